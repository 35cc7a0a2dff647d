"""Rows of a benchmark: from the Hugging Face hub, or from a local JSONL file of the same fields."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dms_core.storage import parse_json

Source = Path | str | None  # a JSONL file; None: the hub


@dataclass(frozen=True)
class HubData:
    """Where a benchmark lies on the hub, and the fields that are read of it."""

    repo: str
    fields: dict  # name → type or tuple of types
    split: str = "train"
    config: str | None = None
    files: tuple[str, ...] = ()  # JSONL files of the repository, for one that `datasets` cannot load by its name
    gated: bool = False


def read_rows(data: HubData, source: Source = None) -> list[dict]:
    """The rows of ``source``, a UTF-8 JSONL file with or without a byte-order mark, or of the hub where it is None.

    Raises ValueError that names file, line and field for a bad row, and one that says what would have been fetched and
    how to give a file where the hub cannot be reached.
    """
    found = _hub_rows(data) if source is None else _local_rows(data, Path(source))
    return [_checked(row, data, where) for where, row in found]


def _local_rows(data: HubData, file: Path) -> Iterator[tuple[str, dict]]:
    wanted, where = f"expected JSONL with the fields {sorted(data.fields)} of {data.repo}", None
    if not file.is_file():
        raise ValueError(f"{file}: no such file; {wanted}")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, parse_json(line, where)  # of bytes: it skips a byte-order mark
    if where is None:
        raise ValueError(f"{file}: no rows; {wanted}")


def _hub_rows(data: HubData) -> Iterator[tuple[str, dict]]:
    try:
        from datasets import load_dataset

        if data.files:
            paths = [f"hf://datasets/{data.repo}/{name}" for name in data.files]
            rows = load_dataset("json", data_files=paths, split="train")
        else:
            rows = load_dataset(data.repo, data.config, split=data.split)
    except Exception as error:  # datasets and hub raise many kinds: offline, no access, unknown repository
        page, config = f"https://huggingface.co/datasets/{data.repo}", data.config and f"config {data.config}"
        what = ", ".join(filter(None, [f"dataset {data.repo}", config, f"split {data.split}", *data.files]))
        terms = f" It is gated: accept its terms at {page}, then `hf auth login`." if data.gated else ""
        raise ValueError(
            f"cannot fetch {what} from the Hugging Face hub ({type(error).__name__}: {error}).{terms} Without "
            f"it give a local JSONL file (source=, --source) with the fields {sorted(data.fields)}"
        ) from error
    return ((f"{data.repo}, row {number}", row) for number, row in enumerate(rows))


def _checked(row: dict, data: HubData, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}; expected an object")
    for name, kinds in data.fields.items():
        if name not in row:
            raise ValueError(f"{where}: field {name!r} is missing; required: {sorted(data.fields)}")
        if not isinstance(row[name], kinds) or isinstance(row[name], bool):
            allowed = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise ValueError(f"{where}: field {name!r} is {row[name]!r:.60}; allowed: {allowed}")
    return row
