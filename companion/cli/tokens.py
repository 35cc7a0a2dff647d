"""``dms tokens``: which tokens of held-out conversations a retrofit keeps, for the book to show without the model."""

import json
from pathlib import Path

from companion.paths import DATA, RESULTS

SAVED = RESULTS / "smollm2-tokens.json"

HELP = """\
  dms tokens --json        {"cr", "index", "example": {"tokens": [text], "special": bits, "layers", "heads", "window",
                           "cr_decisions", "kept": [bits of each (layer, KV head)]}, "summary": {"documents", "tokens",
                           "retention": (layers, KV heads), "kinds": {kind: {"tokens", "retention"}}}, "environment"}
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    command = add("tokens", run_tokens, "which tokens of held-out conversations stay in the cache, and of what kind")
    command.add_argument("--model", required=True, help="the dense model: a directory or a hub id")
    command.add_argument("--gates", type=Path, required=True, help="a checkpoint of its retrofit")
    command.add_argument("--data", type=Path, required=True, help="held-out conversations from dms converse")
    command.add_argument("--index", type=int, default=0, help="the conversation that is shown")
    command.add_argument("--limit", type=int, default=400, help="tokens of it that are shown")
    command.add_argument("--documents", type=int, default=4, help="conversations, whole, that are summarised")
    command.add_argument("--save", nargs="?", const=SAVED, type=Path, help=f"default: {SAVED.relative_to(DATA.parent)}")


def run_tokens(args) -> dict:
    conversations = [json.loads(line)["messages"] for line in args.data.read_text().splitlines()]
    if not 0 <= args.index < len(conversations):
        raise ValueError(f"--index {args.index}: {args.data} has conversations 0 to {len(conversations) - 1}")
    for name in ("limit", "documents"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be >= 1")
    result = _measure(args, conversations)
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps(result) + "\n")
    if not args.json:
        print(
            "{documents} documents, {tokens} tokens; of each kind, the share that is kept:".format(**result["summary"])
        )
        for kind, facts in result["summary"]["kinds"].items():
            print(f"{kind:12} {facts['tokens']:6} tokens {100 * facts['retention']:5.1f} %")
    return result


def _measure(args, conversations: list) -> dict:
    import sys

    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from companion.figures.tokens import example, summary
    from companion.provenance import describe
    from dms_core.checkpoint import load_base, load_gates, read_settings

    model = load_gates(load_base(args.model, dtype=torch.bfloat16), args.gates)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    whole = [
        example(model, tokenizer, messages, sys.maxsize)
        for messages in tqdm(conversations[: args.documents], desc="conversations")
    ]
    return {
        "cr": read_settings(args.gates)["cr"], "index": args.index,
        "example": example(model, tokenizer, conversations[args.index], args.limit),
        "summary": summary(whole), "environment": describe(),
    }  # fmt: skip
