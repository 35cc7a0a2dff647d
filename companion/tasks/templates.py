"""Prompt templates of the evaluation protocols, quoted: they are data, part of what an accuracy means.

MATH and MULTIPLE_CHOICE: huggingface/open-r1, ``src/open_r1/evaluate.py`` (Apache-2.0), as in huggingface/lighteval,
``default_prompts.py``; MULTIPLE_CHOICE there after openai/simple-evals, ``common.py``.
CODE_*: LiveCodeBench/LiveCodeBench, ``lcb_runner/prompts/code_generation.py`` (MIT), style DeepSeekR1.  The system
message stands there between the hard-coded tokens ``<｜begin▁of▁sentence｜>`` and ``<｜User｜>``; the chat template of
the DeepSeek-R1 family puts a system message in that place, and another family's template puts it where that family
expects one.
TAGGED: the ``default`` system prompt of the PyPI package reasoning-gym, ``utils.py`` (Apache-2.0).
"""

import re

MATH = (
    "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step before "
    "answering.\n\n<QUESTION>"
)

MULTIPLE_CHOICE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n<QUESTION>"
    "\n\nA) <A>\nB) <B>\nC) <C>\nD) <D>"
)

CODE_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>."
)
CODE = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests.\n\nQuestion: <QUESTION>\n\n<FORMAT>"
)
CODE_FUNCTION = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters.\n```python\n<STARTER>\n```\n\n"
)
CODE_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n"
)

TAGGED_SYSTEM = (
    "Given a problem, your task is to answer the question by thinking step-by-step in a clear and specific manner.\n"
    "Once you have thought about the reasoning process, provide the answer in the following format:\n"
    "<answer>answer here</answer>\n"
    "Do not explain your reasoning inside the answer tags, provide only the final answer. When an example is provided, "
    "you should strictly follow the format of the output/answer in that example.\n"
)


def fill(template: str, **values: str) -> str:
    """The template with every ``<NAME>`` of ``values`` replaced, in one pass: what is filled in is never looked at."""
    return re.sub(r"<([A-Z]+)>", lambda match: values.get(match[1], match[0]), template)
