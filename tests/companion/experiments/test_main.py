"""Studies around the main job, and what its commands refuse; tests/companion/test_reproduce.py runs the job."""

from dataclasses import replace

import pytest

from companion.cli.main import main
from companion.experiments import controls
from companion.experiments import main as job
from companion.experiments.profiles import get_profile

SMOKE = get_profile("smoke")


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    assert main(["curves", "--results", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["cache-report", "--checkpoint", str(tmp_path)]) == 2
    assert "dms.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nano"):
        get_profile("nano")


@pytest.mark.slow
def test_the_grid_trains_and_samples_what_is_not_there_yet(tmp_path):
    recipe = SMOKE.recipe.changed(retrofit={"final_cr": 2.0, "steps_per_unit": 1, "rests": ((2.0, 1),), "batch": 2})
    quick = replace(SMOKE, recipe=recipe, crs=(2.0,), problems=2, chains=1, lengths=(8,), widths=(1,), held_out=2)
    quick = replace(quick, lengths=(2, 4, 6, 8))
    result = controls.grid(job.Run(quick, tmp_path))
    methods = {"vanilla", "dms", *controls.CONTROLS, *controls.LIGHT}
    assert {point["method"] for point in result["points"]} == methods
    lengths = {name: {p["L"] for p in result["points"] if p["method"] == name} for name in ("tova", "tova-protected")}
    assert lengths == {"tova": {8}, "tova-protected": {2, 8}}
    assert {row["b"] for row in result["margins"] if row["a"] == "dms"} == methods - {"dms"}
    assert (tmp_path / "grid.json").exists()
