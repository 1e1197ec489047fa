"""`lowbit bench --device mps`: what it does on a Mac unattended. On the emulator, kernels are its, and the rest is as there."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import cli
from lowbit.commands import _benchmark, _measure, _target, bench
from lowbit.commands._measure import Roofline
from lowbit.commands._target import Target
from metal_problems import BACKEND

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))

PEAKS = {"float32": 1e12, "bfloat16": 2e12, "int8": 0.0}


def check_modules() -> list[Any]:
    """What bench/device_check.sh measures with; not part of a source distribution."""
    if not BENCH.is_dir():
        return []
    from device import contenders, measure, sanitize_cases, timing

    return [contenders, measure, sanitize_cases, timing]


@pytest.fixture
def waits(metal: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the GPU was waited for; the emulator takes its place."""
    count: list[int] = []
    if BACKEND == "device":
        real = _target.find_target("mps")
        found = Target("mps", real.device, real.what, real.model, lambda: [count.append(1), torch.mps.synchronize()])
    else:
        found = Target("mps", torch.device("cpu"), "Apple M0 GPU", metal.model, lambda: count.append(1), metal.ops)
    find: Callable[[str], Target] = lambda name: found if name == "mps" else _target.find_target(name)  # noqa: E731
    for module in (_benchmark, bench, *check_modules()):
        monkeypatch.setattr(module, "find_target", find)
    monkeypatch.setattr(_measure, "cache_bytes", lambda *_: 1 << 14)
    monkeypatch.setattr(_measure, "_GPU_SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(_benchmark, "measure_roofline", lambda threads, target: Roofline(threads, 1e11, PEAKS))
    return count


def run(capsys: pytest.CaptureFixture[str], device: str) -> dict[str, Any]:
    schemes = "int4-g32,int8-a8,nf4-g32"
    baselines = "torch-bf16,torch-fp32,torch-int4pack,dequant"
    arguments = ["--shape", "24x64", "--M", "1,9", "--scheme", schemes, "--baseline", baselines, "--batch-invariant"]
    command = ["bench", "--json", "--device", device, "--time-budget", "0.1", *arguments]
    assert cli.main(command) == 0
    return json.loads(capsys.readouterr().out)


def test_the_same_json_as_on_the_cpu(
    waits: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = run(capsys, "mps")
    assert len(waits) > 2 * len(there["rows"])
    monkeypatch.setattr(_benchmark, "measure_roofline", lambda threads, target: Roofline(threads, 1e11, PEAKS))
    here = run(capsys, "cpu")
    assert there.keys() == here.keys()
    assert {frozenset(row) for row in there["rows"]} == {frozenset(row) for row in here["rows"]}
    assert there["device_type"] == "mps" and there["isa"].startswith("apple") and here["device_type"] == "cpu"
    ours = {row["name"]: row for row in there["rows"] if not row["baseline"] and row["M"] == 9}
    assert {row["kernel"].partition("_")[0] for row in ours.values()} == {"metal"}
    assert ours["int4-g32"]["kernel"] == "metal_matrix_m32_apple7"
    assert ours["int4-g32 batch-invariant"]["kernel"] == "metal_stream_m8_apple7"
    assert ours["int8-a8"]["kernel"] == "metal_matrix_exact_m64_apple7"
    errors = [(row["name"], row["error"]) for row in there["rows"]]
    assert all(0 <= error < 0.2 for _, error in errors), errors
    names = {row["name"] for row in there["rows"]}
    assert {"torch-bf16", "torch-fp32", "dequant int4-g32"} <= names and there["complete"]
    if BACKEND == "device":  # on the emulator W is where the CPU's peers can have it
        assert {e["why"] for e in there["left_out"] if e["name"] == "torch-int4pack"} == {"multiplies on the CPU only"}


def test_the_table_says_where(waits: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        "--device",
        "mps",
        "--shape",
        "24x64",
        "--scheme",
        "int4-g32",
        "--M",
        "1",
        "--time-budget",
        "0.05",
    ]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "GPU, apple" in text and "metal_stream_m1_apple7" in text


def test_peers_of_the_cpu_stay_there() -> None:
    from lowbit.commands import _peers

    weight = torch.empty(64, 128, device="meta")
    with pytest.raises(RuntimeError, match="multiplies on the CPU only"):
        _peers.make_peer("torch-int4pack", weight, torch.bfloat16, warm=True)
    assert {name for name, peer in _peers.PEERS.items() if peer.gpu} == {
        *(f"torch-{name}" for name in ("bf16", "fp32", "fp16", "int8pack", "int8-mm", "fp8-mm"))
    }


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this is a Mac")
def test_without_a_gpu_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "mps", "--json"]) == 1
    assert "no kernels for device 'mps': PyTorch" in capsys.readouterr().err


def test_a_gpu_is_waited_for_before_the_clock_is_read(waits: list[int]) -> None:
    calls: list[str] = []
    target = Target("mps", torch.device("cpu"), "", "apple7:8", lambda: calls.append("wait"))
    samples = _measure.interleave(
        {"a": lambda i: calls.append("a"), "b": lambda i: calls.append("b")}, 0.0, target=target
    )
    assert all(len(sample.seconds) == 3 for sample in samples.values())
    text = "".join(name[0] for name in calls)
    assert text[-1] == "w" and "ab" not in text and "ba" not in text  # one after another, each waited for


# ---- bench/device_check.sh ---------------------------------------------------------------------------------------------------

needs_check = pytest.mark.skipif(not BENCH.is_dir(), reason="the benches are not part of a source distribution")
SECTIONS = (
    "roofline",
    "W4A16",
    "INT8 W8A8",
    "W4A8-fp8",
    "FP8 blocks",
    "dequantize",
    "quantize_activation int8",
    "gradient",
)


class Here:
    """device.worker.Worker in this process, where the emulator is; problems are small."""

    def __init__(self, device: str):
        from device import timing

        self.device, self.timer = device, timing.make_timer(device)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, case: Any, seconds: float, limit: float) -> dict[str, Any]:
        from device import measure

        small = {name: min(getattr(case, name), most) for name, most in (("M", 9), ("N", 128), ("K", 128))}
        return measure.measure_case(dataclasses.replace(case, **small), self.device, self.timer, 0.0)


@needs_check
def test_the_device_check_measures(waits: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every kind of case, without a question asked, into the files that a run on any GPU writes."""
    from device import __main__ as command
    from device import cells, machine, timing

    monkeypatch.setattr(timing, "cache_bytes", lambda *_: 1 << 10)
    monkeypatch.setattr(command, "Worker", Here)
    if BACKEND == "emulator":
        monkeypatch.setattr(machine, "device_name", lambda device: "Apple M0 GPU")
    first = {cell.spec.section: cell for cell in reversed(cells.plan(["bench"], device="mps"))}
    monkeypatch.setattr(cells, "plan", lambda *_, **__: [first[name] for name in SECTIONS])
    assert command.main(["--device", "mps", "--installed", "bench", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "device_check.json").read_text())
    assert data["machine"]["model"].startswith("apple") and data["device"].endswith("GPU")
    rows = [row for cell in data["stages"]["bench"].values() for row in cell.get("rows", ())]
    kernels = {row["kernel"].split(", ")[-1] for row in rows if row["name"].startswith("lowbit")}
    assert {"metal_stream_m1_apple7", "metal_matrix_exact_m64_apple7", "metal_grad_m64_apple7"} <= kernels
    assert {"torch-bf16"} < {row["name"] for row in rows}
    text = (tmp_path / "device_check.md").read_text()
    assert text.startswith("# lowbit on Apple M") and "given for 20 ms on end" in text and "GPU taken for apple" in text


@needs_check
@pytest.mark.parametrize("group", ["gemm", "gemm_a8", "gemm_grad_input", "weights", "activations"])
def test_what_validation_watches_runs(waits: list[int], group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from device import sanitize_cases

    monkeypatch.setattr(sanitize_cases, "SCHEMES", ("int3-g64-asym",))
    monkeypatch.setattr(sanitize_cases, "SHAPES", ((3, 20, 72),))
    assert sanitize_cases.run(group, "mps") > 0
