"""What one call costs beside its arithmetic: a 64 x 64 weight, one row, one thread, through each way of calling."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowbit.linear import QuantizedLinear
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["WAYS", "measure_calls", "ways_to_call"]

_SIZE = 64

#: What is called, by the key in results.
WAYS = {
    "F.linear": "`F.linear(x, weight, bias)`",
    "op": "`torch.ops.lowbit.gemm.default(x, w, bias, N, K, desc, 0)`",
    "op out": "`torch.ops.lowbit.gemm_out.default`, with a workspace",
    "forward": "`QuantizedLinear.forward(x)`",
    "module": "`QuantizedLinear.__call__(x)`",
    "nn.Linear": "`nn.Linear.__call__(x)`",
}


def ways_to_call(dtype: torch.dtype, scheme: str = "int4-g32", M: int = 1) -> dict[str, Callable[[], object]]:
    """A call of each of `WAYS` on the same layer with a bias, x [M, 64] in `dtype`.

    Example:
        >>> ways_to_call(torch.float32)["op"]().shape
        torch.Size([1, 64])
    """
    from lowbit import _C

    N = K = _SIZE
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    weight = QuantizedWeight.quantize(torch.randn(N, K), Scheme.parse(scheme))
    dense = weight.dequantize(dtype)
    layer = QuantizedLinear.from_weight(weight, bias)
    linear = nn.Linear(K, N, dtype=dtype)
    w, desc = layer.weight.detach(), layer._desc
    out, workspace = (
        torch.empty(M, N, dtype=dtype),
        torch.empty(_C.workspace_size("gemm", M, N, K, desc), dtype=torch.uint8),
    )
    gemm, gemm_out = torch.ops.lowbit.gemm.default, torch.ops.lowbit.gemm_out.default
    return {
        "F.linear": lambda: F.linear(x, dense, bias),
        "op": lambda: gemm(x, w, bias, N, K, desc, 0),
        "op out": lambda: gemm_out(x, w, bias, N, K, desc, 0, out, workspace),
        "forward": lambda: layer.forward(x),
        "module": lambda: layer(x),
        "nn.Linear": lambda: linear(x),
    }


def measure_calls(rounds: int = 40, repeats: int = 200) -> list[dict[str, Any]]:
    """Time every way of calling in turns, on one thread and by its CPU time, under torch.no_grad().

    Returns:
        a row per dtype and way: "dtype", "way", "what", "median_us", "best_us", and "ratio" of the median to F.linear's.

    Example:
        >>> [row["ratio"] for row in measure_calls() if row["way"] == "op"]
        [1.08, 0.9]
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        with torch.no_grad():
            for dtype in (torch.float32, torch.bfloat16):
                rows += _measure(dtype, rounds, repeats)
    finally:
        torch.set_num_threads(before)
    return rows


def _measure(dtype: torch.dtype, rounds: int, repeats: int) -> list[dict[str, Any]]:
    calls = ways_to_call(dtype)
    found: dict[str, list[float]] = {way: [] for way in calls}
    for call in calls.values():
        for _ in range(repeats):
            call()
    for _ in range(rounds):
        for way, call in calls.items():
            begin = time.thread_time()
            for _ in range(repeats):
                call()
            found[way].append((time.thread_time() - begin) / repeats * 1e6)
    medians = {way: statistics.median(values) for way, values in found.items()}
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "way": way,
            "what": WAYS[way],
            "median_us": medians[way],
            "best_us": min(found[way]),
            "ratio": medians[way] / medians["F.linear"],
        }
        for way in calls
    ]
