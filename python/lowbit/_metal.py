"""The Metal kernels: whether this process has them, otherwise why not, and the GPU that they run on.

They are part of liblowbit_ops on macOS for Apple silicon. Nothing here starts Metal: shaders are compiled when an op first
needs them.
"""

from __future__ import annotations

import re
from typing import Final

import torch

from lowbit import _C

__all__ = ["absent_reason", "device_string", "loaded"]


def _reason_now() -> str | None:
    if not torch.backends.mps.is_built():
        return f"PyTorch {torch.__version__} is built without MPS"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("lowbit::gemm", "MPS"):
        return "this lowbit was built without Metal: it needs macOS on Apple silicon"
    return None


_reason: Final = _reason_now()


def loaded() -> bool:
    """Whether the ops have Metal kernels in this process."""
    return _reason is None


def absent_reason() -> str | None:
    """Why they have none, in words; None when they have."""
    return _reason


def device_string(device: torch.device | str) -> str:
    """A device as `_C.explain` knows it: "mps" becomes "apple9:40" on a Mac that has the kernels.

    Elsewhere it stays "mps", which stands for a default model.

    Example:
        >>> device_string("cpu")
        'cpu'
    """
    text = str(device)
    return _C.metal_model() if loaded() and re.fullmatch(r"mps(:\d+)?", text) else text
