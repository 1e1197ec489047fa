"""What a call costs beside its arithmetic: a 64 x 64 weight and one row, through each way of calling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit import QuantizedLinear, QuantizedWeight, ops
from lowbit._canonical import preferred_layout
from lowbit.scheme import Scheme

N = K = 64


@pytest.fixture(scope="module")
def parts():
    scheme = Scheme.parse("int4-g32")
    weight = QuantizedWeight.quantize(torch.randn(N, K), scheme)
    w, desc = weight.pack(), scheme.desc(preferred_layout(weight.device, scheme))
    return torch.randn(1, K), w, desc, weight


@pytest.fixture(autouse=True)
def _one_thread(benchmark):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    benchmark.group = "one call, 64x64, M=1"
    yield
    torch.set_num_threads(before)


def bench_op(benchmark, parts) -> None:
    x, w, desc, _ = parts
    benchmark(torch.ops.lowbit.gemm.default, x, w, None, N, K, desc, 0)


def bench_op_out(benchmark, parts) -> None:
    x, w, desc, _ = parts
    benchmark(torch.ops.lowbit.gemm_out.default, x, w, None, N, K, desc, 0, torch.empty(1, N), None)


def bench_wrapper(benchmark, parts) -> None:
    x, w, desc, _ = parts
    benchmark(ops.gemm, x, w, None, N, K, desc)


def bench_differentiable_op(benchmark, parts) -> None:
    x, w, desc, _ = parts
    benchmark(torch.ops.lowbit.linear.default, x, w, None, N, K, desc, 0)


def bench_module(benchmark, parts) -> None:
    x, _, _, weight = parts
    benchmark(QuantizedLinear.from_weight(weight), x)


def bench_torch_function(benchmark, parts) -> None:
    x, _, _, weight = parts
    benchmark(nn.functional.linear, x, weight.dequantize())


def bench_torch_module(benchmark, parts) -> None:
    benchmark(nn.Linear(K, N, bias=False), parts[0])
