"""Conversations that ask for what was said before, and what a compressed cache remembers of them."""

import sys
from pathlib import Path

from companion.cli.app import Device, at_least_one, command, opt
from companion.paths import RESULTS
from dms_core.storage import read_jsonl, write_json, write_jsonl


@command("Retrofit", "compose")
def compose(
    model: opt(str, "whose tokenizer counts: a directory or a hub id"),
    exchanges: opt(list[Path], "answered conversations from dms converse", metavar="FILE..."),
    out: opt(Path, "a JSONL file", metavar="FILE"),
    split: opt(str, "train, validation, or test, which has kinds of its own and asks at the end") = "train",
    count: opt(int, "conversations") = 900,
    tokens: opt(list[int], "lengths; training draws between the first and the last", metavar="N...") = (
        512,
        1024,
        1536,
    ),
    avoid: opt(list[Path], "conversations with which nothing may be shared", metavar="FILE...") = (),
    seed: int = 1,
):
    """conversations in which later turns ask about earlier ones, composed of answered questions"""
    at_least_one(count=count, tokens=min(tokens))
    import random

    from companion.experiments.sample import load_tokenizer
    from companion.tasks import memory
    from dms_core.hub_files import local_directory

    tokenizer, late = load_tokenizer(local_directory(model)), split != "train"
    others = [row for file in avoid for row in read_jsonl(file)]
    pool = memory.exchanges_of([row for file in exchanges for row in read_jsonl(file)], others)
    rng = random.Random(f"lengths/{split}/{seed}")
    lengths = [tokens[i % len(tokens)] if late else rng.randint(min(tokens), max(tokens)) for i in range(count)]

    def size(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = [memory.compose(pool, split, seed, i, length, size, late) for i, length in enumerate(lengths)]
    if twice := memory.shared(rows, others):
        raise ValueError(f"--avoid: {len(twice)} prompts are in both, such as {twice[0][:80]!r}")
    write_jsonl(out, rows)
    facts = {"documents": len(rows), "exchanges": len(pool), "questions": sum(len(row["asked"]) for row in rows)}
    yield "{documents} conversations of {exchanges} exchanges; {questions} questions about what was said".format(
        **facts
    )
    return facts


LINE = (
    "{method} CR {cr:g} (live {cr_live:.2f}): needles {needles}, hops {hops}, copies {copies}, "
    "agreement {agreement}, KL {kl}; far-dependent {far_agreement}, {far_kl}"
)


@command("Measure", "recall")
def recall(
    model: opt(str, "the dense model: a directory or a hub id"),
    retrofits: opt(list[Path], "gates or whole checkpoints; controls get the last one's memory", metavar="DIR..."),
    data: opt(Path, "conversations from dms compose --split test", metavar="FILE"),
    out: opt(Path, "records; an interrupted study goes on from there", metavar="DIR"),
    controls: opt(list[str], "methods, or all, or none", metavar="NAME...") = ("all",),
    up_to: opt(int, "controls on texts of about this many tokens at most (default: on all)") = None,
    topics: opt(int, "texts of Python's language reference beside them") = 8,
    batch: opt(int, "texts run together") = 16,
    device: Device = None,
    save: opt(str, "default: data/results/recall.json", metavar="[FILE]") = None,
):
    """what a compressed cache remembers: needles, hops, far-dependent tokens, prose"""
    at_least_one(batch=batch, up_to=up_to)
    from companion.experiments import recall as passes
    from companion.experiments import recall_study as study
    from companion.experiments.sample import load_tokenizer
    from companion.provenance import describe
    from dms_core.checkpoint import fingerprint
    from dms_core.hub_files import local_directory

    names = {"all": list(passes.CONTROLS), "none": []}.get(" ".join(controls), list(controls))
    if unknown := sorted(set(names) - set(passes.CONTROLS)):
        raise ValueError(f"--controls {' '.join(unknown)}: must be all, none, or of {', '.join(passes.CONTROLS)}")
    directory = local_directory(model)
    tokenizer = load_tokenizer(directory)
    documents = [passes.conversation(tokenizer, row) for row in read_jsonl(data)]
    longest = max(len(document.ids) for document in documents)
    documents += [passes.prose(tokenizer, text, longest) for text in passes.topics(topics)]
    methods = study.open_methods(model, retrofits, names, out, device)
    found = study.measure(methods, documents, out, batch, {"model": fingerprint(directory)}, up_to)
    result = study.summaries(found) | {"topics": topics, "environment": describe()}
    if save is not None:
        write_json(save or RESULTS / "recall.json", result)
        print(f"saved {save or RESULTS / 'recall.json'}", file=sys.stderr)
    for part in filter(None, (result, result["common"])):
        yield "{documents} texts, {questions} questions:".format(**part)
        for row in part["rows"]:
            said = {name: _said(**spread) for name, spread in row["measures"].items()}
            yield LINE.format_map(_Missing({**row, **said}))
    return result


class _Missing(dict):
    def __missing__(self, name: str) -> str:
        return "none"


def _said(value: float | None, low: float | None, high: float | None) -> str:
    return "none" if value is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
