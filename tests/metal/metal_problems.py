"""What the tests of Metal shaders share: one problem run on a backend, and what must come out.

A backend is the emulator (shaders compiled for the CPU, tensors on the CPU) or a Mac; see conftest.py. Problems are small,
because the emulator runs every thread of every threadgroup as a fiber.
"""

from __future__ import annotations

import os
from typing import Any

import torch

import cases
import kernel_cases
from lowbit import _C
from reference import Spec, Weight

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


def metal_desc(spec: Spec) -> int:
    return cases.desc(spec, LAYOUT)


def pack(backend: Any, weight: Weight) -> torch.Tensor:
    """The weight in the kernel layout, packed by the CPU, on the backend's device."""
    w = torch.ops.lowbit.pack(*weight.tensors, weight.N, weight.K, metal_desc(weight.spec), *weight.supers)
    return w.to(backend.device)


class Problem(kernel_cases.Problem):
    @property
    def desc(self) -> int:
        return metal_desc(self.spec)

    def packed(self, backend: Any, weight: Weight) -> torch.Tensor:
        return pack(backend, weight)


def group_sizes(scaling: str) -> tuple[int, ...]:
    """Powers of two and others, within a chunk's lane and across SIMD-groups."""
    return (128,) if scaling == "block128" else (128, 32, -1, 64, 8, 48, 256, 40)
