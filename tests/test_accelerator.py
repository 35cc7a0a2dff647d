"""Every public path on a stand-in accelerator: results are the CPU's, nothing mixes devices, and waits are bounded."""

import shutil
from dataclasses import replace
from inspect import signature

import pytest
import shadow
import torch
from model_inputs import PROMPTS, cached_logits, left_padded, random_ids

import companion.cli.main  # noqa: F401  registers the commands
from companion import devices, families
from companion.cli.app import app
from companion.cost.decode_speed import decode_speed
from companion.experiments import main as job
from companion.experiments.delay import Case, interchange
from companion.experiments.fidelity import Prompt, answer
from companion.experiments.heldout import cache_report, held_out, kept_tokens, random_eviction
from companion.experiments.profiles import get_profile
from companion.method import Method
from companion.paths import REASONER
from companion.tasks.reasoner import make_tokenizer
from dms_core.baselines import BASELINES, Quest
from dms_core.baselines.dmc import DMCConfig, attach_dmc
from dms_core.cache.dms import DMSCache
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.sampling import SamplingConfig, sample_chains
from dms_core.train import self_distill
from dms_core.train.losses import Distiller, Totals
from dms_core.train.optim import make_optimizer

TOKENIZER = make_tokenizer()
DOCUMENTS = [
    {"input_ids": ids[0].tolist(), "labels": ids[0].tolist()} for ids in (random_ids(1, n, n) for n in (9, 14))
]
ASKED = [Prompt(ids, [5, 6], [7, 8, 9], "?") for ids in PROMPTS]
JOBS = [(p, c) for p in range(3) for c in range(2)]
METHODS = {name: Quest(3.0, page=4) if name == "quest" else cls(3.0) for name, cls in BASELINES.items()}


def generate(model, cache=None, **settings):
    torch.manual_seed(0)
    inputs = {name: x.to(model.device) for name, x in left_padded(PROMPTS).items()}
    cache = DMSCache.for_model(model, page=4) if cache is None else cache
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, **settings)
    return ids, cache.live_tokens(), cache.kv_reads(), cache.peak_tokens(), cache.tokens_seen()


def chains(model, make_cache=None, **settings):
    config = SamplingConfig(**{"max_new_tokens": 12, "temperature": 1.0, "batch": 4, "stride": 4, **settings})
    return sorted(map(str, sample_chains(model, TOKENIZER, PROMPTS, JOBS, config, make_cache)))


def rows_come_and_go(model):
    """Two turns, then fork, reorder, rows into another cache, single rows reset, memory given back, all reset."""
    ids = random_ids(3, 20).to(model.device)
    logits, cache = cached_logits(model, ids, [9, 10, 11, 15])
    cache.fork(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 5], device=model.device))
    other = cache.empty_like(3)
    other.put_rows(torch.tensor([2, 0], device=model.device), cache, torch.tensor([1, 3], device=model.device))
    cache.reset_rows(torch.tensor([1], device=model.device))
    cache.trim()
    said = [model(ids[:1, :1].expand(rows, -1), past_key_values=c).logits for rows, c in ((4, cache), (3, other))]
    facts = (cache.live_tokens(), other.live_tokens(), cache.kv_reads(), other.peak_tokens())
    cache.reset()
    return logits, *said, *facts, cached_logits(model, ids, [4], cache)[0]


def baseline(name: str):
    def path(model):
        with model.dms.disabled():
            return chains(model, METHODS[name]), generate(model, METHODS[name](model, 12), do_sample=False)

    return path


def train(direction: str = "forward", teacher: bool = True, documents: bool = False):
    """A retrofit's step: losses, gradients and the weights after one step of the optimiser."""

    def path(model):
        other = model.make_teacher() if teacher else None
        distiller = Distiller(model.train(), other, direction, chunk=8)
        ids = random_ids(3, 24).to(model.device)
        inputs = {"attention_mask": torch.ones_like(ids), "alpha_target": 0.9, "totals": Totals(69, 3, 72)}
        if documents:
            inputs["position_ids"] = (torch.arange(24) % 10).expand(3, -1).to(model.device)
        model.dms.noise_keys = torch.arange(3, device=model.device)
        losses = distiller(ids, ids, **inputs)
        losses["loss"].backward()
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradients = [p.grad.clone() for _, p in trained]
        optimizer = make_optimizer(trained, "muon", 1e-2, 0.1)
        before = [p.detach().clone() for _, p in trained]
        optimizer.step()  # what it rounds decides about signs: weights are compared with those before
        moved = [bool((p != old).any() & p.isfinite().all()) for (_, p), old in zip(trained, before, strict=True)]
        return *losses.values(), *gradients, moved

    return path


def fidelity(model):
    said = answer(model, TOKENIZER, ASKED, lambda m: DMSCache.for_model(m, page=4), 6, batch=2)
    return said.tokens, said.logits, said.seen, said.live, said.kv_bytes


def converse(model):
    return list(self_distill.conversations(model, Talker(), 2, 2, seed=1, max_new_tokens=4, batch=3))


class Endless:
    """A tokenizer whose chains never end by themselves."""

    pad_token_id, eos_token_id = 0, -1


class Talker(Endless):
    """A tokenizer without words."""

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"][:9]

    def __call__(self, text, **_):
        return {"input_ids": [1 + ord(c) % 30 for c in text]}

    def decode(self, ids):
        return str(ids)


def without_rate(facts: dict):
    return facts["kv_bytes"]


def randomly_evicting(model):
    with random_eviction(model, 2.0):
        return kept_tokens(model, range(1, 20))


PATHS = {
    "forward": lambda model: model(random_ids(2, 30).to(model.device)).logits,
    "forward, padded": lambda model: model(**{k: x.to(model.device) for k, x in left_padded(PROMPTS).items()}).logits[
        :, -1
    ],
    "rows": rows_come_and_go,
    "generate, greedy": lambda model: generate(model, do_sample=False),
    "generate, sampling": lambda model: generate(model, do_sample=True, temperature=1.5),
    "generate, beams": lambda model: generate(model, do_sample=False, num_beams=3),
    "chains": chains,
    "chains, greedy": lambda model: chains(model, temperature=0.0),
    "held out": lambda model: [*map(str, sorted(held_out(model, model.make_teacher(), DOCUMENTS, 0, 2)))],
    "kept tokens": lambda model: kept_tokens(model, range(1, 20)).numpy().tolist(),
    "random eviction": randomly_evicting,
    "cache report": lambda model: sorted(map(str, cache_report(model, TOKENIZER, "?a;a=3;!", 2.0, 4, 12).items())),
    "intervention": lambda model: interchange(model, [Case(tuple(PROMPTS[1]), 1, 3, 9, "result")], 3)[0]["clean"],
    "fidelity": fidelity,
    "decode speed": lambda model: without_rate(decode_speed(model, PROMPTS, 0, 3)),
    "conversations": converse,
    "retrofit": train(),
    "retrofit, packed documents": train(documents=True),
    "retrofit, reverse": train("reverse"),
    "retrofit, next token": train("lm", teacher=False),
    "retrofit, frozen base": train(teacher=False),
} | {name: baseline(name) for name in METHODS}


@pytest.fixture
def both(tiny_model):
    """A function that makes the same model on the CPU and on the stand-in; ``make_teacher`` makes its dense twin."""

    def make(gate: str = "adapter", prepare=None, **settings):
        models = []
        for place in (lambda model: model, shadow.moved):
            if prepare is None:
                model = place(tiny_model(vocabulary=len(TOKENIZER), gate=gate, **settings))
            else:
                model = place(prepare(tiny_model(vocabulary=len(TOKENIZER), gates=False)))
            model.make_teacher = lambda place=place: place(tiny_model(vocabulary=len(TOKENIZER), seed=3, gates=False))
            models.append(model)
        return models

    return make


def same(expected, found) -> None:
    """Equal, and within 1e-4 where there are fractions."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-4, atol=1e-4)
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(found)
        for a, b in zip(expected, found, strict=True):
            same(a, b)
    else:
        assert found == expected


def check(path, models) -> None:
    mode = torch.enable_grad() if getattr(path, "__qualname__", "").startswith("train") else torch.no_grad()
    with mode:
        expected, found = (path(model) for model in models)
    same(expected, found)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", PATHS)
def test_path_on_the_accelerator_equals_the_cpu(both, name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)  # the stand-in has no streams
    if name == "conversations":
        pytest.importorskip("reasoning_gym")
    check(PATHS[name], both())


@pytest.mark.every(5)
@pytest.mark.parametrize("name", ["forward", "rows", "generate, beams", "chains", "fidelity", "retrofit"])
@pytest.mark.parametrize("options", [{"gate": "neuron"}, {"eviction": "immediate"}, {"granularity": "layer"}], ids=str)
def test_path_with_other_settings_equals_the_cpu(both, name, options):
    check(PATHS[name], both(**options))


@pytest.mark.parametrize("name", ["forward", "generate, greedy", "generate, beams", "chains", "retrofit"])
def test_merging_on_the_accelerator_equals_the_cpu(both, name):
    check(PATHS[name], both(prepare=lambda model: attach_dmc(model, DMCConfig(scale=8.0, offset=0.0))))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*keep their")
@pytest.mark.parametrize("family", ["falcon_h1", "gemma3_text", "gpt_oss", "llama4_text", "qwen3_next"])
def test_hybrid_on_the_accelerator_equals_the_cpu(family):
    """Sinks, sliding windows, chunks, states: they go where the model is, row by row."""
    config, models = DMSConfig(window=3, scale=10.0, offset=0.0), []
    for place in (lambda model: model, shadow.moved):
        model = families.tiny_model(family)
        model.set_experts_implementation("eager")  # grouped products need a card
        attach(model, config)
        for parameter in model.dms.gate_parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        models.append(place(model))
    for name in ("forward, padded", "rows", "generate, greedy", "chains"):
        check(PATHS[name], models)


@pytest.mark.slow
def test_main_job_measures_and_samples_on_its_device(tmp_path, monkeypatch):
    """As with a card, which ``device`` None finds; both devices write the same records."""
    profile = replace(get_profile("smoke"), crs=(4.0,), problems=3, chains=2, lengths=(24,), widths=(1,), held_out=4)
    found = {}
    for place in ("cpu", "shadow"):
        monkeypatch.setattr(devices, "checked_device", lambda name, place=place: place)
        checkpoint = shutil.copytree(REASONER / "dms-cr4", tmp_path / place / "cr4")
        run = job.Run(profile, tmp_path / place, variants={}, checkpoints={4.0: checkpoint})
        with shadow.waits() as seen:
            held = job.held_out(run, "dms", 4.0)
            chains = [
                job.records(run, method) for method in (Method("vanilla", 1.0), Method("dms", 4.0), Method("h2o", 4.0))
            ]
        assert bool(len(seen)) == (place == "shadow")
        found[place] = held["retention"], held["agreement"], chains
    assert found["shadow"] == found["cpu"]


def test_device_that_is_not_here_is_refused(tmp_path):
    run = job.Run(get_profile("smoke"), tmp_path, device="cuda:7")
    with pytest.raises(ValueError, match=r"device 'cuda:7': must be one of cpu"):
        job.records(run, Method("vanilla", 1.0))


def test_every_command_that_runs_a_model_takes_a_device():
    running = {
        "reproduce",
        "grid",
        "cache-report",
        "ablate",
        "stage",
        "retrofit",
        "converse",
        "sample",
        "eval",
        "runtime",
    }
    running |= {"check", "fidelity", "recall", "tokens", "bench"}
    taking = {c.name for c in app.registered_commands if "device" in signature(c.callback).parameters}
    assert taking == running | {"plan"}  # which asks for a card's name


# Waits for the device.


@pytest.fixture
def model(both):
    return both()[1]


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name in METHODS if name != "rkv"])  # it asks each step which rows are full
def test_decode_step_of_a_baseline_waits_for_nothing(model, name):
    with model.dms.disabled():
        cache = METHODS[name](model, 100)
        model(random_ids(3, 20).to(model.device), past_key_values=cache)
        seen = decode_waits(model, cache, 3, 8)
    assert not sum(map(len, seen)), str(seen[-1])


def decode_waits(model, cache, rows: int, steps: int) -> list[shadow.Waits]:
    """What each of so many decode steps waits for."""
    token = torch.ones(rows, 1, dtype=torch.long, device=model.device)
    seen = []
    for _ in range(steps):
        with shadow.waits() as counter, torch.inference_mode():
            model(token, past_key_values=cache)
        seen.append(counter)
    return seen


def test_decode_step_waits_for_nothing_between_refills_of_room(model):
    _, cache = cached_logits(model, random_ids(3, 20).to(model.device), [9])
    seen = decode_waits(model, cache, 3, 48)
    looked = [counter for counter in seen if len(counter)]
    assert len(looked) <= 48 // 16 and max(map(len, looked)) <= 2, "\n\n".join(map(str, looked))


def test_decode_of_forked_rows_waits_only_while_pages_are_shared(model):
    _, cache = cached_logits(model, random_ids(3, 20).to(model.device), [9])
    cache.fork(4)
    seen = decode_waits(model, cache, 12, 48)
    looked = [counter for counter in seen if len(counter)]
    assert len(looked) <= 48 // 16 and max(map(len, looked)) <= 2 + 2 * model.dms.layers, "\n\n".join(map(str, looked))


@pytest.mark.parametrize("cuts", [[], [9]], ids=["first", "second"])
def test_prefill_waits_at_most_twice_a_layer(model, cuts):
    ids = random_ids(3, 20).to(model.device)
    cache = cached_logits(model, ids[:, : cuts[0]], [])[1] if cuts else DMSCache.for_model(model)
    with shadow.waits() as seen:
        model(ids[:, 9:], past_key_values=cache)
    assert len(seen) <= 2 * model.dms.layers + 2, str(seen)  # and twice for the whole: padding, and NaN logits


@pytest.mark.slow
def test_sampling_waits_only_to_look_at_what_has_ended(model):
    counts = []
    for length in (32, 96):
        config = SamplingConfig(length, batch=len(JOBS))
        with shadow.waits() as seen:
            for chain in sample_chains(model, Endless(), PROMPTS, JOBS, config):
                assert len(chain.tokens) == length
        counts.append(seen)
    more = len(counts[1]) - len(counts[0])
    assert more <= 3 * (96 - 32) // 16, str(counts[1])  # every 16 steps: room, NaN logits, chains that ended


# What the host is told.


@torch.no_grad()
def test_nan_gates_are_reported_on_the_accelerator(model):
    _, cache = cached_logits(model, random_ids(2, 9).to(model.device), [4])
    model.dms.layout.modules[1].dms_gate.proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        decode_waits(model, cache, 2, 40)
    with pytest.raises(ValueError, match="NaN"):
        model(random_ids(2, 9).to(model.device))
    with pytest.raises(ValueError, match="NaN"):
        chains(model)


@torch.no_grad()
def test_row_without_a_page_is_reported_on_the_accelerator(model):
    """As if a cache had made too little room: steps run on without waiting, and the next look raises."""
    _, cache = cached_logits(model, random_ids(2, 9).to(model.device), [4])
    for layer in cache.layers:
        layer.rows.credit = 40
    with pytest.raises(RuntimeError, match="lost a token"):
        decode_waits(model, cache, 2, 60)


# The stand-in itself.


def test_tensors_of_two_devices_do_not_mix(model):
    here, there = torch.ones(3), torch.ones(3, device="shadow")
    for call in (
        lambda: here + there,
        lambda: there.add_(here),
        lambda: torch.cat([here, there]),
        lambda: torch.where(there > 0, there, here),
        lambda: there.gather(0, torch.tensor([1])),
        lambda: model(random_ids(1, 4)),
        lambda: there.normal_(generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match=r"same device|generator"):
            call()
    assert (there + torch.tensor(2.0)).cpu().tolist() == [3, 3, 3]
    assert there[torch.tensor([0, 2])].shape == (2,)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_what_waits_is_counted_and_what_does_not_is_not():
    x = torch.arange(6.0, device="shadow")
    mask, other = x > 2, torch.zeros(6)
    waiting = {
        "item": [x.sum().item, lambda: bool(mask[0]), lambda: int(x[1]), lambda: torch.equal(x, x)],
        "nonzero": [x.nonzero, lambda: mask.nonzero(as_tuple=True)],
        "boolean index": [lambda: x[mask], lambda: x.masked_select(mask), lambda: x.index_put_((mask,), x[:3].clone())],
        "unique": [x.unique, x.unique_consecutive],
        "repeat_interleave": [lambda: x.repeat_interleave(mask.int())],
        "to the host": [x.cpu, x.tolist, lambda: other.copy_(x)],
        "to the device": [lambda: other.to("shadow"), lambda: x.copy_(other), lambda: x[torch.tensor([1])]],
    }
    for kind, calls in waiting.items():
        for call in calls:
            with shadow.waits() as seen:
                call()
            assert seen.kinds == {kind: 1}
    with shadow.waits() as seen:
        x[mask] = 1.0
        x.add_(1).masked_fill_(mask, 0.0)
        torch.full((3,), 2.0, device="shadow").sum()
        other.to("shadow", non_blocking=True)
        x.repeat_interleave(mask.int(), output_size=3)
        torch.where(mask, x, torch.tensor(0.0))
        x.sort().values.cumsum(0)
    assert not len(seen), str(seen)
