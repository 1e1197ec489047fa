"""Floats of 4 and 8 bits under scales of one byte, as several formats keep them: MXFP4, MXFP8, NVFP4.

    MXFP4    codes uint8 [N, K/2], the even k in the low nibble; scales E8M0 [N, K/32]
    MXFP8    codes e4m3 [N, K]; scales E8M0 [N, K/32]
    NVFP4    codes as MXFP4; scales e4m3 [N, K/16], under one number for the tensor

Bytes are taken as they are. The number above NVFP4's scales is a factor here; where a format keeps its reciprocal, that is
rounded to fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

import torch

from lowbit._checks import SCALE_DTYPES
from lowbit.formats._module import Module
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["KINDS", "Microscaling", "check_microscaling"]

_E8M0: Final = (torch.uint8, torch.float8_e8m0fnu)
_ONE: Final = ((), (1,), (1, 1))

#: Scheme -> (dtypes of codes, dtypes of scales).
KINDS: Final[dict[str, tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...]]]] = {
    "mxfp4": ((torch.uint8,), _E8M0),
    "mxfp8": ((torch.float8_e4m3fn,), _E8M0),
    "nvfp4": ((torch.uint8,), (torch.float8_e4m3fn,)),
}


@dataclasses.dataclass(frozen=True)
class Microscaling:
    """Where a format keeps such a weight.

    Args:
        kind: a key of KINDS.
        codes, scales: leaves of the module.
        above: the leaf of the number for the tensor, or None.
        divides: scales are divided by that number.
    """

    kind: str
    codes: str
    scales: str
    above: str | None = None
    divides: bool = False

    @property
    def leaves(self) -> tuple[str, ...]:
        """Tensors it is made of."""
        return (self.codes, self.scales, *(() if self.above is None else (self.above,)))

    @property
    def about(self) -> str:
        """For people."""
        return f"{self.kind}, groups of {Scheme.parse(self.kind).group_size}"


def check_microscaling(module: Module, store: Microscaling) -> tuple[tuple[int, int], Callable[[], QuantizedWeight]]:
    """(N, K) of a layer, and what reads its weight; refuse tensors that do not fit each other."""
    codes, scales = KINDS[store.kind]
    scheme = Scheme.parse(store.kind)
    N, width = module.check(store.codes, codes, None).shape
    K = width * 8 // scheme.bits
    module.positive(N, K)
    if K % scheme.group_size:
        raise module.fail(f"K={K} is not a multiple of {scheme.group_size}, the group of {store.kind}")
    module.check(store.scales, scales, (N, K // scheme.group_size))
    if store.above is not None:
        module.check(store.above, (torch.float32,), *_ONE)

    def read() -> QuantizedWeight:
        tensors = {
            "packed": module.read(store.codes).view(torch.uint8),
            "scales": module.read(store.scales).view(torch.uint8).view(SCALE_DTYPES[str(scheme.scale_dtype)]),
        }
        if store.above is not None:
            number = module.read(store.above).reshape(1)
            if not bool(torch.isfinite(number) & (number > 0)):
                raise ValueError(f"{store.above} is {number.item():g}; it must be finite and above 0")
            tensors["super_scales"] = 1 / number if store.divides else number
        return QuantizedWeight.from_tensors(tensors, scheme, (N, K))

    return (N, K), read
