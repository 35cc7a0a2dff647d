"""One retrofit, however it is cut into processes, interrupted, or economical with memory."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import end, fork, in_child, torchrun
from safetensors.torch import load_file

from companion.cli.main import main
from companion.paths import REASONER
from companion.tasks.reasoner import make_tokenizer
from dms_core.checkpoint import load_base
from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.noise import keyed_noise, row_keys, sample_noise
from dms_core.train.losses import Distiller
from dms_core.train.retrofit import pad_collate
from dms_core.train.trainer import full_state, shard_teacher

ROOT = Path(__file__).parents[3]
SMALL = ["final_cr=2", "steps_per_unit=4", "rests=[]", "batch=4", "save_steps=2", "warmup=3", "lr=1e-3"]


def test_noise_of_a_row_does_not_depend_on_the_batch_around_it():
    keys = row_keys(seed=1, step=5, first=0, count=6)
    whole = keyed_noise(torch.zeros(6, 2, 40), keys, layer=3)
    assert torch.equal(row_keys(1, 5, 4, 2), keys[4:])
    assert torch.equal(keyed_noise(torch.zeros(2, 2, 25), keys[4:], 3), whole[4:, :, :25])  # less padding


def test_noise_is_logistic_and_fresh_in_every_row_layer_head_token_step_and_seed():
    z = torch.zeros(32, 4, 1000)
    noise = keyed_noise(z, row_keys(0, 0, 0, 32), 0)
    reference = sample_noise(z, torch.Generator().manual_seed(0))
    quantiles = torch.linspace(0.01, 0.99, 21)
    torch.testing.assert_close(
        noise.flatten().quantile(quantiles), reference.flatten().quantile(quantiles), atol=0.06, rtol=0.03
    )
    assert noise.unique().numel() > 0.98 * noise.numel()
    others = [keyed_noise(z, row_keys(*place, 0, 32), layer) for *place, layer in ((0, 0, 1), (0, 1, 0), (1, 0, 0))]
    shifted = [noise.roll(1, dim) for dim in range(3)]
    for other in others + shifted:
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.015


def losses_and_gradients(model, checkpointing: bool, separate_teacher):
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.dms.noise_keys = row_keys(0, 0, 0, 2)
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 40, (n,), generator=g).tolist() for n in (9, 15)]
    batch = pad_collate(0)([{"input_ids": x, "labels": [-100] * 3 + x[3:]} for x in ids])
    out = Distiller(model, separate_teacher)(**batch, alpha_target=0.9)
    out["loss"].backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gate, frozen", [("adapter", False), ("adapter", True), ("neuron", False)])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_activation_checkpointing_changes_neither_losses_nor_gradients(tiny_model, kind, gate, frozen):
    results = []
    for checkpointing in (False, True):
        model = tiny_model(kind, gate=gate)
        if frozen:
            gates = {id(p) for p in model.dms.gate_parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in gates)
        teacher = None if frozen else tiny_model(kind, seed=1, gates=False)
        results.append(losses_and_gradients(model, checkpointing, teacher))
    (plain, gradients), (saved, again) = results
    assert plain["kd"] > 1e-4 and 0 < plain["evicted"] < 1 and set(gradients) == set(again)
    for name in ("loss", "kd", "aux", "evicted"):
        assert torch.equal(plain[name], saved[name])
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_checkpointed_layers_are_computed_twice(tiny_model):
    """What the test above compares is really the checkpointed path."""
    model, calls = tiny_model(), []
    model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    losses_and_gradients(model, True, tiny_model(seed=1, gates=False))
    assert len(calls) == 2


PEAK = """
import resource, torch
from dms_core.train.losses import chunked_loss
torch.set_num_threads(1)
hidden, teacher = (torch.randn(1024, 64) for _ in range(2))
heads = [torch.nn.Linear(64, 150_000, bias=False) for _ in range(2)]
heads[1].requires_grad_(False)
hidden.requires_grad_()
heads[0].weight.grad, hidden.grad = torch.zeros_like(heads[0].weight), torch.zeros_like(hidden)
hidden.grad.add_(1), heads[0].weight.grad.add_(1)  # pages that training holds anyway
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
chunked_loss(hidden, teacher, torch.zeros(1024, dtype=torch.long), heads, "forward", 32).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_chunked_loss_never_holds_all_logits_of_a_long_sequence():
    """1024 tokens, 150,000 entries in the vocabulary, chunks of 32; the narrow hidden state only saves time."""
    at_once = {
        "MALLOC_MMAP_THRESHOLD_": "1000000"
    }  # what is freed goes back to the system; else chunks fragment the heap
    peak = int(run([sys.executable, "-c", PEAK], **at_once).stdout)
    logits = 1024 * 150_000 * 4
    assert peak < logits / 2, f"{peak / 1e9:.2f} GB beyond the inputs, of {logits / 1e9:.2f} GB for one set of logits"


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


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


def test_neuron_warmup_fades_the_neuron_before_any_eviction(tmp_path, tiny_model, monkeypatch):
    """Warm-up of appendix C, then the ramp."""
    module, seen = sys.modules["dms_core.train.retrofit"], []  # the package exports the function of that name

    class Watched(module.RetrofitTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            dms = self.model.student.dms
            seen.append((dms.neuron_factor, dms.evicting, float(self.parts["evicted"])))
            return loss

    monkeypatch.setattr(module, "RetrofitTrainer", Watched)
    recipe = module.RetrofitConfig(final_cr=2.0, steps_per_unit=2, neuron_warmup=4, batch=2, lr=1e-3)
    data = [{"input_ids": list(range(1, 20)), "labels": list(range(1, 20))}] * 4
    settings = DMSConfig(gate="neuron", window=2, offset=0.0)
    model = module.retrofit(tiny_model(gates=False), make_tokenizer(), data, settings, recipe, tmp_path, use_cpu=True)
    assert [factor for factor, *_ in seen] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [evicting for _, evicting, _ in seen] == [False] * 4 + [True] * 2
    assert all((evicted > 0) == evicting for _, evicting, evicted in seen)
    assert (model.dms.neuron_factor, model.dms.evicting, model.dms.noise_keys) == (0.0, True, None)
    log = json.loads((tmp_path / "retrofit.json").read_text())["log"]
    assert log[0]["kd"] < 1e-6  # the first step is still the original model
    assert [entry["cr_target"] for entry in log if "loss" in entry] == [1, 1, 1, 1, 1, 1.5]


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
