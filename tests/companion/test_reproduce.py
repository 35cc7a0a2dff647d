"""The whole main job with the smoke profile: notebooks executed, book rendered."""

import json
import re
import shutil
import time
from dataclasses import replace
from functools import partial

import nbformat
import pytest

from companion.book import STAGELESS, execute, reproduce
from companion.book_check import check_files, check_pages, check_with_myst
from companion.cli.main import main
from companion.experiments import main as job
from companion.experiments.profiles import get_profile
from companion.paths import CHECKOUT as ROOT
from companion.side_by_side import prepare

SMOKE = get_profile("smoke")
EXTERNAL = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=.(?:https?:)?//|<link[^>]*\shref=.(?:https?:)?//|@import url\(.?https?:"
)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """(The directory of it all, what reproduce returned): a retrofit, all records, nine chapters."""
    root = tmp_path_factory.mktemp("reproduced")
    for part in ("notebooks", "book"):
        ignore = (
            shutil.ignore_patterns("_build") if part == "notebooks" else shutil.ignore_patterns("_build", "notebooks")
        )
        shutil.copytree(ROOT / part, root / part, ignore=ignore)
    shutil.copytree(ROOT / "data", root / "data")
    prepare()
    return root, reproduce("smoke", root / "runs", root=root)


@pytest.fixture(scope="module")
def finished(reproduced):
    """The run, and its summary as read from what is there."""
    run = job.Run.of("smoke", reproduced[0] / "runs")
    return run, job.run_all(run)


@pytest.mark.slow
def test_reproduce_smoke_executes_every_notebook_and_renders_the_book(reproduced):
    """Slow: the reproduction and a browser."""
    root, result = reproduced
    assert result["retrofit"]["cr_target"] == 3.0 and {"retrofit-dms", "summary", "05_retrofit"} <= set(result["parts"])
    pages = {path.stem for path in (root / "book" / "_build" / "html" / "notebooks").glob("*.html")}
    assert pages == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    check_network(root / "book" / "_build" / "html")
    check_book(root / "book")


def check_network(html) -> None:
    """Nothing comes from elsewhere; formulas are set by the book's own copy of MathJax, once a chapter."""
    pages = sorted(html.rglob("*.html"))
    assert {page.name: EXTERNAL.findall(page.read_text()) for page in pages if EXTERNAL.search(page.read_text())} == {}
    assert [path.relative_to(html).as_posix() for path in html.rglob("tex-*.js")] == ["_static/tex-svg-full.js"]
    for chapter in (html / "notebooks").glob("*.html"):
        text = chapter.read_text()
        assert text.count("tex-svg-full.js") == 1 and "unpkg" not in text and ".png" in text


def check_book(book) -> None:
    """The checks of `make book-check`; the brief ones in a browser.  Skips what cannot be had."""
    html = book / "_build" / "html"
    assert check_files(html) == []
    missing = []
    for check in (partial(check_with_myst, book), partial(check_pages, html, brief=True)):
        try:
            assert check() == []
        except ValueError as error:
            missing.append(str(error))
    if missing:
        pytest.skip("; ".join(missing))


@pytest.mark.slow
def test_summary_has_every_method_and_both_axes(finished):
    _, summary = finished
    assert {(p["method"], p["cr"]) for p in summary["points"]} == {
        ("vanilla", 1.0),
        ("dms", 2.0),
        ("dms", 3.0),
        ("dms-immediate", 2.0),
    }
    assert {(m["axis"], m["scale"]) for m in summary["margins"] if m["a"] == "dms" and m["b"] == "vanilla"} == {
        (axis, scale) for axis in ("reads", "peak") for scale in ("linear", "log2")
    }
    assert {(p["a"], p["b"]) for p in summary["paired"]} >= {("dms", "vanilla"), ("dms", "dms-immediate")}
    assert summary["retrofit"]["steps"] == SMOKE.recipe.retrofit.steps


@pytest.mark.slow
def test_a_second_call_reuses_every_stage(finished):
    run, summary = finished
    again = job.Run(SMOKE, run.root)
    began = time.time()
    assert job.retrofit(again)["seconds"] == job.retrofit(run)["seconds"]
    assert job.summary(again)["points"] == summary["points"]
    assert time.time() - began < 10


@pytest.mark.slow
def test_another_recipe_gets_another_directory(finished):
    run, _ = finished
    other = job.Run(replace(SMOKE, recipe=SMOKE.recipe.changed(retrofit={"lr": 1e-4})), run.root)
    assert job.checkpoint(other, "dms", 2.0) != job.checkpoint(run, "dms", 2.0)
    assert not job.checkpoint(other, "dms", 2.0).exists()


@pytest.mark.slow
def test_curves_command_prints_the_stored_summary_last(finished, capsys):
    run, summary = finished
    assert main(["curves", "--json", "--results", str(run.root)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["points"] == json.loads(json.dumps(summary["points"]))


@pytest.mark.slow
def test_cache_report_measures_tensors(finished, capsys):
    run, _ = finished
    assert main(["cache-report", "--json", "--checkpoint", str(job.checkpoint(run, "dms", 3.0))]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    live = [items for heads in report["live_per_layer_head"] for items in heads]
    one = report["bytes_dense"] / report["tokens"] / len(live)  # bytes of one live item
    assert sum(live) * one <= report["bytes_held"] <= (sum(live) + 4 * len(live)) * one


def test_an_unknown_parameter_is_an_error(tmp_path):
    notebook = sorted((ROOT / "notebooks").glob("*.ipynb"))[0]
    with pytest.raises(ValueError, match="no_such_parameter"):
        execute(notebook, tmp_path / "out.ipynb", {"no_such_parameter": 1})


def test_chapters_that_run_before_the_stages_read_no_run():
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        code = [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
        code = [re.sub(r"keep\(\s*run_dir", "", source) for source in code[1:]]  # the first cell holds the parameters
        reads = any("run_dir" in source for source in code)
        assert reads != (notebook.name[:2] in STAGELESS), notebook.name
