"""The shape of the chapters: goals first, short cells, a caption and alt text for each figure, executed solutions.

MyST-NB copies ``mystnb.image.alt`` of a cell to the images of its output: that is how a page gets its alt texts.
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from companion.lesson import source
from dms_core.gate import AdapterGate
from dms_core.visibility import visible

ROOT = Path(__file__).parents[2]
CHAPTERS = (
    "01_bottleneck",
    "02_gate",
    "03_delayed_eviction",
    "04_kernels",
    "05_retrofit",
    "06_hyperscaling",
    "07_ablations",
    "08_real_model",
    "09_on_gpus",
)
HIDING = {"hide-input", "hide-cell", "hide-output", "remove-input", "remove-cell", "remove-output"}
DRAWING = re.compile(r"^plt\.show\(\)$", re.M)
CAPTION = re.compile(r"^\*\*Figure (\d+)\.(\d+)\.\*\* \S", re.M)
EXERCISE = re.compile(r"^\*\*Exercise (\d+)\.(\d+)\.\*\* \S", re.M)


@pytest.fixture(params=CHAPTERS)
def chapter(request):
    return nbformat.read(ROOT / "notebooks" / f"{request.param}.ipynb", 4)


@pytest.fixture
def number(request, chapter):
    return int(request.node.callspec.params["chapter"][:2])


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def code(chapter) -> list:
    return [cell for cell in chapter.cells if cell.cell_type == "code"]


def text(chapter) -> list:
    return [cell for cell in chapter.cells if cell.cell_type == "markdown"]


def test_chapter_opens_with_goals_prerequisites_and_run_time_and_ends_with_references(chapter):
    headings = re.findall(r"^## (.+)$", "\n".join(cell.source for cell in text(chapter)), re.M)
    assert headings[0] == "What you will learn" and chapter.cells[1].source.startswith("## What you will learn")
    assert chapter.cells[1].source.count("\n- ") >= 3
    assert "*Before you start:*" in chapter.cells[1].source and "*Run time:*" in chapter.cells[1].source
    assert headings[-3:] == ["What to take along", "Exercises", "Further reading"]
    assert "{cite:" in chapter.cells[-1].source
    assert any("measured" in heading.lower() for heading in headings)


def test_cells_are_short_and_few_are_hidden(chapter):
    lines = [cell.source.split("\n") for cell in code(chapter)]
    counts = sorted(map(len, lines))
    assert counts[len(counts) // 2] <= 12 and counts[-1] <= 30
    assert [line for cell in lines for line in cell if len(line) > 88] == []
    shown = [cell for cell in code(chapter) if "solution" not in tags(cell)]
    assert sum(bool(tags(cell) & HIDING) for cell in shown) <= len(shown) / 3


def test_set_up_is_folded(chapter):
    setup = [cell for cell in code(chapter) if tags(cell) & {"setup", "parameters"}]
    assert len(setup) == 2 and all("hide-input" in tags(cell) for cell in setup)
    others = [cell.source for cell in code(chapter) if cell not in setup]
    assert all(len(re.findall(r"^(?:from|import) ", source, re.M)) <= 2 for source in others)


def test_folded_cells_say_what_they_hold(chapter):
    for cell in code(chapter):
        if tags(cell) & {"hide-input", "hide-cell"}:
            assert cell.metadata.get("mystnb", {}).get("code_prompt_show"), cell.id


def test_paragraphs_are_short(chapter):
    for cell in text(chapter):
        for paragraph in re.split(r"\n\s*\n|\n(?=- |\d\. )", re.sub(r"\$\$.*?\$\$", "", cell.source, flags=re.S)):
            assert len(paragraph.split()) <= 120, (cell.id, paragraph)


def test_each_figure_has_alt_text_and_a_caption_numbered_in_order(chapter, number):
    cells, captions = chapter.cells, []
    for at, cell in enumerate(cells):
        if cell.cell_type == "code" and DRAWING.search(cell.source):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt.split()) >= 8, cell.id
            assert CAPTION.match(cells[at + 1].source), cell.id
        captions += CAPTION.findall(cell.source) if cell.cell_type == "markdown" else []
    assert captions == [(str(number), str(n + 1)) for n in range(len(captions))] and len(captions) >= 3
    assert len(captions) == sum(bool(DRAWING.search(cell.source)) for cell in code(chapter))


def test_figures_are_as_wide_as_the_page(chapter):
    for cell in code(chapter):
        for width in re.findall(r"figsize=\(([\d.]+),", cell.source):
            assert float(width) <= 7, cell.id


def test_exercises_have_folded_solutions_that_cannot_rot(chapter, number):
    cells, found = chapter.cells, []
    for at, cell in enumerate(cells):
        if cell.cell_type == "markdown" and EXERCISE.match(cell.source):
            found += EXERCISE.findall(cell.source)
            assert ":::{dropdown} Solution" in cell.source
            solution = cells[at + 1]
            assert solution.cell_type == "code" and {"solution", "hide-cell"} <= tags(solution)
            checks = [node for node in ast.walk(ast.parse(solution.source)) if isinstance(node, ast.Assert)]
            assert checks or "assert_close" in solution.source, cell.id
    assert found == [(str(number), str(n + 1)) for n in range(len(found))] and len(found) >= 3
    assert sum("solution" in tags(cell) for cell in code(chapter)) == len(found)


def test_no_sentence_is_assembled_by_code(chapter):
    for cell in code(chapter):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.JoinedStr):
                literal = " ".join(part.value for part in node.values if isinstance(part, ast.Constant))
                assert len(re.findall(r"[A-Za-z]{2,}", literal)) <= 4, (cell.id, literal)


def test_every_parameter_is_used(chapter):
    (parameters,) = (cell for cell in code(chapter) if "parameters" in tags(cell))
    names = [target.id for node in ast.parse(parameters.source).body for target in node.targets]
    others = [cell.source for cell in code(chapter) if cell is not parameters]
    loaded = {
        node.id
        for source in others
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    assert set(names) <= loaded and {"profile", "seed", "run_dir"} <= set(names)


def test_chapter_shows_code_of_the_library_by_reference(chapter, number):
    shown = " ".join(
        re.findall(r"^(?:lesson\.)?source\((.*)\)$", "\n".join(cell.source for cell in code(chapter)), re.M)
    )
    wanted = {2: "AdapterGate.forward, gate_logits", 3: "visible", 4: "naive.train_attention", 9: "sampling_hours"}
    wanted |= {5: "chunked_loss, compression_loss", 6: "vote", 7: "tova.TOVALayer", 8: "own_needle.ask"}
    assert wanted.get(number, "") in shown


def test_source_is_the_code_of_today_without_docstrings_and_in_short_lines():
    shown = source(visible, AdapterGate.forward).data
    assert shown.startswith("```python\ndef visible(") and shown.endswith("```")
    assert '"""' not in shown and "class" not in shown
    assert "seen = (behind >= 0) & ((behind <= window) | ~evicted[:, :, None, :])" in shown
    assert max(map(len, shown.split("\n"))) <= 88 or "#" in shown  # a comment stays on its line
    assert '"""Boolean' in source(visible, docstrings=True).data
