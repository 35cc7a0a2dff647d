# Any other model: one retrofit that leaves a checkpoint at each ratio, chains per (task, method, CR), curves per task,
# and the comparison with the published tables.  These rules depend on parameters and results, not on the library's
# sources: an edited comment shall not cost a thousand GPU-hours.  To do it anew after a change, use another `name`.
TASKS = S["tasks"]
TRAINED = ("dms",)  # methods that need a retrofitted checkpoint; others run the original weights
CRS = sorted({f"{cr:g}" for method in TRAINED for cr in S["methods"].get(method, [])})
TRAINING = [contents(S["recipe"]), contents(S["data"])]
RETROFIT = f"{RUN}/retrofit-{key(S['model'], *TRAINING)}"
SHARDS = [f"{number}-of-{S['shards']}" for number in range(1, S["shards"] + 1)]
RUN_PARAMETERS = {}
FINAL = [
    *expand(f"{RUN}/{{task}}/published.md", task=TASKS),
    *expand(f"{RUN}/notebooks/{{chapter}}.ipynb", chapter=CHOSEN),
]


def chapter_stages(chapter):
    return []


def chapter_data(chapter):
    return PUBLISHED


def chains(task, method, cr):
    """Directory of one grid of chains; other settings have another, and more chains are added to those there."""
    facts = [S["model"], max(TASKS[task]["lengths"]), TASKS[task]["options"], *(TRAINING if method in TRAINED else [])]
    return f"{RUN}/{task}/{method}-cr{cr:g}-{key(*facts)}"


def chain_directories(task):
    return [chains(task, method, cr) for method, crs in S["methods"].items() for cr in crs]


def retrofitted(wildcards):
    return [f"{RETROFIT}/checkpoints.txt"] if wildcards.method in TRAINED else []


def weights(wildcards, input):
    return f"{RETROFIT}/cr{wildcards.cr}" if input else S["model"]


# Snakemake deletes the outputs of a job that failed, so what a retrofit goes on with is none: the list below is written
# last, and only if all checkpoints that are sampled from are there.
rule retrofit:
    output:
        f"{RETROFIT}/checkpoints.txt",
    params:
        checkpoints=expand(f"{RETROFIT}/cr{{cr}}/dms.json", cr=CRS),
        arguments=shlex.join(
            ["--recipe", S["recipe"], "--model", S["model"], *(["--data", S["data"]] if S["data"] else [])]
        ),
        out=RETROFIT,
    log:
        f"{RUN}/logs/retrofit.txt",
    threads: threads(S, "retrofit")
    resources:
        **resources(S, "retrofit"),
    shell:
        "{LAUNCH} retrofit {params.arguments} --out {params.out:q} > {log:q} 2>&1 && ls {params.checkpoints:q} > {output:q}"


# One job a shard: a lost one is repeated alone, and goes on where it stopped.
rule sample:
    input:
        retrofitted,
    output:
        touch(f"{RUN}/{{task}}/{{method}}-cr{{cr}}-{{key}}/done-{{shard}}"),
    params:
        weights=weights,
        chains=lambda w: TASKS[w.task]["chains"],
        length=lambda w: max(TASKS[w.task]["lengths"]),
        options=lambda w: TASKS[w.task]["options"],
        shard=lambda w: w.shard.replace("-of-", "/"),
        out=lambda w, output: str(Path(output[0]).parent),
    log:
        f"{RUN}/logs/sample-{{task}}-{{method}}-cr{{cr}}-{{key}}-{{shard}}.txt",
    threads: threads(S, "sample")
    resources:
        **resources(S, "sample"),
    shell:
        "{LAUNCH_SAMPLE} sample --model {params.weights:q} --task {wildcards.task} --method {wildcards.method}"
        " --cr {wildcards.cr} --chains {params.chains} --length {params.length} {params.options} --shard {params.shard}"
        " --workers {threads}"
        " --out {params.out:q} > {log:q} 2>&1"


rule curves:
    input:
        lambda w: [f"{directory}/done-{shard}" for directory in chain_directories(w.task) for shard in SHARDS],
    output:
        f"{RUN}/{{task}}/curves.json",
    params:
        records=lambda w: chain_directories(w.task),
        lengths=lambda w: TASKS[w.task]["lengths"],
        widths=lambda w: TASKS[w.task]["widths"],
        names=lambda w: shlex.join(
            ["--model", S["published_as"] or S["model"], "--task", TASKS[w.task]["published_as"] or w.task]
        ),
    log:
        f"{RUN}/logs/curves-{{task}}.txt",
    resources:
        **resources(S, "curves"),
    shell:
        "{DMS} summarise {params.records:q} --lengths {params.lengths} --widths {params.widths} {params.names}"
        " --out {output:q} > {log:q} 2>&1"


rule published:
    input:
        PUBLISHED,
        f"{RUN}/{{task}}/curves.json",
    output:
        markdown=f"{RUN}/{{task}}/published.md",
        json=f"{RUN}/{{task}}/published.json",
        figure=f"{RUN}/{{task}}/published.svg",
    localrule: True
    shell:
        "{DMS} published --results {RUN:q}/{wildcards.task} --markdown {output.markdown:q} --figure {output.figure:q} --json"
        " > {output.json:q}"
