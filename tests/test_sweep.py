"""bench/sweep.py without a GPU: who is measured, what becomes of the numbers, and that selection goes by them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
from lowbit import _C
from lowbit._selection import explain
from reference import Spec

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path[:0] = [p for p in (str(BENCH),) if p not in sys.path]

cells = importlib.import_module("device.cells")
device_sweep = importlib.import_module("device.sweep")
sweep = importlib.import_module("sweep")

MODEL = "sm_90:132"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    _C.force_kernel("")
    _C.load_tuning("")


def case(M: int, N: int = 8192, K: int = 8192, scheme: str = "int4-g128", inputs: str = "bf16") -> Any:
    return cells.Case(f"sweep {scheme} {inputs}", scheme, M, N, K, inputs, "sweep")


def result(M: int, times: dict[str, float], **shape: Any) -> dict[str, Any]:
    spec = case(M, **shape)
    rows = [{"name": name, "us": us} for name, us in times.items()]
    return {
        "ok": True,
        "case": {key: getattr(spec, key) for key in ("scheme", "inputs", "M", "N", "K")},
        "model": MODEL,
        "rows": rows,
    }


def chosen(M: int, N: int = 8192, K: int = 8192, device: str = MODEL, scheme: str = "int4-g128") -> tuple[str, str]:
    answer = explain("gemm", M=M, N=N, K=K, scheme=scheme, device=device)
    return answer.chosen.removeprefix("cuda_").rpartition("_sm_")[0], answer.config


class TestCandidates:
    def test_everybody_who_takes_the_problem_and_no_plan_twice(self) -> None:
        names = device_sweep.candidates(case(1), MODEL)
        assert {"stream_m8", "stream_m16", "hopper_stream_m8", "matrix_m32"} <= set(names)
        plans = [name for name in names if name.startswith("hopper_stream_m8")]
        assert len(plans) == 12, plans  # the plan of its own choice is one of the twelve
        clusters = [name for name in device_sweep.candidates(case(64), MODEL) if name.startswith("hopper_matrix_m64")]
        assert len(clusters) == 4, clusters
        assert not any(name.startswith(("a8_", "general", "grad")) for name in names)
        assert _C.forced_kernel() == ""

    def test_nobody_whom_the_device_refuses_or_who_has_no_chance(self) -> None:
        assert not any(name.startswith("hopper") for name in device_sweep.candidates(case(1), "sm_80:108"))
        many = device_sweep.candidates(case(256), MODEL)
        assert "matrix_m128" in many and "stream_m8" not in many and "stream_m16" not in many
        assert "matrix_m128" not in device_sweep.candidates(case(4), MODEL)
        int8 = device_sweep.candidates(case(64, inputs="int8", scheme="int8"), MODEL)
        assert "a8_int_m64" in int8 and not any(name.startswith("a8_fp8") for name in int8)

    def test_every_problem_of_the_sweep_has_several(self) -> None:
        swept = cells.sweep_cells()
        assert len({cell.key for cell in swept}) == len(swept) > 100
        few = [cell.key for cell in swept if len(device_sweep.candidates(cell.spec, MODEL)) < 2]
        assert [key for key in few if not key.startswith("sweep int4-g128 fp8")] == []  # one kernel takes those


class TestTable:
    RESULTS = (
        result(1, {"hopper_stream_m8:1x2": 9.0, "hopper_stream_m8:1x1": 9.5, "stream_m8": 12.0}),
        result(8, {"hopper_stream_m8:1x2": 9.4, "stream_m8": 13.0}),
        result(16, {"stream_m16": 11.9, "hopper_stream_m16:4x8": 11.8}),
        result(64, {"matrix_m64": 30.0, "matrix_m32": 28.0}),
        result(256, {"matrix_m64": 80.0, "matrix_m128": 70.0}),
    )

    def test_ranges_and_runners_up(self) -> None:
        """Neighbours with the same winner are one row; Hopper's kernels must win by more than the noise."""
        head = "gemm half int4 sm_90:132 8192x8192"
        assert device_sweep.rows_of(self.RESULTS) == [
            f"{head} 1..8 hopper_stream_m8:1x2 9.40 stream_m8 13.00",
            f"{head} 9..16 stream_m16 11.90 hopper_stream_m16:4x8 11.80",
            f"{head} 17..64 matrix_m32 28.00 matrix_m64 30.00",
            f"{head} 65..1073741823 matrix_m128 70.00 matrix_m64 80.00",
        ]

    def test_selection_goes_by_it(self) -> None:
        before = chosen(1)[0]
        assert before == "stream_m8"
        _C.load_tuning("\n".join(device_sweep.rows_of(self.RESULTS)))
        assert [chosen(M)[0] for M in (1, 8, 9, 16, 17, 64, 65, 10000)] == [
            *("hopper_stream_m8", "hopper_stream_m8", "stream_m16", "stream_m16"),
            *("matrix_m32", "matrix_m32", "matrix_m128", "matrix_m128"),
        ]
        assert "tiles of 64 x 8" in chosen(1)[1] and "clusters of 2, " in chosen(1)[1]  # the plan that won
        # Another shape nearby: the kernel, with a plan of its own. Far away, on another device, another weight: as ever.
        assert chosen(1, N=6144, K=4096)[0] == "hopper_stream_m8" and "clusters of 4, " in chosen(1, N=6144, K=4096)[1]
        assert chosen(1, N=1024, K=1024)[0] == "stream_m8"
        assert chosen(1, device="sm_80:108")[0] == "stream_m8"
        assert chosen(1, scheme="int8")[0] == "stream_m8"
        desc = cases.desc(Spec("int4", "none", 128), _C.preferred_layout("cuda", cases.desc(Spec("int4", "none", 128))))
        reasons = dict(_C.explain("gemm", MODEL, 1, 8192, 8192, desc, "float16", 0))
        assert reasons["cuda_stream_m8_sm_80"] == (
            "slower than the chosen one: 9.4 us against 13 of stream_m8 at N=8192 K=8192 on sm_90:132"
        )
        _C.load_tuning("")
        assert chosen(1)[0] == before

    def test_a_winner_that_refuses_is_passed_over(self) -> None:
        _C.load_tuning("gemm half int4 sm_90:132 8192x8192 1..16 hopper_stream_m8:1x2 9 stream_m8 12")
        assert explain("gemm", M=1, N=8192, K=8192, scheme="int4-g24", device=MODEL).general
        batch = cases.desc(
            Spec("int4", "none", 128), _C.preferred_layout("cuda", cases.desc(Spec("int4", "none", 128)))
        )
        rows = _C.explain("gemm", MODEL, 1, 8192, 8192, batch, "bfloat16", cases.BATCH_INVARIANT)
        assert [name for name, reason in rows if not reason] == ["cuda_matrix_m32_sm_80"]

    def test_the_file_keeps_other_devices_and_reads_back(self, tmp_path: Path) -> None:
        other = "gemm half int4 sm_80:108 4096x4096 1..8 stream_m8 20.00 stream_m16 21.00"
        old = "gemm half int4 sm_90:132 4096x4096 1..8 stream_m16 1.00 stream_m8 2.00"
        held = {"stages": {"sweep": {str(i): r for i, r in enumerate(self.RESULTS)}}}
        (tmp_path / "results.json").write_text(json.dumps(held))
        table = tmp_path / "measured.inc"
        table.write_text(device_sweep.HEAD + f"{old}\n{other}\n" + ')table"\n')
        sweep.write(tmp_path / "results.json", table)
        text = table.read_text()
        assert other in text and old not in text and text.count("sm_90:132") == 4
        built_in = (BENCH.parent / "csrc" / "cuda" / "measured.inc").read_text()
        assert built_in.startswith(device_sweep.HEAD) and built_in.endswith(')table"\n')

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ("gemm half int4 sm_90:132 8192x8192 1..8 fast 9 stream_m8 12", "line 1: kernel 'fast' is not one of"),
            ("gemm half int9 sm_90:132 8192x8192 1..8 stream_m8 9 stream_m8 12", "line 1: is no row of a tuning table"),
            ("gemm half int4 sm_90:132 8192x8192 8..1 stream_m8 9 stream_m8 12", "line 1: is no row of a tuning table"),
            ("gemm half int4 sm_90:132 8192x8192 1..8 stream_m8 9", "line 1: is no row of a tuning table"),
        ],
    )
    def test_what_is_no_row_is_refused(self, row: str, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            _C.load_tuning(row)
        assert chosen(1)[0] == "stream_m8"


def test_candidates_are_measured_and_a_wrong_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where there is one candidate; then with another that always fails."""
    from device.contenders import Inputs
    from device.measure import _expected, measure_case
    from device.timing import make_timer

    small = case(3, 64, 256)
    timed = measure_case(small, "cpu", make_timer("cpu"), 0.01)
    assert timed["ok"] and [row["name"] for row in timed["rows"]] == [""] and timed["rows"][0]["us"] > 0
    inputs = Inputs.make(small, "cpu")
    wrong = device_sweep.measure_candidates(small, inputs, _expected(inputs) + 1, 0.02, make_timer("cpu"), 0.01)
    assert not wrong["ok"] and wrong["error"].startswith("wrong: ")
    named = cells.dataclasses.replace(small, peers=("", "no_such_kernel"))
    both = measure_case(named, "cpu", make_timer("cpu"), 0.01)
    assert both["ok"] and both["refused"]["no_such_kernel"].startswith("ValueError: kernel 'no_such_kernel'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_when_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "measured.inc"
    assert sweep.main(["--table", str(table)]) == 2
    assert "there is no GPU to measure" in capsys.readouterr().out and not table.exists()


def test_dry_run_lists_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--dry-run", "--only", "int4-g128 bf16 M=1 8192x8192"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "hopper_stream_m8:2x4" in lines[0] and "stream_m16" in lines[0]


def test_a_kernel_that_hangs_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem is measured again without the kernels for Hopper, and counts as failed."""
    check = importlib.import_module("device.__main__")
    asked = []

    class Worker:
        device = "cpu"

        def measure(self, spec: Any, seconds: float, limit: float) -> dict[str, Any]:
            asked.append(spec.peers)
            return {"ok": False, "error": "gave up after 40 s"} if not spec.peers else {"ok": True, "rows": [1]}

    monkeypatch.setattr(
        importlib.import_module("lowbit.commands._target"), "find_target", lambda d: type("T", (), {"model": MODEL})
    )
    answer = check.sweep(Worker(), cells.Cell("sweep", "one", 1, case(1)), 1.0, 100)
    assert answer == {"ok": False, "rows": [1], "error": "with all kernels: gave up after 40 s"}
    assert asked[0] == () and "stream_m8" in asked[1] and not any(name.startswith("hopper") for name in asked[1])
