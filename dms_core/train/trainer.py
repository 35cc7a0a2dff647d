"""The retrofit's training loop on transformers' Trainer: targets, noise and loss weights of a step's global batch.

A step's result does not depend on how its rows are cut into processes and accumulation steps: noise is keyed by a
row's index in the global batch (``noise.keyed_noise``), losses are means over that batch (``losses.Totals``).
"""

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback

from dms_core.checkpoint import fingerprint, save_gates, save_model, write_difference, writing
from dms_core.config import target_fraction
from dms_core.gate import warmup_factor
from dms_core.hub_files import local_directory
from dms_core.noise import row_keys
from dms_core.probe import decoder_of
from dms_core.storage import seal
from dms_core.train.lora import lora_difference
from dms_core.train.losses import Totals
from dms_core.train.schedule import checkpoint_dir


class RetrofitTrainer(Trainer):
    """Hands target, noise keys and totals to the Distiller, and keeps the parts of its loss for the log."""

    def __init__(self, recipe, **kwargs) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.model_accepts_loss_kwargs = True  # the loss is a share of the step's mean: no division by accumulation
        self.totals: Totals | None = None
        self.parts: dict[str, torch.Tensor] = {}  # of the current step, summed over this process's batches
        self.seen = 0  # batches of the current step that this process has had

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(1, 3, dtype=torch.float64)
        for batch in samples:
            labels, mask = batch["labels"], batch["attention_mask"]
            counts += torch.tensor([(labels[:, 1:] != -100).sum(), len(labels), mask.sum()], dtype=counts.dtype)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.to(device))
        self.totals = Totals(*counts.sum(0).tolist())
        self.parts, self.seen = {}, 0
        return samples, self.totals.labelled

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        step, schedule = self.state.global_step, self.recipe.schedule
        dms = self.model.student.dms
        dms.evicting = step >= schedule.lead
        dms.neuron_factor = 0.0 if dms.evicting else warmup_factor(step, schedule.lead)
        if self.recipe.neuron_zero and step == schedule.lead:  # in each batch of that step: nothing has moved it since
            dms.zero_neurons()
        first = (self.seen * self.args.world_size + self.args.process_index) * self.args.per_device_train_batch_size
        labels = inputs["labels"]
        dms.noise_keys = row_keys(self.recipe.seed, step, first, len(labels)).to(labels.device)
        self.seen += 1
        outputs = model(**inputs, alpha_target=target_fraction(schedule.cr(step)), totals=self.totals)
        for name in ("kd", "aux", "evicted"):
            self.parts[name] = self.parts.get(name, 0) + outputs[name]
        loss = outputs["loss"] * self.args.world_size  # gradients, and the losses logged, are means over processes
        return (loss, outputs) if return_outputs else loss

    def check_finite(self) -> None:
        """Before anything is saved.  Raises ValueError where a loss of this step, of any process, is not finite."""
        bad = [name for name, value in self._values().items() if not math.isfinite(value)]
        if bad:
            at = f"step {self.state.global_step}: {bad[0]} is not finite"
            raise ValueError(f"{at}; nothing of it was saved, {self.args.output_dir} holds what came before")

    def _values(self) -> dict[str, float]:
        """The parts of this step's loss, summed over processes; each of them takes part."""
        if not self.parts:
            return {}
        values = self.accelerator.reduce(torch.stack([part.float() for part in self.parts.values()]))
        return dict(zip(self.parts, values.tolist(), strict=True))

    def _save_checkpoint(self, *args) -> None:
        """Sealed when every process has written its part, so that a resumed run can tell a whole checkpoint."""
        self.check_finite()
        with writing(directory := Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(directory)

    def _save(self, output_dir=None, state_dict=None) -> None:
        """Tied weights are saved once."""
        state = self.model.state_dict() if state_dict is None else state_dict
        again = self.model._keys_to_ignore_on_save or ()
        super()._save(output_dir, {name: tensor for name, tensor in state.items() if name not in again})

    def log(self, logs: dict, *args, **kwargs) -> None:
        if "loss" in logs and self.parts:
            logs |= self._values()
            logs["cr_target"] = self.recipe.schedule.cr(max(self.state.global_step - 1, 0))
            logs["cr_measured"] = 1 / (1 - min(logs["evicted"], 0.999))
        super().log(logs, *args, **kwargs)


class SaveFamily(TrainerCallback):
    """Keeps the student at each integer CR: whole where all weights train, else what goes on its base model."""

    def __init__(self, recipe, student: PreTrainedModel, tokenizer, out: Path, check: Callable[[], None]) -> None:
        self.recipe, self.student, self.tokenizer, self.out, self.check = recipe, student, tokenizer, out, check

    def on_step_end(self, args, state, control, model=None, **kwargs):
        cr = self.recipe.schedule.saves().get(state.global_step)
        if cr is None:
            return
        self.check()
        weights = full_state(model) if args.fsdp else None  # every process takes part
        if state.is_world_process_zero:
            self._save(checkpoint_dir(self.out, cr), weights, cr=cr, step=state.global_step)

    def _save(self, place: Path, weights: dict | None, **facts) -> None:
        if self.recipe.train != "all" and self.base:  # dms.json comes last
            self.tokenizer.save_pretrained(place)
        if self.recipe.train == "lora":
            parts = lora_difference(self.student.state_dict() if weights is None else weights)
            write_difference(self.student, parts, place, weights, **facts, **self.base)
        elif self.recipe.train == "gates" and self.base:
            save_gates(self.student, place, weights, **facts, **self.base)
        else:
            save_model(self.student, place, self.tokenizer, weights, **facts)

    @cached_property
    def base(self) -> dict:
        """What dms.json says of the base model; nothing of a model that was not loaded from files in reach."""
        name, revision = self.student.config.name_or_path, getattr(self.student, "base_revision", None)
        name = str(Path(name).resolve()) if name and Path(name).is_dir() else name
        note = {"base_revision": revision} if revision else {}
        try:
            found = {"base_weights": fingerprint(local_directory(name, revision=revision))} if name else {}
            return {"base": name, **found, **note} if name else {}
        except ValueError:
            return {}


def full_state(distiller) -> dict:
    """The student's weights gathered from their FSDP2 shards, on the first process; empty on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(distiller, options=options)
    return {name.removeprefix("student."): tensor for name, tensor in state.items()}


def shard_teacher(teacher: PreTrainedModel, device: torch.device) -> None:
    """FSDP2 on a teacher that is no part of the trained module: its layers are sharded, the rest is replicated.

    Embeddings and output layer stay whole: they may be one tensor, and the loss calls the output layer by itself.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in decoder_of(teacher).layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)  # each is a root, and roots stay gathered


class StopAfter(TrainerCallback):
    """Ends a run after a step, with a checkpoint from which it can go on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


class ProgressBar(TrainerCallback):
    """One plain bar on standard error, in a terminal and in a notebook; the log itself goes to retrofit.json."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = not state.is_world_process_zero
        self.bar = tqdm(None, "retrofit", self.steps, initial=state.global_step, mininterval=2, disable=hidden)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {key: f"{logs[key]:.3g}" for key in ("kd", "cr_target", "cr_measured") if key in logs}
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
