"""Recipes: everything that defines a retrofit, as a YAML file of flat fields.

The fields are those of DMSConfig and RetrofitConfig, and which model, data and context they were made for.  The
library carries the paper's six rows (Table 3), the released adapter recipe, and two that run on a CPU.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from dms_core.config import DMSConfig
from dms_core.train.retrofit import RetrofitConfig

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A retrofit: what to train on which model and data."""

    name: str
    model: str  # hub id or directory; "reasoner": the embedded model
    data: str  # hub id or JSONL file; "traces": the embedded model's program traces
    context: int  # tokens a row; documents are packed to it
    dms: DMSConfig
    retrofit: RetrofitConfig

    def to_dict(self) -> dict:
        """Flat, as in the YAML file; tuples become lists."""
        own = {"name": self.name, "model": self.model, "data": self.data, "context": self.context}
        return _plain({**own, **self.dms.to_dict(), **dataclasses.asdict(self.retrofit)})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


OWN = {"model": str, "data": str, "context": int}
TYPES = {**OWN, **typing.get_type_hints(DMSConfig), **typing.get_type_hints(RetrofitConfig)}


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
    """
    file = recipe_file(name)
    try:
        fields = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: holds a {type(fields).__name__}; must be a mapping of fields")
    fields = {**fields, **(changes or {})}
    given = fields.pop("name", file.stem)
    for field in fields:
        _check_known(field)
    if missing := [field for field in OWN if field not in fields]:
        raise ValueError(f"{file}: {missing} missing; a recipe names model, data and context")
    values = {field: parse(field, value) for field, value in fields.items()}
    if values["context"] < 2:
        raise ValueError(f"context {values['context']}: must be >= 2 tokens")
    parts = [
        {f.name: values[f.name] for f in dataclasses.fields(part) if f.name in values}
        for part in (DMSConfig, RetrofitConfig)
    ]
    return Recipe(given, *(values[field] for field in OWN), DMSConfig(**parts[0]), RetrofitConfig(**parts[1]))


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


def parse(field: str, value):
    """``value`` in the type of ``field``.  YAML reads 1e-4 as text: numbers in text are read as numbers."""
    for kind in typing.get_args(TYPES[field]) if _is_union(TYPES[field]) else (TYPES[field],):
        try:
            return _convert(kind, value)
        except (TypeError, ValueError):
            continue
    raise ValueError(f"{field} {value!r}: must be {_words(TYPES[field])}")


def _check_known(field: str) -> None:
    if field not in TYPES:
        near = get_close_matches(str(field), TYPES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown field {field!r}{hint}: must be one of {', '.join(sorted(TYPES))}")


def _is_union(kind) -> bool:
    return isinstance(kind, types.UnionType)


def _convert(kind, value):
    """TypeError or ValueError where ``value`` is not of this kind."""
    if kind is type(None) or kind is bool:
        if not isinstance(value, kind):
            raise TypeError
        return value
    if kind is str and not isinstance(value, str):
        raise TypeError
    if kind in (int, float):
        number = float(value) if not isinstance(value, bool) else None
        if number is None or (kind is int and number != int(number)):
            raise ValueError
        return kind(number)
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(typing.get_args(kind), value)
    return kind(value)


def _convert_tuple(kinds: tuple, value) -> tuple:
    if not isinstance(value, list | tuple):
        raise TypeError
    if kinds[-1] is Ellipsis:
        return tuple(_convert(kinds[0], item) for item in value)
    return tuple(_convert(kind, item) for kind, item in zip(kinds, value, strict=True))


def _words(kind) -> str:
    """A type as a reader would say it."""
    if _is_union(kind):
        return " or ".join(_words(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis:
            return f"a list, each item {_words(inner[0])}"
        return f"[{', '.join(_words(part) for part in inner)}]"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names[kind]


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
