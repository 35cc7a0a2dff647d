"""``dms curves``: what it prints of a run's summary."""

import json

from companion.cli.main import main


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
