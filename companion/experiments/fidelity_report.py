"""``dms fidelity``: a retrofit of a real model, and training-free methods, beside the dense model."""

from collections.abc import Sequence

from companion.cost.decode_speed import decode_speed
from companion.experiments.fidelity import answer, compare, make_prompts, own_cache
from dms_core.baselines import get_baseline
from dms_core.checkpoint import load_gates, read_settings
from dms_core.config import DMSConfig
from dms_core.model import attach, detach

BASELINES = ("tova", "streaming-llm")


def report(
    model, tokenizer, checkpoints: Sequence, conversations: Sequence, tokens: int, longest: int, batch: int = 4,
    baselines: Sequence[str] = BASELINES,
) -> dict:  # fmt: skip
    """Rows of ``fidelity.compare`` for the gates in ``checkpoints``, and at the last one's ratio for the baselines.

    Their budget of items a KV head is (context + tokens) / CR.
    """
    prompts, eos = make_prompts(tokenizer, conversations, longest), tokenizer.eos_token_id
    longest_few = sorted([[*p.context, *p.question] for p in prompts], key=len)[-2 * batch :]
    plain = decode_speed(model, longest_few, tokenizer.pad_token_id)
    attach(model, DMSConfig())
    with model.dms.disabled():
        dense = answer(model, tokenizer, prompts, own_cache, tokens, batch=batch, label="dense")
        rows = [{"method": "vanilla", "cr": 1.0} | compare(dense, dense, eos)]
    detach(model)
    ratios = [float(read_settings(directory)["cr"]) for directory in checkpoints]
    for cr, directory in zip(ratios, checkpoints, strict=True):
        load_gates(model, directory)
        mine = answer(model, tokenizer, prompts, own_cache, tokens, dense.tokens, batch, f"DMS CR {cr:g}")
        rows.append({"method": "dms", "cr": cr} | compare(mine, dense, eos))
        detach(model)
    attach(model, DMSConfig())
    for name in baselines:
        method = get_baseline(name)(ratios[-1])

        def make_cache(model, method=method):
            return method(model, tokens)

        with model.dms.disabled():
            theirs = answer(model, tokenizer, prompts, make_cache, tokens, dense.tokens, batch, name)
        rows.append({"method": name, "cr": ratios[-1]} | compare(theirs, dense, eos))
    detach(model)
    lengths = [len(p.context) + len(p.question) for p in prompts]
    return {
        "prompts": len(prompts), "prompt_tokens": [min(lengths), max(lengths)], "continuation": tokens, "rows": rows,
        "plain": {"rows": len(longest_few), **plain},
    }  # fmt: skip
