"""One row of each benchmark's schema; what the texts say is made up."""

import json

CASES = json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}])
AIME = {"id": 60, "problem": "What is $1 + 1$?", "solution": "2", "answer": "033", "url": "", "year": "2024"}
HMMT = {
    "problem_idx": 7,
    "problem": "Halve $\\sqrt{2}$.",
    "answer": "\\frac{\\sqrt{2}}{2}",
    "problem_type": ["Algebra"],
}
ROWS = {
    "aime24": AIME,
    "aime25": AIME | {"id": "1", "answer": 70},
    "aime26": {"problem_idx": 1, "problem": "What is $1 + 2$?", "answer": 3},
    "hmmt_feb25": HMMT,
    "hmmt_nov25": HMMT,
    "hmmt_feb26": HMMT,
    "math500": {"problem": "?", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 2, "unique_id": "t/1.json"},
    "gpqa_diamond": {
        "Record ID": "rec1",
        "Question": "A made-up question?",
        "Correct Answer": "yes",
        "Incorrect Answer 1": "no",
        "Incorrect Answer 2": "perhaps",
        "Incorrect Answer 3": "never",
        "Canary String": "",
    },
    "livecodebench": {
        "question_title": "Sum",
        "question_content": "Add {two} <QUESTION> numbers.",
        "platform": "atcoder",
        "question_id": "abc1",
        "contest_id": "abc",
        "contest_date": "2024-08-01T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": CASES,
        "private_test_cases": "[]",
        "metadata": "{}",
    },
    "traces": {"prompt": "?j;j=3;!", "answer": "3", "variables": 1},
}
