"""Protocols: each says what it must, its detectable difference is what the design gives, and bad files are refused."""

import pytest
import yaml

from companion.claims import protocols as module
from companion.claims.protocols import protocol, protocols
from companion.experiments.ablations import ablation_profile
from companion.experiments.profiles import get_profile
from dms_core.budgets.bootstrap import detectable


def test_the_main_ones_were_written_before_their_records_and_name_the_design():
    full = get_profile("full")
    for name in ("curves", "fixed-budget", "delay"):
        found = protocol(name)
        assert found.written == "before"
        design = {key: found.detects[key] for key in ("problems", "chains", "seeds")}
        assert design == {"problems": full.problems, "chains": full.chains, "seeds": full.seeds}


@pytest.mark.parametrize("name", [name for name, rule in protocols().items() if rule.detects])
def test_what_a_design_detects_is_computed(name):
    given = dict(protocol(name).detects)
    assert given.pop("points") == pytest.approx(detectable(**given), abs=0.05)


@pytest.mark.parametrize(
    "change, message",
    [({"rule": None}, "rule"), ({"colour": "red"}, "colour"), ({"written": "later"}, "written 'later'")],
)
def test_a_file_that_lacks_a_field_or_has_another_is_refused(tmp_path, monkeypatch, change, message):
    entry = yaml.safe_load((module.PROTOCOLS / "curves.yaml").read_text()) | change
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({k: v for k, v in entry.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        module._read(tmp_path / "bad.yaml")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="nothing"):
        protocol("nothing")


def test_those_of_short_retrofits_were_written_before_and_name_the_design():
    plan = ablation_profile(3)
    for name in ("neuron-gate", "teachers", "dmc", "rests"):
        found = protocol(name)
        assert found.written == "before" and found.seeds == "0, 1, 2"
        design = {key: found.detects[key] for key in ("problems", "chains", "seeds")}
        assert design == {"problems": plan.problems, "chains": plan.chains, "seeds": plan.seeds}
