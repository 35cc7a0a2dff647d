"""Multiple choice over program traces: the embedded model's stand-in for GPQA.

A prompt is a program (see ``programs``) and four options, of which one is the goal's value and the others are values of
other lines, so that a guess is right in a quarter of the cases.  The trace is the program's, then the options in their
order, each compared by a difference, ``>`` for no and ``<`` for yes, then the letter::

    <j;T=4-I;e=I+8;I=3;q=j+2;j=T+e;A1B3C4D2;!                       prompt
    j=T+e>T;...;j=1+1=2<?;A1-2=9>B3-2=1>C4-2=2>D2-2=0<#D            trace

No variable is called as an option is.  Who reads only the prompt can do better than a quarter: the goal is never a
line such as ``I=3``, so leaving out the options that are one is right in 30 % of the cases.
"""

import random
import re

from companion.tasks.programs import ANSWER_MARK, DIGITS, LETTERS, PROMPT_END, TRAINING_MIX, Problem, make_problem

OPTIONS = "ABCD"
NAMES = "".join(letter for letter in LETTERS if letter not in OPTIONS)


def make_choice(split: str, seed: int, index: int, variables: tuple[int, int] = TRAINING_MIX) -> Problem:
    """The ``index``-th choice of (split, seed); its answer is a letter.  ValueError as in ``make_problem``."""
    problem = make_problem(split, seed, f"choice/{index}", variables, NAMES)
    rng = random.Random(f"options/{split}/{seed}/{index}")
    others = sorted(set(line_values(problem.prompt)) - {problem.answer})
    wrong = rng.sample(others, min(3, len(others)))
    wrong += rng.sample([digit for digit in DIGITS if digit not in (problem.answer, *wrong)], 3 - len(wrong))
    values = rng.sample([problem.answer, *wrong], 4)
    letter = OPTIONS[values.index(problem.answer)]
    options = [name + value for name, value in zip(OPTIONS, values, strict=True)]
    prompt = "<" + problem.prompt[1:].removesuffix(PROMPT_END) + "".join(options) + ";" + PROMPT_END
    gaps = [(int(value) - int(problem.answer)) % 10 for value in values]
    tried = [f"{option}-{problem.answer}={gap}" for option, gap in zip(options, gaps, strict=True)]
    seen = ">".join(tried[: OPTIONS.index(letter) + 1])
    trace = problem.trace.partition(ANSWER_MARK)[0] + f"{seen}<{ANSWER_MARK}{letter}"
    return Problem(prompt, trace, letter, problem.variables)


def line_values(prompt: str) -> list[str]:
    """The value of every line of a program's prompt."""
    lines = dict(re.findall(r"([a-zA-Z])=([^;]+);", prompt))

    def value(term: str) -> int:
        if term in DIGITS:
            return int(term)
        right = lines[term]
        if len(right) == 1:
            return value(right)
        a, sign, b = right
        return (value(a) + value(b) if sign == "+" else value(a) - value(b)) % 10

    return [str(value(name)) for name in lines]
