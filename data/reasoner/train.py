"""Train the embedded reasoner from scratch: ``python data/reasoner/train.py`` (about an hour on one core).

Writes config.json, model.safetensors, tokenizer files, and train_log.jsonl beside this file.
Two stages, each with an optimizer of its own: program traces, from short ones to the evaluation mix, then all three
tasks.  ``--size large --out data/reasoner-large`` trains the one four times larger, on the same documents, and stores
it in 16 bits.  ``--resume`` goes on from state.pt after an interruption and gives the same weights.
"""

import argparse
import json
import time
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from companion.experiments.profiles import PROBLEMS_SEED
from companion.paths import REASONER
from companion.tasks import get_task
from companion.tasks.embedded import EMBEDDED
from companion.tasks.mixture import MAKERS, RETROFIT_MIX, TURNS, Document, documents, size_of
from companion.tasks.programs import make_problem
from companion.tasks.reasoner import encode_problem, make_model, make_tokenizer
from dms_core.train.optim import make_optimizer
from dms_core.train.recipe import load_recipe

TOKENS_PER_STEP = 8192
PROMPT_WEIGHT = 0.1  # the prompt is mostly random; learning to parse it helps a little
POOL = 8  # batches drawn together and sorted by length, so that padding stays small
CURRICULUM = ((0, (1, 5)), (200, (2, 8)), (600, (2, 14)))  # from this step on: needed variables
SHARES = {"traces": 0.3, "choice": 0.3, "search": 0.4}  # of the second stage's tokens


@dataclass(frozen=True)
class Stage:
    """Steps at a learning rate that is piecewise linear in the step."""

    name: str
    rate: tuple[tuple[int, float], ...]

    @property
    def steps(self) -> int:
        return self.rate[-1][0]

    def learning_rate(self, step: int) -> float:
        return float(np.interp(step + 1, *zip(*self.rate, strict=True)))

    def pool(self, first: int, seed: int) -> list[Document]:
        """The documents of steps ``first`` .. ``first`` + POOL - 1."""
        if self.name != "traces":
            return documents("train", seed + 1, first * 10_000, POOL * TOKENS_PER_STEP, SHARES)
        found, tokens = [], 0
        sizes = [sizes for start, sizes in CURRICULUM if first >= start][-1]
        while tokens < POOL * TOKENS_PER_STEP:
            found.append(make_problem("train", seed, first * 10_000 + len(found), sizes))
            tokens += size_of(found[-1])
        return found


@dataclass(frozen=True)
class Size:
    """A model's width, and its stages.

    halved: its finished weights are stored in fp16, and loaded in the float32 that config.json says.
    """

    width: int
    stages: tuple[Stage, ...]
    halved: bool = False


SIZES = {
    "small": Size(
        128,
        (  # the first with a second wind, since look-ups were still improving at step 1300
            Stage(
                "traces", ((0, 0.0), (100, 2e-3), (750, 2e-3), (1300, 0.0), (1320, 1.5e-3), (1500, 1.5e-3), (1900, 0.0))
            ),
            Stage("mixture", ((0, 0.0), (50, 1.5e-3), (700, 1.5e-3), (1400, 0.0))),
        ),
    ),
    "large": Size(
        256,
        (
            Stage("traces", ((0, 0.0), (100, 1.5e-3), (500, 1.5e-3), (800, 0.0))),
            Stage("mixture", ((0, 0.0), (50, 1.5e-3), (1200, 1.5e-3), (2000, 0.0))),
        ),
        halved=True,
    ),
}


def batches(tokenizer, stage: Stage, seed: int, start: int):
    """(ids, weights), both (B, T), from step ``start`` on; a pure function of stage, seed and step."""
    for first in range(start - start % POOL, stage.steps, POOL):
        pool = [encode_problem(tokenizer, document) for document in stage.pool(first, seed)]
        pool.sort(key=lambda item: len(item[0]))
        ends = list(accumulate(len(ids) for ids, _ in pool))
        inner = [bisect_left(ends, part * ends[-1] / POOL) + 1 for part in range(1, POOL)]
        cuts = [0, *inner, len(pool)]  # parts of equal tokens
        order = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed + first)).tolist()
        for offset, part in enumerate(order):
            if start <= first + offset < stage.steps:
                yield collate(pool[cuts[part] : cuts[part + 1]])


def collate(items) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    weights = torch.zeros(len(items), width)
    for row, (tokens, prompt) in enumerate(items):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, :prompt] = PROMPT_WEIGHT
        weights[row, prompt : len(tokens)] = 1.0
    return ids, weights


def overlap(seed: int, size: str = "small", problems: int = 2000, retrofits: int = 3) -> dict:
    """Which of the first ``problems`` of each task, split and seed that are evaluated occur among all training prompts.

    Beside them: which occur among the documents of the first ``retrofits`` seeds of recipe ``reasoner``.
    """
    evaluated = [(split, of) for split in ("validation", "test") for of in (0, PROBLEMS_SEED)]
    held_out = {
        problem.question: f"{name} {problem.id}"
        for name in EMBEDDED
        for split, of in evaluated
        for problem in get_task(name, size=problems, split=split, seed=of).problems
    }
    facts = {"held_out_prompts": len(held_out), "training_prompts": 0, "retrofit_prompts": 0}
    met = {"in_training": set(), "in_retrofits": set()}
    for stage in SIZES[size].stages:
        for first in tqdm(range(0, stage.steps, POOL), desc=f"training prompts, {stage.name}"):
            prompts = {document.prompt for document in stage.pool(first, seed)}
            facts["training_prompts"] += len(prompts)
            met["in_training"] |= prompts & held_out.keys()
    recipe = load_recipe("reasoner").retrofit
    for of in range(retrofits):
        for i in tqdm(range(recipe.steps * recipe.batch), desc=f"prompts of retrofit {of}"):
            prompt = MAKERS[TURNS[i % len(TURNS)]]("retrofit", of, i, RETROFIT_MIX).prompt
            facts["retrofit_prompts"] += 1
            met["in_retrofits"] |= {prompt} & held_out.keys()
    return facts | {name: sorted(held_out[prompt] for prompt in prompts) for name, prompts in met.items()}


class Training:
    """A run in a directory: what is trained, how far it is, and what it writes."""

    def __init__(self, out: Path, seed: int, resume: bool, size: str = "small") -> None:
        self.out, self.seed, self.tokenizer, self.size = out, seed, make_tokenizer(), SIZES[size]
        self.model = make_model(len(self.tokenizer), seed, self.size.width)
        self.state_file, self.log_file = out / "state.pt", out / "train_log.jsonl"
        self.weights_file = out / "model.safetensors"
        self.facts = {"stage": 0, "step": 0, "tokens": 0, "seconds": 0.0}
        state = torch.load(self.state_file, weights_only=True) if resume else {"model": None, "optimizer": None}
        self.saved_optimizer = state["optimizer"]
        kept = []
        if resume:
            self.model.load_state_dict(state["model"])
            self.facts = {name: state[name] for name in self.facts}
            rows = [json.loads(line) for line in self.log_file.read_text().splitlines()]
            names = [stage.name for stage in self.size.stages]
            at = (self.facts["stage"], self.facts["step"])
            kept = [row for row in rows if (names.index(row["stage"]), row["step"]) < at]
        self.log_file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def run(self) -> None:
        for number in range(self.facts["stage"], len(self.size.stages)):
            self._stage(number)
        self.tokenizer.save_pretrained(self.out)
        if self.size.halved:
            weights = {name: weight.half() for name, weight in load_file(self.weights_file).items()}
            save_file(weights, self.weights_file, metadata={"format": "pt"})

    def _stage(self, number: int) -> None:
        stage, start = self.size.stages[number], self.facts["step"]
        optimizer = make_optimizer(list(self.model.named_parameters()), "muon", 0.0, weight_decay=0.1)
        if self.saved_optimizer:
            optimizer.load_state_dict(self.saved_optimizer)
        began, tokens = time.time() - self.facts["seconds"], self.facts["tokens"]
        steps = batches(self.tokenizer, stage, self.seed, start)
        for step, batch in enumerate(tqdm(steps, stage.name, stage.steps, initial=start, mininterval=5), start):
            rate = stage.learning_rate(step)
            losses = self._step(optimizer, rate, *batch)
            tokens += int((batch[1] > 0).sum())
            seconds = round(time.time() - began, 1)
            if step % 50 == 0:
                row = {"stage": stage.name, "step": step, **losses, "lr": round(rate, 6)}
                with self.log_file.open("a") as log:
                    log.write(json.dumps(row | {"tokens": tokens, "seconds": seconds}) + "\n")
            if (step + 1) % 100 == 0 or step + 1 == stage.steps:
                last = step + 1 == stage.steps
                self.facts = {"stage": number + last, "step": 0 if last else step + 1}
                self.facts |= {"tokens": tokens, "seconds": seconds}
                self._save(None if last else optimizer.state_dict())
        self.saved_optimizer = None

    def _step(self, optimizer, rate: float, ids: torch.Tensor, weights: torch.Tensor) -> dict:
        logits = self.model(input_ids=ids[:, :-1]).logits
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        trace = losses[weights[:, 1:].flatten() == 1].mean()
        return {"loss": round(loss.item(), 5), "trace_loss": round(trace.item(), 5)}

    def _save(self, optimizer: dict | None) -> None:
        self.model.save_pretrained(self.out)
        torch.save({"model": self.model.state_dict(), "optimizer": optimizer, **self.facts}, self.state_file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, default=REASONER)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--check", action="store_true", help="only list evaluated prompts that are trained on")
    args = parser.parse_args()
    if args.check:
        print(json.dumps(overlap(args.seed, args.size)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    Training(args.out, args.seed, args.resume, args.size).run()


if __name__ == "__main__":
    main()
