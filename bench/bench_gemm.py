"""gemm: y = x @ W.T with W packed, cold in cache; torch's bf16 beside it. Input quantization included for a8 schemes."""

from __future__ import annotations

import pytest
import torch

from conftest import SCHEMES, SHAPES, cold, contender
from lowbit.commands._cases import STANDARD_A8_SCHEMES, STANDARD_MS, Shape


@pytest.mark.parametrize("M", STANDARD_MS)  # the innermost loop, so that a weight is made once
@pytest.mark.parametrize("name", [*SCHEMES, *STANDARD_A8_SCHEMES, "torch-bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_gemm(benchmark, name: str, M: int, shape: Shape) -> None:
    made = contender(name, shape)
    benchmark.group = f"gemm {shape} M={M}"
    benchmark.extra_info |= {"kernel": made.kernel(M), "bytes": made.nbytes, "operations": 2 * M * shape.N * shape.K}
    benchmark(cold(made.bind(torch.randn(M, shape.K).to(torch.bfloat16))))
