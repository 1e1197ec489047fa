"""What bench/device_check.sh measures and the tables that it writes, without a GPU: cells run on the CPU, by a fake clock."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("the benches are not part of a source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from device import cells, markdown, measure, timing, worker  # noqa: E402

from lowbit.commands._measure import Sample  # noqa: E402

# ---- measuring -------------------------------------------------------------------------------------------------------------


class FakeTimer:
    """Runs everybody once; lowbit takes 10 us and each one after it 10 us more."""

    def measure(self, calls: Mapping[str, timing.Call], copies: Mapping[str, int], seconds: float) -> timing.Measured:
        assert calls.keys() == copies.keys()
        for call in calls.values():
            call(0)
            call(1)
        return {name: Sample(tuple([(i + 1) * 1e-5] * 8)) for i, name in enumerate(calls)}


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda *_: 1 << 16)


@pytest.mark.usefixtures("small_cache")
class TestMeasuring:
    def test_every_case_runs_on_the_cpu(self) -> None:
        """Tiny: right results, weights in rotation, and whoever cannot says why."""
        ran: set[str] = set()
        for case in cells.bench_cases(tiny=True):
            result = measure.measure_case(case, "cpu", FakeTimer(), 0.0)
            assert result["ok"], (case, result)
            ran |= {row["name"] for row in result.get("rows", [])}
            others = {"torch-bf16"} if "torch-bf16" in case.peers else set()
            names = {row["name"] for row in result.get("rows", [])} | set(result.get("refused", {}))
            assert names >= others | set(case.peers)
        assert ran >= {"lowbit", "lowbit, quantizing x", "torch-bf16", "torch-int8pack"}

    def test_a_wrong_result_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "_error", lambda inputs: float("nan"))
        result = measure.measure_case(cells.bench_cases(tiny=True)[1], "cpu", FakeTimer(), 0.0)
        assert not result["ok"] and "wrong result" in result["error"]

    def test_a_peer_that_fails_late_is_a_reason_and_not_an_end(self) -> None:
        def broken(i: int) -> object:
            raise RuntimeError("no kernel image\nand more")

        found = timing.HostTimer().measure({"good": lambda i: None, "bad": broken}, {"good": 1, "bad": 1}, 0.01)
        assert found["bad"] == "RuntimeError: no kernel image"
        assert isinstance(found["good"], Sample)

    def test_copies_outgrow_the_cache(self) -> None:
        assert timing.copies_for(1 << 14, "cpu") == 9
        assert timing.copies_for(1 << 30, "cpu") == 2
        assert timing.copies_for(1 << 14, "cpu", memory=4 << 14) == 4

    def test_rounds_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The timer of the GPU, its graphs and events aside."""
        orders = []

        def one_round(replays: Mapping[str, Any], order: list[str]) -> dict[str, float]:
            orders.append(tuple(order))
            return {name: 40.0 if len(orders) == 1 else 20.0 + replays[name] for name in order}

        def capture(call: timing.Call, count: int) -> Any:
            return call(count)

        monkeypatch.setattr(timing.CudaTimer, "_capture", staticmethod(capture))
        monkeypatch.setattr(timing.CudaTimer, "_round", staticmethod(one_round))

        def refuses(i: int) -> object:
            raise NotImplementedError("sm_80")

        calls = {"a": lambda i: 0.0, "b": lambda i: 20.0, "c": refuses}
        found = timing.CudaTimer().measure(calls, {"a": 3, "b": 40, "c": 1}, 0.0)
        assert found["c"] == "NotImplementedError: sm_80"
        a, b = found["a"], found["b"]
        assert isinstance(a, Sample) and isinstance(b, Sample)
        assert len(a.seconds) == len(orders) - 1 >= 5  # the first round does not count
        assert (a.median, b.median) == (pytest.approx(1e-3), pytest.approx(1e-3))  # 20 ms of 20 launches, 40 of 40
        assert len(set(orders)) == 2


def crash(connection: Any, device: str) -> None:
    connection.send("ready")
    case, _ = connection.recv()
    if case == "hang":
        connection.poll(60)
    os._exit(3)


class TestWorker:
    def test_survives_a_crash_and_a_hang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker, "_serve", crash)
        with worker.Worker("cpu") as found:
            assert found.measure("crash", 0, 30)["error"] == "the process ended with status 3"  # type: ignore[arg-type]
            assert found.measure("hang", 0, 0.2)["error"] == "gave up after 0 s"  # type: ignore[arg-type]
            assert found.measure("crash", 0, 30)["error"] == "the process ended with status 3"  # type: ignore[arg-type]

    def test_one_that_does_not_start_ends_the_stage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker, "_serve", os._exit)  # takes one argument and gets two
        with worker.Worker("cpu") as found:
            assert found.measure("case", 0, 30)["fatal"]  # type: ignore[arg-type]


# ---- tables ------------------------------------------------------------------------------------------------------------------

ROWS = [
    {
        "name": "lowbit",
        "us": 9.0,
        "spread": 0.01,
        "bytes_per_s": 3.7e12,
        "operations_per_s": 1.5e13,
        "kernel": "cuda_stream_m8",
    },
    {
        "name": "torch-bf16",
        "us": 40.0,
        "spread": 0.01,
        "bytes_per_s": 3.3e12,
        "operations_per_s": 3e12,
        "kernel": "F.linear",
    },
    {"name": "humming", "us": 22.4, "spread": 0.01, "bytes_per_s": 1.5e12, "operations_per_s": 6e12, "kernel": ""},
]
RATES = {"copy": 4.3e12, "read": 4.2e12, "bf16": 7.9e14}


class TestTables:
    @pytest.mark.parametrize(
        ("section", "M", "us", "device", "verdict"),
        [
            ("W4A16", 1, 9.0, "NVIDIA H200", "met"),
            ("W4A16", 1, 11.0, "NVIDIA H200", "missed"),
            ("W4A16", 1, 9.0, "NVIDIA A100", ""),
            ("W4A16", 4096, 40.8, "NVIDIA A100", "met"),
            ("W4A16", 4096, 41.0, "NVIDIA A100", "missed"),
            ("FP8 W8A8", 4096, 1.0, "NVIDIA H200", "missed"),  # there is no torch._scaled_mm to compare with
            ("dequantize fp8", 0, 9.0, "NVIDIA H200", "met"),
            ("NF4", 1, 9.0, "NVIDIA H200", ""),
            ("W4A16", 4096, 40.8, "Apple M3 Max GPU", ""),  # targets are for other GPUs
        ],
    )
    def test_verdict(self, section: str, M: int, us: float, device: str, verdict: str) -> None:
        rows = [{**ROWS[0], "us": us}, *ROWS[1:]]
        found = markdown.verdict({"section": section, "M": M}, rows, RATES, device)
        assert found.endswith(verdict) and bool(found) == bool(verdict)

    def test_a_page(self) -> None:
        case = {"section": "W4A16", "M": 1, "N": 8192, "K": 8192}
        data = {
            "device": "NVIDIA H200",
            "sources": "abc",
            "machine": {"commit": "1234", "versions": {"torch": "2.11"}, "clocks_before": {"sm_mhz": "1980"}},
            "stages": {
                "correct": {
                    "kernels": {"ok": False, "seconds": 9.0, "summary": "3 passed, 1 failed", "failures": ["t::x"]}
                },
                "bench": {
                    "roofline": {"ok": True, "rates": RATES, "case": {**case, "section": "roofline"}, "seconds": 3.0},
                    "W4A16 M=1": {
                        "ok": True,
                        "rows": ROWS,
                        "refused": {"gemlite": "ImportError: no"},
                        "case": case,
                        "seconds": 6.0,
                    },
                    "NF4 M=1": {"ok": False, "error": "gave up after 120 s", "seconds": 120.0},
                },
            },
        }
        text = markdown.markdown(data)
        assert text.startswith("# lowbit on NVIDIA H200\n")
        assert "| kernels | FAILED, 9 s. 3 passed, 1 failed |" in text and "- `t::x`" in text
        assert "copy 4.30 TB/s (read and written), read 4.20 TB/s, bf16 product 790 TFLOP/s" in text
        assert "| 1 | 8192 x 8192 | humming | 22.4 (1%) | 1.50 | 36 | 6 | 2.49 |" in text
        assert "cuda_stream_m8; 10 us, and 1.8x the best peer or 85% of the read bandwidth: met" in text
        assert "| gemlite | | | | | | ImportError: no |" in text
        assert "- NF4 M=1: gave up after 120 s" in text
        assert "- before: sm_mhz 1980" in text
