"""JSON and JSONL on disk: whole or not at all, and damage is a ValueError that names the file.

A JSONL file has one writer; readers may come while it writes, or after it was killed: they leave out a last line that
has no end, and only the next writer cuts it off.  A directory of checkpoints has one writer as well.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

SEAL = "sha256.json"  # of a sealed directory


@contextlib.contextmanager
def replacing(file: Path | str) -> Iterator[Path]:
    """A path beside ``file`` to write to, which takes its place in the end; an error removes it, and ``file`` stays."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")  # hosts of a cluster may share a process id
    try:
        yield part
        os.replace(part, file)
    except OSError as error:  # a full disk names no file
        if error.errno and not error.filename:
            error.filename = str(file)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(file: Path | str, text: str) -> None:
    """Replace ``file`` as a whole; its directory is made."""
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8")


def write_json(file: Path | str, value) -> None:
    """Replace ``file`` by indented JSON."""
    write_text(file, json.dumps(value, indent=1) + "\n")


def parse_json(text: bytes | str, place: str):
    """The value in ``text``.  Raises ValueError that begins with ``place``, also where brackets nest too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # JSON, its encoding, thousands of opening brackets
        raise ValueError(f"{place}: not valid JSON ({error})") from None


def read_json(file: Path | str) -> dict:
    """The object in a JSON file.  ValueError where it holds something else; FileNotFoundError where it is missing."""
    value = parse_json(Path(file).read_bytes(), str(file))
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
    return [parse_json(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def write_jsonl(file: Path | str, values: Iterable[dict]) -> None:
    """Replace ``file`` by a line a value."""
    write_text(file, "".join(json.dumps(value) + "\n" for value in values))


def _lock(descriptor: int, path: Path, whole: Path) -> None:
    """Until it is closed, or its process ends in whatever way.  Raises ValueError where another one holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise BlockingIOError  # replaced since it was opened
    except (BlockingIOError, FileNotFoundError):
        raise ValueError(f"{whole}: another process is writing it; wait for that one or stop it") from None


@contextlib.contextmanager
def only_writer(directory: Path | str, wait: float = 0) -> Iterator[None]:
    """Hold a directory, which is made, against a second process that would write there; readers are not stopped.

    Raises ValueError where another process still holds it after ``wait`` seconds.
    """
    mark = Path(directory) / ".lock"  # a file: network file systems lock no directories
    mark.parent.mkdir(parents=True, exist_ok=True)
    with _held(mark, time.monotonic() + wait):
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)


def _held(mark: Path, until: float) -> BinaryIO:
    """The file, opened and locked; opened anew at each try, since who holds it deletes it in the end."""
    while True:
        file = mark.open("ab")
        try:
            _lock(file.fileno(), mark, mark.parent)
            return file
        except ValueError:
            file.close()
            if time.monotonic() >= until:
                raise
        time.sleep(0.02)


class JsonlWriter:
    """Appends to a JSONL file, each line at once on disk: ``with JsonlWriter(file) as log: log.write(value)``.

    Raises ValueError where another process has the file open for writing.
    """

    def __init__(self, file: Path | str) -> None:
        self.path = Path(file)

    def __enter__(self) -> "JsonlWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("ab+", buffering=0)
        try:
            _lock(self.file.fileno(), self.path, self.path)
        except ValueError:
            self.file.close()
            raise
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)  # what an interruption left of a line
        return self

    def write(self, value: dict) -> None:
        """One line.  If it does not fit on the disk, OSError, and the file ends with the line before."""
        rest, end = json.dumps(value).encode() + b"\n", os.fstat(self.file.fileno()).st_size
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.file.truncate(end)
            error.filename = str(self.path)
            raise

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


def sha256(file: Path | str) -> str:
    """Of a file's bytes, as hexadecimal digits."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(directory: Path | str) -> None:
    """Write down the SHA-256 of every file below a directory."""
    files = sorted(file for file in Path(directory).rglob("*") if file.is_file() and file.name != SEAL)
    write_json(Path(directory) / SEAL, {file.relative_to(directory).as_posix(): sha256(file) for file in files})


def broken_seal(directory: Path | str) -> Path | None:
    """A file that is gone, or is not as it was sealed; None for a whole directory, and for one without a seal."""
    mark = Path(directory) / SEAL
    try:
        sums = read_json(mark) if mark.exists() else {}
    except ValueError:
        return mark
    files = ((mark.parent / name, known) for name, known in sums.items())
    return next((file for file, known in files if not (file.is_file() and sha256(file) == known)), None)
