"""The way from a hidden state to its slot in the cache: which files it enters, and in which order."""

import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

import companion
import dms_core
import dms_kernels
from dms_core.budgets.curves import summarise
from dms_core.cache.dms import DMSCache
from dms_kernels.cpu import step

ROOT = Path(__file__).parents[1]


def named(title: str) -> list[str]:
    """The files, in order, of the paragraph of README.md that begins with ``title``; alternatives in brackets aside."""
    text = (ROOT / "README.md").read_text().partition(f"**{title}**")[2].partition("\n\n")[0]
    text = re.sub(r"\([^)]*\)", "", text.partition(". Who sees")[0])
    return re.findall(r"`([a-z_0-9/]+\.(?:py|ipynb))`", text)


HIDDEN_TO_SLOT = [file.removeprefix("kernels/") for file in named("From a hidden state to its slot")]
# What a step only asks for a value or a size, or calls beside the way: settings, shared parts, attention itself.
SHARED = {
    "dms_core/config.py",
    "dms_core/cache/base.py",
    "dms_core/cache/pages.py",
    "dms_kernels/cpu/decode.py",
    "dms_kernels/cpu/step.py",
    "dms_kernels/naive.py",
    "dms_kernels/ops.py",
    "dms_core/parallel.py",
    "dms_core/step.py",
}
ROOTS = [Path(package.__file__).parents[1] for package in (companion, dms_core, dms_kernels)]


@cache
def name_of(file: str) -> str | None:
    """As README.md names it; None for a file of another package."""
    for root in ROOTS:
        if Path(file).is_relative_to(root):
            name = Path(file).relative_to(root)
            if name.parts[0] in ("companion", "dms_core", "dms_kernels"):
                return name.as_posix()
    return None


def files_entered(function) -> list[str]:
    """Files of the packages as ``function`` enters them, one after the other."""
    entered = [""]

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_name != "<module>":
            name = name_of(code.co_filename)
            entered.extend([name] * (name not in (None, entered[-1])))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return entered[1:]


@torch.no_grad()
def test_decode_step_enters_the_named_files_in_order(tiny_model, monkeypatch):
    monkeypatch.setattr(step, "COMPILED", False)  # machine code is not seen
    model, ids = tiny_model(), torch.arange(1, 8)[None]
    cache = DMSCache.for_model(model)
    model(ids, past_key_values=cache)
    entered = files_entered(lambda: model(ids[:, :1], past_key_values=cache))
    rest = iter(entered)
    assert all(file in rest for file in HIDDEN_TO_SLOT), entered
    assert set(entered) - SHARED == set(HIDDEN_TO_SLOT)


def test_readme_names_at_most_6_files_from_hidden_state_to_slot_and_9_from_problem_to_page():
    page = named("From a problem to a page")
    assert len(HIDDEN_TO_SLOT) == 6 and len(page) == 9
    assert [file for file in page if not (ROOT / file).is_file()] == []


def test_figure_of_a_problem_enters_every_named_file(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    from companion.experiments import main as job
    from companion.experiments.profiles import get_profile
    from companion.figures.curves import draw_curves

    profile = replace(get_profile("smoke"), crs=(), compare_cr=1.0, problems=1, chains=1, lengths=(4,), widths=(1,))
    run = job.Run(profile, tmp_path, variants={})

    def page():
        records = [record for method in job.methods(run) for record in job.records(run, method)]
        draw_curves(summarise(records, [4], [1], 10), tmp_path / "curves.svg")

    path = {file for file in named("From a problem to a page") if file.endswith(".py")}
    assert path - set(files_entered(page)) == set()
