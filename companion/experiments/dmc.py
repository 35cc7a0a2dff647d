"""DMC against DMS at equal tokens: the embedded model, the same trainer, data, steps and schedule.

``python -m companion.experiments.dmc`` retrofits each arm to the same compression ratio, measures it on held-out
documents, samples validation problems, and writes data/results/dmc.json.  A stopped run goes on where it was.

Arms:
- ``dms``: eviction, adapter gate.
- ``dms-neuron``: eviction decided by a query neuron, which is taken out of attention without a warm-up.
- ``dmc``: merging decided by a key neuron, weighted by a query neuron, both taken out of attention likewise.
- ``dmc-s100``: the same with scale 100, so that the decisions move ten times as far with each step.
- ``dmc-s1``: the same from the neurons' values in the base model, with DMC's own scale 1.
In ``dms-neuron`` and ``dmc`` the neurons start at 0 and act with the scale of the adapters, so that they start like
``dms``, with nothing compressed: ``dms-neuron`` tells what the neuron costs from what merging costs.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from companion.experiments.heldout import held_out
from companion.experiments.profiles import TINY
from companion.paths import REASONER, RESULTS
from companion.provenance import describe
from companion.records import Method, run_grid
from companion.tasks.dataset import TraceDataset
from companion.tasks.program_traces import ProgramTraces
from companion.tasks.reasoner import load_tokenizer
from dms_core.baselines.dmc import DMCConfig, attach_dmc, load_dmc, zero_neurons
from dms_core.budgets.curves import summarise
from dms_core.checkpoint import load_base, load_model
from dms_core.model import attach
from dms_core.sampling import SamplingConfig
from dms_core.train.retrofit import RetrofitConfig, checkpoint_dir, retrofit

RESULT = RESULTS / "dmc.json"
GROUP = 2  # query heads a KV head of the embedded model


def attach_neuron(model, config):
    """DMS's neuron gate, with the neurons at 0."""
    zero_neurons(model, config.neuron, "q", GROUP)
    return attach(model, config)


ARMS = {  # settings, how a retrofit begins, how a checkpoint is loaded
    "dms": (TINY.dms, attach, load_model),
    "dms-neuron": (replace(TINY.dms, gate="neuron"), attach_neuron, load_model),
    "dmc": (DMCConfig(scale=TINY.dms.scale), partial(attach_dmc, reset=True), load_dmc),
    "dmc-s100": (DMCConfig(scale=100.0), partial(attach_dmc, reset=True), load_dmc),
    "dmc-s1": (DMCConfig(), attach_dmc, load_dmc),
}


def shortened(steps: int, options: argparse.Namespace) -> RetrofitConfig:
    """The tiny profile's recipe up to its rest at CR 4, ramp and rest shortened alike."""
    (cr, rest), *_ = TINY.recipe.rests
    whole = (cr - 1) * TINY.recipe.steps_per_unit + rest
    per_unit = max(1, round(TINY.recipe.steps_per_unit * steps / whole))
    return replace(
        TINY.recipe, final_cr=cr, steps_per_unit=per_unit, rests=((cr, steps - round((cr - 1) * per_unit)),),
        batch=options.batch, save_steps=25, seed=options.seed,
    )  # fmt: skip


def train(arm: str, recipe: RetrofitConfig, out: Path, tokenizer) -> dict:
    """Retrofit one arm, or read what was trained; returns its facts."""
    config, put, _ = ARMS[arm]
    if not (out / "retrofit.json").exists():
        data = TraceDataset(tokenizer, recipe.steps * recipe.batch, recipe.batch, seed=recipe.seed)
        began = time.process_time()
        arguments = {"train_sampling_strategy": "sequential", "use_cpu": True}
        retrofit(load_base(REASONER), tokenizer, data, config, recipe, out, attach=put, **arguments)
        facts = json.loads((out / "retrofit.json").read_text())
        labels = [item["labels"] for item in (data[i] for i in range(len(data)))]
        facts |= {
            "cpu_seconds": round(time.process_time() - began, 1),
            "tokens": sum(map(len, labels)),
            "labelled_tokens": sum(label != -100 for row in labels for label in row),
        }
        (out / "retrofit.json").write_text(json.dumps(facts, indent=1) + "\n")
    return json.loads((out / "retrofit.json").read_text())


def measure(arm: str, out: Path, options: argparse.Namespace, tokenizer) -> dict:
    """Held-out compression, KL and agreement of one arm; accuracy and budgets of its chains."""
    cr = TINY.recipe.rests[0][0]
    model = ARMS[arm][2](checkpoint_dir(out, cr))
    documents = TraceDataset(tokenizer, options.documents, 1, "validation", options.seed)
    documents = [documents[i] for i in range(len(documents))]
    facts = held_out(model, load_base(REASONER), documents, tokenizer.pad_token_id)
    facts["retention"] = [[round(share, 4) for share in layer] for layer in facts["retention"]]
    return {"held_out": facts, "sampled": sample(model, Method(arm, cr), options, tokenizer)}


def sample(model, method: Method, options: argparse.Namespace, tokenizer) -> dict:
    """One chain's accuracy at the longest length, in percent with a 95 % interval over problems, and its budgets."""
    task = ProgramTraces(size=options.problems, split="validation", seed=options.seed)
    length = max(TINY.lengths)
    config = SamplingConfig(max_new_tokens=length, batch=TINY.batch, seed=options.seed)
    records = run_grid(model, tokenizer, task, method, options.chains, config, options.runs / "records")
    point = summarise(records, [length], [1])["points"][0]
    return {key: point[key] for key in ("problems", "L", "accuracy", "low", "high", "reads", "peak")}


def compare(arm: str, steps: int, options: argparse.Namespace, tokenizer) -> dict:
    """One arm after ``steps`` steps."""
    out = options.runs / f"{arm}-{steps}-{options.batch}"
    facts = train(arm, shortened(steps, options), out, tokenizer)
    log = [entry for entry in facts["log"] if "kd" in entry]
    curve = [{key: round(entry[key], 4) for key in ("step", "kd", "cr_target", "cr_measured")} for entry in log]
    trained = {key: facts[key] for key in ("tokens", "labelled_tokens", "cpu_seconds", "recipe")}
    return {
        "arm": arm, "steps": steps, "config": facts["dms"], "trained": trained, "training": curve,
        **measure(arm, out, options, tokenizer),
    }  # fmt: skip


def main(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer()
    base = attach(load_base(REASONER), TINY.dms)
    result = {
        "options": {name: value for name, value in vars(options).items() if name not in ("runs", "out")},
        "environment": describe(), "vanilla": sample(base, Method("vanilla", 1.0), options, tokenizer), "runs": [],
    }  # fmt: skip
    for steps in options.steps:
        for arm in options.arms:
            run = compare(arm, steps, options, tokenizer)
            result["runs"].append(run)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            held = run["held_out"]
            print(
                f"{steps} steps, {arm}: CR {held['cr_decisions']:.2f}, live {held['cr_live']:.2f}, KL {held['kl']:.4f},"
                f" agreement {held['agreement']:.4f}, accuracy {run['sampled']['accuracy']:.1f} %", flush=True,
            )  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", nargs="+", type=int, default=[150, 335], help="optimiser steps; 335: as in TINY")
    parser.add_argument("--batch", type=int, default=TINY.recipe.batch)
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/dmc"))
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
