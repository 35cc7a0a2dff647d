"""What each command prints with --json: results.yaml, and the words for it in help texts."""

from pathlib import Path

import yaml

SHAPES = yaml.safe_load(Path(__file__).with_name("results.yaml").read_text())


def describe(shape) -> str:
    """A shape in words: {"cr", "book": text}, where a field without any is a number."""
    if isinstance(shape, list):
        return f"[{describe(*shape)}]"
    if not isinstance(shape, dict):
        return shape or "number"
    fields = ", ".join(_field(name, of) for name, of in shape.items() if name != "_")
    return f"{{{fields}}}" + (f"; {shape['_']}" if "_" in shape else "")


def _field(name: str, shape) -> str:
    if name.startswith("<"):
        return f"{name.strip('<>')}: {describe(shape)}"
    if name.endswith(" or null"):
        return f'"{name.removesuffix(" or null")}": {describe(shape)} or null'
    return f'"{name}"' + ("" if shape is None else f": {describe(shape)}")
