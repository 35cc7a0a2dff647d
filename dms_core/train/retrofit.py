"""Retrofit training on transformers' Trainer: CR rises as CR(t) = 1 + t / steps_per_unit (paper section 3.2).

One run gives a family: a checkpoint at each integer CR.  Three recipes: all weights (with a frozen copy as teacher);
low-rank adapters on frozen weights, or the gates alone (the teacher is the same weights without either).
"""

import contextlib
import copy
import hashlib
import os
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState

from dms_core.config import DMSConfig
from dms_core.model import attach
from dms_core.storage import SEAL, broken_seal, claim, only_writer, read_json, write_json
from dms_core.train.lora import add_lora, fold_lora
from dms_core.train.losses import Distiller
from dms_core.train.optim import make_optimizer
from dms_core.train.recipe import RetrofitConfig
from dms_core.train.trainer import ProgressBar, RetrofitTrainer, SaveFamily, StopAfter, shard_teacher

CLAIM = "recipe.json"  # what a directory of checkpoints was trained with


def pad_collate(pad: int):
    """Documents of input_ids and labels to right-padded (B, T) tensors with an attention mask.

    position_ids, which tell packed documents apart, are carried where any document has them: 0, 1, .. in the others.
    """

    fills = {"input_ids": pad, "labels": -100, "attention_mask": 0, "position_ids": 0}

    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        packed = any("position_ids" in item for item in items)
        items = [_complete(item, packed) for item in items]
        width = max(len(item["input_ids"]) for item in items)
        return {
            key: torch.tensor([[*item[key], *[fill] * (width - len(item[key]))] for item in items])
            for key, fill in fills.items()
            if key in items[0]
        }

    return collate


def _complete(item: dict, packed: bool) -> dict:
    count = len(item["input_ids"])
    places = {"position_ids": range(count)} if packed else {}
    return {**places, **item, "attention_mask": [1] * count}


def retrofit(
    model,
    tokenizer,
    dataset,
    dms: DMSConfig,
    recipe: RetrofitConfig,
    out,
    *,
    until: float | None = None,
    attach=attach,
    facts=None,
    **arguments,
) -> PreTrainedModel:
    """Teach ``model`` to evict, in place; checkpoints go to ``out``/cr<N>.  An interrupted run goes on by itself.

    Where not all weights train a checkpoint is small and names the files that ``model`` was loaded from, which must
    stay as they are.  Of a model that was changed since, empty ``model.config.name_or_path``: with ``train="gates"``
    all weights are kept then.

    model: a transformers decoder.  dataset: documents with input_ids and labels (-100: not predicted), and position_ids
    where several are packed in a row (each starts over at 0).  ``arguments`` go to TrainingArguments, such as fsdp=True
    to shard model and teacher by layers (FSDP2); ``attach`` puts a method on the model; ``facts``, a dictionary, say
    what else ``out`` belongs to, beside the settings (default: the model's weights and the number of documents).
    ``until``: stop after the checkpoint of this CR, where the next call goes on.  Under torchrun every process calls
    this.

    Raises ValueError for settings that do not fit each other, weights that train and are not in float32, an ``until``
    at which the run keeps no checkpoint or that it is past, and if ``out`` holds a run with other settings, or another
    process writes there.

    >>> recipe = RetrofitConfig(final_cr=2.0, steps_per_unit=2, batch=2)  # at least a few hundred steps in earnest
    >>> documents = [{"input_ids": [2, 3, 4, 5, 6], "labels": [-100, 3, 4, 5, 6]}] * 4
    >>> retrofit(model, tokenizer, documents, DMSConfig(window=2), recipe, "run").dms.config.window
    2
    """
    apart = _rows_apart(dms, recipe, fsdp=bool(arguments.get("fsdp")))
    if recipe.train == "all" and (dtype := next((d for d in _dtypes(model) if d != torch.float32), None)):
        raise ValueError(f"a model in {dtype}: all weights train in float32 alone; load_base(NAME, dtype='float32')")
    out, last = Path(out), recipe.steps if until is None else recipe.step_of(until)
    settings = _settings(model, recipe, out, arguments)
    if settings.process_index == 0:
        facts = {"weights": _mark(model), "documents": len(dataset)} if facts is None else facts
        claim(out, {**facts, **dms.to_dict(), **recipe.to_dict()}, CLAIM)
    teacher = copy.deepcopy(model) if recipe.train == "all" and recipe.direction != "lm" else None
    set_seed(recipe.seed)
    _put_on(model, dms, recipe, attach)
    if settings.fsdp and teacher is not None:
        shard_teacher(teacher, settings.device)
    distiller = Distiller(model, teacher, recipe.direction, recipe.chunk, recipe.aux_weight)
    if apart:
        model.to(settings.device)  # the optimiser's own copies of rows must be there when its state is loaded
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rates = recipe.lr, recipe.weight_decay, recipe.gate_lr, recipe.betas
    optimizer = make_optimizer(trained, recipe.optimizer, *rates, model.dms.gate_rows())
    rows = {"train_dataset": dataset, "data_collator": pad_collate(tokenizer.pad_token_id or 0)}
    steps = {"optimizers": (optimizer, LambdaLR(optimizer, recipe.schedule.rate))}
    callbacks = [ProgressBar(last), StopAfter(last)]
    trainer = RetrofitTrainer(recipe, model=distiller, args=settings, callbacks=callbacks, **rows, **steps)
    trainer.add_callback(SaveFamily(recipe, model, tokenizer, out, trainer.check_finite))
    if settings.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError("fsdp True: must be under torchrun on GPUs; on CPUs or in one process, leave it out")
    with only_writer(out) if settings.process_index == 0 else contextlib.nullcontext():
        _train(trainer, last_checkpoint(out / "trainer"), last)
        if trainer.is_world_process_zero() and trainer.state.global_step == recipe.steps:
            used = {**asdict(recipe), "steps": recipe.steps}
            write_json(out / "retrofit.json", {"dms": dms.to_dict(), "recipe": used, "log": trainer.state.log_history})
    model.dms.evicting, model.dms.neuron_factor, model.dms.noise_keys = True, 0.0, None
    fold_lora(model)
    return model.eval()


def _rows_apart(dms: DMSConfig, recipe: RetrofitConfig, fsdp: bool) -> bool:
    """Whether the optimizer treats rows of the query projection apart.  Raises ValueError for settings at odds."""
    if recipe.train != "all" and dms.gate == "neuron":
        raise ValueError(f"train {recipe.train!r} with gate 'neuron': that gate is part of the weights; train 'all'")
    for name in ("neuron_warmup", "neuron_zero"):
        if (value := getattr(recipe, name)) and dms.gate != "neuron":
            raise ValueError(f"{name} {value} with gate {dms.gate!r}: must be {type(value)(0)}; it is for 'neuron'")
    apart = dms.gate == "neuron" and (recipe.gate_lr is not None or recipe.neuron_zero)
    if apart and fsdp:
        raise ValueError("fsdp True with gate 'neuron': must be without gate_lr and neuron_zero, which need whole rows")
    if fsdp and recipe.optimizer != "adamw":
        raise ValueError(f"fsdp True with optimizer {recipe.optimizer!r}: must be 'adamw', whose state can be sharded")
    return apart


def _dtypes(model: PreTrainedModel) -> dict[torch.dtype, None]:
    return dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point())


def _mark(model: PreTrainedModel) -> str:
    """A hash of some values of every parameter, as bf16 has them: what tells other weights from these."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.detach().flatten()[:16].bfloat16().tolist()}\n".encode())
    return digest.hexdigest()[:16]


def _put_on(model: PreTrainedModel, dms: DMSConfig, recipe: RetrofitConfig, attach) -> None:
    """Gates, and adapters before them, since gates are linear layers, too; what does not train is frozen."""
    if recipe.train == "lora":
        add_lora(model, recipe.rank)
    attach(model, dms)
    if recipe.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if recipe.train == "gates":
        model.requires_grad_(False)
        for parameter in model.dms.gate_parameters():
            parameter.requires_grad_(True)


def _settings(model: PreTrainedModel, recipe: RetrofitConfig, out: Path, arguments: dict) -> TrainingArguments:
    at_once, accumulation = recipe.split(int(os.environ.get("WORLD_SIZE", 1)))
    if arguments.get("fsdp"):
        arguments = {"fsdp_config": {"transformer_layer_cls_to_wrap": list(model._no_split_modules)}, **arguments}
    steps = {"max_steps": recipe.steps, "logging_steps": max(1, min(10, recipe.steps // 20)), "seed": recipe.seed}
    batch = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": accumulation}
    update = {"max_grad_norm": recipe.clip, "ddp_find_unused_parameters": False, "remove_unused_columns": False}
    saved = {"save_steps": recipe.save_steps, "save_total_limit": 2, "report_to": [], "disable_tqdm": True}
    settings = TrainingArguments(str(out / "trainer"), **steps, **batch, **update, **saved, **arguments)
    settings._n_gpu = min(settings.n_gpu, 1)  # one device a process; more of them with torchrun
    return settings


def _train(trainer: RetrofitTrainer, last: str | None, steps: int) -> None:
    """From the checkpoint ``last`` to ``steps``; a finished run resumed, the Trainer would take one step more."""
    trainer.remove_callback(PrinterCallback)  # what disable_tqdm puts in place of the Trainer's own bar
    done = 0 if last is None else int(last.rsplit("-", 1)[1])
    if done > steps:
        raise ValueError(f"until step {steps}: {last} is past it; load the checkpoint of that CR")
    if done < steps:
        trainer.train(resume_from_checkpoint=last)
    else:
        trainer._load_from_checkpoint(last)
        trainer.state = TrainerState.load_from_json(f"{last}/trainer_state.json")


def last_checkpoint(directory: Path) -> str | None:
    """The newest Trainer checkpoint that is complete and as it was saved, if any.

    Warns of a damaged one that is passed over.  Raises ValueError if there are only such.
    """
    found = [d for d in directory.glob("checkpoint-*") if _is_complete(d)]
    damaged: list = []
    for checkpoint in sorted(found, key=lambda d: int(d.name.split("-")[1]), reverse=True):
        if not (file := broken_seal(checkpoint)):
            if damaged:
                warnings.warn(f"{damaged[0]}: not the file that was saved; going on from {checkpoint}", stacklevel=2)
            return str(checkpoint)
        damaged.append(file)
    if damaged:
        remedy = f"delete {directory} to begin again"
        raise ValueError(f"{damaged[0]}: not the file that was saved, and no checkpoint is whole; {remedy}")
    return None


def _is_complete(checkpoint: Path) -> bool:
    """Was it saved to its end?  Of one without a seal, its last file, if that can be read."""
    try:
        return (checkpoint / SEAL).exists() or bool(read_json(checkpoint / "trainer_state.json"))
    except (FileNotFoundError, ValueError):
        return False
