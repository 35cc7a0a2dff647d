"""Retrofit training on transformers' Trainer: CR rises as CR(t) = 1 + t / steps_per_unit (paper section 3.2).

One run gives a family: a checkpoint at each integer CR.  Two recipes: all weights (with a frozen copy as
teacher), or the gates alone (the teacher is the same weights with eviction off).
"""

import copy
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState

from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.train.losses import DIRECTIONS, Distiller
from dms_core.train.optim import KINDS, make_optimizer
from dms_core.train.schedule import Schedule
from dms_core.train.trainer import ProgressBar, RetrofitTrainer, SaveFamily, checkpoint_dir, shard_teacher

__all__ = ["RetrofitConfig", "checkpoint_dir", "pad_collate", "retrofit"]


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
    neuron_warmup: int = 0  # steps at CR 1 before the ramp in which gate "neuron" fades its neuron out (paper: 2000)
    batch: int = 16  # sequences a step, over all processes
    device_batch: int | None = None  # of them at once on a device, the rest by accumulation; None: no accumulation
    optimizer: str = "adamw"  # or "muon" for the layers' matrices
    lr: float = 3e-5
    gate_lr: float | None = None  # for the adapters' parameters; lr if None
    warmup: int = 0  # steps of learning-rate warm-up
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    clip: float = 1.0  # largest norm of the gradient
    checkpointing: bool = False  # compute activations twice instead of keeping them
    chunk: int = 4096  # tokens whose logits are held at once
    seed: int = 0
    save_steps: int = 100  # between resumable checkpoints

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "aux_weight", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be >= 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)}: must be >= 0 and < 1")
        if self.neuron_warmup < 0:
            raise ValueError(f"neuron_warmup {self.neuron_warmup}: must be >= 0")
        for name, allowed in (("direction", DIRECTIONS), ("train", ("all", "gates")), ("optimizer", KINDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be one of {allowed}")
        if self.stop_cr is not None and self.stop_cr not in self.schedule.saves().values():
            raise ValueError(f"stop_cr {self.stop_cr}: must be one of {sorted(self.schedule.saves().values())}")
        for name in ("batch", "device_batch", "chunk", "save_steps", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be >= 1")

    @property
    def schedule(self) -> Schedule:
        rests = tuple(map(tuple, self.rests))
        return Schedule(self.final_cr, self.steps_per_unit, rests, self.warmup, self.neuron_warmup)

    @property
    def steps(self) -> int:
        """Steps taken: all of the schedule, or those up to ``stop_cr``."""
        if self.stop_cr is None:
            return self.schedule.steps
        return next(step for step, cr in self.schedule.saves().items() if cr == self.stop_cr)

    def split(self, processes: int) -> tuple[int, int]:
        """(sequences at once on a device, batches accumulated) that make a step of ``batch`` sequences.

        Raises ValueError where ``batch`` does not divide.
        """
        at_once = self.device_batch or self.batch // processes
        if at_once < 1 or self.batch % (processes * at_once):
            given = f"batch {self.batch} over {processes} process(es)"
            given += "" if self.device_batch is None else f" with device_batch {self.device_batch}"
            raise ValueError(f"{given}: batch must be a multiple of {processes * max(at_once, 1)}")
        return at_once, self.batch // (processes * at_once)


def pad_collate(pad: int):
    """Documents of input_ids and labels to right-padded (B, T) tensors with an attention mask.

    position_ids, which tell packed documents apart, are carried where the documents have them.
    """

    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(item["input_ids"]) for item in items)

        def rows(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([list(item[key]) + [fill] * (width - len(item[key])) for item in items])

        mask = torch.tensor([[1] * len(x["input_ids"]) + [0] * (width - len(x["input_ids"])) for x in items])
        batch = {"input_ids": rows("input_ids", pad), "labels": rows("labels", -100), "attention_mask": mask}
        if "position_ids" in items[0]:
            batch["position_ids"] = rows("position_ids", 0)
        return batch

    return collate


def retrofit(
    model: PreTrainedModel, tokenizer, dataset, dms: DMSConfig, recipe: RetrofitConfig, out: Path | str, *,
    attach=attach, **arguments,
) -> PreTrainedModel:  # fmt: skip
    """Teach ``model`` to evict, in place; checkpoints go to ``out``/cr<N>.  An interrupted run goes on by itself.

    dataset: documents with input_ids and labels (-100: not predicted), and position_ids where several are packed in a
    row (each starts over at 0).  ``arguments`` go to TrainingArguments, such as fsdp=True to shard model and teacher by
    layers (FSDP2); ``attach`` puts a method on the model.  Under torchrun every process calls this.
    """
    _check_gate(dms, recipe)
    out, world = Path(out), int(os.environ.get("WORLD_SIZE", 1))
    at_once, accumulation = recipe.split(world)
    if arguments.get("fsdp"):
        arguments.setdefault("fsdp_config", {"transformer_layer_cls_to_wrap": list(model._no_split_modules)})
    facts = {"dms": dms.to_dict(), "recipe": {**asdict(recipe), "steps": recipe.steps}}
    if int(os.environ.get("RANK", 0)) == 0:
        _claim(out, facts)
    teacher = copy.deepcopy(model) if recipe.train == "all" and recipe.direction != "lm" else None
    set_seed(recipe.seed)
    _make_student(model, dms, recipe, attach)
    settings = TrainingArguments(
        output_dir=str(out / "trainer"), max_steps=recipe.steps, per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulation, max_grad_norm=recipe.clip, seed=recipe.seed,
        ddp_find_unused_parameters=False, save_steps=recipe.save_steps, save_total_limit=1, report_to=[],
        logging_steps=max(1, min(10, recipe.steps // 20)), remove_unused_columns=False, dataloader_num_workers=0,
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    settings._n_gpu = min(settings.n_gpu, 1)  # one device a process; more of them with torchrun
    if settings.fsdp and teacher is not None:
        shard_teacher(teacher, settings.device)
    distiller = Distiller(model, teacher, recipe.direction, recipe.chunk, recipe.aux_weight)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.gate_lr, recipe.betas)
    trainer = RetrofitTrainer(
        recipe, model=distiller, args=settings, train_dataset=dataset,
        data_collator=pad_collate(tokenizer.pad_token_id or 0), callbacks=[SaveFamily(recipe, model, tokenizer, out)],
        optimizers=(optimizer, LambdaLR(optimizer, recipe.schedule.rate)),
    )  # fmt: skip
    if settings.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            "fsdp True: accelerate shards under torchrun on GPUs only; on CPUs or one process, leave it out"
        )
    _train(trainer, last_checkpoint(out / "trainer"), recipe.steps)
    if trainer.is_world_process_zero():
        (out / "retrofit.json").write_text(json.dumps({**facts, "log": trainer.state.log_history}, indent=1) + "\n")
    model.dms.evicting, model.dms.neuron_factor, model.dms.noise_keys = True, 0.0, None
    return model.eval()


def _check_gate(dms: DMSConfig, recipe: RetrofitConfig) -> None:
    if recipe.train == "gates" and dms.gate == "neuron":
        raise ValueError("train 'gates' with gate 'neuron': that gate has no parameters; train 'all'")
    if recipe.neuron_warmup and dms.gate != "neuron":
        raise ValueError(f"neuron_warmup {recipe.neuron_warmup} with gate {dms.gate!r}: must be 0; it is for 'neuron'")


def _make_student(model: PreTrainedModel, dms: DMSConfig, recipe: RetrofitConfig, attach) -> None:
    attach(model, dms)
    if recipe.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if recipe.train == "gates":
        gates = {id(p) for p in model.dms.gate_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in gates)


def _train(trainer: RetrofitTrainer, last: str | None, steps: int) -> None:
    """From the checkpoint ``last`` to the end; a finished run resumed, the Trainer would take one step more."""
    trainer.remove_callback(PrinterCallback)  # what disable_tqdm puts in place of the Trainer's own bar
    trainer.add_callback(ProgressBar())
    if last is None or int(last.rsplit("-", 1)[1]) < steps:
        trainer.train(resume_from_checkpoint=last)
    else:
        trainer._load_from_checkpoint(last)
        trainer.state = TrainerState.load_from_json(f"{last}/trainer_state.json")


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
