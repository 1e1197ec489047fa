"""quantize: round to nearest, and with the search of the scale."""

from __future__ import annotations

import pytest

from conftest import SCHEMES, dense
from lowbit import QuantizedWeight
from lowbit.commands._cases import Shape

SHAPE = Shape(1024, 4096)  # a search of a larger one takes seconds, and time is proportional to the size


@pytest.mark.parametrize("rounding", ["rtn", "search"])
@pytest.mark.parametrize("scheme", SCHEMES)
def bench_quantize(benchmark, scheme: str, rounding: str) -> None:
    benchmark.group = f"quantize {SHAPE} {rounding}"
    benchmark(QuantizedWeight.quantize, dense(SHAPE), f"{scheme}-{rounding}")
