"""What a call costs beside its arithmetic: a 64 x 64 weight and one row, through each way of calling."""

from __future__ import annotations

import pytest
import torch

from lowbit.commands._calls import WAYS, ways_to_call


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_call(benchmark, dtype: torch.dtype, way: str) -> None:
    benchmark.group = f"one call, 64x64, M=1, {dtype}"
    benchmark(ways_to_call(dtype)[way])
