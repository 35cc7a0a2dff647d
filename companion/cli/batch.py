"""Single steps for batch runs: one stage of the main job, one notebook, the book from executed notebooks."""

from pathlib import Path

from companion.cli.app import Device, Profile, Seed, arg, command, opt
from companion.paths import RUNS, checkout
from dms_core.storage import write_json

BATCH = "Batch"


@command(BATCH, "stage")
def stage(
    name: arg(str, "such as records-traces-dms-cr4", "[NAME]") = None,
    profile: Profile = "tiny",
    run_dir: opt(Path, "where results are kept and reused (default: runs/PROFILE)") = None,
    seed: Seed = 0,
    code: opt(str, "first delete what other sources made of the stage", metavar="DIGEST") = "",
    out: opt(Path, "also write the result to this JSON file") = None,
    device: Device = None,
):
    """one stage of the main job, such as records-traces-dms-cr4; no name lists them"""
    from companion.experiments.profiles import get_profile
    from companion.experiments.run import Run
    from companion.experiments.stages import run_stage, stages

    run = Run(get_profile(profile), run_dir or RUNS / profile, seed=seed, device=device)
    if name is None:
        names = list(stages(run))
        yield "\n".join(names)
        return {"stages": names}
    result = run_stage(run, name, code)
    if out:
        write_json(out, result)
    yield f"{result['stage']}: {result['seconds']} s"
    return result


@command(BATCH, "notebook")
def notebook(
    notebook: arg(Path, "to execute", "NOTEBOOK"),
    out: arg(Path, "the executed copy", "OUT"),
    parameters: opt(
        list[str], "set a parameter; the value is YAML, such as 3, [0, 4] or a word", "-p", metavar="KEY VALUE"
    ) = (),
):
    """execute a notebook; a parameter that it does not have is an error"""
    import yaml

    from companion.book import execute

    if not notebook.exists():
        raise ValueError(f"{notebook}: no such notebook")
    values = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in parameters)}
    execute(notebook, out, values)
    return {"notebook": str(out), "parameters": values}


@command(BATCH, "chapters")
def chapters(
    notebooks: arg(Path, "directory of executed notebooks", "NOTEBOOKS"),
    out: arg(Path, "directory for sources and pages; what it holds is replaced", "OUT"),
):
    """render the book from executed notebooks, in a directory of its own"""
    checkout("dms chapters")  # before packages that only the book needs
    from companion.book import render_chapters

    page = render_chapters(notebooks, out)
    yield str(page)
    return {"book": str(page)}


@command(BATCH, "pdf")
def pdf(
    out: opt(Path, "the file") = Path("book/_build/book.pdf"),
    book: opt(Path, "directory of the rendered book", "--book") = Path("book"),
):
    """print the rendered book to one PDF, with Chromium"""
    from companion.printing import print_book

    sheets = print_book(book / "_build" / "html", book / "_toc.yml", out)
    yield f"{out}: {sheets} pages"
    return {"pdf": str(out), "pages": sheets}
