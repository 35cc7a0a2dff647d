"""Training documents of the embedded model's three tasks: program traces, multiple choice and digit puzzles."""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from torch.utils.data import Dataset

from companion.tasks.choices import make_choice
from companion.tasks.programs import TRAINING_MIX, Problem, make_problem
from companion.tasks.puzzles import Puzzle, make_puzzle
from companion.tasks.reasoner import encode_problem

LONGEST = 900  # characters of a puzzle's trace; the rest of the context is its prompt's
POOL = 8  # batches whose documents are sorted by length together
SHORT = (1, 4)  # needed variables of every other choice in training: its options are not lost in a long trace
RETROFIT_MIX = (4, 24)  # needed variables, inclusive, of a retrofit's documents: as long as what is evaluated
TURNS = ("traces", "choice", "traces", "choice", "search")  # of a retrofit's documents; a puzzle is the longest

Document = Problem | Puzzle


def _choice(split: str, seed: int, index: int, mix: tuple[int, int]) -> Problem:
    return make_choice(split, seed, index, SHORT if index % 2 else mix)


MAKERS: dict[str, Callable[[str, int, int, tuple[int, int]], Document]] = {  # the last: needed variables, from and to
    "traces": make_problem,
    "choice": _choice,
    "search": lambda split, seed, index, mix: make_puzzle(split, seed, index, LONGEST),
}


def size_of(document: Document) -> int:
    """Tokens of a document, its end included: one a character."""
    return len(document.prompt) + len(document.trace) + 1


def documents(split: str, seed: int, first: int, tokens: int, shares: dict[str, float]) -> list[Document]:
    """Documents from the ``first``-th of each task on, until each task has its share of ``tokens``."""
    found = []
    for task, share in shares.items():
        index, held = first, 0
        while held < tokens * share:
            found.append(MAKERS[task](split, seed, index, TRAINING_MIX))
            held, index = held + size_of(found[-1]), index + 1
    return found


class TraceDataset(Dataset):
    """``size`` correct traces of one split, the tasks in turns; labels cover the trace, not the prompt.

    Every run of ``group`` documents is of like length: taken in order, a batch of that size pads little.
    """

    def __init__(
        self,
        tokenizer,
        size: int,
        group: int,
        split: str = "retrofit",
        seed: int = 0,
        tasks: Sequence[str] = TURNS,
    ) -> None:
        if size < 1 or group < 1:
            raise ValueError(f"size {size}, group {group}: both must be >= 1")
        if not tasks or set(tasks) - set(MAKERS):
            raise ValueError(f"tasks {list(tasks)}: must be among {', '.join(MAKERS)}")
        self.tokenizer, self.size, self.group, self.split, self.seed = tokenizer, size, group, split, seed
        self.tasks, self._pool = tuple(tasks), lru_cache(maxsize=2)(self._make_pool)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        pool, place = divmod(index, POOL * self.group)
        ids, prompt = encode_problem(self.tokenizer, self._pool(pool)[place])
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}

    def _make_pool(self, number: int) -> list[Document]:
        """Documents of POOL batches: sorted by length, cut into batches, the batches shuffled."""
        first, tasks = number * POOL * self.group, self.tasks
        numbers = range(first, first + POOL * self.group)
        found = [MAKERS[tasks[i % len(tasks)]](self.split, self.seed, i, RETROFIT_MIX) for i in numbers]
        found.sort(key=size_of)
        batches = [found[start : start + self.group] for start in range(0, len(found), self.group)]
        random.Random(f"batches/{self.seed}/{number}").shuffle(batches)
        return [document for batch in batches for document in batch]
