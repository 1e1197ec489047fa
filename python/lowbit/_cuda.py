"""The CUDA library: loaded beside `_C` where PyTorch is a CUDA build, and otherwise why it is not there.

Nothing here initialises CUDA: loading the library registers its ops and runs none of its code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import torch

from lowbit import _C
from lowbit._refusals import refuse_tensors

__all__ = ["absent_reason", "code_for", "device_string", "driver_problem", "least_driver", "loaded"]

LIBRARY: Final = Path(_C.__file__).parent / "liblowbit_cuda.so"

#: The oldest driver (its first number) for programs built with a CUDA release, by that release's first number: NVIDIA's
#: table of minor version compatibility.
_LEAST_DRIVER: Final = {11: 450, 12: 525, 13: 580}


def _load() -> str | None:
    """Load the library; the reason when that cannot be."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if not LIBRARY.exists():
        return f"this lowbit was built without CUDA: {_C.build_info()['cuda_absent'] or f'{LIBRARY.name} is missing'}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} does not load: {error}"
    return None


_reason: Final = _load()
if _reason is not None and torch.version.cuda is not None:
    refuse_tensors("CUDA", "on a GPU", "CUDA", _reason)


def loaded() -> bool:
    """Whether the ops have CUDA kernels in this process."""
    return _reason is None


def absent_reason() -> str | None:
    """Why they have none, in words; None when they have."""
    return _reason


def device_string(device: torch.device | str) -> str:
    """A device as `_C.explain` and `_C.workspace_size` know it: "cuda:1" becomes "sm_86:84" once CUDA is in use.

    Before that it stays "cuda", which stands for a default model: asking the device would initialise CUDA.

    Example:
        >>> device_string("cpu")
        'cpu'
    """
    text = str(device)
    if not re.fullmatch(r"cuda(:\d+)?", text) or not torch.cuda.is_initialized():
        return text
    found = torch.cuda.get_device_properties(torch.device(text))
    return f"sm_{found.major}{found.minor}:{found.multi_processor_count}"


# -- what a driver and a GPU need, for `lowbit info` ---------------------------------------------------------------------


def least_driver(cuda: str) -> int | None:
    """The oldest driver branch for a library built with this CUDA ("13.0"); None for releases that are not known here.

    Example:
        >>> least_driver("12.8")
        525
    """
    return _LEAST_DRIVER.get(int(cuda.partition(".")[0] or 0))


def driver_problem(driver: str, cuda: str) -> str | None:
    """One line when the driver ("535.104.05") is too old for a library built with this CUDA; else None.

    Example:
        >>> driver_problem("535.104.05", "13.0")
        'the driver 535.104.05 is too old: kernels built with CUDA 13.0 need 580 or later'
    """
    least, branch = least_driver(cuda), driver.partition(".")[0]
    if least is None or not branch.isdigit() or int(branch) >= least:
        return None
    return f"the driver {driver} is too old: kernels built with CUDA {cuda} need {least} or later"


def code_for(capability: str, archs: str) -> str:
    """What a build for `archs` ("80 90a 120f 80-ptx") has for a GPU of this compute capability ("8.6"), in words.

    Machine code runs on later devices of its generation (80 on 8.6), with the letter f of its family, with a only on the
    very same; PTX is compiled by the driver, at load time, for that device and all later ones.

    Example:
        >>> code_for("8.6", "80 90a 80-ptx")
        'compiled in (sm_80)'
    """
    major, _, minor = capability.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        return "unknown: the driver does not say what the GPU is"
    device = 10 * int(major) + int(minor)
    if device < 80:
        return "too old: the kernels need compute capability 8.0 (Ampere) or later"
    best: tuple[int, str] = (0, "")
    for arch in archs.split():
        match = re.fullmatch(r"(\d+)([af]?)", arch)
        if match is None:
            continue
        number, letter = int(match[1]), match[2]
        runs = number == device if letter == "a" else number // 10 == device // 10 and number <= device
        best = max(best, (number, arch) if runs else (0, ""))
    if best[0]:
        return f"compiled in (sm_{best[1]})"
    ptx = [int(arch.removesuffix("-ptx")) for arch in archs.split() if re.fullmatch(r"\d+-ptx", arch)]
    ptx = [number for number in ptx if number <= device]
    if ptx:
        return f"compiled at load time, from PTX for compute_{max(ptx)}"
    return f"none: the build is for {archs or 'no GPU'}"
