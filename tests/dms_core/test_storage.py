"""JSON and JSONL on disk: whole or not at all, one writer."""

import json
import subprocess
import sys

import pytest

from dms_core.storage import JsonlWriter, claim, read_json, read_jsonl, write_json
from dms_core.train.data import read_rows


def test_second_writer_of_a_file_is_refused_and_readers_are_not(tmp_path):
    file = tmp_path / "records.jsonl"
    code = f"from dms_core.storage import JsonlWriter\nwith JsonlWriter({str(file)!r}) as log: log.write({{}})"
    with JsonlWriter(file) as log:
        log.write({"chain": 0})
        assert read_jsonl(file) == [{"chain": 0}]
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode and f"{file}: another process is writing it" in done.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert read_jsonl(file) == [{"chain": 0}, {}]


def test_partial_last_line_is_left_by_readers_and_cut_by_the_writer(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"a": 1}\n{"b"')
    assert read_jsonl(file) == [{"a": 1}] and file.read_text().endswith('{"b"')
    with JsonlWriter(file):
        pass
    assert file.read_text() == '{"a": 1}\n'


def test_damage_names_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n{\n")
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not valid JSON"):
        read_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"b\.json: holds a list; must hold an object"):
        read_json(tmp_path / "b.json")


def test_byte_order_mark_is_skipped(tmp_path):
    file, row = tmp_path / "a.jsonl", {"text": "Grüße"}
    for text in (json.dumps(row), json.dumps(row, ensure_ascii=False)):
        file.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n")
        assert read_jsonl(file) == [row] and read_json(file) == row
        assert [found for _, found in read_rows(str(file), 0)] == [row]


def test_directory_belongs_to_one_run(tmp_path):
    claim(tmp_path, {"lr": 1e-4, "rests": (1, 2)}, "run.json")
    claim(tmp_path, {"lr": 1e-4, "rests": (1, 2)}, "run.json")
    with pytest.raises(ValueError, match="holds a run with other lr"):
        claim(tmp_path, {"lr": 2e-4, "rests": (1, 2)}, "run.json")
    assert read_json(tmp_path / "run.json")["lr"] == 1e-4


def test_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == {"a": 1} and len(list(tmp_path.iterdir())) == 1
