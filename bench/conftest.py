"""Fixtures of the benches. Shapes and schemes come from the list that `lowbit bench` uses."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch

import lowbit
from lowbit.commands._cases import STANDARD_SCHEMES, STANDARD_SHAPES, Shape
from lowbit.commands._contenders import make_scheme
from lowbit.commands._measure import Call
from lowbit.commands._peers import make_peer
from lowbit.scheme import Scheme

SHAPES = [pytest.param(shape, id=str(shape)) for shape in STANDARD_SHAPES[:2]]
SCHEMES = STANDARD_SCHEMES


@pytest.fixture(autouse=True, scope="session")
def _seed() -> None:
    torch.manual_seed(0)
    print(
        f"\n{lowbit._C.isa()}, {torch.get_num_threads()} threads, lowbit {lowbit.__version__}, torch {torch.__version__}"
    )


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


@functools.lru_cache(maxsize=1)
def dense(shape: Shape) -> torch.Tensor:
    """W[N, K], bf16."""
    return torch.randn(shape.N, shape.K).to(torch.bfloat16)


@functools.lru_cache(maxsize=1)
def contender(name: str, shape: Shape):
    """A scheme or a baseline on the weight of that shape, with as many copies as it takes to be cold."""
    make = make_peer if name.startswith("torch-") else lambda n, *rest: make_scheme(Scheme.parse(n), *rest)
    return make(name, dense(shape), torch.bfloat16, False)


def cold(call: Call) -> Callable[[], object]:
    """A function without arguments that uses the next copy of the weight each time."""
    count = itertools.count()
    return lambda: call(next(count))
