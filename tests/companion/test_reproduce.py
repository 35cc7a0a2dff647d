"""The whole main job with the smoke profile: notebooks executed, book rendered."""

import shutil

import pytest

from companion.book import execute, reproduce
from companion.paths import CHECKOUT as ROOT


@pytest.mark.slow
def test_reproduce_smoke_executes_every_notebook_and_renders_the_book(tmp_path):
    for part in ("notebooks", "book"):
        ignore = (
            shutil.ignore_patterns("_build") if part == "notebooks" else shutil.ignore_patterns("_build", "notebooks")
        )
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignore)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    result = reproduce("smoke", tmp_path / "runs", root=tmp_path)
    assert result["retrofit"]["cr_target"] == 3.0
    pages = {path.stem for path in (tmp_path / "book" / "_build" / "html" / "notebooks").glob("*.html")}
    assert pages == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_an_unknown_parameter_is_an_error(tmp_path):
    notebook = sorted((ROOT / "notebooks").glob("*.ipynb"))[0]
    with pytest.raises(ValueError, match="no_such_parameter"):
        execute(notebook, tmp_path / "out.ipynb", {"no_such_parameter": 1})
