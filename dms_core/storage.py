"""JSON and JSONL on disk: whole or not at all, and damage is a ValueError that names the file.

A JSONL file has one writer; readers may come while it writes, or after it was killed: they leave out a last line that
has no end, and only the next writer cuts it off.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def write_text(file: Path | str, text: str) -> None:
    """Replace ``file`` as a whole; its directory is made."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")  # hosts of a cluster may share a process id
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def write_json(file: Path | str, value) -> None:
    """Replace ``file`` by indented JSON."""
    write_text(file, json.dumps(value, indent=1) + "\n")


def read_json(file: Path | str) -> dict:
    """The object in a JSON file.  ValueError where it holds something else; FileNotFoundError where it is missing."""
    text = Path(file).read_bytes()
    try:
        value = json.loads(text)
    except ValueError as error:  # JSON, or its encoding
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a {type(value).__name__}; must hold an object")
    return value


def update_json(file: Path | str, **entries) -> dict:
    """Set some entries of the object in a JSON file, which may not be there yet; returns the object."""
    value = {**(read_json(file) if Path(file).exists() else {}), **entries}
    write_json(file, value)
    return value


def read_jsonl(file: Path | str) -> list[dict]:
    """The whole lines of a JSONL file; none where there is no file.  ValueError names file and line."""
    file = Path(file)
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    values = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{file}:{number}: not valid JSON ({error})") from None
    return values


def write_jsonl(file: Path | str, values: Iterable[dict]) -> None:
    """Replace ``file`` by a line a value."""
    write_text(file, "".join(json.dumps(value) + "\n" for value in values))


class JsonlWriter:
    """Appends to a JSONL file, each line at once on disk: ``with JsonlWriter(file) as log: log.write(value)``.

    Raises ValueError where another process has the file open for writing.
    """

    def __init__(self, file: Path | str) -> None:
        self.path = Path(file)

    def __enter__(self) -> "JsonlWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                raise BlockingIOError  # replaced since it was opened
        except BlockingIOError:
            self.file.close()
            raise ValueError(f"{self.path}: another process is writing it; wait for that one or stop it") from None
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)  # what an interruption left of a line
        return self

    def write(self, value: dict) -> None:
        self.file.write(json.dumps(value).encode() + b"\n")
        self.file.flush()

    def __exit__(self, *error) -> None:
        self.file.close()


def is_written(file: Path | str) -> bool:
    """Does another process have this JSONL file open for writing?"""
    with Path(file).open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def claim(directory: Path | str, facts: dict, name: str) -> None:
    """A directory belongs to one run: put ``facts``, flat JSON values, into the file ``name``.

    Raises ValueError that names what differs if the directory was claimed with other facts; nothing is changed then.
    """
    file, facts = Path(directory) / name, json.loads(json.dumps(facts))
    if file.exists():
        before = read_json(file)
        if changed := sorted(key for key in facts | before if facts.get(key, ...) != before.get(key, ...)):
            raise ValueError(
                f"{directory} holds a run with other {', '.join(changed)}: give this one another directory"
            )
    write_json(file, facts)
