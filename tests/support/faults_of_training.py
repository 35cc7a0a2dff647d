"""Faults while a retrofit trains and while a checkpoint is written."""

import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from faulty import cut, error_of, fault, flip, small_disk
from forks import die, in_child, killed, torchrun
from transformers import Trainer, TrainerCallback

from companion.tasks.reasoner import make_tokenizer
from dms_core import checkpoint
from dms_core.checkpoint import GATES, SETTINGS, load_model, save_model
from dms_core.config import DMSConfig
from dms_core.storage import only_writer, read_json, write_json
from dms_core.train.recipe import RetrofitConfig
from dms_core.train.retrofit import retrofit

DMS = DMSConfig(window=2, scale=10.0)
RECIPE = RetrofitConfig(final_cr=2.0, steps_per_unit=8, rests=(), batch=2, lr=1e-2, save_steps=3, warmup=1)
TOKENIZER, WEIGHTS = make_tokenizer(), "model.safetensors"
RETROFIT = sys.modules["dms_core.train.retrofit"]  # the package exports the function of that name
COMMON = tempfile.TemporaryDirectory()  # what several faults begin with; faults run in copies of this process


def train(make, out: Path, optimizer="muon", **more) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 40, (n,), generator=g).tolist() for n in (9, 14, 11, 8, 12, 10, 15, 9, 13, 11)]
    documents = [{"input_ids": x, "labels": [-100] * 3 + x[3:]} for x in ids]
    recipe, more = replace(RECIPE, optimizer=optimizer), {"train_sampling_strategy": "sequential", **more}
    return retrofit(make(gates=False), TOKENIZER, documents, DMS, recipe, out, use_cpu=True, **more).state_dict()


def whole(make) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing disturbs, which is made once."""
    out, file = Path(COMMON.name, "whole"), Path(COMMON.name, "whole.pt")
    if not file.exists():
        torch.save(train(make, out), file)
    return torch.load(file)


def stopping_at(step: int, action: Callable):
    """The trainer calls ``action`` as a step begins."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                action()

    class Stopping(RETROFIT.RetrofitTrainer):
        def __init__(self, *args, callbacks, **kwargs) -> None:
            super().__init__(*args, callbacks=[*callbacks, Stop()], **kwargs)

    return mock.patch.object(RETROFIT, "RetrofitTrainer", Stopping)


def goes_on(make, out: Path) -> str:
    """A run ends with the weights and losses of one that nothing disturbed; returns what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = train(make, out)
    assert all(torch.equal(weight, weights[name]) for name, weight in whole(make).items())
    assert load_model(out / "cr2") is not None
    assert losses(out) == losses(Path(COMMON.name, "whole"))
    return "; ".join(str(w.message) for w in caught if str(out) in str(w.message))


AGAIN = "the next start goes on from the last checkpoint, to the same weights bit by bit"


@fault("Training", "`kill -9` between two steps", AGAIN)
def killed_between_steps(out, make):
    with stopping_at(5, die):
        killed(lambda: train(make, out))
    assert [d.name for d in (out / "trainer").iterdir()] == ["checkpoint-3"]
    return goes_on(make, out)


@fault("Training", "`kill -9` while the trainer writes a checkpoint", AGAIN)
def killed_in_checkpoint_of_trainer(out, make):
    save = Trainer._save_optimizer_and_scheduler

    def half(self, directory):
        if directory.endswith("-6"):
            Path(directory, "optimizer.pt").write_bytes(b"half")
            die()
        save(self, directory)

    with mock.patch.object(Trainer, "_save_optimizer_and_scheduler", half):
        killed(lambda: train(make, out))
    assert (out / "trainer" / "checkpoint-6" / "optimizer.pt").exists()
    return goes_on(make, out)


def losses(out: Path) -> list[list[float]]:
    """Step by step."""
    log = read_json(out / "retrofit.json")["log"]
    return [[entry[key] for key in ("loss", "kd", "aux", "evicted")] for entry in log if "loss" in entry]


def interrupted(make) -> Path:
    """A run with checkpoints of the trainer at steps 3 and 6, which is made once."""
    out = Path(COMMON.name, "interrupted")
    if not out.exists():
        with stopping_at(7, die):
            killed(lambda: train(make, out))
    assert sorted(d.name for d in (out / "trainer").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    return out


BEFORE = "goes on from the checkpoint before, to the same weights bit by bit"


@fault("Training", "the optimiser's state in the newest checkpoint is cut short", BEFORE)
def optimizer_cut(out, make):
    shutil.copytree(interrupted(make), out, dirs_exist_ok=True)
    cut(out / "trainer" / "checkpoint-6" / "optimizer.pt")
    return goes_on(make, out)


@fault("Training", "one bit of it is flipped", BEFORE)
def optimizer_flipped(out, make):
    shutil.copytree(interrupted(make), out, dirs_exist_ok=True)
    flip(out / "trainer" / "checkpoint-6" / "optimizer.pt")
    return goes_on(make, out)


@fault("Training", "every checkpoint of the trainer is damaged", "refused; nothing is overwritten")
def all_damaged(out, make):
    shutil.copytree(interrupted(make), out, dirs_exist_ok=True)
    for directory in (out / "trainer").iterdir():
        flip(directory / "model.safetensors")
    return error_of(lambda: train(make, out))


@fault("Training", "the disk fills up while the trainer writes a checkpoint", "stops; with room again, " + AGAIN)
def disk_full_in_training(out, make):
    room = 3 * sum(file.stat().st_size for file in (interrupted(make) / "trainer" / "checkpoint-3").iterdir()) // 2

    def run():
        with small_disk(out / "run", room) as enlarge:
            said = error_of(lambda: train(make, out / "run"))
            enlarge()
            return said, goes_on(make, out / "run")

    said, warned = in_child(run)
    assert not warned
    return said.partition(" (")[0]


@fault("Training", "one of two processes of torchrun is killed", "the other is ended; one process goes on from there")
def worker_dies(out, make):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def work():
        with stopping_at(5, die if os.environ["RANK"] == "1" else time.time):
            train(make, out / "run", "adamw", ddp_backend="gloo")

    def launch():
        with pytest.raises(ChildFailedError) as error:
            torchrun(work)
        return next(failure.exitcode for failure in error.value.failures.values())

    assert in_child(launch) in (-signal.SIGKILL, 1)  # of the one whose end is noticed first; 1: it lost the other
    assert not (out / "run" / "retrofit.json").exists()
    weights = train(make, out / "run", "adamw")  # Muon would magnify how sums are rounded
    for name, weight in train(make, out / "whole", "adamw").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)
    return ""


@fault("Training", "a second run starts in the same directory", "refused; the first is not disturbed")
def two_runs(out, make):
    with only_writer(out):
        said = in_child(lambda: error_of(lambda: train(make, out)))
    goes_on(make, out)
    return said


@fault("Checkpoints", "`kill -9` within the weights, over an older checkpoint", "refused when loaded")
def killed_in_weights(out, make):
    save = transformers.modeling_utils.safe_save_file

    def half(tensors, file, metadata=None):
        save(tensors, file, metadata=metadata)
        cut(Path(file))
        die()

    save_model(make(), out)
    with mock.patch.object(transformers.modeling_utils, "safe_save_file", half):
        killed(lambda: save_model(make(seed=1), out))
    return error_of(lambda: load_model(out))


@fault("Checkpoints", "`kill -9` between weights and settings, over an older checkpoint", "refused when loaded")
def killed_before_settings(out, make):
    save_model(make(), out)
    with mock.patch.object(checkpoint, "write_json", die):
        killed(lambda: save_model(make(seed=1), out))
    return error_of(lambda: load_model(out))


@fault("Checkpoints", "the weights are cut short", "refused when loaded")
def weights_cut(out, make):
    save_model(make(), out)
    cut(out / WEIGHTS)
    return error_of(lambda: load_model(out))


@fault("Checkpoints", "one bit of a weight is flipped", "refused when loaded")
def weight_flipped(out, make):
    save_model(make(), out)
    flip(out / WEIGHTS)
    return error_of(lambda: load_model(out))


@fault("Checkpoints", "one bit of a gate is flipped", "refused when loaded")
def gate_flipped(out, make):
    save_model(make(), out)
    flip(out / GATES)
    return error_of(lambda: load_model(out))


@fault("Checkpoints", "`kill -9` while the settings are replaced", "the old ones are there, as they were")
def killed_in_settings(out, make):
    write_json(out / SETTINGS, {"a": 1})
    with mock.patch.object(os, "replace", die):
        killed(lambda: write_json(out / SETTINGS, {"a": 2}))
    assert read_json(out / SETTINGS) == {"a": 1}
    return ""


@fault("Checkpoints", "the disk fills up", "stops; what is there is no checkpoint")
def disk_full_in_checkpoint(out, make):
    def run():
        with small_disk(out / "cr8", 40_960):
            return error_of(lambda: save_model(make(), out / "cr8")), checkpoint.is_checkpoint(out / "cr8")

    said, found = in_child(run)
    assert not found
    return said.partition(" (")[0]
