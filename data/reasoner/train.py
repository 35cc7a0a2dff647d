"""Train the embedded reasoner from scratch: ``python data/reasoner/train.py`` (33 minutes on one core).

Writes config.json, model.safetensors, tokenizer files, and train_log.jsonl beside this file.
The curriculum goes from short programs to the evaluation mix.  ``--resume`` goes on from state.pt after an
interruption and gives the same weights.
"""

import argparse
import json
import time
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from companion.paths import REASONER
from companion.tasks.programs import SPLITS, Problem, make_problem
from companion.tasks.reasoner import encode_problem, make_model, make_tokenizer
from dms_core.train.optim import make_optimizer

TOKENS_PER_STEP = 8192
PROMPT_WEIGHT = 0.1  # the prompt is mostly random; learning to parse it helps a little
POOL = 8  # batches drawn together and sorted by length, so that padding stays small
CURRICULUM = ((0, (1, 5)), (200, (2, 8)), (600, (2, 14)))  # from this step on: needed variables
RATE = (  # learning rate, piecewise linear; a second wind, since look-ups were still improving at step 1300
    (0, 0.0), (100, 2e-3), (750, 2e-3), (1300, 0.0), (1320, 1.5e-3), (1500, 1.5e-3), (1900, 0.0)
)  # fmt: skip
STEPS = RATE[-1][0]


def stage_range(step: int) -> tuple[int, int]:
    """Needed variables at ``step``."""
    return [sizes for first, sizes in CURRICULUM if step >= first][-1]


def pool_problems(first: int, seed: int) -> list[Problem]:
    """The problems of steps ``first`` .. ``first`` + POOL - 1."""
    sizes = stage_range(first)
    problems, tokens = [], 0
    while tokens < POOL * TOKENS_PER_STEP:
        problems.append(make_problem("train", seed, first * 10_000 + len(problems), sizes))
        tokens += len(problems[-1].prompt) + len(problems[-1].trace) + 1
    return problems


def batches(tokenizer, seed: int, start: int):
    """(ids, weights), both (B, T), from step ``start`` on; a pure function of seed and step."""
    for first in range(start - start % POOL, STEPS, POOL):
        pool = [encode_problem(tokenizer, problem) for problem in pool_problems(first, seed)]
        pool.sort(key=lambda item: len(item[0]))
        ends = list(accumulate(len(ids) for ids, _ in pool))
        inner = [bisect_left(ends, part * ends[-1] / POOL) + 1 for part in range(1, POOL)]
        cuts = [0, *inner, len(pool)]  # parts of equal tokens
        order = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed + first)).tolist()
        for offset, part in enumerate(order):
            if start <= first + offset < STEPS:
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


def learning_rate(step: int) -> float:
    return float(np.interp(step + 1, *zip(*RATE, strict=True)))


def overlap(seed: int) -> dict:
    """How many of the first 2000 prompts of every other split occur among all training prompts."""
    held_out = {make_problem(split, 0, i).prompt for split in SPLITS if split != "train" for i in range(2000)}
    seen, programs = 0, 0
    for first in tqdm(range(0, STEPS, POOL), desc="training prompts"):
        prompts = {problem.prompt for problem in pool_problems(first, seed)}
        seen, programs = seen + len(prompts & held_out), programs + len(prompts)
    return {"training_programs": programs, "held_out_prompts": len(held_out), "in_training": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REASONER)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--check", action="store_true", help="only count evaluation prompts in the training stream")
    args = parser.parse_args()
    if args.check:
        print(json.dumps(overlap(args.seed)))
        return

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), args.seed)
    optimizer = make_optimizer(list(model.named_parameters()), "muon", learning_rate(0), weight_decay=0.1)
    state_file, log_file = args.out / "state.pt", args.out / "train_log.jsonl"
    start, tokens, spent = 0, 0, 0.0
    if args.resume:
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, tokens, spent = state["step"], state["tokens"], state["seconds"]
        kept = [line for line in log_file.read_text().splitlines() if json.loads(line)["step"] < start]
        log_file.write_text("".join(line + "\n" for line in kept))
    elif log_file.exists():
        log_file.unlink()
    began = time.time() - spent
    steps = tqdm(batches(tokenizer, args.seed, start), initial=start, total=STEPS, mininterval=5)
    for step, (ids, weights) in enumerate(steps, start):
        rate = learning_rate(step)
        logits = model(input_ids=ids[:, :-1]).logits
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        tokens += int((weights > 0).sum())
        if step % 50 == 0:
            trace = weights[:, 1:].flatten() == 1
            row = {"step": step, "loss": round(loss.item(), 5), "trace_loss": round(losses[trace].mean().item(), 5),
                   "lr": round(rate, 6), "tokens": tokens, "seconds": round(time.time() - began, 1)}  # fmt: skip
            with log_file.open("a") as log:
                log.write(json.dumps(row) + "\n")
        if (step + 1) % 250 == 0 or step + 1 == STEPS:
            model.save_pretrained(args.out)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "tokens": tokens, "seconds": time.time() - began}, state_file)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
