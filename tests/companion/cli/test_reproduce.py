"""``dms curves``: what it prints of runs' summaries, and how it puts those of several tasks together."""

import json
import subprocess
import sys

from companion.cli.main import main
from companion.paths import RESULTS


def finished(directory, task):
    point = {"task": task, "method": "dms", "cr": 8, "L": 64, "W": 1}
    summary = {"points": [point], "margins": [], "paired": [], "pass_at_1": [], "retrofit": {"steps": 1}}
    directory.mkdir()
    (directory / "curves.json").write_text(json.dumps(summary))
    return str(directory)


def test_curves_of_several_tasks_are_put_together_and_saved(tmp_path, capsys):
    runs = [finished(tmp_path / name, name) for name in ("lcm", "gcd")]
    assert main(["curves", "--results", *runs, "--save", str(tmp_path / "both.json"), "--json"]) == 0
    shown, saved = json.loads(capsys.readouterr().out), json.loads((tmp_path / "both.json").read_text())
    assert [point["task"] for point in shown["points"]] == ["lcm", "gcd"]
    assert saved.pop("environment")["packages"] and saved == shown and "retrofit" not in saved


def test_two_runs_of_one_task_are_refused_and_nothing_is_written(tmp_path, capsys):
    runs = [finished(tmp_path / name, "lcm") for name in ("a", "b")]
    assert main(["curves", "--results", *runs, "--save", str(tmp_path / "both.json")]) == 2
    assert "several directories of lcm; must be of different tasks" in capsys.readouterr().err
    assert not (tmp_path / "both.json").exists()


def test_curves_print_avg_at_k_with_both_errors_at_each_methods_longest_length(tmp_path, capsys):
    row = {"task": "choice", "method": "dms", "cr": 8, "problems": 30, "chains": 4.0, "accuracy": 61.25}
    rows = [row | {"L": length, "se_questions": 8.94, "se_samples": length / 100} for length in (256, 128)]
    rows.append(row | {"method": "vanilla", "cr": 1, "L": 256, "chains": 1.0, "se_questions": 8.94, "se_samples": None})
    summary = {"points": [], "margins": [], "paired": [], "pass_at_1": rows}
    (tmp_path / "curves.json").write_text(json.dumps(summary))
    assert main(["curves", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "choice: avg@4 dms CR 8, L 256: 61.2 %, SE 8.9 over questions, 2.6 over chains",
        "choice: avg@1 vanilla CR 1, L 256: 61.2 %, SE 8.9 over questions, — over chains",
    ]


def test_records_of_a_method_with_two_settings_are_refused_and_old_peaks_are_said(tmp_path, capsys):
    record = {"task": "traces", "method": "dms", "cr": 4.0, "problem": 0, "chain": 0, "answer": "1", "gold": "1"}
    record |= {"finished_at": 3, "tokens": 3, "stride": 16, "live": [5, 6], "reads": [0, 9], "prompt_tokens": 5}
    for mark, more in (("0123456789ab", {}), ("ba9876543210", {"budget_length": 64})):
        (tmp_path / f"dms-cr4-{mark}.1-of-2.jsonl").write_text(json.dumps(record | {"prompt_live": 5.0, **more}) + "\n")
    assert main(["curves", "--results", str(tmp_path)]) == 0
    assert "what is live of a prompt after the prefill counts as shared" in capsys.readouterr().out
    (tmp_path / "dms-cr4-ba9876543210.2-of-2.jsonl").write_text(json.dumps(record | {"prompt_live": 5.0}) + "\n")
    assert main(["curves", "--results", str(tmp_path)]) == 2
    assert "holds dms-cr4 with settings 0123456789ab and ba9876543210; must be one" in capsys.readouterr().err


def test_curves_of_stored_results_and_of_records_need_no_torch(tmp_path):
    """Whose import takes longer than all else that the command does."""
    record = {"task": "traces", "method": "dms", "cr": 4.0, "problem": 0, "chain": 0, "answer": "1", "gold": "1"}
    record |= {"finished_at": 3, "tokens": 3, "stride": 16, "live": [5, 6], "reads": [0, 9], "prompt_tokens": 5}
    (tmp_path / "a.jsonl").write_text(json.dumps(record | {"prompt_live": 5.0}) + "\n")
    code = (
        "import sys; from companion.cli.main import main\n"
        "for place in sys.argv[1:]: assert main(['curves', '--results', place]) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, RESULTS / "full", tmp_path], check=True, stdout=subprocess.DEVNULL)
