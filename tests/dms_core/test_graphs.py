"""Decoding as a replayed graph, with a stand-in that records torch operations instead of CUDA's launches.

Like a CUDA graph it computes nothing of consequence while it captures, holds every address fixed, and replays what was
recorded with the Python numbers of that moment.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dms_core import graphs, sampling
from dms_core.baselines import get_baseline
from dms_core.graphs import StepGraph
from dms_core.sampling import SamplingConfig, sample_chains
from dms_kernels.cpu import step as cpu_step


class Recorder(TorchDispatchMode):
    """Keeps every operation, and what the storages written to held before."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))  # so that no address is used again
        return out


class RecordedGraph:
    made = 0

    def __init__(self) -> None:
        self.recorder, self.replays = Recorder(), 0
        RecordedGraph.made += 1

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.recorder.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def recording(graph: RecordedGraph, **settings):
    with graph.recorder:
        yield
    for storage, content in graph.recorder.before.values():
        storage.copy_(content)


@pytest.fixture
def no_card(monkeypatch):
    """What is asked of CUDA apart from graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)


@pytest.fixture
def recorded(monkeypatch, no_card):
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(sampling, "why_no_graph", lambda model, cache: "")
    monkeypatch.setattr(cpu_step, "COMPILED", False)  # machine code is not recorded
    monkeypatch.setattr(cpu_step.decode, "decode_attention", cpu_step.naive.decode_attention)
    RecordedGraph.made = 0


class Words:
    pad_token_id, eos_token_id = 0, 7


def chains(model, prompts, **settings) -> dict:
    jobs = [(problem, chain) for problem in range(len(prompts)) for chain in range(3)]
    config = SamplingConfig(40, temperature=1.0, stride=5, page=4, **settings)
    return {(x.problem, x.chain): x for x in sample_chains(model, Words, prompts, jobs, config)}


def test_replayed_steps_say_what_called_ones_say_through_growth_refills_and_shrinking(tiny_model, request):
    model, prompts = tiny_model(), [[5, 9, 2], [3, 3, 8, 1, 4, 6, 2], [11, 12]]
    expected = chains(model, prompts, batch=9)
    request.getfixturevalue("recorded")
    for batch in (9, 4):
        found = chains(model, prompts, batch=batch)
        assert found.keys() == expected.keys()
        for name, chain in found.items():
            assert (chain.tokens, chain.live, chain.reads) == (
                expected[name].tokens, expected[name].live, expected[name].reads)  # fmt: skip
    assert RecordedGraph.made >= 4


def test_a_step_that_cannot_be_captured_goes_on_as_it_is(monkeypatch, no_card):
    @contextmanager
    def refuse(graph, **settings):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    done, counted, told = [], [], []
    graph = StepGraph(lambda: done.append(1), moved=lambda: 0, ran=counted.append, failed=told.append)
    graph.run()
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        graph.run()
    graph.run()
    assert len(done) == 3 and sum(counted) == 0 and "capture failed" in graph.why_not and told == [graph.why_not]


def test_a_capture_that_failed_is_not_tried_again_with_this_model(tiny_model, monkeypatch, no_card):
    tried = []

    @contextmanager
    def refuse(graph, **settings):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(sampling, "why_no_graph", lambda model, cache: model.dms.no_graph)
    model = tiny_model()
    with pytest.warns(UserWarning, match="not permitted"):
        first = chains(model, [[5, 9, 2]], batch=3)
    assert chains(model, [[5, 9, 2]], batch=3).keys() == first.keys() and tried == [1]


def test_reasons_against_a_graph_are_named(tiny_model):
    model = tiny_model()
    assert graphs.why_no_graph(model, model.dms.new_cache()) == "not on CUDA"


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda model: model.dms.new_cache(), ""),
        (lambda model: model.dms.new_cache(slack=1), "DMSCache: its steps change shapes"),
        (lambda model: get_baseline("tova")(2.0)(model, 9), "BaselineCache: its steps change shapes"),
    ],
    ids=["dms", "slack", "baseline"],
)
def test_steps_that_change_shapes_are_not_captured(tiny_model, monkeypatch, make, reason):
    model = tiny_model()
    cache, card = make(model), SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(model, "parameters", lambda: [card])
    assert graphs.why_no_graph(model, cache) == reason
    model.dms.no_graph = "capture failed: once"
    assert graphs.why_no_graph(model, cache) == (reason or "capture failed: once")
