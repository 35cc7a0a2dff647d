# The main job with the embedded model: stages, chapters, book, and the comparison with the published tables.
from companion.experiments.profiles import get_profile
from companion.experiments.run import Run
from companion.experiments.stages import settings, stages

try:
    JOB = Run(get_profile(S["profile"]), RUN, seed=S["seed"])
except ValueError as error:
    raise WorkflowError(str(error)) from error

STAGES = stages(JOB)
BASE = [ROOT / "data" / "reasoner" / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
RESULTS = ROOT / "data" / "results"
GLUE = [ROOT / "companion" / "experiments" / name for name in ("main.py", "run.py", "stages.py")]
MODULES = {  # what a stage runs; profiles are no sources, since their values are parameters
    "retrofit": ["companion.experiments.embedded", "dms_core.train.retrofit", "dms_core.checkpoint", "companion.tasks.mixture"],
    "held-out": ["companion.experiments.heldout", "dms_core.checkpoint", "companion.tasks.mixture"],
    "records": ["companion.records", "companion.tasks.embedded", "companion.tasks.grading", "dms_core.sampling", "dms_core.checkpoint", "dms_core.model"],
    "summary": ["dms_core.budgets.curves", "companion.experiments.summaries", "companion.tasks.grading"],
}
SOURCES = {kind: [*GLUE, *sources(modules)] for kind, modules in MODULES.items()}
CHAPTER_STAGES = {  # chapters that need no stage; the others wait for all of them
    "01_bottleneck": [], "02_gate": [], "03_delayed_eviction": [], "04_kernels": [], "08_real_model": [],
    "09_on_gpus": [],
    "05_retrofit": [name for name, stage in STAGES.items() if stage.kind in ("retrofit", "held-out")],
}
RUN_PARAMETERS = {"profile": S["profile"], "seed": S["seed"], "run_dir": relpath(RUN, ROOT / "notebooks")}
FINAL = [f"{RUN}/book/_build/html/index.html", f"{RUN}/curves.png", f"{RUN}/published.md"]


def stage_files(names):
    return [f"{RUN}/stages/{name}.json" for name in names]


def chapter_stages(chapter):
    return stage_files(CHAPTER_STAGES.get(chapter, STAGES))


def chapter_data(chapter):
    stored = {
        "01_bottleneck": [], "02_gate": [], "03_delayed_eviction": BASE,
        "04_kernels": [RESULTS / "kernels-cpu.json", RESULTS / "e2e-cpu.json"],
        "05_retrofit": [*BASE, *PUBLISHED, RESULTS / "full" / "curves.json"],
        "06_hyperscaling": [*BASE, *PUBLISHED, RESULTS / "int8.json", *RESULTS.glob("large*.json"), *sorted((RESULTS / "full").glob("*.json"))],
        "07_ablations": [
            *BASE, *PUBLISHED, *sorted(RESULTS.rglob("*.json")), ROOT / "companion/claims/claims.yaml",
            *sorted((ROOT / "data" / "protocols").glob("*.yaml")),
        ],
        "08_real_model": sorted([*RESULTS.glob("smollm2*.json"), *RESULTS.glob("recall.json")]),
        "09_on_gpus": PUBLISHED,
    }
    return stored.get(chapter, [*BASE, *PUBLISHED])


def needed(kind):
    return lambda wildcards: stage_files(STAGES[f"{kind}-{wildcards.what}"].needs)


def shape(kind):
    return lambda wildcards: settings(STAGES[f"{kind}-{wildcards.what}"])


# With --code, a stage deletes what other sources have made of it, and goes on with what these sources have begun.
OPTIONS = f"--profile {S['profile']} --seed {S['seed']} --run-dir {shlex.quote(RUN)}"
CODE = {kind: digest(files) for kind, files in SOURCES.items()}


rule retrofit:
    input:
        needed("retrofit"),
        base=BASE,
        sources=SOURCES["retrofit"],
    output:
        f"{RUN}/stages/retrofit-{{what}}.json",
    params:
        settings=shape("retrofit"),
    log:
        f"{RUN}/logs/retrofit-{{what}}.txt",
    threads: threads(S, "retrofit")
    resources:
        **resources(S, "retrofit"),
    shell:
        "{DMS} stage retrofit-{wildcards.what} {OPTIONS} --code {CODE[retrofit]} --out {output:q} > {log:q} 2>&1"


rule held_out:
    input:
        needed("held-out"),
        base=BASE,
        sources=SOURCES["held-out"],
    output:
        f"{RUN}/stages/held-out-{{what}}.json",
    params:
        settings=shape("held-out"),
    log:
        f"{RUN}/logs/held-out-{{what}}.txt",
    threads: threads(S, "held_out")
    resources:
        **resources(S, "held_out"),
    shell:
        "{DMS} stage held-out-{wildcards.what} {OPTIONS} --code {CODE[held-out]} --out {output:q} > {log:q} 2>&1"


rule records:
    input:
        needed("records"),
        base=BASE,
        sources=SOURCES["records"],
    output:
        f"{RUN}/stages/records-{{what}}.json",
    params:
        settings=shape("records"),
    log:
        f"{RUN}/logs/records-{{what}}.txt",
    threads: threads(S, "records")
    resources:
        **resources(S, "records"),
    shell:
        "{DMS} stage records-{wildcards.what} {OPTIONS} --code {CODE[records]} --out {output:q} > {log:q} 2>&1"


rule summary:
    input:
        stage_files(STAGES["summary"].needs),
        sources=SOURCES["summary"],
    output:
        f"{RUN}/stages/summary.json",
    params:
        settings=settings(STAGES["summary"]),
    log:
        f"{RUN}/logs/summary.txt",
    threads: threads(S, "summary")
    resources:
        **resources(S, "summary"),
    shell:
        "{DMS} stage summary {OPTIONS} --code {CODE[summary]} --out {output:q} > {log:q} 2>&1"


rule curves:
    input:
        f"{RUN}/stages/summary.json",
        sources=sources(["companion.figures.curves"]),
    output:
        f"{RUN}/curves.png",
    localrule: True
    shell:
        "{DMS} curves --results {RUN:q} --figure {output:q}"


rule published:
    input:
        PUBLISHED,
        f"{RUN}/stages/summary.json",
        sources=sources(["companion.claims.published_plot"]),
    output:
        markdown=f"{RUN}/published.md",
        json=f"{RUN}/published.json",
        figure=f"{RUN}/published.svg",
    localrule: True
    shell:
        "{DMS} published --results {RUN:q} --markdown {output.markdown:q} --figure {output.figure:q} --json > {output.json:q}"


rule book:
    input:
        expand(f"{RUN}/notebooks/{{chapter}}.ipynb", chapter=NOTEBOOKS),
        pages=[path for path in sorted((ROOT / "book").glob("*")) if path.is_file()],
        extensions=sorted((ROOT / "book" / "_ext").glob("*.py")),
        sources=sources(["companion.book"]),
    output:
        f"{RUN}/book/_build/html/index.html",
    log:
        f"{RUN}/logs/book.txt",
    resources:
        **resources(S, "book"),
    shell:
        "{DMS} chapters {RUN:q}/notebooks {RUN:q}/book > {log:q} 2>&1"
