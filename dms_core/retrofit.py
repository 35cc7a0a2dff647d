"""Retrofit training on transformers' Trainer: CR rises as CR(t) = 1 + t / steps_per_unit (paper section 3.2).

One run gives a family: a checkpoint at each integer CR.  Two recipes: all weights (with a frozen copy as
teacher), or the gates alone (the teacher is the same weights with eviction off).
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState

from dms_core.checkpoint import save_model
from dms_core.config import DMSConfig, target_fraction
from dms_core.distill import DIRECTIONS, Distiller
from dms_core.model import attach
from dms_core.optim import KINDS, make_optimizer
from dms_core.schedule import Schedule


@dataclass(frozen=True)
class RetrofitConfig:
    """A recipe.  The defaults are the paper's; rests and Muon help at the embedded scale."""

    train: str = "all"  # "all" weights, or "gates" alone
    direction: str = "forward"  # KL(teacher || student); "reverse", or "lm" for no teacher
    aux_weight: float = 1.0  # of the compression loss
    final_cr: float = 8.0
    steps_per_unit: int = 100  # optimiser steps per unit of CR
    rests: tuple[tuple[float, int], ...] = ()  # (CR, steps): stay there while the rate falls to zero
    stop_cr: float | None = None  # end after the checkpoint of this CR, rate and CR schedules as if going on
    batch: int = 16  # sequences a device and step
    optimizer: str = "adamw"  # or "muon" for the layers' matrices
    lr: float = 3e-5
    gate_lr: float | None = None  # for the adapters' parameters; lr if None
    warmup: int = 0  # steps of learning-rate warm-up
    weight_decay: float = 0.0
    chunk: int = 4096  # tokens whose logits are held at once
    seed: int = 0
    save_steps: int = 100  # between resumable checkpoints

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "aux_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be >= 0")
        for name, allowed in (("direction", DIRECTIONS), ("train", ("all", "gates")), ("optimizer", KINDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be one of {allowed}")
        if self.stop_cr is not None and self.stop_cr not in self.schedule.saves().values():
            raise ValueError(f"stop_cr {self.stop_cr}: must be one of {sorted(self.schedule.saves().values())}")
        for name in ("batch", "chunk", "save_steps", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be >= 1")

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.final_cr, self.steps_per_unit, tuple(map(tuple, self.rests)), self.warmup)

    @property
    def steps(self) -> int:
        """Steps taken: all of the schedule, or those up to ``stop_cr``."""
        if self.stop_cr is None:
            return self.schedule.steps
        return next(step for step, cr in self.schedule.saves().items() if cr == self.stop_cr)


class RetrofitTrainer(Trainer):
    """Hands the schedule's target to the Distiller, keeps its loss parts for the log, seeds each step."""

    def __init__(self, recipe: RetrofitConfig, **kwargs) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.model_accepts_loss_kwargs = False  # the loss is a mean: divide it by the accumulation steps
        self.parts: dict[str, torch.Tensor] = {}
        self.micro_step = (-1, 0)  # optimiser step, and the batch within it

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        step = self.state.global_step
        self._seed_noise(step)
        outputs = model(**inputs, alpha_target=target_fraction(self.recipe.schedule.cr(step)))
        self.parts = {name: outputs[name] for name in ("kd", "aux", "evicted")}
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _seed_noise(self, step: int) -> None:
        """The noise of a batch depends on seed, step, batch within the step and process; not on what ran before."""
        last, micro = self.micro_step
        self.micro_step = step, micro + 1 if step == last else 0
        place = [self.recipe.seed, step, self.micro_step[1], self.args.process_index]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))

    def _save(self, output_dir=None, state_dict=None) -> None:
        """Tied weights are saved once."""
        state = self.model.state_dict() if state_dict is None else state_dict
        again = self.model._keys_to_ignore_on_save or ()
        super()._save(output_dir, {name: tensor for name, tensor in state.items() if name not in again})

    def log(self, logs: dict, *args, **kwargs) -> None:
        if "loss" in logs and self.parts:
            logs |= {name: float(value) for name, value in self.parts.items()}
            logs["cr_target"] = self.recipe.schedule.cr(max(self.state.global_step - 1, 0))
            logs["cr_measured"] = 1 / (1 - min(logs["evicted"], 0.999))
        super().log(logs, *args, **kwargs)


class SaveFamily(TrainerCallback):
    """Keeps the student at each integer CR."""

    def __init__(self, recipe: RetrofitConfig, student: PreTrainedModel, tokenizer, out: Path) -> None:
        self.recipe, self.student, self.tokenizer, self.out = recipe, student, tokenizer, out

    def on_step_end(self, args, state, control, **kwargs):
        cr = self.recipe.schedule.saves().get(state.global_step)
        if cr is not None and state.is_world_process_zero:
            save_model(self.student, checkpoint_dir(self.out, cr), self.tokenizer, cr=cr, step=state.global_step)


class ProgressBar(TrainerCallback):
    """One plain bar on standard error, in a terminal and in a notebook; the log itself goes to retrofit.json."""

    def on_train_begin(self, args, state, control, **kwargs):
        show = state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="retrofit", mininterval=2, disable=not show
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.bar.set_postfix(
            {key: f"{logs[key]:.3g}" for key in ("kd", "cr_target", "cr_measured") if key in logs}, refresh=False
        )

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def checkpoint_dir(out: Path | str, cr: float) -> Path:
    return Path(out) / f"cr{cr:g}"


def pad_collate(pad: int):
    """Documents of input_ids and labels to right-padded (B, T) tensors with an attention mask."""

    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(item["input_ids"]) for item in items)

        def rows(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([list(item[key]) + [fill] * (width - len(item[key])) for item in items])

        mask = torch.tensor([[1] * len(x["input_ids"]) + [0] * (width - len(x["input_ids"])) for x in items])
        return {"input_ids": rows("input_ids", pad), "labels": rows("labels", -100), "attention_mask": mask}

    return collate


def retrofit(
    model: PreTrainedModel, tokenizer, dataset, dms: DMSConfig, recipe: RetrofitConfig, out: Path | str, *,
    attach=attach, **arguments,
) -> PreTrainedModel:  # fmt: skip
    """Teach ``model`` to evict, in place; checkpoints go to ``out``/cr<N>.  An interrupted run goes on by itself.

    dataset: documents with input_ids and labels (-100: not predicted).  ``attach`` puts a method on the model;
    ``arguments`` go to TrainingArguments.
    """
    if recipe.train == "gates" and dms.gate == "neuron":
        raise ValueError("train 'gates' with gate 'neuron': that gate has no parameters; train 'all'")
    out = Path(out)
    facts = {"dms": dms.to_dict(), "recipe": {**asdict(recipe), "steps": recipe.steps}}
    _claim(out, facts)
    teacher = copy.deepcopy(model) if recipe.train == "all" and recipe.direction != "lm" else None
    set_seed(recipe.seed)
    attach(model, dms)
    if recipe.train == "gates":
        gates = {id(p) for p in model.dms.gate_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in gates)
    settings = TrainingArguments(
        output_dir=str(out / "trainer"), max_steps=recipe.steps, per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.lr, weight_decay=recipe.weight_decay, adam_beta2=0.95, max_grad_norm=1.0, seed=recipe.seed,
        save_steps=recipe.save_steps, save_total_limit=1, report_to=[],
        logging_steps=max(1, min(10, recipe.steps // 20)), remove_unused_columns=False, dataloader_num_workers=0,
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    distiller = Distiller(model, teacher, recipe.direction, recipe.chunk, recipe.aux_weight)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.gate_lr)
    trainer = RetrofitTrainer(
        recipe, model=distiller, args=settings, train_dataset=dataset,
        data_collator=pad_collate(tokenizer.pad_token_id), callbacks=[SaveFamily(recipe, model, tokenizer, out)],
        optimizers=(optimizer, LambdaLR(optimizer, recipe.schedule.rate)),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # what disable_tqdm puts in place of the Trainer's own bar
    trainer.add_callback(ProgressBar())
    last = last_checkpoint(out / "trainer")
    if (
        last is not None and int(last.rsplit("-", 1)[1]) >= recipe.steps
    ):  # resumed, the Trainer would take one step more
        trainer._load_from_checkpoint(last)
        trainer.state = TrainerState.load_from_json(f"{last}/trainer_state.json")
    else:
        trainer.train(resume_from_checkpoint=last)
    (out / "retrofit.json").write_text(json.dumps({**facts, "log": trainer.state.log_history}, indent=1) + "\n")
    return model.eval()


def _claim(out: Path, facts: dict) -> None:
    """A directory belongs to one recipe: another one may not go on from its checkpoints."""
    file = out / "recipe.json"
    if file.exists() and (before := json.loads(file.read_text())) != json.loads(json.dumps(facts)):
        changed = sorted(k for part in facts for k in facts[part] if facts[part][k] != before.get(part, {}).get(k))
        raise ValueError(f"{out} holds a run with other {', '.join(changed)}: give the new run another directory")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=1) + "\n")


def last_checkpoint(directory: Path) -> str | None:
    """The newest complete Trainer checkpoint, if any."""
    found = [d for d in directory.glob("checkpoint-*") if (d / "trainer_state.json").exists()]
    return str(max(found, key=lambda d: int(d.name.split("-")[1]))) if found else None
