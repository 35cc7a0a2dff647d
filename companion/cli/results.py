"""What each command prints with --json, as types: help texts are made of them, and tests hold results against them."""

from types import NoneType
from typing import Literal, TypedDict, get_args, get_origin, is_typeddict

WORDS = {str: "text", float: "number", bool: "true or false", NoneType: "null", object: "..."}


def record(numbers: str = "", texts: str = "", others: str = "", note: str = "", **fields) -> type:
    """A TypedDict whose fields are named in ``numbers``, ``texts`` and, of any type, ``others``, or given by type."""
    kinds = {name: kind for kind, names in ((str, texts), (float, numbers), (object, others)) for name in names.split()}
    made = TypedDict("Record", kinds | fields)
    made.__doc__ = note
    return made


def table(keys: str, values) -> type:
    """A dictionary by ``keys``, a word for what they are; ``values``: a type, or such a word."""
    return dict[Literal[keys], Literal[values] if isinstance(values, str) else values]


def describe(kind) -> str:
    """A type in words: {"cr", "book": text}, where a field without any is a number."""
    inner = get_args(kind)
    if is_typeddict(kind):
        words = {name: "" if of is float else f": {describe(of)}" for name, of in kind.__annotations__.items()}
        fields = ", ".join(f'"{name}"{word}' for name, word in words.items())
        return f"{{{fields}}}" + (f"; {kind.__doc__}" if kind.__doc__ else "")
    if get_origin(kind) is list:
        return f"[{describe(*inner)}]"
    if get_origin(kind) is dict:
        return "{{{}: {}}}".format(*map(describe, inner))
    return inner[0] if get_origin(kind) is Literal else WORDS.get(kind) or " or ".join(map(describe, inner))


Text, Matrix = str | None, list[list[float]]
Score = record("cr L problems chains accuracy se_questions se_samples", "method")
CURVES = {
    "points": list[record("cr L W problems accuracy low high reads peak", "method")],
    "pass_at_1": list[Score],
    "margins": list[record("value low high", "a b axis scale")],
    "paired": list[record("cr difference low high", "a b")],
    "note": "accuracies and margins in points, 95 % bootstrap intervals over problems; reads, peak: tokens a KV head",
}
Curves, Grid = record(**CURVES), record("seconds", **CURVES)
Summary = record(others="environment", model=Text, task=Text, **CURVES)
Reproduce = record("seconds", "book", retrofit=record("steps seconds cr_target cr_measured cr_live"))
Margin = record("value low high")
Accuracy = record(measured=record("accuracy low high L", difference=record("difference low high") | None) | None)
Margins = record(direction=Text, measured=record(log2=Margin, linear=Margin) | None)
Ran = record(texts="label", model=Text, task=Text, same=bool)
ROWS = "margins and accuracies: the published rows with these fields added"
Published = record(run=Ran, margins=list[Margins], accuracies=list[Accuracy], note=ROWS)
Ledger = record(claims=list[record(texts="claim where measured published verdict needs")])
FACTS = "cr cr_decisions cr_live kl agreement seconds accuracy"
Variant = record(f"{FACTS} low high window steps problems chains L tokens", "variant eviction gate train loss")
FOUND = {"rows": list[Variant], "pairs": list[record("difference low high problems", "a b")], "missing": list[str]}
Ablation = record("", "question reference", "recipe environment", left_out=table("variant", "why"), **FOUND)
Replica = record(f"seed {FACTS} accuracy_low accuracy_high difference low high", "method")
Mean, Dense = record("cr difference low high seeds", "a b"), record("accuracy accuracy_low accuracy_high")
MEANS = {"rows": list[Replica], "means": list[Mean], "dense": Dense, "seeds": list[float]}
Seeds = record("problems chains L", "", "recipe dms environment", **MEANS)
EFFECTS = {
    "rows": list[record("lookups follows effect", "model patched kind")],
    "dms_minus_dense": list[record("difference", "patched kind")],
    "window_minus_control": record("difference"),
    "note": "follows, effect, difference in %, with NAME_low and NAME_high; source_kept: share a KV head, a layer",
}
Delay = record("kept_somewhere", "question verdict", "settings environment", source_kept=Matrix, **EFFECTS)
SIZES = "cr tokens window bytes_dense bytes_held bytes_window ratio_excluding_window"
CacheReport = record(SIZES, live_per_layer_head=Matrix)
Sample = record("cr records", "task method file", pass_at_1=Score | None, note="null if not graded")
Grade = record(texts="task", files=list[record("records correct", "file")])
COSTS = "parameters weight_bytes kv_bytes kv_bytes_per_token flops read_bytes latency_s tokens_per_s kv_latency_share"
Plan = record(f"batch context cr {COSTS} largest_batch", "model device", retrofit_h100_hours=float | None)
Budget = record("generations kv_reads dense_kv_reads peak_tokens dense_peak_tokens cr_reads cr_peak")
SCORES = {"results": table("task", table("metric", "value")), "samples": table("task", "number")}
MEANT = "kv: means over the generations, in tokens per KV head"
Eval = record(texts="model", gates=bool, kv=Budget | None, note=MEANT, **SCORES)
Fetch, Chapters, Converse = record(texts="directory"), record(texts="book"), record("documents tokens labelled")
COMPARED = "cr cr_decisions cr_live agreement agreement_low agreement_high kl tokens prompts needles"
SPEED = "tokens_per_s kv_bytes"
REPORT = {"rows": list[record(f"{COMPARED} {SPEED}", "method")], "plain": record(f"rows {SPEED}")}
UNITS = "KL in nats a token, bytes of the first batch"
Fidelity = record("prompts continuation", "", "environment", UNITS, prompt_tokens=list[float], **REPORT)
Example = record("layers heads window cr_decisions", "special", tokens=list[str], kept=list[str])
Kept = record("documents tokens", retention=Matrix, kinds=table("kind", record("tokens retention")))
BITS = "special: a bit a token; kept: such bits of each (layer, KV head); retention: (layers, KV heads)"
Tokens = record("cr index", "", "environment", BITS, example=Example, summary=Kept)
Documents = record("rows rejected_rows documents cut tokens_cut dropped tokens labelled")
Retrofit = record("steps", "out", checkpoints=table("CR", "directory"), documents=Documents)
EACH = table("ours or baseline", "number")
TIMES = {"baseline_ms": EACH, "ratio": EACH, "quartiles_ms": table("ours or baseline", list[float])}
NOTES = {"peak_bytes": EACH, "notes": table("baseline", "why it is missing")}
Case = record("rounds ours_ms gbps copy_gbps flops", "name kind", "shape", **TIMES, **NOTES)
BYTES = (
    "medians; ratio: baseline over ours; gbps: 10^9 bytes a second that the operation must move, copy_gbps: that a "
    "copy moves; peak_bytes: beyond what was held before; with cache also held_bytes"
)
Bench = record("", "device", "environment", BYTES, cases=list[Case])
Device = record(name=Text, modules=table("operation", "module") | None, why=Text)
Kernels = record(texts="torch", triton=Text, devices=table("cpu or cuda", Device))
Compiled = record("target registers spills shared limit stack", "kernel", ok=bool)
Aot = record(texts="triton", cases=list[Compiled], note="sizes in bytes; status 1 if a case is not ok")
Stage, Notebook = record("seconds", "stage", "result"), record(texts="notebook", parameters=table("name", "value"))
Recipes, Stages, Fields = record(recipes=list[str]), record(stages=list[str]), Literal["the recipe's fields"]
