"""What the numbers were measured on: device, clocks, driver, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

from device.store import ROOT

__all__ = ["clocks", "device_name", "facts"]

_QUERY = {
    "name": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "sm_mhz_max": "clocks.max.sm",
    "memory_mhz_max": "clocks.max.mem",
    "watts": "power.draw",
    "watts_limit": "power.limit",
    "celsius": "temperature.gpu",
    "throttle": "clocks_event_reasons.active",
}
_PACKAGES = ("torch", "triton", "lowbit", "humming-kernels", "gemlite", "numpy")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def clocks() -> dict[str, str]:
    """Of the first GPU, as nvidia-smi says; {} without one. Nothing is changed."""
    answer = _run("nvidia-smi", "-i", "0", f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader,nounits")
    values = [value.strip() for value in answer.splitlines()[0].split(",")] if answer else []
    return dict(zip(_QUERY, values, strict=False))


def device_name(device: str) -> str:
    import torch

    if device == "mps":
        if not torch.backends.mps.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} can use no GPU by MPS")
        return f"{_run('/usr/sbin/sysctl', '-n', 'machdep.cpu.brand_string') or 'Apple'} GPU"
    return torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    nvcc = shutil.which("nvcc")
    if nvcc:
        found["nvcc"] = _run(nvcc, "--version").partition("release ")[2].partition(",")[0]
    return found


def _commit() -> str:
    """LOWBIT_COMMIT where the checkout was copied without its history."""
    commit = _run("git", "rev-parse", "HEAD")
    if not commit:
        return os.environ.get("LOWBIT_COMMIT", "unknown")
    return commit + (
        " with uncommitted changes" if _run("git", "status", "--porcelain", "--untracked-files=no") else ""
    )


def facts(device: str) -> dict[str, Any]:
    """For the head of a table."""
    import torch

    found: dict[str, Any] = {"device": device_name(device), "commit": _commit(), "versions": _versions()}
    found["versions"]["cuda of torch"] = str(torch.version.cuda)
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found["capability"] = f"{about.major}.{about.minor}"
        found["multiprocessors"] = about.multi_processor_count
        found["l2_bytes"] = about.L2_cache_size
        found["memory_bytes"] = about.total_memory
        found["clocks_before"] = clocks()
    if device == "mps":
        from lowbit import _C

        found["model"] = _C.metal_model()
        found["macos"] = platform.mac_ver()[0]
        found["memory_bytes"] = int(_run("/usr/sbin/sysctl", "-n", "hw.memsize") or 0)
    return found
