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
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from companion.experiments.heldout import held_out
from companion.experiments.profiles import get_profile
from companion.experiments.sample import checked_device
from companion.paths import REASONER, RESULTS, RUNS
from companion.provenance import describe
from companion.records import Method, records_file, sample_records
from companion.tasks.embedded import Traces
from companion.tasks.mixture import TraceDataset
from companion.tasks.reasoner import load_tokenizer
from dms_core.baselines.dmc import DMCConfig, attach_dmc, load_dmc, zero_neurons
from dms_core.budgets.curves import summarise
from dms_core.checkpoint import fingerprint, load_base, load_model
from dms_core.model import attach
from dms_core.sampling import SamplingConfig
from dms_core.storage import read_json, update_json, write_json
from dms_core.train.recipe import RetrofitConfig
from dms_core.train.retrofit import retrofit
from dms_core.train.trainer import checkpoint_dir

GROUP = 2  # query heads a KV head of the embedded model
TINY = get_profile("tiny")
DMS = TINY.recipe.dms


def attach_neuron(model, config):
    """DMS's neuron gate, with the neurons at 0."""
    zero_neurons(model, config.neuron, "q", GROUP)
    return attach(model, config)


ARMS = {  # settings, how a retrofit begins, how a checkpoint is loaded
    "dms": (DMS, attach, load_model),
    "dms-neuron": (TINY.recipe.changed(dms={"gate": "neuron"}).dms, attach_neuron, load_model),
    "dmc": (DMCConfig(scale=DMS.scale), partial(attach_dmc, reset=True), load_dmc),
    "dmc-s100": (DMCConfig(scale=100.0), partial(attach_dmc, reset=True), load_dmc),
    "dmc-s1": (DMCConfig(), attach_dmc, load_dmc),
}


def shortened(steps: int, batch: int, seed: int) -> RetrofitConfig:
    """The tiny profile's recipe up to its rest at CR 4, ramp and rest shortened alike."""
    whole = TINY.recipe.retrofit
    (cr, rest), *_ = whole.rests
    per_unit = max(1, round(whole.steps_per_unit * steps / ((cr - 1) * whole.steps_per_unit + rest)))
    rests = ((cr, steps - round((cr - 1) * per_unit)),)
    changes = {"final_cr": cr, "steps_per_unit": per_unit, "rests": rests, "batch": batch, "save_steps": 25}
    return TINY.recipe.changed(retrofit={**changes, "seed": seed}).retrofit


def train(arm: str, recipe: RetrofitConfig, out: Path, tokenizer, place: str = "cpu") -> dict:
    """Retrofit one arm, or read what was trained; returns its facts."""
    config, put, _ = ARMS[arm]
    if not (out / "retrofit.json").exists():
        data = TraceDataset(tokenizer, recipe.steps * recipe.batch, recipe.batch, seed=recipe.seed)
        began = time.process_time()
        arguments = {"train_sampling_strategy": "sequential", "use_cpu": place == "cpu"}
        retrofit(load_base(REASONER), tokenizer, data, config, recipe, out, attach=put, **arguments)
        labels = [data[i]["labels"] for i in range(len(data))]
        update_json(
            out / "retrofit.json",
            cpu_seconds=round(time.process_time() - began, 1),
            tokens=sum(map(len, labels)),
            labelled_tokens=sum(label != -100 for row in labels for label in row),
        )
    return read_json(out / "retrofit.json")


def sample(model, weights: str, method: Method, problems: int, chains: int, seed: int, runs: Path, tokenizer) -> dict:
    """One chain's accuracy at the longest length, in percent with a 95 % interval over problems, and its budgets."""
    task, length = Traces(size=problems, split="validation", seed=seed), max(TINY.lengths)
    config = SamplingConfig(max_new_tokens=length, batch=TINY.batch, seed=seed)
    file = runs / "records" / records_file(model, weights, tokenizer, task, method, config, None)
    point = summarise(sample_records(model, tokenizer, task, method, chains, config, file), [length], [1])["points"][0]
    return {key: point[key] for key in ("problems", "L", "accuracy", "low", "high", "reads", "peak")}


def compare_dmc(
    arms: Sequence[str],
    steps: Sequence[int],
    batch: int,
    documents: int,
    problems: int,
    chains: int,
    seed: int,
    runs: Path,
    out: Path,
    device: str | None = None,
) -> dict:
    """Every arm after each number of steps; written to ``out`` after each."""
    options = {"arms": list(arms), "steps": list(steps), "batch": batch, "documents": documents, "problems": problems}
    place = checked_device(device)
    tokenizer, cr = load_tokenizer(), TINY.recipe.retrofit.rests[0][0]
    chosen = (problems, chains, seed, runs, tokenizer)
    held = TraceDataset(tokenizer, documents, 1, "validation", seed)
    base = attach(load_base(REASONER), DMS).to(place)
    result = {
        "options": {**options, "chains": chains, "seed": seed},
        "environment": describe(),
        "vanilla": sample(base, fingerprint(REASONER), Method("vanilla", 1.0), *chosen),
        "runs": [],
    }
    for count, arm in ((count, arm) for count in steps for arm in arms):
        directory = runs / f"{arm}-{count}-{batch}"
        facts = train(arm, shortened(count, batch, seed), directory, tokenizer, place)
        kept = checkpoint_dir(directory, cr)
        model = ARMS[arm][2](kept).to(place)
        measured = held_out(model, load_base(REASONER).to(place), held, tokenizer.pad_token_id)
        measured["retention"] = [[round(share, 4) for share in layer] for layer in measured["retention"]]
        keys = ("step", "kd", "cr_target", "cr_measured")
        run = {
            "arm": arm,
            "steps": count,
            "config": facts["dms"],
            "trained": {key: facts[key] for key in ("tokens", "labelled_tokens", "cpu_seconds", "recipe")},
            "training": [{key: round(entry[key], 4) for key in keys} for entry in facts["log"] if "kd" in entry],
            "held_out": measured,
            "sampled": sample(model, fingerprint(kept), Method(arm, cr), *chosen),
        }
        result["runs"].append(run)
        write_json(out, result)
        line = "{cr_decisions:.2f}, live {cr_live:.2f}, KL {kl:.4f}, agreement {agreement:.4f}".format(**measured)
        print(f"{count} steps, {arm}: CR {line}, accuracy {run['sampled']['accuracy']:.1f} %", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", nargs="+", type=int, default=[150, 335], help="optimiser steps; 335: as in TINY")
    numbers = {"batch": TINY.recipe.retrofit.batch, "documents": 128, "problems": 100, "chains": 2, "seed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--runs", type=Path, default=RUNS / "dmc")
    parser.add_argument("--out", type=Path, default=RESULTS / "dmc.json")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    compare_dmc(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
