# Executed notebooks.  An unknown notebook or parameter in the configuration stops the run before anything is executed.
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
CHOSEN = S["notebooks"] or {}
if unknown := set(CHOSEN) - set(NOTEBOOKS):
    raise WorkflowError(f"notebooks: unknown {', '.join(sorted(unknown))}; there are {', '.join(NOTEBOOKS)}")
if CHOSEN:
    from companion.book import check_parameters

    for chapter, values in CHOSEN.items():
        try:
            check_parameters(NOTEBOOKS[chapter], values or {})
        except ValueError as error:
            raise WorkflowError(str(error)) from error


def chapter_parameters(chapter):
    """Those of the configuration; the embedded model's run also tells where its results are."""
    return {**RUN_PARAMETERS, **(CHOSEN.get(chapter) or {})}


def chapter_arguments(wildcards):
    pairs = chapter_parameters(wildcards.chapter).items()
    return " ".join(f"-p {name} {shlex.quote(json.dumps(value))}" for name, value in pairs)


rule notebook:
    input:
        notebook=lambda w: NOTEBOOKS[w.chapter],
        sources=lambda w: sources([NOTEBOOKS[w.chapter]]),
        data=lambda w: chapter_data(w.chapter),
        stages=lambda w: chapter_stages(w.chapter),
    output:
        f"{RUN}/notebooks/{{chapter}}.ipynb",
    params:
        arguments=chapter_arguments,
    log:
        f"{RUN}/logs/notebook-{{chapter}}.txt",
    threads: threads(S, "notebook")
    resources:
        **resources(S, "notebook"),
    shell:
        "{DMS} notebook {input.notebook:q} {output:q} {params.arguments} 2> {log:q}"
