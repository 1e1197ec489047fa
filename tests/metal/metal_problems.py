"""What the tests of Metal shaders share: one problem run on a backend, and what must come out.

A backend is the emulator (shaders compiled for the CPU, tensors on the CPU) or a Mac; see conftest.py. Problems are small,
because the emulator runs every thread of every threadgroup as a fiber.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch

import cases
import reference
from lowbit import _C
from reference import UNIT, Spec, Weight

BACKEND = os.environ.get("LOWBIT_TEST_BACKEND", "emulator")
LAYOUT = cases.ENUMS["layout"]["metal_tile4"]


def rows_of(op: str) -> list[str]:
    return [row["name"] for row in _C.kernel_table() if row["backend"] == "metal" and row["op"] == op]


GEMM, A8, GRAD = rows_of("gemm"), rows_of("gemm_a8"), rows_of("gemm_grad_input")


class MetalDevice:
    """The Mac's GPU, as a backend: it is what it is, and runs threads in what order it likes."""

    name = "device"
    device = "mps"
    repeats = 100

    def __init__(self) -> None:
        assert torch.backends.mps.is_available(), "LOWBIT_TEST_BACKEND=device needs a Mac with an Apple GPU"
        self.ops: Any = torch.ops.lowbit

    def reset(self) -> None:
        pass

    def set_order(self, order: str, seed: int = 0) -> None:
        pass


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Inside, only this kernel may run; an op that it refuses raises."""
    _C.force_kernel(kernel)
    try:
        yield
    finally:
        _C.force_kernel("")


def metal_desc(spec: Spec) -> int:
    return cases.desc(spec, LAYOUT)


@dataclasses.dataclass(frozen=True)
class Problem:
    """y = x @ W.T (+ bias) for a random weight of a spec."""

    spec: Spec
    M: int
    N: int
    K: int
    dtype: torch.dtype = torch.bfloat16
    bias: torch.dtype | None = None
    flags: int = 0

    @property
    def weight(self) -> Weight:
        return cases.random_weight(self.spec, self.N, self.K)

    @property
    def desc(self) -> int:
        return metal_desc(self.spec)

    def x(self) -> torch.Tensor:
        return cases.random_x(self.M, self.K, dtype=self.dtype)

    def bias_tensor(self) -> torch.Tensor | None:
        return None if self.bias is None else cases.random_x(self.N, dtype=self.bias)


def on(backend: Any, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(backend.device)


def pack(backend: Any, weight: Weight) -> torch.Tensor:
    """The weight in the kernel layout, packed by the CPU, on the backend's device."""
    w = torch.ops.lowbit.pack(*weight.tensors, weight.N, weight.K, metal_desc(weight.spec), *weight.supers)
    return w.to(backend.device)


def gemm(backend: Any, p: Problem, x: torch.Tensor | None = None, weight: Weight | None = None) -> torch.Tensor:
    """The op's result, on the CPU."""
    x = p.x() if x is None else x
    w = pack(backend, p.weight if weight is None else weight)
    y = backend.ops.gemm(on(backend, x), w, on(backend, p.bias_tensor()), p.N, p.K, p.desc, p.flags)
    assert y.dtype == p.dtype and y.device.type == backend.device
    return y.cpu()


def expected(
    p: Problem, x: torch.Tensor | None = None, weight: Weight | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 product and its componentwise bound: weights may be rounded once, to the activations' dtype.

    fp16 has no exponents below -24: a weight rounded to it may move by half its smallest number, whatever its own size.
    """
    x = p.x() if x is None else x
    W = cases.dense(p.spec, p.N, p.K) if weight is None else weight.dense()
    unit = 0.0 if p.dtype == torch.float32 else UNIT[p.dtype]
    y, bound = reference.product(x, W, p.bias_tensor(), unit, p.dtype)
    if p.dtype == torch.float16:
        bound = bound + 2.0**-25 * x.double().abs().sum(-1, keepdim=True)
    return y, bound


def check_gemm(backend: Any, p: Problem) -> torch.Tensor:
    y = gemm(backend, p)
    reference.assert_close(y, expected(p), (backend.name, p))
    return y


def group_sizes(scaling: str) -> tuple[int, ...]:
    """Powers of two and others, within a chunk's lane and across SIMD-groups."""
    return (128,) if scaling == "block128" else (128, 32, -1, 64, 8, 48, 256, 40)
