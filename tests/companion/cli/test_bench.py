"""Benchmarks: what they promise about their inputs, their meters and their JSON.  Nothing here asserts a speed."""

import json

import pytest
import torch

from companion.cli import main as cli
from companion.cli import measure as commands
from dms_kernels import EXACT, benchmarks, prefill_attention, train_attention
from dms_kernels.benchmarks import attention, case, inputs, measure

FIELDS = {
    "name",
    "kind",
    "shape",
    "rounds",
    "ours_ms",
    "baseline_ms",
    "ratio",
    "quartiles_ms",
    "gbps",
    "copy_gbps",
    "flops",
    "peak_bytes",
    "notes",
}
BASELINES = {
    "prefill-32768": {"sdpa"},
    "prefill-8192": {"sdpa"},
    "prefill-1024": {"sdpa"},
    "train-4096": {"sdpa_mask", "sdpa"},
    "train-16384": {"sdpa"},
    "decode-cr8": {"sdpa", "sdpa_folded", "sdpa_gqa"},
    "decode-cr1": {"sdpa", "sdpa_folded", "sdpa_gqa"},
    "cache-append": {"dynamic_cache"},
}


def bench(capsys, *arguments):
    status = cli.main(["bench", *arguments])
    return status, capsys.readouterr()


@pytest.mark.every(4)
@pytest.mark.parametrize("kind", benchmarks.KINDS)
def test_bench_prints_the_promised_json(kind, capsys):
    status, printed = bench(capsys, kind, "--quick", "--repeats", "2", "--json")
    result = json.loads(printed.out.splitlines()[-1])
    assert status == 0 and result["device"] == "cpu"
    assert {"packages", "processor", "threads", "cores"} <= set(result["environment"])
    assert [row["name"] for row in result["cases"]] == [name for name in BASELINES if name.startswith(kind)]
    for row in result["cases"]:
        assert set(row) - {"held_bytes"} == FIELDS and row["rounds"] == 2
        names = set(row["baseline_ms"])
        assert BASELINES[row["name"]] <= names and set(row["ratio"]) == names
        assert set(row["peak_bytes"]) == set(row["quartiles_ms"]) == {"ours", *names}
        for name in names:
            assert row["ratio"][name] == pytest.approx(row["baseline_ms"][name] / row["ours_ms"])
        for key in ("ours_ms", "gbps", "copy_gbps"):
            assert row[key] > 0
        assert "flex" in {**row["baseline_ms"], **row["notes"]} or row["name"] != "train-4096"
        assert ("held_bytes" in row) == (kind == "cache")


def test_bench_prints_one_line_a_case_without_json(capsys):
    _, printed = bench(
        capsys, "prefill", "--quick", "--repeats", "1", "--case", "prefill-1024", "--case", "prefill-8192"
    )
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == ["prefill-8192", "prefill-1024"]
    assert len({line.index("ours") for line in lines}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sort"], "kind 'sort': must be one of prefill, train, decode, cache"),
        (["train", "--device", "tpu"], "device 'tpu': must be one of cpu"),
        (["train", "--case", "train-7"], "case 'train-7': must be one of train-4096, train-16384"),
        (["train", "--repeats", "0"], "repeats 0: must be >= 1"),
        (["train", "--quick", "--save"], "name a file after --save"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_is_allowed(arguments, message, capsys):
    status, printed = bench(capsys, *arguments)
    assert status == 2 and message in printed.err and not printed.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a card")
def test_cuda_without_a_card_is_a_clear_error(capsys):
    status, printed = bench(capsys, "decode", "--device", "cuda")
    assert status == 2 and "device 'cuda': must be one of cpu on this machine" in printed.err


def test_save_replaces_cases_by_name_and_keeps_the_others_of_the_same_environment(tmp_path, capsys):
    file = tmp_path / "kernels.json"

    def result(environment, *cases):
        rows = [{"kind": "train", "name": name, "ours_ms": value} for name, value in cases]
        return {"device": "cpu", "environment": environment, "cases": rows}

    def saved():
        return {row["name"]: row["ours_ms"] for row in json.loads(file.read_text())["cases"]}

    commands.save_cases(result({"cores": 2}, ("a", 1), ("b", 2)), file)
    commands.save_cases(result({"cores": 2}, ("b", 3), ("c", 4)), file)
    assert saved() == {"a": 1, "b": 3, "c": 4}
    commands.save_cases(result({"cores": 1}, ("c", 5)), file)
    assert saved() == {"c": 5} and "3 cases of another environment" in capsys.readouterr().err


def test_save_names_the_file_after_the_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmarks, "run", lambda *arguments: [])
    assert bench(capsys, "cache", "--save")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["kernels-cpu.json"]
    assert commands.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize("rows", [2, 6, 24, 256])
@pytest.mark.parametrize("seed", range(5))
def test_retention_has_mean_one_over_cr_and_a_tenfold_spread(rows, seed):
    share = inputs.retention(rows, 8, torch.Generator().manual_seed(seed))
    assert share.mean().item() == pytest.approx(1 / 8)
    assert (share.max() / share.min()).item() == pytest.approx(10, rel=1e-5)
    assert share.max() <= 1


def test_retention_without_compression_is_whole_and_with_too_little_an_error():
    assert (inputs.retention(5, 1, torch.Generator()) == 1).all()
    with pytest.raises(ValueError, match=r"cr 1\.1: too small for 3 rows"):
        inputs.retention(3, 1.1, torch.Generator().manual_seed(0))


def test_gates_keep_what_retention_says_and_the_rest_is_below_the_threshold():
    shape, generator = {"batch": 2, "heads": 3, "tokens": 4000, "cr": 8}, torch.Generator().manual_seed(0)
    keep = inputs.kept(shape, generator)
    assert keep.float().mean().item() == pytest.approx(1 / 8, abs=1e-3)
    log_keep = inputs.soft_gates(keep, EXACT, generator)
    assert torch.equal(log_keep > EXACT, keep) and (log_keep <= 0).all() and log_keep[keep].min() >= -0.7


def test_rows_are_as_a_cache_leaves_them():
    shape = {"batch": 2, "heads": 3, "tokens": 2048, "cr": 8, "window": 16, "page": 16, "dim": 4, "dtype": "float32"}
    rows = inputs.live_rows(shape, "cpu", spare=2)
    assert rows.length.float().mean().item() == pytest.approx(2048 / 8, rel=0.01)
    assert torch.equal(rows.owned, (rows.length + 15) // 16)
    used = [number for row in range(6) for number in rows.table[row, : rows.owned[row]].tolist()]
    assert used != sorted(used)
    assert sorted(used + rows.free[: rows.free_count].tolist()) == list(range(len(rows.free)))
    for row in range(6):
        slots = set(rows.ring_slot[row].tolist())
        assert len(slots) == 17 and min(slots) >= 0 and max(slots) < rows.length[row]


@pytest.mark.slow
def test_the_masked_baseline_computes_what_ours_does_with_all_gradients():
    shape = benchmarks.cases("train", "cpu", quick=True)[0].shape
    work = attention.build_train(shape, "cpu", ("sdpa_mask",))
    ours, theirs = work.ours(), work.baselines["sdpa_mask"]()
    assert len(ours) == 4
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_flexible_baseline_computes_what_ours_does(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 70, 8, generator=g) for heads in (4, 2, 2))
    log_keep = torch.randn(1, 2, 70, generator=g).clamp_max(0)
    expected = train_attention(q, k, v, log_keep, 5)
    torch.testing.assert_close(attention.flexible((q, k, v, log_keep), 5)(), expected, rtol=1e-3, atol=1e-4)


def test_flops_count_the_pairs_that_the_operation_reads():
    shape = {"batch": 1, "heads": 2, "group": 3, "dim": 8, "tokens": 40, "window": 4, "cr": 4, "dtype": "float32"}
    work = attention.build_prefill(shape, "cpu")
    keep = inputs.kept(shape, torch.Generator().manual_seed(inputs.SEED))
    behind = torch.arange(40)[:, None] - torch.arange(40)
    pairs = ((behind >= 0) & ((behind <= 4) | keep[:, :, None])).sum().item()
    assert work.flops == 4 * 8 * 3 * pairs
    q, k, v = inputs.queries_keys_values(shape, "cpu")
    length = prefill_attention(q, k, v, ~keep, 4)[1].length
    assert work.moved == 4 * 8 * (2 * 6 * 40 + 2 * 2 * 40 + 2 * int(length.sum()))


def tensor(megabytes: int):
    return torch.empty(megabytes << 20, dtype=torch.uint8)


@pytest.mark.slow
def test_peak_counts_what_is_held_at_once_beyond_what_was_there():
    def four_then_two_then_three():
        first, second = tensor(4), tensor(2)
        del first
        return second, tensor(3)

    held = [tensor(4)]

    def replace():
        held[0] = tensor(4)

    def free_first():
        held.clear()
        held.append(tensor(4))

    wanted = {four_then_two_then_three: 6, replace: 4, free_first: 0}
    assert {call: measure.peak_bytes(call, "cpu") >> 20 for call in wanted} == wanted


def test_runs_are_interleaved_and_a_baseline_that_cannot_run_leaves_a_note():
    order = []

    def absent():
        raise ImportError("no such library\nmore")

    baselines = {"other": lambda: order.append("other"), "absent": absent}
    work = case.Work(lambda: order.append("ours"), baselines, moved=1, flops=1)
    row = case.Case("c", "k", {}, lambda shape, device: work).measure("cpu", 3, 1.0)
    assert order[:8] == ["ours", "other"] * 4  # a warm-up and three rounds
    assert set(row["baseline_ms"]) == {"other"}
    assert row["notes"] == {"absent": "left out, ImportError: no such library"}


def test_kernels_says_which_implementation_serves_which_device(capsys):
    assert cli.main(["kernels", "--json"]) == 0
    devices = json.loads(capsys.readouterr().out)["devices"]
    assert devices["cpu"]["modules"]["decode"] == "dms_kernels.cpu.step" and devices["cpu"]["why"] is None
    assert (devices["cuda"]["modules"] is None) == (devices["cuda"]["why"] is not None)
    assert cli.main(["kernels"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["cpu", "cuda"]


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_kernels_aot_reports_every_case_and_fails_on_one_that_is_not_ok(ok, status, monkeypatch, capsys):
    aot = pytest.importorskip("dms_kernels.aot")
    pytest.importorskip("triton")
    found = {"kernel": "k", "target": 90, "registers": 64, "spills": 0, "shared": 1024, "limit": 232448, "stack": 0}
    asked = []

    def report(targets):
        asked.append(targets)
        return [{**found, "ok": True}, {**found, "ok": ok}]

    monkeypatch.setattr(aot, "report", report)
    assert cli.main(["kernels", "--aot", "--target", "80", "90", "--json"]) == status
    result = json.loads(capsys.readouterr().out)
    assert asked == [(80, 90)] and set(result) == {"triton", "cases"} and len(result["cases"]) == 2
    assert cli.main(["kernels", "--aot"]) == status
    assert len(capsys.readouterr().out.splitlines()) == 2 and asked[1] == (80, 86, 90, 100)


def test_kernels_aot_without_triton_or_for_an_unknown_target_exits_with_2(monkeypatch, capsys):
    aot = pytest.importorskip("dms_kernels.aot")
    assert cli.main(["kernels", "--aot", "--target", "75"]) == 2
    assert "75" in capsys.readouterr().err

    def missing(targets):
        raise ImportError("needs triton")

    monkeypatch.setattr(aot, "report", missing)
    assert cli.main(["kernels", "--aot"]) == 2
    assert "needs triton" in capsys.readouterr().err
