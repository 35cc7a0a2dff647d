"""Rows of a benchmark: from the Hugging Face hub, or from a local JSONL file of the same fields."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HubData:
    """Where a benchmark lies on the hub, and the fields that are read of it."""

    repo: str
    fields: dict  # name → type or tuple of types
    split: str = "train"
    config: str | None = None
    files: tuple[str, ...] = ()  # JSONL files of the repository, for one that `datasets` cannot load by its name
    gated: bool = False

    def what(self) -> str:
        parts = [f"dataset {self.repo}", *([f"config {self.config}"] if self.config else []), f"split {self.split}"]
        return ", ".join([*parts, *self.files])


def read_rows(data: HubData, source: Path | str | None = None) -> Iterator[dict]:
    """The rows of ``source``, a JSONL file, or of the hub where it is None.

    Raises ValueError that names file, line and field for a bad row, and one that says what would have been fetched and
    how to give a file where the hub cannot be reached.
    """
    if source is not None:
        return _local_rows(data, Path(source))
    return _hub_rows(data)


def _local_rows(data: HubData, file: Path) -> Iterator[dict]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected JSONL with the fields {sorted(data.fields)} of {data.repo}")
    empty = True
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                empty = False
                yield _checked(_parsed(line, file, number), data, f"{file}, line {number}")
    if empty:
        raise ValueError(f"{file}: no rows; expected JSONL with the fields {sorted(data.fields)} of {data.repo}")


def _parsed(line: str, file: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line {number}: a {type(row).__name__}; expected an object")
    return row


def _hub_rows(data: HubData) -> Iterator[dict]:
    try:
        from datasets import load_dataset

        if data.files:
            paths = [f"hf://datasets/{data.repo}/{name}" for name in data.files]
            rows = load_dataset("json", data_files=paths, split="train")
        else:
            rows = load_dataset(data.repo, data.config, split=data.split)
    except Exception as error:  # datasets and hub raise many kinds: offline, no access, unknown repository
        page = f"https://huggingface.co/datasets/{data.repo}"
        terms = f" It is gated: accept its terms at {page}, then `hf auth login`." if data.gated else ""
        raise ValueError(
            f"cannot fetch {data.what()} from the Hugging Face hub ({type(error).__name__}: {error}).{terms} Without "
            f"it give a local JSONL file (source=, --source) with the fields {sorted(data.fields)}"
        ) from error
    for number, row in enumerate(rows):
        yield _checked(row, data, f"{data.repo}, row {number}")


def _checked(row: dict, data: HubData, where: str) -> dict:
    for name, kinds in data.fields.items():
        if name not in row:
            raise ValueError(f"{where}: field {name!r} is missing; required: {sorted(data.fields)}")
        if not isinstance(row[name], kinds) or isinstance(row[name], bool):
            kinds = kinds if isinstance(kinds, tuple) else (kinds,)
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{where}: field {name!r} is {row[name]!r:.60}; allowed: {allowed}")
    return row
