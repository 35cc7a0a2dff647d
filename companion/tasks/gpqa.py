"""GPQA Diamond: 198 multiple-choice questions; gated, and its authors ask that no text of it be published.

So nothing of it is bundled and records hold letters only: what a chain wrote may quote the question.
"""

import random
import re
from collections.abc import Iterator

from companion.tasks.base import Task, TaskProblem
from companion.tasks.source import HubData, Source, read_rows
from companion.tasks.templates import fill

CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
FIELDS = dict.fromkeys(("Record ID", "Question", *CHOICES), str)
LETTERS = "ABCD"
# Between "answer:" and the letter: marks and styles of Markdown, HTML and LaTeX, brackets, quotes, "option".
OPENING = r"""(?:[\s*_$"'`\u2018\u201c([{<]|<\w+>|\\[(\[]
    |\\(?:boxed|fbox|text\w*|math\w+|bf|rm|bm|boldsymbol|underline)\b|(?i:(?:the\s+)?(?:correct\s+)?(?:option|choice|letter|answer)\b:?)){0,30}"""
# After a letter that is none: a longer word (also D-glucose, B's), a formula (D = 3, C_{2v}), a list (A or B).
NAME = r"""[A-Za-z0-9]|[-\u2010-\u2013][A-Za-z0-9]|\)[-\u2010-\u2013][a-z]|['\u2019]s\b|_[{A-Za-z0-9\\]
    |\s*[=^\u2192\u21cc]|\s*->|(?!\s*</?[A-Za-z]{2,}>)\s*[<>+/&]\s*[\w\\]|\s*\\(?!text|q?quad)[A-Za-z]|\s*:\s*[A-D](?![A-Za-z])
    |[)\s]+(?:or|and)\s+(?:option\s+)?\(?[A-Da-d](?![A-Za-z])(?!\)?\s+(?:is|was)\b)"""
# What may follow on its line where "A" is no article, and "B" no part of a name such as "B lymphocyte".
LINK = r"""(?:and|as|at|based|because|but|due|for|from|given|here|i|indeed|instead|is|not|of|on|or|rather|since|so
    |that|then|though|thus|too|with|which|while|where|when|after|by|again|overall|over|only)\b"""
BE = r"(?:is|are|was|be|becomes)\b(?:\s+(?:therefore|thus|then|hence|clearly|simply|likely))?,?\s*:?"
ANSWER = re.compile(
    rf"""(?:
      (?<![A-Za-z])(?i:answer(?:\s+(?:option|choice|letter))?|(?:correct|right|best|final)\s+(?:option|choice|letter|one))[*_"'}}\])]*\s*
        (?:,\s*(?:therefore|then|thus|hence),\s*)?
        (?:(?P<mark>[:\uff1a=>]|\u2192)|(?:(?i:would|must|should|will|has\s+to|can\s+only|ought\s+to)\s+)?(?i:{BE}))
      |^[#*_ \t]*(?:(?i:final|correct)\s+)?(?i:answer)[*_]*[^\S\n]*\n
      |\u7b54\u6848[*]*\s*(?:[:\uff1a]|\u662f|\u4e3a)
      |\\f?box(?:ed)?\s*\{{
    ){OPENING}
    (?:(?P<upper>[A-D])(?!{NAME})(?!(?<=A)[^\S\n]+(?!(?i:{LINK}))[A-Za-z])(?(mark)|(?![^\S\n]+(?!(?i:{LINK}))[a-z]))
      |(?P<lower>[a-d])(?!{NAME})(?![^\S\n]+\w))""",
    re.VERBOSE | re.MULTILINE,
)


class GPQADiamond(Task):
    """Options in the order that ``seed`` draws for each question; ``order`` in the records says which came first."""

    name = "gpqa_diamond"
    version = 2
    keeps_text = False
    data = HubData("Idavidrein/gpqa", FIELDS, config="gpqa_diamond", gated=True)

    def __init__(self, source: Source = None, seed: int = 0) -> None:
        self.seed = seed
        self.problems = [self._problem(row) for row in read_rows(self.data, source)]

    def _problem(self, row: dict) -> TaskProblem:
        order = random.Random(f"gpqa/{self.seed}/{row['Record ID']}").sample(range(4), 4)
        options = {letter: row[CHOICES[i]].strip() for letter, i in zip(LETTERS, order, strict=True)}
        question = fill("MULTIPLE_CHOICE", QUESTION=row["Question"].strip(), **options)
        return TaskProblem(row["Record ID"], question, LETTERS[order.index(0)], {"order": order, "shuffle": self.seed})

    def candidates(self, text: str) -> Iterator[tuple[int, str]]:
        """Letters after "answer:", "the correct option is" and their like or in a box, as models write them."""
        return ((match.end(), (match["upper"] or match["lower"]).upper()) for match in ANSWER.finditer(text))
