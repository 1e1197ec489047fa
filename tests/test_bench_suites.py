"""The benches still run: found where `make bench` looks, each op's once and without timing; and record.py writes its files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cli_helpers

BENCH = Path(__file__).parents[1] / "bench"

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="the benches are not part of a source distribution")


def pytest_bench(*args: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-s", *args]
    return subprocess.run(
        command,
        cwd=BENCH.parent,
        env=cli_helpers.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_file_is_found_by_make_bench() -> None:
    done = pytest_bench("--collect-only")
    assert done.returncode == 0, done.stdout
    for file in BENCH.glob("bench_*.py"):
        assert f"{file.name}::" in done.stdout


def test_benches_run() -> None:
    done = pytest_bench("--benchmark-disable", "-k", "overhead or activation or (gemm and 4096x4096-int4-g128-1)")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record", BENCH / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_record_writes_a_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    module = record()
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr("lowbit.commands._measure.cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr("lowbit.commands._measure.Others.cores", lambda self: 0.0)
    args = [
        "--name",
        "here",
        "--note",
        "Trial.",
        "--shape",
        "64x128",
        "--M",
        "1,2",
        "--scheme",
        "int8",
        "--threads",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["record.py", *args, "--time-budget", "0.5", "--baseline=torch-bf16"])
    assert module.main() == 0
    result = json.loads((tmp_path / "here.json").read_text())
    assert (result["note"], len(result["rows"])) == ("Trial.", 4)
    text = (tmp_path / "here.md").read_text()
    assert "Trial." in text
    assert "| times as fast as torch bf16 | M = 1 | M = 2 |" in text
    assert "| torch-bf16 | 1.00 | 1.00 |" in text
    assert result["device"] in text
