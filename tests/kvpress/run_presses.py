"""Which positions kvpress keeps: run by compare.py with the python of an environment that has kvpress.

Reads model/ and case.json in the directory given, writes kvpress.json there.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import DecodingPress, SnapKVPress, StreamingLLMPress, TOVAPress
from transformers import AutoModelForCausalLM, DynamicCache


def recording(press):
    """The press, noting in ``press.kept[layer]`` (H, n) the positions of what it keeps."""
    base = type(press)

    class Recorder(base):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            before, layer = keys.shape[2], module.layer_idx
            last = int(kwargs["cache_position"][-1])
            old = self.kept.get(layer, torch.zeros(keys.shape[1], 0, dtype=torch.long))
            new = torch.arange(last + 1 - (before - old.shape[1]), last + 1).expand(keys.shape[1], -1)
            scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
            keys, values = super().compress(module, hidden_states, keys, values, attentions, kwargs)
            chosen = scores[0].topk(keys.shape[2], dim=-1).indices if keys.shape[2] < before else slice(None)
            held = torch.cat([old, new], 1)
            self.kept[layer] = held.gather(1, chosen) if keys.shape[2] < before else held
            return keys, values

    press.__class__ = Recorder
    press.kept = {}
    return press


@torch.no_grad()
def kept(model, ids: list[int], prompt: int, press, wrap) -> list:
    """Positions after each step from the prompt on: steps, layers, heads."""
    cache, steps, start = DynamicCache(), [], 0
    with wrap(press)(model):
        for stop in range(prompt, len(ids) + 1):
            position = torch.arange(start, stop)
            model(
                torch.tensor([ids[start:stop]]),
                past_key_values=cache,
                position_ids=position[None],
                cache_position=position,
            )
            start = stop
            if press.kept:  # not before the first step of decoding
                steps.append([press.kept[layer].sort().values.tolist() for layer in sorted(press.kept)])
    return steps


def main(directory: Path) -> None:
    case = json.loads((directory / "case.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    ids, prompt, cut = case["ids"], case["prompt"], 1 - 1 / case["cr"]

    def decoding(press):
        return DecodingPress(press, compression_interval=1, target_size=case["budget"], hidden_states_buffer_size=1)

    snap = {"window_size": case["window"], "kernel_size": case["kernel"]}
    runs = {  # the key of a run names ours of the same name in compare.py
        "tova": kept(model, ids, prompt, recording(TOVAPress()), decoding),
        "streaming-llm-steps": kept(model, ids, prompt, recording(StreamingLLMPress(n_sink=case["sinks"])), decoding),
        "streaming-llm": kept(model, ids, len(ids), recording(StreamingLLMPress(cut, case["sinks"])), lambda x: x),
        "tova-prefill": kept(model, ids, len(ids), recording(TOVAPress(cut)), lambda x: x),
        "snapkv": kept(model, ids, len(ids), recording(SnapKVPress(cut, **snap)), lambda x: x),
    }
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    (directory / "kvpress.json").write_text(json.dumps({"runs": runs, "versions": versions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
