"""Every kernel compiled for each target without a GPU: no spills, shared memory within the target's limit."""

import importlib.metadata
import importlib.util
import json
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

from dms_kernels import aot

if importlib.util.find_spec("triton") is None:  # not imported here: other tests want it interpreted
    pytest.skip("needs triton", allow_module_level=True)

TUNED = "3.6."  # the release of triton with which launch configurations are chosen
tuned = pytest.mark.skipif(
    not importlib.metadata.version("triton").startswith(TUNED), reason=f"configurations are chosen with triton {TUNED}"
)

HEAVY = (  # the largest tiles of each module
    r"^(forward_bias|dq_bias|dkv_list_bias)_bf16_d(128|256)$|^append\.allocate rows1024 self0$"
    r"|^decode\.split (bf16( int8)? D256 page16 G32|fp32 D256 page64 G4|bf16 D64 page16 G32)$"
)
SAMPLED = (  # of all that is shipped (``dms kernels --aot``): fp16 needs what bf16 needs, and 80 and 96 what 128 needs
    r"^(forward|dq|dkv)\w*_(bf16_d(64|80|128|256)|fp16_d128|fp32_d(32|128|256))$|^append|^decode\.(?!.* (fp16|D32))"
)
STORED = Path(__file__).parents[2] / "data/results/kernels-aot.json"
SAVE = f"python -m dms_kernels.aot --save data/results/kernels-aot.json --only '{SAMPLED}'"
AGAIN = 6  # kernels of a stored sweep that are compiled again, others each day


def check(cases: list[dict]) -> None:
    for case in cases:
        assert "error" not in case, case
        assert case["spills"] == 0, case
        assert 0 < case["registers"] <= 255 and case["shared"] <= case["limit"], case
        assert case["ok"] and case["blocks"] >= 1, case
        if re.match(r"(forward|dq|dkv_list|dkv_band)\w*_(bf|fp)16_d", case["kernel"]):
            assert case["mma"] == tensor_core(case), case
            if case["launch"]["num_stages"] > 2:  # copies of the next block are under way while one is waited for
                assert case["waits"] and min(case["waits"]) > 0, case


def tensor_core(case: dict) -> str:
    """What half types are multiplied by; wgmma takes 64 keys, which spill in the gradient of keys at D 256."""
    narrow = case["kernel"].startswith("dkv") and case["launch"]["BLOCK_N"] < 64
    return {80: "mma", 86: "mma", 90: "mma" if narrow else "wgmma", 100: "tcgen05"}[case["target"]]


@tuned
def test_heaviest_kernels_compile_without_spills_and_within_shared_memory(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # must not reach the compiling processes
    found = json.loads(STORED.read_text())
    if found["sources"] == aot.sources():
        cases = [case for case in found["cases"] if re.search(HEAVY, case["kernel"])]
    else:
        cases = aot.report(only=HEAVY)
    assert {case["target"] for case in cases} == set(aot.SHARED_LIMIT) and len(cases) == 4 * 11
    check(cases)


def stored_sweep(found: dict, compile: Callable) -> list[dict]:
    """The cases of a stored sweep, a few of which are compiled again; of other sources all are compiled."""
    if found["sources"] != aot.sources():
        warnings.warn(f"kernels changed: all are compiled; keep them by: {SAVE}", stacklevel=2)
        return compile(SAMPLED)
    names = sorted({case["kernel"] for case in found["cases"] if not re.search(HEAVY, case["kernel"])})
    again = random.Random(date.today().toordinal()).sample(names, AGAIN)
    for case in compile("|".join(f"^{re.escape(name)}$" for name in again)):
        assert case in found["cases"], case
    return found["cases"]


@tuned
@pytest.mark.slow  # 10 minutes on one core if a kernel changed since the sweep was stored
def test_shipped_configurations_compile_without_spills_and_within_shared_memory():
    cases = stored_sweep(json.loads(STORED.read_text()), lambda only: aot.report(only=only))
    for name in ("forward", "dq", "dkv", "decode", "append"):
        assert any(case["kernel"].startswith(name) for case in cases), name
    assert len({(case["kernel"], case["target"]) for case in cases}) == len(cases)  # names are unique
    assert {case["target"] for case in cases} == set(aot.SHARED_LIMIT)
    check(cases)


def test_a_stored_sweep_counts_for_its_own_sources_alone():
    cases = [{"kernel": f"k{number}", "target": 90, "registers": 8} for number in range(AGAIN)]
    whole, asked = {"sources": aot.sources(), "cases": cases}, []

    def compile(only: str) -> list[dict]:
        asked.append(only)
        return [case | {"registers": 9} for case in cases]

    with pytest.raises(AssertionError):
        stored_sweep(whole, compile)  # another number of registers than was stored
    with pytest.warns(UserWarning, match="kernels changed"):
        assert stored_sweep(whole | {"sources": "0"}, compile)[0]["registers"] == 9
    assert asked[1] == SAMPLED != asked[0]


@pytest.mark.slow
def test_command_prints_one_line_of_json(capsys):
    assert aot.main(["--json", "--targets", "90", "--only", "^dkv_merge_bf16_d64$"]) == 0
    said = capsys.readouterr().out
    result = json.loads(said)
    assert said.count("\n") == 1 and result["triton"]
    (case,) = result["cases"]
    used = {"registers", "spills", "shared", "limit", "stack", "blocks", "mma", "waits"}
    assert set(case) == {"kernel", "target", "launch", "ok", *used}


@pytest.mark.slow
def test_a_kernel_that_spills_or_does_not_compile_is_reported(tmp_path):
    source = tmp_path / "made.py"
    source.write_text(
        "import triton, triton.language as tl\n"
        "@triton.jit\n"
        "def share(x, SIZE: tl.constexpr):\n"
        "    a = tl.load(x + tl.arange(0, SIZE))\n"
        "    tl.store(x + tl.arange(0, SIZE), a / tl.sum(a, 0))\n"
    )
    code = (
        "import json, made; from dms_kernels import aot\n"
        "options = {'num_warps': 1, 'maxnreg': 32}\n"
        "for size in (2048, 100):\n"
        "    print(json.dumps(aot._compile(90, 'share', made.share, {'x': '*fp32'}, {'SIZE': size}, options)))\n"
    )
    env = {**aot._clean_environment(), "PYTHONPATH": f"{tmp_path}:{aot._clean_environment()['PYTHONPATH']}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    spilling, wrong = map(json.loads, done.stdout.splitlines())
    assert spilling["spills"] > 0 and not spilling["ok"]
    assert "error" in wrong and not wrong["ok"]


def test_blocks_a_multiprocessor_follow_from_registers_threads_and_shared_memory():
    assert aot._blocks(90, 255, 256, 1000) == 1  # 65,280 of 65,536 registers
    assert aot._blocks(90, 60, 128, 0) == 8  # in units of 8
    assert aot._blocks(80, 32, 128, 81000) == 2 and aot._blocks(86, 32, 128, 81000) == 1
    assert aot._blocks(86, 255, 128, 101377) == 0
    assert aot._blocks(90, 8, 1024, 0) == 2


def test_waits_are_the_least_of_each_loop_that_has_some():
    ttgir = """
    ttg.async_wait %a {num = 9 : i32}
    %x:2 = scf.for %i = %a to %b step %c {
      ttg.async_wait %k {num = 3 : i32}
      scf.for %j = %a to %b step %c {
        %y = arith.addi %j, %i
      }
      %t = ttg.async_wait %v, %k {num = 2 : i32}
    }
    ttg.async_wait %a {num = 0 : i32}
    """
    assert aot._waits(ttgir) == [2]


def test_unknown_target_and_missing_triton_are_named(monkeypatch):
    with pytest.raises(ValueError, match="target 75: must be one of 80, 86, 90, 100"):
        aot.report((75,))
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install triton"):
        aot.report((90,))
