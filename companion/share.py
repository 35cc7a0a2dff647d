"""Publish gates, or a whole retrofitted model, on the hub: a model card beside the files, and an upload.

``load_gates(base, REPO_ID)`` and ``load_model(REPO_ID)`` read what was published.  The card names base model, licence,
ratio, window and recipe, and holds the evaluation in the form that the hub understands (a model-index).
"""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from dms_core.checkpoint import SETTINGS, is_whole, read_settings
from dms_core.hub_files import PATTERNS, TIMEOUT
from dms_core.storage import read_json, write_text

CARD, TAGS = "README.md", ["dms", "dynamic-memory-sparsification", "kv-cache", "kv-cache-compression"]
PERMISSIVE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "unlicense")
IDS = re.compile(r"(apache-|mit$|bsd|cc-|cc0-|unlicense$|a?gpl|lgpl|mpl-|llama|gemma|.*openrail)")  # of the hub's
KNOWN = {"nvidia/Qwen3-8B-DMS-8x": "nvidia-non-commercial"}  # the authors' checkpoint; its card says "other"


@dataclass(frozen=True)
class Evaluation:
    """One result: accuracy in percent of one chain a problem."""

    task: str
    method: str  # dms or vanilla
    cr: float
    length: int  # most generated tokens a chain
    problems: int
    accuracy: float


def read_evaluation(file: Path | str, cr: float) -> list[Evaluation]:
    """The results at ratio ``cr``, and the dense model's, in a curves.json, at its largest length.

    Raises ValueError where it has none of them.
    """
    summary = read_json(Path(file))
    told = summary.get("task")
    rows = [
        Evaluation(told or x.get("task") or "traces", x["method"], x["cr"], x["L"], x["problems"], x["accuracy"])
        for x in summary.get("pass_at_1", ())
        if (x["method"], x["cr"]) in (("dms", cr), ("vanilla", 1))
    ]
    ours = [row for row in rows if row.method == "dms"]
    if not ours:
        raise ValueError(f"{file}: no results of dms at CR {cr:g}; must be a curves.json with that checkpoint's")
    longest = {row.task: max(r.length for r in ours if r.task == row.task) for row in ours}
    return [row for row in rows if row.length == longest.get(row.task)]


def licence_of(base_model: str) -> str | None:
    """The licence that the card of a model, a directory or a hub id, names; None where it is out of reach."""
    if base_model in KNOWN:
        return KNOWN[base_model]
    try:
        if (Path(base_model) / CARD).exists():
            data = ModelCard.load(Path(base_model) / CARD).data
        else:
            data = HfApi().model_info(base_model, timeout=TIMEOUT).card_data
    except Exception:  # bad ids, HTTP errors, and those of whichever HTTP client is installed
        return None
    given = data and (getattr(data, "license_name", None) or data.license)
    return str(given).lower() if given else None


def check_licence(licence: str, base_model: str, base_licence: str | None) -> None:
    """Raises ValueError where ``licence`` allows what the base model's forbids; warns where that must be read."""
    if not licence.strip():
        raise ValueError("licence '': must be named, such as apache-2.0")
    if base_licence is None:
        warnings.warn(f"{base_model}: its licence is not known; {licence!r} must agree with it", stacklevel=3)
    elif _non_commercial(base_licence) and not _non_commercial(licence):
        raise ValueError(f"licence {licence!r}: {base_model} is {base_licence!r}, so it must be non-commercial, too")
    elif base_licence not in (licence, *PERMISSIVE):
        warnings.warn(f"{base_model} is {base_licence!r}: what is made of it may need that licence", stacklevel=3)


def _non_commercial(licence: str) -> bool:
    return bool(re.search(r"non-?commercial|\bnc\b|research-only", licence.lower()))


def write_card(
    directory: Path | str,
    repo_id: str,
    *,
    licence: str,
    base_model: str,
    base_licence: str | None = None,
    evaluation: Path | str | None = None,
) -> Path:
    """Write README.md into a directory that ``save_gates``, ``save_model`` or a retrofit has written.

    licence: an id of the hub's, or another's name; base_licence: the base model's, where its card is out of reach.
    evaluation: a curves.json.  The recipe is read from the retrofit.json above the directory, if there is one.  Raises
    ValueError for a directory without a checkpoint of ours, a README.md that somebody else wrote, and a licence that
    allows what the base model's forbids.

    >>> save_gates(attach(model, DMSConfig(window=16)), "gates", cr=8.0)
    >>> write_card("gates", "me/tiny-dms-8x", licence="mit", base_model="me/tiny", base_licence="mit").name
    'README.md'
    """
    directory = Path(directory)
    settings, card = read_settings(directory), directory / CARD
    if "window" not in settings["dms"]:
        raise ValueError(f"{directory}: its settings are {settings['dms']}; must be those of DMS")
    if evaluation and not settings.get("cr"):
        raise ValueError(f"{directory}: does not say its compression ratio, so no results are its own")
    validate_repo_id(repo_id)
    if card.exists() and not set(TAGS) <= set(ModelCard.load(card, ignore_metadata_errors=True).data.tags or ()):
        raise ValueError(f"{card}: somebody else wrote it; it must be moved away first")
    check_licence(licence.lower(), base_model, (base_licence or licence_of(base_model) or "").lower() or None)
    rows = read_evaluation(evaluation, settings.get("cr")) if evaluation else []
    whole = is_whole(directory)
    known = IDS.match(licence.lower())
    data = ModelCardData(
        license=licence.lower() if known else "other",
        license_name=None if known else licence,
        base_model=base_model,
        base_model_relation="finetune" if whole else "adapter",
        library_name="dms_core",
        tags=TAGS,
        model_name=repo_id,
        eval_results=[_eval_result(row) for row in rows if row.method == "dms"] or None,
    )
    write_text(card, f"---\n{data.to_yaml()}\n---\n\n{_text(directory, settings, repo_id, base_model, whole, rows)}")
    return card


def _eval_result(row: Evaluation) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=row.task,
        dataset_name=row.task,
        metric_type="accuracy",
        metric_name=f"accuracy in %, one chain of at most {row.length} tokens, CR {row.cr:g}",
        metric_value=round(row.accuracy, 2),
    )


def _text(directory: Path, settings: dict, repo_id: str, base_model: str, whole: bool, rows: list[Evaluation]) -> str:
    dms, cr = settings["dms"], settings.get("cr")
    ratio = f"{cr:g}" if cr else "not noted"
    facts = {"compression ratio": ratio, "step": settings.get("step"), **dms}
    run = directory.parent / "retrofit.json"
    recipe = read_json(run)["recipe"] if run.exists() else {}
    what = "A model retrofitted with" if whole else "Gates for"
    load = f'load_model("{repo_id}")' if whole else f'load_gates(load_base("{base_model}"), "{repo_id}")'
    parts = [
        f"# {repo_id}\n\n{what} Dynamic Memory Sparsification ([arXiv 2506.05345](https://arxiv.org/abs/2506.05345)): "
        f"the model `{base_model}` with a KV cache that drops what each head does not need, after a window of "
        f"{dms['window']} tokens.",
        f"```python\nfrom dms_core import DMSCache, load_base, load_gates, load_model\n\nmodel = {load}\n"
        "model.generate(**inputs, past_key_values=DMSCache.for_model(model), max_new_tokens=1024)\n```",
        _table("Settings", ["setting", "value"], facts.items()),
    ]
    if recipe:
        parts.append(_table("Recipe", ["field", "value"], recipe.items()))
    if rows:
        names = ["task", "method", "CR", "most tokens a chain", "problems", "accuracy, %"]
        found = [(r.task, r.method, f"{r.cr:g}", r.length, r.problems, f"{r.accuracy:.1f}") for r in rows]
        parts.append(_table("Evaluation", names, found))
    return "\n\n".join(parts) + "\n"


def _table(title: str, names: list[str], rows) -> str:
    lines = [names, ["---"] * len(names), *(row for row in rows if row[-1] is not None)]
    return f"## {title}\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def share_gates(directory: Path | str, repo_id: str, *, private: bool = False, token: str | None = None, **card) -> str:
    """``write_card`` with ``card``, then create the repository where there is none and upload; returns its address.

    Weights, settings, tokenizer and card of the directory go, nothing below it.  A base model that the settings name,
    perhaps by a path of this machine, is the card's in what is uploaded.  Raises ValueError as ``write_card`` does, and
    where the hub refuses or is out of reach.
    """
    write_card(directory, repo_id, **card)
    settings = read_settings(directory)
    settings |= {"base": card["base_model"]} if settings.get("base") else {}
    hub, message = HfApi(token=token), "DMS gates and their card"
    patterns = {"allow_patterns": [*PATTERNS, CARD], "ignore_patterns": ["*/*", SETTINGS, "held_out-*", "facts-*"]}
    try:
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=str(directory), commit_message=message, **patterns)
        content = (json.dumps(settings, indent=1) + "\n").encode()
        hub.upload_file(repo_id=repo_id, path_or_fileobj=content, path_in_repo=SETTINGS, commit_message=message)
    except Exception as error:  # HTTP errors, and those of whichever HTTP client is installed
        raise ValueError(f"{repo_id}: not uploaded ({str(error).splitlines()[0]})") from None
    return str(address)
