"""Program traces as training documents for the retrofit."""

import random

from torch.utils.data import Dataset

from dms_core.tasks.programs import EVALUATION_MIX, make_problem
from dms_core.tasks.reasoner import encode_problem


class TraceDataset(Dataset):
    """``size`` correct traces of one split; labels cover the trace, not the prompt.

    Every run of ``group`` documents has one number of needed variables, drawn from the evaluation mix: taken in
    order, a batch of that size pads little.
    """

    def __init__(self, tokenizer, size: int, group: int, split: str = "retrofit", seed: int = 0) -> None:
        self.tokenizer, self.size, self.group, self.split, self.seed = tokenizer, size, group, split, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        variables = random.Random(f"size/{self.seed}/{index // self.group}").randint(*EVALUATION_MIX)
        problem = make_problem(self.split, self.seed, index, (variables, variables))
        ids, prompt = encode_problem(self.tokenizer, problem)
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}
