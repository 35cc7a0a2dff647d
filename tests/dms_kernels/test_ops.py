"""The operations that PyTorch knows: what torch.compile, torch.export and fake tensors need of them."""

from dataclasses import fields

import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode

import dms_kernels
from dms_kernels import Rows, cache_step, decode_attention, gate_logits, ops, train_attention
from dms_kernels.plan import training_plan


def draw(*shape: int, seed: int = 0, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


@pytest.mark.parametrize("biased", [True, False])
def test_attention_by_a_plan(biased):
    q, k, v = draw(1, 4, 70, 8, grad=True), draw(1, 2, 70, 8, seed=1, grad=True), draw(1, 2, 70, 8, seed=2, grad=True)
    log_keep = -draw(1, 2, 70, seed=3).abs().detach() * 30
    plan = training_plan(log_keep, None, 5, dms_kernels.EXACT)
    bias = log_keep.requires_grad_() if biased else None
    arguments = (plan.band, plan.kept, plan.count, plan.first, plan.last, plan.window, plan.offset, 0.3)
    library.opcheck(ops.attend, (q, k, v, bias, *arguments))


def filled() -> Rows:
    rows = Rows.empty(4, 20, 5, 4, 3, torch.empty(0, 8))
    for seed in range(6):
        step_inputs = draw(2, 4, 1, 8, seed=seed), draw(2, 2, 1, 8, seed=seed + 10), draw(2, 2, 1, 8, seed=seed + 20)
        flags = torch.ones(2, 2, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)
        cache_step(rows, *step_inputs, *flags, 1)
    return rows


def test_a_step_its_attention_and_its_gate():
    rows = filled()
    q, k, v = draw(2, 4, 1, 8), draw(2, 2, 1, 8, seed=1), draw(2, 2, 1, 8, seed=2)
    flags = torch.ones(2, 2, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)
    library.opcheck(ops.step, (*(getattr(rows, field.name) for field in fields(rows)), q, k, v, *flags, 1, 0.3))
    library.opcheck(ops.decode, (q, rows.keys, rows.values, rows.table, rows.length, 0.3))
    library.opcheck(ops.gate, (draw(2, 1, 16), draw(16, seed=1), draw(2, 16, seed=2), 1e-6, 100.0, 5.0))


def test_the_facade_takes_fake_tensors():
    rows, flags = filled(), (torch.ones(2, 2, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        tensors = [getattr(rows, field.name) for field in fields(rows)]
        fake = Rows(*(None if x is None else mode.from_tensor(x) for x in tensors))
        q, k = mode.from_tensor(draw(2, 4, 1, 8)), mode.from_tensor(draw(2, 2, 1, 8))
        assert cache_step(fake, q, k, k, *map(mode.from_tensor, flags), 1).shape == (2, 4, 1, 8)
        assert decode_attention(q, fake.keys, fake.values, fake.table, fake.length).shape == (2, 4, 1, 8)
        hidden, weight = torch.empty(2, 1, 16), torch.empty(3, 16)
        assert gate_logits(hidden, weight[0], weight, 1e-6, 100.0, 5.0).shape == (2, 3, 1)


def test_a_traced_graph_calls_the_operations():
    """What torch.compile sees of training attention: one operation forward, one backward, no break."""
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    q, k, v = draw(1, 4, 600, 8, grad=True), draw(1, 2, 600, 8, seed=1), draw(1, 2, 600, 8, seed=2)
    log_keep = -draw(1, 2, 600, seed=3).abs() * 30
    torch.compiler.reset()
    compiled = torch.compile(lambda q: train_attention(q, k, v, log_keep, 5).sum(), backend=backend, fullgraph=True)
    compiled(q).backward()
    got, q.grad = q.grad, None
    train_attention(q, k, v, log_keep, 5).sum().backward()
    torch.testing.assert_close(got, q.grad)
    assert any("dms.attend" in name for name in seen)
