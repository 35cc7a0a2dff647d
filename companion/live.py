"""The embedded model for the page book/live: weights in 8 bits, sample problems, and the page's own files.

A matrix is stored row by row (a row an output) as int8 with one fp32 scale a row: w ~ scale * q, scale = max |w| / 127.
Norms and gates stay fp32; tied embeddings are stored once.  Each model is one script that sets an entry of
``window.DMS_WEIGHTS``, since a page opened from file:// may not fetch.  Numbers are little-endian, in the order of
``_matrices`` and ``_vectors``, which ``engine.js`` repeats.
"""

import base64
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from companion.paths import REASONER, checkout
from companion.tasks.choices import make_choice
from companion.tasks.embedded import MIX
from companion.tasks.programs import make_problem
from companion.tasks.puzzles import make_puzzle
from dms_core.checkpoint import is_checkpoint, load_base, load_model, load_tokenizer, read_settings

MODELS = {"dense": "", "cr4": "dms-cr4", "cr8": "dms-cr8"}  # name in the page: folder below the reasoner's
PAGE = ("index.html", "embed.html", "engine.js", "grid.js", "page.js", "page.css")
PROBLEMS, SEED = 12, 17  # sample problems a task, the first of (validation, SEED)
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def write_live(out_dir: Path | str, reasoner: Path = REASONER) -> Path:
    """Write the page, its models and its problems into ``out_dir``; returns the page's file.

    Raises ValueError where there is no repository, or for a model that the page cannot run.
    """
    source, out = checkout("the live page") / "book" / "live", Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name in PAGE:
        if source.resolve() != out.resolve():
            shutil.copy(source / name, out / name)
    for name, folder in MODELS.items():
        entry = (
            f"(window.DMS_WEIGHTS = window.DMS_WEIGHTS || {{}})[{name!r}] = {json.dumps(pack(reasoner / folder))};\n"
        )
        (out / f"weights-{name}.js").write_text(entry)
    (out / "problems.js").write_text(f"window.DMS_PROBLEMS = {json.dumps(sample_problems())};\n")
    return out / "index.html"


def sample_problems(count: int = PROBLEMS) -> dict[str, list[str]]:
    """Prompts of each embedded task, as the generators make them, none left out."""
    return {
        "traces": [make_problem("validation", SEED, i, MIX["traces"]).prompt for i in range(count)],
        "choice": [make_choice("validation", SEED, i, MIX["choice"]).prompt for i in range(count)],
        "search": [make_puzzle("validation", SEED, i).prompt for i in range(count)],
    }


def pack(directory: Path | str) -> dict:
    """What the page reads of a reasoner, dense or retrofitted.  Raises ValueError for one that the page cannot run."""
    dense = not is_checkpoint(directory)
    model, tokenizer = load_base(directory) if dense else load_model(directory), load_tokenizer(directory)
    config = model.config
    if not (config.model_type == "llama" and config.tie_word_embeddings and config.hidden_act == "silu"):
        raise ValueError(f"{directory}: the page runs a Llama with tied embeddings and SiLU alone")
    if not dense and (model.dms.config.gate, model.dms.config.granularity) != ("adapter", "head"):
        raise ValueError(f"{directory}: the page runs adapter gates with a decision a head alone")
    rows = [quantise(matrix) for matrix in _matrices(model)]
    floats = [scale for _, scale in rows] + _vectors(model)
    dms = None if dense else model.dms.config
    return {
        "shape": {
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "kvHeads": config.num_key_value_heads,
            "headDim": config.head_dim,
            "inner": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "positions": config.max_position_embeddings,
            "eps": config.rms_norm_eps,
            "theta": config.rope_parameters["rope_theta"],
            "eos": config.eos_token_id,
        },
        "dms": dms and {"window": dms.window, "lag": dms.lag, "scale": dms.scale, "offset": dms.offset},
        "cr": 1 if dense else read_settings(directory)["cr"],
        "tokens": tokenizer.convert_ids_to_tokens(range(config.vocab_size)),
        "int8": _base64(torch.cat([matrix.flatten() for matrix, _ in rows])),
        "fp32": _base64(torch.cat([vector.flatten() for vector in floats])),
    }


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 like ``matrix`` (rows, columns), fp32 scale (rows,)).

    >>> quantise(torch.tensor([[127.0, -254.0, 1.0]]))
    (tensor([[  64, -127,    0]], dtype=torch.int8), tensor([2.]))
    """
    scale = matrix.abs().amax(1).clamp_min(1e-12) / 127
    return (matrix / scale[:, None]).round().to(torch.int8), scale


def round_weights(model) -> None:
    """Replace the matrices of a reasoner by what the page computes with: quantised and back, in place."""
    for matrix in _matrices(model):
        whole, scale = quantise(matrix)
        matrix.copy_(whole * scale[:, None])


def _matrices(model) -> list[Tensor]:
    """Embeddings, then a layer's projections, layer by layer."""
    layers = model.model.layers
    return [model.model.embed_tokens.weight.data] + [
        layer.get_submodule(name).weight.data for layer in layers for name in PROJECTIONS
    ]


def _vectors(model) -> list[Tensor]:
    """The norms of each layer, the last norm, then each layer's gate, if any: norm and projection."""
    layers = model.model.layers
    norms = [norm.weight.data for x in layers for norm in (x.input_layernorm, x.post_attention_layernorm)]
    gates = [x.self_attn.dms_gate for x in layers if hasattr(x.self_attn, "dms_gate")]
    return [
        *norms,
        model.model.norm.weight.data,
        *(p.data for gate in gates for p in (gate.norm.weight, gate.proj.weight)),
    ]


def _base64(tensor: Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()
