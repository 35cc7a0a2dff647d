"""One retrofit, however it is cut into processes or interrupted: the processes are forks of the test process.

No test here may compute a gradient in the test process itself: see ``forks`` in tests/conftest.py.
"""

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import end, fork, in_child, run, torchrun
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from companion.cli.main import main
from companion.paths import REASONER
from dms_core.checkpoint import load_base
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.noise import row_keys
from dms_core.train.losses import Distiller
from dms_core.train.trainer import full_state, shard_teacher

SMALL = ["final_cr=2", "steps_per_unit=4", "rests=[]", "batch=4", "save_steps=2", "warmup=3", "lr=1e-3"]


def words(out: Path, *changes: str) -> list[str]:
    return ["retrofit", "--recipe", "reasoner", "--device", "cpu", "--out", str(out), "--set", *SMALL, *changes]


def train(out: Path, *changes: str) -> None:
    assert main(words(out, *changes)) == 0


def logged(out: Path) -> list[list[float]]:
    log = json.loads((out / "retrofit.json").read_text())["log"]
    return [[entry[key] for key in ("loss", "kd", "aux", "evicted")] for entry in log if "loss" in entry]


TWO = "optimizer=adamw", "device_batch=1"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run of torchrun's two processes that nothing disturbs; the runs below are forks."""
    out = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([*launch, "-m", "companion.cli.main", *words(out, *TWO)])
    return out


@pytest.mark.forks
@pytest.mark.slow
def test_two_accumulating_processes_take_the_steps_of_one(two, tmp_path):
    """AdamW: Muon magnifies rounding where gradients almost vanish, so that small divergences differ by 0.1 %."""
    in_child(lambda: train(tmp_path, "optimizer=adamw", "device_batch=4"))
    assert len(logged(tmp_path)) == 4
    assert logged(two) == [pytest.approx(step, rel=1e-4, abs=1e-8) for step in logged(tmp_path)]
    weights = load_file(two / "cr2" / "model.safetensors")
    for name, weight in load_file(tmp_path / "cr2" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.forks
@pytest.mark.slow
def test_killed_and_restarted_run_has_the_weights_of_an_uninterrupted_one(two, tmp_path):
    """Of one process, and with Muon: tests/test_faults.py."""
    kill_after_checkpoint(lambda: torchrun(lambda: train(tmp_path, *TWO)), tmp_path / "trainer" / "checkpoint-2")
    assert not (tmp_path / "retrofit.json").exists()
    in_child(lambda: torchrun(lambda: train(tmp_path, *TWO)))
    whole, resumed = (load_file(out / "cr2" / "model.safetensors") for out in (two, tmp_path))
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert logged(two) == logged(tmp_path)


def kill_after_checkpoint(launch: Callable[[], None], checkpoint: Path) -> None:
    """SIGKILL to a worker as soon as the checkpoint is complete; the launch must fail."""
    launcher, pipe = fork(launch)
    while not (checkpoint / "trainer_state.json").exists():
        assert os.waitpid(launcher, os.WNOHANG) == (0, 0), os.read(pipe, 4000).decode()
        time.sleep(0.01)
    workers = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert "ChildFailedError" in end(launcher, pipe)[1]["error"]


def equal_when_sharded(gate: str, checkpointing: bool) -> None:
    """In each of two processes: what a student and its teacher compute whole, and then cut as accelerate does."""
    torch.manual_seed(0)
    teacher = load_base(REASONER)
    model = attach(copy.deepcopy(teacher), DMSConfig(gate=gate, window=4, scale=5.0, offset=0.0)).train()
    for parameter in model.dms.gate_parameters():
        torch.nn.init.normal_(parameter)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.dms.noise_keys = row_keys(0, 0, 0, 2)
    ids = torch.randint(2, 40, (2, 60), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "alpha_target": 0.9}
    distiller = Distiller(model, teacher)
    whole = distiller(**batch)
    whole["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    distiller.zero_grad()
    shard(distiller, teacher)
    sharded = distiller(**batch)
    sharded["loss"].backward()
    assert all(isinstance(p, DTensor) for p in teacher.get_decoder().layers.parameters())  # cut again after its forward
    assert 0 < whole["evicted"] < 1 and whole["kd"] > 1e-3
    for name in ("loss", "kd", "aux", "evicted"):
        torch.testing.assert_close(sharded[name], whole[name])
    for name, p in model.named_parameters():
        assert p.to_local().numel() < p.numel()
        torch.testing.assert_close(p.grad.full_tensor(), gradients[name], rtol=1e-4, atol=1e-6)
    state = full_state(distiller)
    if dist.get_rank() == 0:
        assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def shard(distiller: Distiller, teacher: torch.nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in distiller.student.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(distiller, mesh=mesh)
    shard_teacher(teacher, torch.device("cpu"))


@pytest.mark.forks
@pytest.mark.slow
def test_sharded_student_and_teacher_give_the_same_losses_and_gradients(tmp_path):
    """FSDP2 as accelerate applies it (layers, then the whole), hooks of the gates included; two CPU processes."""

    def work():
        dist.init_process_group("gloo")
        for gate, checkpointing in (("adapter", False), ("adapter", True), ("neuron", True)):
            equal_when_sharded(gate, checkpointing)
        (tmp_path / f"{dist.get_rank()}").touch()

    in_child(lambda: torchrun(work))
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["0", "1"]
