"""`lowbit info`: what this machine has, what was built, and what of it is in use."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit import _C, _cuda, _metal
from lowbit.commands import _output
from lowbit.report import format_bytes

__all__ = ["add_parser", "collect", "cpu_name", "run"]

_NO_CUDA = "torch is built without CUDA"
#: FP32 lanes of a multiprocessor, by compute capability; 128 from 8.6 on.
_LANES = {"8.0": 64}
_EXAMPLE = """\
examples:
  lowbit info
  lowbit info --json | python -c 'import json, sys; print(json.load(sys.stdin)["cpu"]["isa"])'
"""


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "info",
        help="what this machine and this build have",
        description="Show torch, devices, instruction sets, loaded libraries and the kernel table. Does not initialise CUDA.",
        epilog=_EXAMPLE,
        formatter_class=_output.HelpFormatter,
    )
    _output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    found = collect()
    if args.json:
        _output.print_json(found)
    else:
        _show(found)
    return 0


def collect() -> dict[str, Any]:
    """Everything, as JSON values."""
    devices = _devices()
    return {
        "lowbit": {"version": lowbit.__version__, "python": platform.python_version(), "platform": platform.platform()},
        "torch": {
            "version": torch.__version__,
            "built for CUDA": torch.version.cuda,
            "built for MPS": torch.backends.mps.is_built(),
            "threads": torch.get_num_threads(),
        },
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "isa": _C.isa(),
            "isa_available": _C.isa_levels(),
            "isa_refused": _C.isa_refusals(),
            "features": sorted(name for name, there in _C.cpu_features().items() if there),
            "LOWBIT_ISA": os.environ.get("LOWBIT_ISA"),
            "strict": _C.strict(),
        },
        "devices": devices,
        "cuda": _cuda_state(devices["cuda"]),
        "metal": {
            "loaded": _metal.loaded(),
            "why_not": _metal.absent_reason(),
            "gpu": _C.metal_model() if _metal.loaded() else None,
            "started_by": _metal.started_by(),
        },
        "libraries": _libraries(),
        "build": _C.build_info(),
        "formats": [row["name"] for row in _C.format_table()],
        "kernels": _C.kernel_table(),
    }


def cpu_name() -> str:
    """The CPU as it calls itself.

    Example:
        >>> cpu_name()
        'AMD EPYC'
    """
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        return _output_of(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]).strip() or platform.machine()
    return platform.processor() or platform.machine()


def _output_of(command: list[str]) -> str:
    """What a tool prints; nothing when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _devices() -> dict[str, Any]:
    # The driver's own tool is asked, because any question to the CUDA runtime would set up a context.
    cuda: dict[str, Any] | str = _NO_CUDA
    if torch.version.cuda is not None:
        tool = shutil.which("nvidia-smi")
        fields = "--query-gpu=name,compute_cap,memory.total,driver_version"
        text = _output_of([tool, fields, "--format=csv,noheader"]) if tool else ""
        rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 3]
        names = ("name", "compute_capability", "memory", "driver")
        found: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in rows]
        for index, gpu in enumerate(found):
            gpu["multiprocessors"] = _multiprocessors(index, gpu["compute_capability"])
            gpu["code"] = _cuda.code_for(gpu["compute_capability"], _C.build_info()["cuda_archs"])
        cuda = {"gpus": found} if found else "no GPU answers (nvidia-smi is missing or finds none)"
    mps: dict[str, Any] | str = "torch is built without MPS"
    if torch.backends.mps.is_built():
        mps = {"available": torch.backends.mps.is_available(), "macos": platform.mac_ver()[0]}
    return {"cuda": cuda, "mps": mps}


def _multiprocessors(index: int, capability: str) -> int | None:
    """Of the GPU with that index, from the management library, which does not set up a context; None when it cannot say."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle, lanes = ctypes.c_void_p(), ctypes.c_uint()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            return None
        if nvml.nvmlDeviceGetNumGpuCores(handle, ctypes.byref(lanes)):
            return None
    except (OSError, AttributeError):
        return None
    return lanes.value // _LANES.get(capability, 128) or None


def _driver() -> str | None:
    """The NVIDIA driver's version, from its kernel module; None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", text)
    return match[1] if match else None


def _cuda_state(devices: Mapping[str, Any] | str) -> dict[str, Any]:
    """The CUDA kernels of this build: whether they are in use and why not, what they were built with, what they need."""
    build = _C.build_info()
    gpus = [] if isinstance(devices, str) else devices["gpus"]
    driver = gpus[0]["driver"] if gpus else _driver()
    version = build["cuda"] or None
    least = None if version is None else _cuda.least_driver(version)
    return {
        "loaded": _cuda.loaded(),
        "why_not": _cuda.absent_reason(),
        "built_with": version,
        "architectures": build["cuda_archs"].split(),
        "driver": driver,
        "needs_driver": None if least is None else f"{least} or later",
        "problem": None if version is None or driver is None else _cuda.driver_problem(driver, version),
    }


def _libraries() -> dict[str, Any]:
    module = Path(_C.__file__)
    found: dict[str, Any] = {"_C": _library(module)}
    for name in ("liblowbit_ops", "liblowbit_cuda"):
        paths = sorted(module.parent.glob(f"{name}.*"))
        found[name] = _library(paths[0]) if paths else {"path": None, "loaded": False}
    if not found["liblowbit_cuda"]["loaded"]:
        found["liblowbit_cuda"]["why"] = _cuda.absent_reason()
    return found


def _library(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
        about["loaded"] = os.path.realpath(path) in maps
    except OSError:  # not Linux: importing _C has loaded what it links
        about["loaded"] = path.name.startswith(("_C", "liblowbit_ops"))
    return about


# -- for people --------------------------------------------------------------------------------------------------------------


def _show(found: Mapping[str, Any]) -> None:
    cpu, build = found["cpu"], found["build"]
    rows: list[tuple[str, object]] = [(f"lowbit {key}", value) for key, value in found["lowbit"].items()]
    rows += [(f"torch {key}", "no" if value in (None, False) else value) for key, value in found["torch"].items()]
    rows += [
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores"),
        ("cpu features", ", ".join(cpu["features"])),
        ("instruction set in use", cpu["isa"] + (" (LOWBIT_ISA)" if cpu["LOWBIT_ISA"] else "")),
        ("instruction sets here", ", ".join(cpu["isa_available"])),
        *((f"why not {name}", reason) for name, reason in cpu["isa_refused"].items()),
        ("strict", "yes: a general kernel is an error" if cpu["strict"] else "no"),
    ]
    rows += [(name, value if isinstance(value, str) else _words(value)) for name, value in found["devices"].items()]
    rows += _cuda_rows(found["cuda"])
    metal = found["metal"]
    in_use = f"in use, on {metal['gpu']}, started by {metal['started_by']}"
    rows.append(("metal kernels", in_use if metal["loaded"] else f"absent: {metal['why_not']}"))
    for name, library in found["libraries"].items():
        if library["path"] is None:
            rows.append((name, f"absent: {library.get('why', 'not found beside _C')}"))
        else:
            state = (
                "" if library["loaded"] else f", not loaded: {library['why']}" if "why" in library else ", not loaded"
            )
            rows.append((name, f"{library['path']} ({format_bytes(library['bytes'])}{state})"))
    rows += [(f"build {key}", value) for key, value in build.items()]
    rows.append(("formats", ", ".join(found["formats"])))
    _output.print_table(("", ""), rows, left=2)
    kernels = [
        (k["op"], k["backend"], k["name"], k["isa"], "yes" if k["general"] else "", k["takes"])
        for k in found["kernels"]
    ]
    head = ("op", "backend", "kernel", "isa", "general", "takes")
    _output.print_table(head, kernels, left=6, title="kernels, in the order in which they are asked:")


def _cuda_rows(cuda: Mapping[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("cuda kernels", "in use" if cuda["loaded"] else f"absent: {cuda['why_not']}")]
    if cuda["built_with"]:
        built = f"CUDA {cuda['built_with']}, for {' '.join(cuda['architectures'])}"
        rows += [("cuda kernels built with", built), ("cuda driver needed", cuda["needs_driver"] or "unknown")]
    rows.append(("cuda driver", cuda["driver"] or "none found"))
    if cuda["problem"]:
        rows.append(("cuda problem", cuda["problem"]))
    return rows


def _words(value: Mapping[str, Any]) -> str:
    gpus = value.get("gpus")
    if gpus is not None:
        return "; ".join(_gpu_words(gpu) for gpu in gpus)
    return ", ".join(f"{key} {entry}" for key, entry in value.items())


def _gpu_words(gpu: Mapping[str, Any]) -> str:
    sms = f", {gpu['multiprocessors']} multiprocessors" if gpu["multiprocessors"] else ""
    return (
        f"{gpu['name']}, compute capability {gpu['compute_capability']}{sms}, {gpu['memory']}, driver {gpu['driver']}; "
        f"code: {gpu['code']}"
    )
