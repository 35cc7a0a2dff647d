"""Recipes: everything that defines a retrofit, as a YAML file of flat fields.

The fields are those of DMSConfig and RetrofitConfig, and which model, data and context they were made for.  The
library carries the paper's six rows (Table 3), the released adapter recipe, and some that run on a CPU.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import dacite
import yaml

from dms_core.config import DMSConfig, check_numbers
from dms_core.train.schedule import Schedule

RECIPES = Path(__file__).parent / "recipes"
DIRECTIONS = ("forward", "reverse", "lm")
OPTIMIZERS = ("adamw", "muon")
TRAINED = ("all", "lora", "gates")
# Fields added later: at these values they are left out, so that names and hashes of older runs stay valid.
LATER = {"decay": None, "neuron_zero": False, "autocast": False, "rank": 8}


@dataclass(frozen=True)
class RetrofitConfig:
    """How a retrofit trains.  Ramp, losses and rate are the paper's or its code's; rests and Muon help a small model.

    Raises ValueError for a value that its field may not have.

    >>> RetrofitConfig(final_cr=4.0, steps_per_unit=50).steps
    150
    """

    train: str = "all"  # "all" weights; "lora" on frozen ones, beside the gates; or "gates" alone
    rank: int = 8  # of "lora"
    direction: str = "forward"  # KL(teacher || student); "reverse", or "lm" for no teacher
    aux_weight: float = 1.0  # of the compression loss
    final_cr: float = 8.0
    steps_per_unit: int = 100  # optimiser steps per unit of CR
    rests: tuple[tuple[float, int], ...] = ()  # (CR, steps): stay there while the rate falls to zero
    decay: int | None = None  # the rate falls to zero over the last so many steps (0: never), and in no rest
    stop_cr: float | None = None  # end after the checkpoint of this CR, rate and CR schedules as if going on
    neuron_warmup: int = 0  # steps at CR 1 before the ramp in which gate "neuron" fades its neuron out (paper: 2000)
    neuron_zero: bool = False  # after these steps set that neuron to 0: like adapters, it then evicts nothing at first
    batch: int = 16  # sequences a step, over all processes
    device_batch: int | None = None  # of them at once on a device, the rest by accumulation; None: no accumulation
    optimizer: str = "adamw"  # or "muon" for the layers' matrices
    lr: float = 3e-5
    gate_lr: float | None = None  # for the adapters, or the neuron's rows of the weights; None: as other parameters
    warmup: int = 0  # steps of learning-rate warm-up
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    clip: float = 1.0  # largest norm of the gradient; 0: any
    checkpointing: bool = False  # compute activations twice instead of keeping them
    autocast: bool = False  # products in bf16 on a CPU, too, if it has AVX512_BF16 or AMX: pays where all weights train
    chunk: int = 4096  # tokens whose logits are held at once
    seed: int = 0
    save_steps: int = 100  # between resumable checkpoints

    def __post_init__(self) -> None:
        for name, allowed in (("direction", DIRECTIONS), ("train", TRAINED), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be one of {allowed}")
        check_numbers(self, "lr", "gate_lr", "weight_decay", "aux_weight", "clip", least=0)
        check_numbers(self, "neuron_warmup", "decay", "seed", whole=True, least=0)
        check_numbers(self, "warmup", whole=True)  # its bound and those of the ratios are the schedule's
        check_numbers(self, "final_cr", "stop_cr")
        counts = ("batch", "device_batch", "chunk", "rank", "save_steps", "steps_per_unit")
        check_numbers(self, *counts, whole=True, least=1)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)}: must be >= 0 and < 1")
        if self.stop_cr is not None and self.stop_cr not in self.schedule.saves().values():
            raise ValueError(f"stop_cr {self.stop_cr}: must be one of {sorted(self.schedule.saves().values())}")
        check_numbers(self, "steps", whole=True, least=1)

    @property
    def schedule(self) -> Schedule:
        rests = tuple((cr, steps) for cr, steps in self.rests)
        return Schedule(self.final_cr, self.steps_per_unit, rests, self.warmup, self.neuron_warmup, self.decay)

    @property
    def steps(self) -> int:
        """Steps taken: all of the schedule, or those up to ``stop_cr``."""
        return self.schedule.steps if self.stop_cr is None else self.step_of(self.stop_cr)

    def to_dict(self) -> dict:
        """The fields, those of ``LATER`` only where they differ from their default."""
        return {name: value for name, value in asdict(self).items() if LATER.get(name, ...) != value}

    def step_of(self, cr: float) -> int:
        """The step after which the checkpoint of ``cr`` is kept.  Raises ValueError where there is none."""
        found = {kept: step for step, kept in self.schedule.saves().items()}
        if cr not in found:
            raise ValueError(f"CR {cr}: no checkpoint is kept there, only at {sorted(found)}")
        return found[cr]

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


@dataclass(frozen=True)
class Recipe:
    """A retrofit: what to train on which model and data."""

    name: str
    model: str  # hub id or directory; "reasoner": the embedded model
    data: str  # hub id or JSONL file; "traces": the embedded model's program traces
    context: int  # tokens a row; documents are packed to it
    dms: DMSConfig
    retrofit: RetrofitConfig

    def __post_init__(self) -> None:
        check_numbers(self, "context", whole=True, least=2)

    def changed(self, name: str | None = None, dms: dict | None = None, retrofit: dict | None = None) -> "Recipe":
        """The recipe with another name, and with some fields of its parts changed."""
        changed = {"dms": replace(self.dms, **(dms or {})), "retrofit": replace(self.retrofit, **(retrofit or {}))}
        return Recipe(**{**vars(self), **changed, "name": self.name if name is None else name})

    def own(self) -> dict:
        """The fields that belong to neither part."""
        return {name: getattr(self, name) for name in ("name", *REQUIRED)}

    def to_dict(self) -> dict:
        """Flat, as in the YAML file; tuples become lists."""
        return json.loads(json.dumps({**self.own(), **self.dms.to_dict(), **self.retrofit.to_dict()}))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


REQUIRED = ("model", "data", "context")
PARTS = {"dms": DMSConfig, "retrofit": RetrofitConfig}
TYPES = {name: get_type_hints(Recipe)[name] for name in REQUIRED}
TYPES |= {name: kind for part in PARTS.values() for name, kind in get_type_hints(part).items()}


def recipe_names() -> list[str]:
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """A recipe of the library by its name, or any YAML file.  Raises ValueError where there is neither."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not file.is_file():
        raise ValueError(f"recipe {name!r}: must be a YAML file or one of {', '.join(recipe_names())}")
    return file


def load_recipe(name: str, changes: dict | None = None) -> Recipe:
    """The recipe of that name or file, with some fields changed.

    Raises ValueError that names a field which is unknown or missing, or the value that it may not have.

    >>> load_recipe("reasoner", {"lr": 1e-4}).retrofit.lr
    0.0001
    """
    file = recipe_file(name)
    try:
        given = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict):
        raise ValueError(f"{file}: holds a {type(given).__name__}; must be a mapping of fields")
    given |= changes or {}
    name = str(given.pop("name", file.stem))
    for field in given:
        _check_known(field)
    if missing := [field for field in REQUIRED if field not in given]:
        raise ValueError(f"{file}: {missing} missing; a recipe names model, data and context")
    flat = {field: _frozen(value) for field, value in given.items()}
    parts = {key: {f.name: flat[f.name] for f in fields(part) if f.name in flat} for key, part in PARTS.items()}
    try:
        return dacite.from_dict(Recipe, {"name": name, **flat, **parts}, TYPING)
    except dacite.WrongTypeError as error:
        field = error.field_path.split(".")[-1]
        raise ValueError(f"{field} {given[field]!r}: must be {_words(TYPES[field])}") from None


def parse_changes(pairs: list[str]) -> dict:
    """``field=value`` texts, as after --set, to a dictionary; values are YAML."""
    changes = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: must be field=value")
        _check_known(field)
        try:
            changes[field] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{field} {value!r}: not a YAML value") from None
    return changes


def _check_known(field: str) -> None:
    if field not in TYPES:
        near = get_close_matches(str(field), TYPES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown field {field!r}{hint}: must be one of {', '.join(sorted(TYPES))}")


def _frozen(value):
    """Lists as tuples.  No field is a mapping: an empty one is refused as any other, without a look at its items."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {} if isinstance(value, dict) else value


def _number(value) -> float | str:
    """YAML reads 1e-4 as text: numbers in text count as numbers.  What is none becomes text, which dacite refuses."""
    try:
        return str(value) if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return str(value)


def _integer(value) -> int | str:
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else str(value)


TYPING = dacite.Config(type_hooks={float: _number, int: _integer})
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _words(kind) -> str:
    """A type as a reader would say it."""
    inner = [_words(part) for part in get_args(kind) if part is not Ellipsis]
    if get_origin(kind) is not tuple:
        return " or ".join(inner) or WORDS[kind]
    return f"a list, each item {inner[0]}" if Ellipsis in get_args(kind) else f"[{', '.join(inner)}]"
