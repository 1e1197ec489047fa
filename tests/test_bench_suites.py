"""The benches still run: found where `make bench` looks, each op's once and without timing; and record.py writes its files."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import cli_helpers
from lowbit.commands import _benchmark, _calls, _peers
from lowbit.commands._cases import Shape
from lowbit.commands._measure import Roofline, Sample

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


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None) -> ModuleType:
    """bench/record.py, writing to a folder of the test's, with every measurement a millisecond per row of x."""
    module = load(BENCH / "record.py")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr("lowbit.commands._measure.cache_bytes", lambda *_: 1 << 16)
    monkeypatch.setattr("lowbit.commands._measure.Others.cores", lambda self: 0.0)
    roof = Roofline(1, 1e10, {"float32": 1e11, "bfloat16": 2e11, "int8": 4e11})
    monkeypatch.setattr(_benchmark, "measure_roofline", lambda threads, **_: dataclasses.replace(roof, threads=threads))
    monkeypatch.setattr(_benchmark, "interleave", _fake_times)
    return module


def _fake_times(calls: dict[str, Any], *rest: object, **_: object) -> dict[str, Sample]:
    """torch's dense products take 4 ms, other baselines 3, ours 2; 2.5 when batch-invariant; half of it on two threads."""
    times = {"torch-bf16": 4e-3, "torch-fp32": 4e-3, "torch-int4pack": 3e-3}
    found = {name: times.get(name, 2.5e-3 if "invariant" in name else 2e-3) for name in calls}
    return {name: Sample((seconds / torch.get_num_threads(),) * 5) for name, seconds in found.items()}


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["record.py", *args])
    return int(module.main())


def test_suites_are_planned(record: ModuleType) -> None:
    suites = record._suites()
    assert sum(suite.share for suite in suites.values()) == pytest.approx(1)
    assert set(suites["peers"].settings.baselines) == set(_peers.PEERS) - {"torch-fp16"}
    for suite in suites.values():
        assert set(suite.settings.baselines) <= set(_peers.PEERS)
        assert 1 in suite.settings.threads
    chosen = record._chosen("peers,small,calls", [], 100.0)
    assert list(chosen) == ["peers", "small"]
    assert sum(settings.seconds for settings in chosen.values()) == pytest.approx(100)
    with pytest.raises(SystemExit, match="no suite is called peer; there are peers, shapes, "):
        record._chosen("peer", [], 1.0)


def test_record_writes_a_page_json_and_a_plot(
    record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert run(record, monkeypatch, *args, "--baseline=torch-bf16") == 0
    result = json.loads((tmp_path / "here.json").read_text())
    custom = result["suites"]["custom"]
    assert (result["note"], result["format"], len(custom["rows"])) == ("Trial.", 2, 4)
    assert {"commit", "date", "device", "isa", "versions", "command", "python", "build"} <= result.keys()
    text = (tmp_path / "here.md").read_text()
    assert "Trial." in text
    assert "| times as fast as torch bf16 | M = 1 | M = 2 |" in text
    assert "| torch-bf16 | 1.00 | 1.00 |" in text
    assert "| int8 | 2.00 | 2.00 |" in text
    assert result["device"] in text
    pytest.importorskip("matplotlib")
    assert "![Roofline](here.png)" in text
    assert (tmp_path / "here.png").read_bytes().startswith(b"\x89PNG")


def test_pages_are_made_from_a_record(record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every suite, with smaller shapes: what docs/generate_bench.py makes of it."""
    planned = record._suites()

    def small(suite: Any) -> Any:
        N = {Shape(4096, 4096): 128, Shape(384, 384): 64}
        shapes = [Shape(N.get(Shape(s.N, s.K), 96), 256) for s in suite.settings.shapes]
        baselines = [
            name for name in suite.settings.baselines if name in ("torch-bf16", "torch-fp32", "torch-int4pack")
        ]
        settings = dataclasses.replace(
            suite.settings, shapes=list(dict.fromkeys(shapes)), Ms=[1, 4], threads=(1, 2), baselines=baselines,
            schemes=suite.settings.schemes[:2],
        )  # fmt: skip
        return dataclasses.replace(suite, settings=settings)

    monkeypatch.setattr(record, "_suites", lambda: {name: small(suite) for name, suite in planned.items()})
    row = {"dtype": "float32", "way": "op", "what": "`x`", "median_us": 3.0, "best_us": 2.9, "ratio": 1.1}
    monkeypatch.setattr(record._calls, "measure_calls", lambda: [row])
    monkeypatch.setattr(record, "_has_matplotlib", lambda: False)
    assert run(record, monkeypatch, "--name", "here") == 0
    made = load(BENCH.parent / "docs" / "generate_bench.py").blocks(
        json.loads((tmp_path / "here.json").read_text()), "here"
    )
    assert not [name for name, text in made.items() if "Not part of" in text]
    assert "| W4A16 | `int4-g128` | 2.00 | 2.00 |\n" in made["bench"]
    assert "| W4A16 | the best other | 1.33 | 1.33 |" in made["bench"]
    assert re.search(r"\| `int4-g128` \| W4A16 \| 0\.\d+ \| 2\.00 \| 2\.00 \|", made["peers-2"])
    assert "| `int4-g128` | 1.25 | 1.25 |" in made["batch-invariant"]
    assert re.search(r"\| `int4-g128` \| 2\.00, \d+% \| 2\.00 \|", made["threads"])
    assert "| 64 x 256 | 2 | `int4-g32` | 2.00 | 2.00 |" in made["small"]
    assert "| float32 | `x` | 3.00 | 1.10 |" in made["calls"]
    assert "| 96 x 256 | `torch-int4pack` | W4A16 | 1.33 | 1.33 |" in made["shapes"]
    assert re.search(r"\| `int2-g32-offset` \| 0\.0 \| \d+% \| 2\.00", made["formats"])
    assert "float32 | `x` | 3.00 | 2.90 | 1.10" in (tmp_path / "here.md").read_text()


def test_a_record_of_calls_alone(record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record._calls, "measure_calls", list)
    assert run(record, monkeypatch, "--name", "here", "--suite", "calls") == 0
    made = load(BENCH.parent / "docs" / "generate_bench.py").blocks(
        {**json.loads((tmp_path / "here.json").read_text()), "date": "2026-01-01", "torch": "2"}, "here"
    )
    assert made["peers-1"] == "Not part of the last run ('peers')."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_way_of_calling_computes_the_layer(dtype: torch.dtype) -> None:
    ways = _calls.ways_to_call(dtype, M=3)
    assert list(ways) == list(_calls.WAYS)
    wanted = ways["F.linear"]()
    for way in ("op", "forward", "module"):
        torch.testing.assert_close(ways[way](), wanted, rtol=2e-2, atol=5e-2)
    assert ways["op out"]() is None
    rows = _calls.measure_calls(rounds=2, repeats=2)
    assert [(row["dtype"], row["way"]) for row in rows[:2]] == [("float32", "F.linear"), ("float32", "op")]
    assert rows[0]["ratio"] == 1
