"""The live page computes what the library computes (in node and in two browsers)."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from firefox import open_live

from companion import live
from companion.paths import REASONER
from companion.tasks.choices import make_choice
from companion.tasks.programs import make_problem
from companion.tasks.puzzles import make_puzzle, solves
from dms_core.cache.dms import DMSCache
from dms_core.checkpoint import load_base, load_model, load_tokenizer
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.pick import pick_tokens
from dms_core.sampling import pad_left

BOUNDARY = 1e-4  # a gate's logit so near to 0 that rounding may decide

TRACE = """({model, prompt, ids}) => {
  const m = new DMS.Model(window.DMS_WEIGHTS[model]), c = new DMS.Cache(m), logits = [], z = [];
  ids.forEach((id, i) => { logits.push(...m.step(id, c, i >= prompt)); z.push(...m.z); });
  const encode = (x) => { const b = new Uint8Array(new Float32Array(x).buffer), parts = [];
    for (let i = 0; i < b.length; i += 8192) parts.push(String.fromCharCode(...b.subarray(i, i + 8192)));
    return btoa(parts.join("")); };
  return {logits: encode(logits), z: encode(z), reads: [...c.reads], live: [...c.length],
          state: Array.from({length: m.rows}, (_, r) => [...c.state.subarray(r * c.capacity).subarray(0, ids.length)])};
}"""


@dataclass(frozen=True)
class Case:
    prompt: str
    trace: str


@cache
def cases() -> list[Case]:
    """50 problems of the three tasks with their traces."""
    made = [make_problem("validation", 5, i, (3, 8)) for i in range(17)]
    made += [make_choice("validation", 5, i, (3, 8)) for i in range(17)]
    made += [make_puzzle("validation", 5, i, longest=200) for i in range(16)]
    return [Case(problem.prompt, problem.trace) for problem in made]


class Node:
    """Runs a JavaScript function with the engine loaded, in node."""

    def __init__(self, page: Path) -> None:
        self.head = "globalThis.window = globalThis;"
        self.head += "".join(f"require({str(file)!r});" for file in (page / "engine.js", *page.glob("weights-*.js")))

    def calls(self, function: str, values: list) -> list:
        """What the function returns for each of ``values``."""
        body = "const values = JSON.parse(require('fs').readFileSync(0));"
        script = f"{self.head}{body}process.stdout.write(JSON.stringify(values.map({function})))"
        done = subprocess.run(
            ["node", "-e", script], input=json.dumps(values), capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)


class Browser:
    """The same in headless Chromium, in the page itself, from file://."""

    def __init__(self, tab) -> None:
        self.tab = tab

    def calls(self, function: str, values: list) -> list:
        return [self.tab.evaluate(function, value) for value in values]


class Gecko:
    """The same in headless Firefox."""

    def __init__(self, firefox, page: Path) -> None:
        open_live(firefox, page)
        for name in live.MODELS:
            load = "document.head.append(Object.assign(document.createElement('script'), {src: arguments[0]}))"
            firefox.run(load, f"weights-{name}.js")
            firefox.wait_for(f"{name!r} in window.DMS_WEIGHTS")
        self.firefox = firefox

    def calls(self, function: str, values: list) -> list:
        return [self.firefox.run(f"return ({function})(arguments[0])", value) for value in values]


@pytest.fixture(scope="module", params=["node", "chromium", "firefox"])
def engine(request, page):
    if request.param == "firefox":
        return Gecko(request.getfixturevalue("firefox"), page)
    if request.param == "chromium":
        tab = request.getfixturevalue("browser")()
        for name in live.MODELS:
            if not tab.evaluate(f"{name!r} in window.DMS_WEIGHTS"):
                tab.add_script_tag(path=page / f"weights-{name}.js")
        return Browser(tab)
    if not shutil.which("node"):
        pytest.skip("NOT RUN IN NODE: node is not installed")
    return Node(page)


@cache
def expected(name: str) -> list[dict]:
    """Of each case, what the library computes with the page's weights: logits by one forward pass with hard decisions,
    gates' logits likewise, counters by decoding token by token with a cache."""
    tokenizer = load_tokenizer(REASONER)
    folder = REASONER / live.MODELS[name]
    dense = not live.MODELS[name]
    model = attach(load_base(folder), DMSConfig(window=16, scale=10.0)) if dense else load_model(folder)
    live.round_weights(model)
    prompts = [tokenizer(case.prompt)["input_ids"] for case in cases()]
    traces = [tokenizer(case.trace)["input_ids"] for case in cases()]
    with torch.inference_mode():
        if dense:
            with model.dms.disabled():
                return _both(model, prompts, traces)
        return _both(model, prompts, traces)


def _both(model, prompts: list[list[int]], traces: list[list[int]]) -> list[dict]:
    counted = _decode(model, prompts, traces)
    for prompt, trace, facts in zip(prompts, traces, counted, strict=True):
        facts["logits"] = model(torch.tensor([prompt + trace]), use_cache=False).logits[0].numpy()
        if model.dms.enabled:
            logits = model.dms.step.logits  # (1, H, T) of each layer
            facts["z"] = torch.cat([logits[layer] for layer in sorted(logits)], 1)[0].T.numpy()
    return counted


def _decode(model, prompts, traces) -> list[dict]:
    """Reads and live tokens (rows,) after each text, all texts side by side."""
    cache = DMSCache.for_model(model)
    ids, mask, positions = pad_left(prompts, 0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    lengths = torch.tensor([len(trace) for trace in traces])
    for step in range(int(lengths.max())):
        on = lengths > step
        token = torch.tensor([trace[step] if step < len(trace) else 0 for trace in traces])[:, None]
        at = torch.tensor([[len(prompt) + step] for prompt in prompts])
        model(token, attention_mask=on[:, None].long(), position_ids=at, past_key_values=cache, use_cache=True)
    counters = (cache.kv_reads(), cache.live_tokens(), cache.peak_tokens())
    reads, alive, peak = (x.transpose(0, 1).flatten(1).tolist() for x in counters)
    return [{"reads": r, "live": n, "peak": p} for r, n, p in zip(reads, alive, peak, strict=True)]


def states(z: np.ndarray, window: int) -> list[list[int]]:
    """What has become of each token (1 held, 2 marked, 3 overwritten) after the last one: dms_core.visibility."""
    tokens = len(z)
    marked = np.zeros_like(z, dtype=bool)
    marked[:-1] = z[1:] > 0  # token j + 1 decides about j
    gone = (tokens - 1 - np.arange(tokens) > window)[:, None]
    return np.where(marked, np.where(gone, 3, 2), 1).T.tolist()


def test_weights_are_small_and_rounded_to_half_a_step(page):
    for name in live.MODELS:
        assert (page / f"weights-{name}.js").stat().st_size <= 1.3e6
    matrix = torch.randn(5, 64) * torch.tensor([1e-3, 0.1, 1.0, 30.0, 0.0])[:, None]
    whole, scale = live.quantise(matrix)
    assert whole.dtype == torch.int8
    assert ((whole * scale[:, None] - matrix).abs() <= 0.501 * scale[:, None]).all()


def test_sample_problems_are_what_the_generators_make():
    problems = live.sample_problems(3)
    assert problems["traces"][0] == make_problem("validation", live.SEED, 0, live.MIX["traces"]).prompt
    assert {kind: {prompt[0] for prompt in prompts} for kind, prompts in problems.items()} == {
        "traces": {"?"},
        "choice": {"<"},
        "search": {">"},
    }


def test_model_that_the_page_cannot_run_is_refused(tiny_model, tmp_path):
    tiny_model("qwen3", gates=False, vocabulary=73).save_pretrained(tmp_path)
    load_tokenizer(REASONER).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a Llama with tied embeddings"):
        live.pack(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", live.MODELS)
def test_engine_equals_library(engine, name):
    tokenizer = load_tokenizer(REASONER)
    every = 5 if isinstance(engine, Browser) and shutil.which("node") else 1  # node and Chromium run the same V8
    wanted = expected(name)[::every]
    asked = [
        {"model": name, "prompt": len(case.prompt), "ids": tokenizer(case.prompt + case.trace)["input_ids"]}
        for case in cases()[::every]
    ]
    worst = decided = whole = 0
    for want, got, given in zip(wanted, engine.calls(TRACE, asked), asked, strict=True):
        tokens = len(given["ids"])
        logits, z = (np.frombuffer(base64.b64decode(got[x]), np.float32).reshape(tokens, -1) for x in ("logits", "z"))
        until = tokens
        if name != "dense":
            differ = (z > 0) != (want["z"] > 0)
            assert (np.abs(want["z"][differ]) < BOUNDARY).all()
            until = int(differ.any(1).argmax()) if differ.any() else tokens
            decided += int((z > 0).sum())
        worst = max(worst, float(np.abs(logits[:until] - want["logits"][:until]).max()))
        if until == tokens:
            whole += 1
            assert (got["reads"], got["live"], got["live"]) == (want["reads"], want["live"], want["peak"])
            if name != "dense":
                assert got["state"] == states(z, 16)
    print(
        f"{name}: largest difference of a logit {worst:.2g}, {decided} evictions, {whole} of {len(asked)} texts whole"
    )
    assert worst <= 1e-3 and whole >= len(asked) - 2
    assert name == "dense" or decided > 1000


def test_picks_equal_the_library(engine):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(300, 73)) * 3).astype(np.float32)
    uniforms = rng.random(300)
    for temperature, top_p in ((0.6, 0.95), (1.0, 1.0), (1.3, 0.5), (0.0, 0.95)):
        want = pick_tokens(torch.from_numpy(logits), torch.from_numpy(uniforms), temperature, top_p).tolist()
        asked = [{"x": x.tolist(), "u": float(u)} for x, u in zip(logits, uniforms, strict=True)]
        got = engine.calls(f"({{x, u}}) => DMS.pick(Float32Array.from(x), {temperature}, {top_p}, u)", asked)
        assert sum(a != b for a, b in zip(got, want, strict=True)) <= 1  # a uniform at the border of two tokens


@pytest.mark.every(3)
def test_verdicts_equal_the_graders(engine):
    judge = "({prompt, text}) => { const p = DMS.parse(prompt), a = DMS.extract(p.task, text);"
    judge += "return [p.task, a, DMS.correct(p, a)] }"
    asked = [{"prompt": case.prompt, "text": case.trace} for case in cases()]
    assert all(right for _, _, right in engine.calls(judge, asked))
    wrong = [{**x, "text": re.sub(r"\d(?=;?#|$)", lambda d: str((int(d[0]) + 1) % 10), x["text"])} for x in asked]
    for given, (task, answer, right) in zip(wrong, engine.calls(judge, wrong), strict=True):
        if task == "search":
            assert right == solves(given["prompt"], answer)
        elif task == "traces":
            assert not right and answer is not None
    cut = [{**x, "text": x["text"][: len(x["text"]) // 2]} for x in asked]
    assert not any(right for _, _, right in engine.calls(judge, cut))
