"""How the cells of each stage are done. Everything that touches the GPU runs in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from device.cells import KERNEL_TESTS, Cell
from device.resume_plugin import read_record
from device.store import ROOT

__all__ = ["Setting", "build", "correct", "sanitize"]

BUILD: Final = ROOT / "build" / "device"
SITE: Final = BUILD / "site"
#: Tests about the build, the emulator and the command line: no GPU would change what they say.
ELSEWHERE: Final = tuple(
    f"test_{name}.py"
    for name in (
        *(
            "build",
            "cuda_library",
            "emulator",
            "metal_emulator",
            "mutants",
            "bench_suites",
            "cli_bench",
            "demo",
            "docs",
        ),
        *("device_check", "stubs", "engine_example"),
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
from lowbit.commands._target import find_target
print("on", find_target(device).what)  # raises, with the reason, where there are no kernels
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
        ignored += [f"--ignore={folder}" for folder in KERNEL_TESTS.values()]
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
        LOWBIT_TEST_BACKEND="emulator" if setting.device == "cpu" else "device",
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


#: Metal's validation: of every access of a shader, and of arguments and sizes. What it finds goes to stderr, and ends the
#: process where the host is at fault.
_VALIDATION: Final = {
    "MTL_DEBUG_LAYER": "1",
    "MTL_DEBUG_LAYER_ERROR_MODE": "assert",
    "MTL_SHADER_VALIDATION": "1",
    "MTL_SHADER_VALIDATION_REPORT_TO_STDERR": "1",
}
_INVALID: Final = re.compile(
    r"^.*(?:invalid (?:device|constant|threadgroup)|validation (?:error|failure)).*$", re.M | re.I
)


def _validate(setting: Setting, group: str, limit: float) -> dict[str, Any]:
    """One group of kernels under Metal's validation."""
    command = [sys.executable, "-m", "device.sanitize_cases", group, "mps"]
    status, output = _command(setting, "sanitize.log", min(limit, 240), *command, **_VALIDATION)
    found, ran = _INVALID.search(output), re.search(r"^\d+ problems$", output, re.M)
    if status == 0 and ran is not None and found is None:
        return {"ok": True, "summary": f"{ran[0]}, nothing invalid"}
    return {"ok": False, "error": found[0].strip() if found else f"status {status}", "output": output[-_TAIL:]}


def sanitize(setting: Setting, cell: Cell, limit: float) -> dict[str, Any]:
    """compute-sanitizer (on a Mac, Metal's validation) over one group of kernels, on small problems only: it slows everything."""
    tool, group = cell.spec
    if tool == "validation":
        return _validate(setting, group, limit)
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
