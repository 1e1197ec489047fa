"""How the cells of each stage are done. Everything that touches the GPU runs in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from device.cells import Cell
from device.resume_plugin import read_record
from device.store import ROOT

__all__ = ["Setting", "build", "correct", "sanitize"]

BUILD: Final = ROOT / "build" / "device"
SITE: Final = BUILD / "site"
#: Tests about the build, the emulator and the command line: no GPU would change what they say.
ELSEWHERE: Final = tuple(
    f"test_{name}.py"
    for name in (
        *("build", "cuda_library", "emulator", "mutants", "bench_suites", "cli_bench", "demo", "docs", "device_check"),
        *("stubs", "engine_example"),
    )
)
#: Kept from what a command said.
_TAIL: Final = 3000


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the runners need to know.

    Args:
        out: where logs go.
        sources: sources_hash().
        device: cuda, or cpu to try the harness out.
        archs: LOWBIT_CUDA_ARCHS.
        site: the folder with lowbit in it; None uses the one that Python finds.
    """

    out: Path
    sources: str
    device: str
    archs: str
    site: Path | None

    def environment(self) -> dict[str, str]:
        folders = [str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
        if self.site is not None:
            folders.insert(0, str(self.site))
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "PYTHONUNBUFFERED": "1"}


def _command(setting: Setting, log: str, limit: float, *command: str, **environment: str) -> tuple[int, str]:
    """Exit status and output, which also goes to a log; 124 where it took longer than the limit."""
    path = setting.out / log
    with path.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**setting.environment(), **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(limit, 1),
                check=False,
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = 124
    with path.open("rb") as file:
        file.seek(begin)
        return status, file.read().decode(errors="replace")


# ---- build ---------------------------------------------------------------------------------------------------------------

_CHECK: Final = """
import sys, torch, lowbit
device = sys.argv[1]
print("lowbit", lowbit.__file__)
info = lowbit._C.build_info()
print("cuda", info["cuda"], "for", info["cuda_archs"], info["cuda_absent"])
assert device == "cpu" or torch._C._dispatch_has_kernel_for_dispatch_key("lowbit::gemm", "CUDA"), "no CUDA kernels"
weight = lowbit.QuantizedWeight.quantize(torch.randn(128, 256), "int4-g128")
layer = lowbit.QuantizedLinear(weight).to(device)
print("y", tuple(layer(torch.ones(3, 256, device=device, dtype=torch.bfloat16)).shape))
"""


def build(setting: Setting, cell: Cell, limit: float) -> dict[str, Any]:
    """Into build/device, for the GPUs that are here; only what changed. Nothing is installed anywhere else."""
    if setting.site is not None:
        begin = time.monotonic()
        steps = (
            ("cmake", "-S", ".", "-B", str(BUILD), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
             f"-DLOWBIT_CUDA={'ON' if setting.device == 'cuda' else 'OFF'}", f"-DLOWBIT_CUDA_ARCHS={setting.archs}"),
            ("cmake", "--build", str(BUILD)),
            ("cmake", "--install", str(BUILD), "--prefix", str(setting.site)),
        )  # fmt: skip
        for step in steps:
            status, output = _command(setting, "build.log", limit - (time.monotonic() - begin), *step)
            if status != 0:
                return {
                    "ok": False,
                    "error": f"{' '.join(step[:2])} ended with status {status}",
                    "output": output[-_TAIL:],
                }
        shutil.copytree(ROOT / "python" / "lowbit", setting.site / "lowbit", dirs_exist_ok=True)
    status, output = _command(setting, "build.log", 300, sys.executable, "-c", _CHECK, setting.device)
    return {"ok": status == 0, "summary": " ".join(output.split()[-12:]), "output": output[-_TAIL:]}


# ---- correct -------------------------------------------------------------------------------------------------------------


def correct(setting: Setting, cell: Cell, limit: float) -> dict[str, Any]:
    """pytest over some folders. Tests that passed in an earlier run are not repeated."""
    record = setting.out / f"correct-{cell.key}.jsonl"
    ignored = [f"--ignore=tests/{name}" for name in ELSEWHERE]
    if cell.key != "kernels":
        ignored.append("--ignore=tests/cuda")
    command = [sys.executable, "-m", "pytest", "-p", "device.resume_plugin", "-q", "--tb=short", "-m", "not slow"]
    status, output = _command(
        setting,
        "correct.log",
        limit,
        *command,
        *ignored,
        *cell.spec,
        LOWBIT_CHECK_RECORD=str(record),
        LOWBIT_CHECK_SOURCES=setting.sources,
        # One test may still be running then: leave it some time.
        LOWBIT_CHECK_DEADLINE=str(time.time() + limit - 20),
        LOWBIT_TEST_BACKEND="device" if setting.device == "cuda" else "emulator",
    )
    outcomes = [str(line["outcome"]) for line in read_record(record, setting.sources).values()]
    failures = [name for name, line in read_record(record, setting.sources).items() if line["outcome"] == "failed"]
    unfinished = status == 124 or "the time is up" in output
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "skipped", "failed"))
    # 5: nothing was left to run. 2: stopped by the deadline.
    ok = not failures and not unfinished and status in (0, 5) and "passed" in outcomes
    result = {"ok": ok, "unfinished": unfinished, "failures": failures, "summary": counts}
    return result if ok else {**result, "output": output[-_TAIL:]}


# ---- sanitize ------------------------------------------------------------------------------------------------------------


def sanitize(setting: Setting, cell: Cell, limit: float) -> dict[str, Any]:
    """compute-sanitizer over one group of kernels. Its program runs small problems only: everything is slower in it."""
    tool, group = cell.spec
    found = shutil.which("compute-sanitizer")
    if found is None:
        return {"ok": False, "error": "compute-sanitizer is not in PATH"}
    status, output = _command(
        setting,
        "sanitize.log",
        min(limit, 240),
        found,
        "--tool",
        tool,
        "--error-exitcode",
        "99",
        sys.executable,
        "-m",
        "device.sanitize_cases",
        group,
        # Each tensor its own allocation, so that one byte too far is an error and not somebody else's byte.
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    lines = [line for line in output.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    said = lines[-1].strip("= ") if lines else f"status {status}"
    ok = status == 0 and bool(lines)
    return {"ok": ok, "summary": said} if ok else {"ok": False, "error": said, "output": output[-_TAIL:]}
