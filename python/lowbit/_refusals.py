"""Ops on a device that has no kernels here: they say why, and not that a dispatch key is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

import torch

__all__ = ["refuse_tensors"]

_KEEP: Final[list[torch.library.Library]] = []  # what is registered lasts as long as these objects


def refuse_tensors(key: str, where: str, kernels: str, reason: str) -> None:
    """Register every op of lowbit for a dispatch key, to raise.

    Args:
        key: "CUDA" or "MPS".
        where: the tensor that an op was given is there ("on a GPU").
        kernels: what is missing ("CUDA").
        reason: why.
    """

    def refuse(name: str) -> Callable[..., NoReturn]:
        def kernel(*args: Any) -> NoReturn:
            raise RuntimeError(
                f"lowbit::{name}: a tensor is {where}, and there are no {kernels} kernels here: {reason}. "
                "Move the model and its inputs to the CPU, or see `lowbit info`"
            )

        return kernel

    library = torch.library.Library("lowbit", "IMPL")
    _KEEP.append(library)
    for name in sorted(n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("lowbit::")):
        library.impl(name, refuse(name), key)
