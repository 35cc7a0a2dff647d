"""One seed, one machine, one number of threads: the same bytes, in this process and in another one."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from companion.experiments.embedded import train_recipe
from companion.paths import REASONER
from companion.tasks import get_task
from companion.tasks.reasoner import load_tokenizer
from dms_core.checkpoint import load_model
from dms_core.sampling import SamplingConfig, sample_chains
from dms_core.train.recipe import load_recipe

SHORT = {"final_cr": 3.0, "steps_per_unit": 1, "rests": [], "batch": 2, "warmup": 0}


def sampled() -> str:
    model, tokenizer = load_model(REASONER / "dms-cr8"), load_tokenizer(REASONER)
    task = get_task("traces", size=4, split="validation")
    prompts = [task.prompt_ids(tokenizer, problem) for problem in task.problems]
    jobs = [(problem, chain) for chain in range(2) for problem in range(4)]
    return repr(list(sample_chains(model, tokenizer, prompts, jobs, SamplingConfig(48, batch=3))))  # seconds left out


def retrofitted(out: Path) -> list[str]:
    """Digests of the weights at each ratio, of the state from which a run goes on."""
    train_recipe(load_recipe("reasoner", SHORT), out, cpu=True)
    files = sorted(out.rglob("*.safetensors"))
    return [f"{file.relative_to(out)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]


def everything(out: Path) -> str:
    torch.set_num_threads(1)
    return "\n".join([sampled(), *retrofitted(out)])


@pytest.mark.slow
def test_sampling_and_retrofit_give_the_same_bytes_again_here_and_in_another_process(tmp_path):
    here = everything(tmp_path / "here")
    assert here.count("safetensors") >= 3 and here.count("Chain(") == 8
    assert here == everything(tmp_path / "again")
    other = {**os.environ, "PYTHONHASHSEED": "7", "MALLOC_PERTURB_": "85"}  # sets in another order, memory not zero
    ran = subprocess.run([sys.executable, __file__, str(tmp_path / "other")], env=other, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == here + "\n"


if __name__ == "__main__":
    print(everything(Path(sys.argv[1])))
