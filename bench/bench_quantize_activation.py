"""quantize_activation: what an a8 scheme adds to each call."""

from __future__ import annotations

import pytest
import torch

from lowbit import ops
from lowbit.scheme import format_info


@pytest.mark.parametrize("M", [1, 16, 256])
@pytest.mark.parametrize(
    ("name", "group_size", "symmetric"),
    [("int8", -1, True), ("int8", -1, False), ("fp8", -1, True), ("fp8", 128, True)],
    ids=["int8", "int8-asym", "fp8", "fp8-g128"],
)
def bench_quantize_activation(benchmark, name: str, group_size: int, symmetric: bool, M: int) -> None:
    x = torch.randn(M, 4096).to(torch.bfloat16)
    benchmark.group = f"quantize_activation {M}x4096"
    benchmark(ops.quantize_activation, x, format_info(name).id, group_size, symmetric=symmetric)
