"""Quantized layers shared by the tests of QuantizedLinear."""

from __future__ import annotations

import torch

from lowbit import QuantizedLinear, QuantizedWeight

SCHEMES = [
    "int4-g32",
    "int3-g16-offset",
    "int4-g32-asym",
    "int5-g8-fzero",
    "int8",
    "fp8",
    "fp8-b128",
    "nf4-g64",
    "fp4-g32",
]


def layer(text: str = "int4-g32", bias: bool = True, perm: bool = False, N: int = 48, K: int = 128) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.quantize(torch.randn(N, K, generator=generator), text)
    if perm:
        order = torch.randperm(K, generator=generator).to(torch.int32)
        weight = QuantizedWeight.from_tensors({**weight.tensors(), "perm": order}, text, weight.shape)
    return QuantizedLinear.from_weight(weight, torch.randn(N, generator=generator) if bias else None)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
