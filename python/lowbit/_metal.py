"""The Metal kernels: whether this process has them, otherwise why not, and the GPU that they run on.

They are part of liblowbit_ops on macOS for Apple silicon. Nothing here starts Metal: shaders are compiled when an op first
needs them. Kernels are started through torch's C interface to Metal; by torch.mps.compile_shader where torch's library lacks
that, or where LOWBIT_METAL_COMPILE_SHADER=1 asks for it: exceptions then hold what Apple's compiler says.
"""

from __future__ import annotations

import os
import re
from typing import Final

import torch

from lowbit import _C, _compile_shader
from lowbit._refusals import refuse_tensors

__all__ = ["absent_reason", "device_string", "loaded", "started_by"]


def _reason_now() -> str | None:
    if not torch.backends.mps.is_built():
        return f"PyTorch {torch.__version__} is built without MPS"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("lowbit::gemm", "MPS"):
        return "this lowbit was built without Metal: it needs macOS on Apple silicon"
    return None


def _needs_python() -> bool:
    return os.environ.get("LOWBIT_METAL_COMPILE_SHADER", "0") not in ("", "0") or not _C.has_metal_interface()


_reason: Final = _reason_now()
_by_python: Final = _reason is None and _needs_python()
if _by_python:
    _compile_shader.install()
if _reason is not None and torch.backends.mps.is_built():
    refuse_tensors("MPS", "on mps", "Metal", _reason)


def loaded() -> bool:
    """Whether the ops have Metal kernels in this process."""
    return _reason is None


def absent_reason() -> str | None:
    """Why they have none, in words; None when they have."""
    return _reason


def started_by() -> str | None:
    """What starts the kernels; None where there are none."""
    if _reason is not None:
        return None
    return "torch.mps.compile_shader" if _by_python else "PyTorch's C interface"


def device_string(device: torch.device | str) -> str:
    """A device as `_C.explain` knows it: "mps" becomes "apple9:40" on a Mac that has the kernels.

    Elsewhere it stays "mps", which stands for a default model.

    Example:
        >>> device_string("cpu")
        'cpu'
    """
    text = str(device)
    return _C.metal_model() if loaded() and re.fullmatch(r"mps(:\d+)?", text) else text
