"""FP8 weights as several formats keep them: codes [N, K], and scales for the tensor, for rows or for blocks. Multiply."""

from __future__ import annotations

from typing import Final

import torch

from lowbit.formats._module import SCALE_DTYPES, Module
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["FP8", "check_float8", "read_float8"]

_BLOCK: Final = 128

#: Dtypes of codes, and their formats.
FP8: Final = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
_SCALES: Final = (*SCALE_DTYPES, torch.float8_e8m0fnu)


def check_float8(module: Module, weight: str, scale: str, block: bool) -> tuple[tuple[int, int], str]:
    """(N, K) of a layer and how it is stored, for people; refuse tensors that do not fit each other.

    Args:
        weight, scale: what the format calls them.
        block: scales of 128 x 128 blocks, the last ones possibly cut off.
    """
    info = module.info(weight)
    N, K = module.check(weight, tuple(FP8), None).shape
    module.positive(N, K)
    name = FP8[info.dtype].replace("_", " ")
    if block:
        module.check(scale, _SCALES, (-(-N // _BLOCK), -(-K // _BLOCK)))
        return (N, K), f"{name}, blocks of 128 x 128"
    found = module.check(scale, _SCALES, (), (1,), (1, 1), (N,), (N, 1))
    return (N, K), f"{name}, " + ("one scale" if found.shape in ((), (1,), (1, 1)) and N > 1 else "one scale per row")


def read_float8(module: Module, weight: str, scale: str, block: bool, activation: str | None) -> QuantizedWeight:
    """The weight of a layer that `check_float8` accepted. One scale for the tensor is repeated for every row."""
    codes, scales = module.read(weight), module.read(scale)
    format = FP8[codes.dtype]
    if not block:
        scales = scales.reshape(-1, 1).expand(codes.shape[0], 1).contiguous()
    scheme = Scheme(
        format,
        scaling="block128" if block else "group",
        scale_dtype="e8m0" if scales.dtype == torch.float8_e8m0fnu else str(scales.dtype).removeprefix("torch."),
        activation=activation,
    )
    tensors = {"packed": codes.view(torch.uint8), "scales": scales}
    return QuantizedWeight.from_tensors(tensors, scheme, (codes.shape[0], codes.shape[1]))
