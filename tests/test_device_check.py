"""bench/device_check.sh without a GPU: what it plans, resumes and writes; what it measures is test_device_measuring.py."""

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
from device import cells, markdown, runner, sanitize_cases, stages, store  # noqa: E402

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
