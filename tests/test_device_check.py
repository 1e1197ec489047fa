"""bench/device_check.sh without a GPU: what it plans, resumes and writes; its cells run on the CPU, by a fake clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("the benches are not part of a source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from device import __main__ as command  # noqa: E402
from device import cells, markdown, measure, runner, sanitize_cases, stages, store, timing, worker  # noqa: E402

from lowbit.commands._measure import Sample  # noqa: E402

Cell = cells.Cell


# ---- the plan --------------------------------------------------------------------------------------------------------------


class TestPlan:
    def test_every_cell_has_its_own_name(self) -> None:
        for tiny in (False, True):
            keys = [(cell.stage, cell.key) for cell in cells.plan(cells.STAGES, tiny)]
            assert len(keys) == len(set(keys)) > 80 - 40 * tiny

    def test_the_build_is_first_and_correctness_next(self) -> None:
        order = [f"{cell.stage} {cell.key}" for cell in cells.plan(cells.STAGES)]
        assert order[:2] == ["build build", "correct kernels"]
        assert order[2] == "bench roofline M=0 8192x8192"
        assert order.index("bench W4A16 M=1 8192x8192") < order.index("sanitize racecheck gemm")
        assert order.index("sanitize racecheck gemm") < order.index("bench W4A16 M=32 8192x8192")

    def test_only_the_stages_asked_for(self) -> None:
        assert {cell.stage for cell in cells.plan(["sanitize", "bench"])} == {"sanitize", "bench"}

    def test_a_mac_has_tests_and_tools_of_its_own(self) -> None:
        plan = cells.plan(cells.STAGES, device="mps")
        assert [cell.spec for cell in plan if cell.stage == "correct"] == [("tests/metal",), ("tests",)]
        assert {cell.spec[0] for cell in plan if cell.stage == "sanitize"} == {"validation"}
        assert [cell.key for cell in plan if cell.stage == "bench"] == [
            cell.key for cell in cells.plan(["bench"], device="cuda")
        ]

    def test_every_target_has_a_case(self) -> None:
        """A target whose section is misspelt would never be looked at."""
        for section, Ms, *_ in markdown.TARGETS:
            found = [
                case
                for case in cells.bench_cases()
                if case.section == section or case.section.startswith(f"{section} ")
            ]
            assert found, section
            assert {case.M for case in found} >= set(Ms), section


# ---- doing it --------------------------------------------------------------------------------------------------------------


class Clock:
    """Moves when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """Cells that take their time and are written down."""

    def __init__(self, path: Path, sources: str = "s1"):
        self.clock, self.did = Clock(), []  # type: ignore[var-annotated]
        self.store = store.Store(path / "device_check.json", sources, "a GPU")

    def run(self, todo: list[Cell], budget: float = 1e9, results: Mapping[str, Any] | None = None) -> runner.Outcome:
        def work(cell: Cell, limit: float) -> dict[str, Any]:
            self.clock.now += cell.seconds
            self.did.append(cell.key)
            result = (results or {}).get(cell.key, {"ok": True})
            if isinstance(result, Exception):
                raise result
            return dict(result)

        return runner.run_cells(
            todo, dict.fromkeys(cells.STAGES, work), self.store, budget, lambda text: None, self.clock
        )


CELLS = [Cell("build", "build", 5), Cell("correct", "a", 10), Cell("bench", "b", 30), Cell("bench", "c", 4)]


class TestRunner:
    def test_does_everything_once_in_order(self, tmp_path: Path) -> None:
        desk = Desk(tmp_path)
        outcome = desk.run(CELLS)
        assert desk.did == ["build", "a", "b", "c"]
        assert (outcome.status, outcome.left, outcome.before) == (0, [], [])
        again = Desk(tmp_path)
        outcome = again.run(CELLS)
        assert again.did == ["build"]  # which sees for itself what is to do
        assert outcome.before == ["correct: a", "bench: b", "bench: c"]

    def test_what_does_not_fit_is_left_and_what_does_is_done(self, tmp_path: Path) -> None:
        desk = Desk(tmp_path)
        outcome = desk.run(CELLS, budget=25)
        assert desk.did == ["build", "a", "c"]
        assert (outcome.left, outcome.status) == (["bench: b"], 75)
        again = Desk(tmp_path)
        assert again.run(CELLS, budget=100).status == 0
        assert again.did == ["build", "b"]

    def test_what_failed_is_tried_again(self, tmp_path: Path) -> None:
        desk = Desk(tmp_path)
        outcome = desk.run(CELLS, results={"b": {"ok": False, "error": "wrong result"}, "c": ValueError("boom")})
        assert (outcome.failed, outcome.status) == (["bench: b", "bench: c"], 1)
        assert "ValueError: boom" in desk.store.cells("bench")["c"]["error"]
        again = Desk(tmp_path)
        again.run(CELLS)
        assert again.did == ["build", "b", "c"]

    def test_without_a_build_nothing_else_is_tried(self, tmp_path: Path) -> None:
        desk = Desk(tmp_path)
        outcome = desk.run(CELLS, results={"build": {"ok": False}})
        assert desk.did == ["build"]
        assert (outcome.failed, len(outcome.left), outcome.status) == (["build: build"], 3, 1)

    def test_what_is_fatal_ends_its_stage(self, tmp_path: Path) -> None:
        desk = Desk(tmp_path)
        desk.run([*CELLS, Cell("correct", "d", 1)], results={"b": {"ok": False, "fatal": True}})
        assert desk.did == ["build", "a", "b", "d"]

    def test_unfinished_is_no_failure(self, tmp_path: Path) -> None:
        desk = Desk(tmp_path)
        outcome = desk.run(CELLS, results={"a": {"ok": False, "unfinished": True, "failures": []}})
        assert (outcome.failed, outcome.left, outcome.status) == ([], ["correct: a"], 75)
        outcome = Desk(tmp_path).run(CELLS, results={"a": {"ok": False, "unfinished": True, "failures": ["t"]}})
        assert (outcome.failed, outcome.left, outcome.status) == (["correct: a"], ["correct: a"], 1)


class TestStore:
    def test_results_about_other_sources_are_dropped(self, tmp_path: Path) -> None:
        Desk(tmp_path).run(CELLS)
        other = Desk(tmp_path, sources="s2")
        assert other.store.dropped.endswith("is about other sources")
        other.run(CELLS)
        assert other.did == ["build", "a", "b", "c"]

    def test_a_damaged_file_is_no_obstacle(self, tmp_path: Path) -> None:
        (tmp_path / "device_check.json").write_text('{"format": 1, "stag')
        desk = Desk(tmp_path)
        assert "is not a result file" in desk.store.dropped
        desk.run(CELLS)
        assert json.loads((tmp_path / "device_check.json").read_text())["stages"]["bench"]["c"]["ok"]

    def test_sources_are_what_results_depend_on(self, tmp_path: Path) -> None:
        (tmp_path / "csrc").mkdir()
        (tmp_path / "CMakeLists.txt").write_text("x")
        (tmp_path / "csrc" / "a.cu").write_text("x")
        before = store.sources_hash(tmp_path)
        (tmp_path / "README.md").write_text("x")
        (tmp_path / "csrc" / "b.so").write_text("x")
        assert store.sources_hash(tmp_path) == before
        (tmp_path / "csrc" / "a.cu").write_text("y")
        assert store.sources_hash(tmp_path) != before


# ---- tests that record themselves --------------------------------------------------------------------------------------------

SUITE = """
import pathlib, pytest, time
@pytest.mark.parametrize("i", range(3))
def test_good(i): time.sleep({pause})
def test_bad(): assert pathlib.Path("fixed").exists()
def test_skipped(): pytest.skip("no")
@pytest.fixture
def broken():
    yield
    assert pathlib.Path("fixed").exists()
def test_teardown(broken): pass
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    setting = stages.Setting(tmp_path, "s1", "cpu", "", None)
    monkeypatch.setenv("PYTHONPATH", str(BENCH))

    def run(limit: float = 60, pause: float = 0, **changed: str) -> dict[str, Any]:
        (tmp_path / "tests" / "test_suite.py").write_text(SUITE.format(pause=pause))
        where = stages.Setting(tmp_path, changed.get("sources", "s1"), "cpu", "", None)
        return stages.correct(where, Cell("correct", "kernels", 1, ("tests",)), limit)

    yield run
    assert setting.site is None


class TestCorrect:
    def test_only_what_has_not_passed_runs_again(self, suite: Any, tmp_path: Path) -> None:
        first = suite()
        assert (first["ok"], first["summary"]) == (False, "3 passed, 1 skipped, 2 failed")
        assert [name.rpartition("::")[2] for name in first["failures"]] == ["test_bad", "test_teardown"]
        (tmp_path / "fixed").touch()
        second = suite()
        assert (second["ok"], second["summary"], second["failures"]) == (True, "5 passed, 1 skipped, 0 failed", [])
        assert len((tmp_path / "correct-kernels.jsonl").read_text().splitlines()) == 1 + 6 + 2
        assert suite()["ok"]  # nothing is left to run

    def test_stops_in_time_and_goes_on_later(self, suite: Any, tmp_path: Path) -> None:
        (tmp_path / "fixed").touch()
        first = suite(limit=20.5, pause=1.0)  # it stops 20 seconds before its limit
        assert first["unfinished"] and not first["ok"] and not first["failures"]
        assert suite()["summary"] == "5 passed, 1 skipped, 0 failed"

    def test_other_sources_begin_anew(self, suite: Any, tmp_path: Path) -> None:
        suite()
        (tmp_path / "fixed").touch()
        assert suite(sources="s2")["summary"] == "5 passed, 1 skipped, 0 failed"
        assert len((tmp_path / "correct-kernels.jsonl").read_text().splitlines()) == 1 + 6


# ---- sanitizing ------------------------------------------------------------------------------------------------------------


class TestSanitize:
    @pytest.mark.parametrize("group", sanitize_cases.GROUPS)
    def test_cases_run(self, group: str) -> None:
        assert sanitize_cases.run(group, "cpu") > 0

    def test_every_group_is_run_by_every_tool(self) -> None:
        for device, tools in cells.TOOLS.items():
            specs = {cell.spec for cell in cells.sanitize_cells(device)}
            assert specs == {(tool, group) for tool in tools for group in sanitize_cases.GROUPS}

    @pytest.mark.parametrize(
        ("says", "status", "ok"),
        [
            ("ERROR SUMMARY: 0 errors", 0, True),
            ("ERROR SUMMARY: 2 errors", 99, False),
            ("Device not supported", 0, False),
        ],
    )
    def test_its_verdict_is_read(
        self, says: str, status: int, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\necho '========= {says}'\nexit {status}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        setting = stages.Setting(tmp_path, "s1", "cuda", "", None)
        result = stages.sanitize(setting, Cell("sanitize", "x", 1, ("memcheck", "gemm")), 60)
        assert result["ok"] == ok
        assert says in (tmp_path / "sanitize.log").read_text()


SAYS = {
    "": (0, True),
    "Invalid device load executing kernel function stream_m1 encoder: 0": (0, False),
    "-[MTLDebugComputeCommandEncoder setBuffer:]: failed assertion `Compute Command Encoder Validation error'": (
        0,
        False,
    ),
    "anything": (1, False),
}


@pytest.mark.parametrize("says", SAYS)
def test_what_metals_validation_says_is_read(says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, ok = SAYS[says]
    seen: dict[str, str] = {}

    def command(setting: Any, log: str, limit: float, *words: str, **environment: str) -> tuple[int, str]:
        seen.update(environment, words=" ".join(words[1:]))
        return status, f"{says}\n56 problems\n"

    monkeypatch.setattr(stages, "_command", command)
    setting = stages.Setting(tmp_path, "s1", "mps", "", None)
    result = stages.sanitize(setting, Cell("sanitize", "x", 1, ("validation", "gemm")), 60)
    assert result["ok"] == ok and (ok or result["error"])
    assert seen["MTL_SHADER_VALIDATION"] == seen["MTL_DEBUG_LAYER"] == "1"
    assert seen["words"] == "-m device.sanitize_cases gemm mps"


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


# ---- the command -------------------------------------------------------------------------------------------------------------


def run_command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BENCH / "device_check.sh"), *args],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_command_measures_and_resumes(tmp_path: Path) -> None:
    args = ["--device", "cpu", "--installed", "bench", "--seconds", "0.02", "--only", "W8A16 fp8", "--out"]
    done = run_command(*args, str(tmp_path / "one"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed, 0 failed, 0 left, 0 done before" in done.stdout
    text = (tmp_path / "one" / "device_check.md").read_text()
    assert "### W8A16 fp8" in text and "| torch-bf16 |" in text and "| humming | | | | | | ModuleNotFoundError" in text
    done = run_command(*args, str(tmp_path / "two"), "--resume", str(tmp_path / "one"))
    assert "0 passed, 0 failed, 0 left, 5 done before" in done.stdout, done.stderr
    done = run_command(*args, str(tmp_path / "three"), "--budget", "0")
    assert done.returncode == 75


def test_dry_run_lists_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--dry-run", "--out", str(tmp_path / "none"), "bench", "correct"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "to do    30 s  correct: kernels"
    assert any("bench: W4A16 M=1 8192x8192" in line for line in lines)
    assert not (tmp_path / "none").exists()


def test_command_says_when_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    def absent(index: int) -> str:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "get_device_name", absent)
    with pytest.raises(SystemExit, match="PyTorch finds no GPU here"):
        command.main(["--out", str(tmp_path)])


def test_command_names_a_stage_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["biuld"])
    assert "no stage is called biuld; there are build, correct, sanitize, bench" in capsys.readouterr().err
