"""Compare which positions our TOVA, StreamingLLM and SnapKV keep with NVIDIA's kvpress, on a random model.

kvpress 0.5.5 needs transformers < 5.3, so it runs in an environment of its own:

    python -m venv kvpress-env && kvpress-env/bin/pip install kvpress==0.5.5
    python tests/kvpress/compare.py kvpress-env/bin/python --save data/results/kvpress-agreement.json

``tova`` is compared after every step of decoding (kvpress: DecodingPress with an interval of 1), ``streaming-llm`` and
``snapkv`` after a prompt.  Agreement is |ours & theirs| / budget, the mean over steps, layers and KV heads.

Where kvpress differs by definition: its TOVA never drops the newest token, the paper's may; ``tova-newest-stays`` is
ours with that exception.  ``tova-prefill`` is its press for prompts, by which the last token ranks the whole dense
prompt at once; ours takes a prompt beyond the budget token by token.  ``streaming-llm-steps`` is StreamingLLMPress
after every step: it takes the order of the cache for that of the text, and the top-k that prunes does not keep it.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from companion.provenance import describe
from dms_core.baselines import TOVA, SnapKV, StreamingLLM
from dms_core.baselines.tova import TOVALayer
from dms_core.config import DMSConfig
from dms_core.model import attach

CASE = {"prompt": 20, "total": 100, "cr": 4.0, "window": 8, "kernel": 5, "sinks": 4, "seeds": 2}


class NewestStaysLayer(TOVALayer):
    def _observe(self, weights, count, active) -> None:
        worth = weights.sum((1, 2))[:, None].expand(-1, self.heads, -1)
        self._evict(worth.scatter(2, self.free[..., None], torch.inf), count, active)


class NewestStays(TOVA):
    layer = NewestStaysLayer


def make_model(seed: int):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            initializer_range=0.25,
        )
    ).eval()


@torch.no_grad()
def kept(model, ids: list[int], prompt: int, cache) -> list:
    """Positions after each step from the prompt on: steps, layers, heads.  Found by the keys, which never change."""
    keys = [[] for _ in cache.layers]
    for layer, seen in zip(cache.layers, keys, strict=True):

        def attend(q, k, *rest, seen=seen, plain=layer.attend):
            seen += k[0].unbind(1)
            return plain(q, k, *rest)

        layer.attend = attend
    steps, start = [], 0
    with model.dms.disabled():
        for stop in range(prompt, len(ids) + 1):
            position = torch.arange(start, stop)[None]
            model(torch.tensor([ids[start:stop]]), position_ids=position, past_key_values=cache)
            start = stop
            steps.append([held_positions(*pair) for pair in zip(cache.layers, keys, strict=True)])
    return steps


def held_positions(layer, seen: list) -> list[list[int]]:
    """Per KV head the positions whose keys the layer holds."""
    heads = []
    for h in range(layer.heads):
        slots = torch.arange(layer.capacity - 1)
        live = slots <= layer.held[0] if hasattr(layer, "free") else slots < layer.held[0]
        if hasattr(layer, "free"):
            live[layer.free[0, h]] = False
        same = (torch.stack(seen)[:, h, None] == layer.keys[0, h, :-1][live]).all(-1)  # (tokens, live slots)
        assert (same.sum(0) == 1).all()
        heads.append(same.any(1).nonzero()[:, 0].tolist())
    return heads


def share(ours: list, theirs: list) -> dict:
    """Agreement of two lists of steps."""
    shares = [
        len(set(a) & set(b)) / max(len(a), len(b))
        for step in zip(ours, theirs, strict=True)
        for layer in zip(*step, strict=True)
        for a, b in zip(*layer, strict=True)
    ]
    return {"mean": sum(shares) / len(shares), "least": min(shares), "identical": shares.count(1.0) / len(shares)}


def compare(python: str, seed: int, directory: Path) -> tuple[dict, dict]:
    """Agreement per method for one random model, and versions."""
    total, cr = CASE["total"], CASE["cr"]
    model = make_model(seed)
    model.save_pretrained(directory / "model")
    ids = torch.randint(0, 64, (total,)).tolist()
    case = {**CASE, "ids": ids, "budget": int(total / cr)}
    (directory / "case.json").write_text(json.dumps(case))
    subprocess.run([python, Path(__file__).with_name("run_presses.py"), directory], check=True)
    theirs = json.loads((directory / "kvpress.json").read_text())
    theirs["runs"]["tova-newest-stays"] = theirs["runs"]["tova"]

    attach(model, DMSConfig(window=1))
    prompt, new = CASE["prompt"], total - CASE["prompt"]
    snap = SnapKV(cr, window=CASE["window"], kernel=CASE["kernel"], pool="avg")
    ours = {
        "tova": kept(model, ids, prompt, TOVA(cr)(model, new)),
        "tova-newest-stays": kept(model, ids, prompt, NewestStays(cr)(model, new)),
        "streaming-llm-steps": kept(model, ids, prompt, StreamingLLM(cr, sinks=CASE["sinks"])(model, new)),
        "streaming-llm": kept(model, ids, total, StreamingLLM(cr, sinks=CASE["sinks"])(model, 0)),
        "tova-prefill": kept(model, ids, total, TOVA(cr)(model, 0)),
        "snapkv": kept(model, ids, total, snap(model, 0)),
    }
    # kvpress notes nothing before its first compression, at the first step of decoding
    runs = {
        name: (steps[len(steps) - len(theirs["runs"][name]) :], theirs["runs"][name]) for name, steps in ours.items()
    }
    return {name: share(*pair) for name, pair in runs.items()}, theirs["versions"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="python of an environment with kvpress")
    parser.add_argument("--save", type=Path, help="write the result to this JSON file")
    args = parser.parse_args()
    agreement = {}
    for seed in range(CASE["seeds"]):
        with tempfile.TemporaryDirectory() as directory:
            agreement[seed], versions = compare(args.python, seed, Path(directory))
    result = {"case": CASE, "agreement": agreement, "kvpress_environment": versions, "environment": describe()}
    print(json.dumps(result, indent=1))
    if args.save:
        args.save.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
