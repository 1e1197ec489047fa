"""What the tests of CUDA kernels share: one problem run on a backend, and what must come out.

A backend is the emulator (kernels compiled for the CPU, tensors on the CPU) or a real device; see conftest.py. Problems
are small, because the emulator runs every thread of every block as a fiber.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

import cases
import reference
from lowbit import _C
from reference import UNIT, Spec, Weight

#: The kernels that multiply 16-bit activations, by the name of their row.
A16 = [row["name"] for row in _C.kernel_table() if row["backend"] == "cuda" and row["op"] == "gemm"]
A8 = [row["name"] for row in _C.kernel_table() if row["backend"] == "cuda" and row["op"] == "gemm_a8"]
GRAD = [row["name"] for row in _C.kernel_table() if row["backend"] == "cuda" and row["op"] == "gemm_grad_input"]

#: Of those, the kernels for few rows: codes are multiplied as 16-bit numbers, and the scale comes after.
FEW = [name for name in A16 if "stream_m" in name]

HALVES = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Inside, only this kernel may run; an op that it refuses raises."""
    _C.force_kernel(kernel)
    try:
        yield
    finally:
        _C.force_kernel("")


def runs_on(kernel: str, model: str) -> bool:
    """Whether a device is one that the kernel is for. The emulator is one by default."""
    return not kernel.startswith("hopper") or model.startswith("sm_90")


def cuda_desc(spec: Spec) -> int:
    return cases.desc(spec, _C.preferred_layout("cuda", cases.desc(spec)))


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
        return cuda_desc(self.spec)

    def x(self) -> torch.Tensor:
        return cases.random_x(self.M, self.K, dtype=self.dtype)

    def bias_tensor(self) -> torch.Tensor | None:
        return None if self.bias is None else cases.random_x(self.N, dtype=self.bias)


def pack(backend: Any, weight: Weight) -> torch.Tensor:
    """The weight in the backend's layout, on its device; by the CPU, where it alone knows the scales."""
    spec, tensors = weight.spec, (*weight.tensors, *weight.supers)
    there = spec.super_groups in (0, -1) and spec.scale_dtype != "dynamic8" and spec.scaling != "flat"
    device, ops = (backend.device, backend.ops) if there else ("cpu", torch.ops.lowbit)
    moved = [None if t is None else t.to(device) for t in tensors]
    return ops.pack(*moved[:4], weight.N, weight.K, cuda_desc(spec), *moved[4:]).to(backend.device)


def on(backend: Any, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(backend.device)


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
    """Every way in which groups meet cells of 16 k and tiles of 128 k."""
    return (128,) if scaling == "block128" else (128, 32, -1, 64, 16, 48, 256, 96)
