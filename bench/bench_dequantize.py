"""dequantize, pack and unpack of a whole weight."""

from __future__ import annotations

import pytest
import torch

from conftest import SCHEMES, SHAPES, dense
from lowbit import QuantizedWeight
from lowbit._canonical import preferred_layout
from lowbit.commands._cases import Shape


@pytest.mark.parametrize("shape", SHAPES[:1])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def bench_dequantize(benchmark, scheme: str, shape: Shape, dtype: torch.dtype) -> None:
    weight = QuantizedWeight.quantize(dense(shape), f"{scheme}-rtn")
    benchmark.group = f"dequantize {shape} to {dtype}"
    benchmark(weight.dequantize, dtype)


@pytest.mark.parametrize("shape", SHAPES[:1])
@pytest.mark.parametrize("scheme", SCHEMES)
def bench_pack(benchmark, scheme: str, shape: Shape) -> None:
    weight = QuantizedWeight.quantize(dense(shape), f"{scheme}-rtn")
    benchmark.group = f"pack {shape}"
    benchmark(weight.pack)


@pytest.mark.parametrize("shape", SHAPES[:1])
@pytest.mark.parametrize("scheme", SCHEMES)
def bench_unpack(benchmark, scheme: str, shape: Shape) -> None:
    weight = QuantizedWeight.quantize(dense(shape), f"{scheme}-rtn")
    layout = preferred_layout(weight.device, weight.scheme)
    packed = weight.pack(layout)
    benchmark.group = f"unpack {shape}"
    benchmark(QuantizedWeight.unpack, packed, weight.scheme, weight.shape, layout)
