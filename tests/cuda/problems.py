"""What the tests of CUDA kernels share: one problem run on a backend, and what must come out.

A backend is the emulator (kernels compiled for the CPU, tensors on the CPU) or a real device; see conftest.py. Problems
are small, because the emulator runs every thread of every block as a fiber.
"""

from __future__ import annotations

from typing import Any

import torch

import cases
import kernel_cases
from lowbit import _C
from reference import Spec, Weight

#: The kernels that multiply 16-bit activations, by the name of their row.
A16 = [row["name"] for row in _C.kernel_table() if row["backend"] == "cuda" and row["op"] == "gemm"]
A8 = [row["name"] for row in _C.kernel_table() if row["backend"] == "cuda" and row["op"] == "gemm_a8"]
GRAD = [row["name"] for row in _C.kernel_table() if row["backend"] == "cuda" and row["op"] == "gemm_grad_input"]

#: Of those, the kernels for few rows: codes are multiplied as 16-bit numbers, and the scale comes after.
FEW = [name for name in A16 if "stream_m" in name]

HALVES = (torch.bfloat16, torch.float16)


def runs_on(kernel: str, model: str) -> bool:
    """Whether a device is one that the kernel is for. The emulator is one by default."""
    return not kernel.startswith("hopper") or model.startswith("sm_90")


def cuda_desc(spec: Spec) -> int:
    return cases.desc(spec, _C.preferred_layout("cuda", cases.desc(spec)))


def pack(backend: Any, weight: Weight) -> torch.Tensor:
    """The weight in the backend's layout, on its device; by the CPU, where it alone knows the scales."""
    spec, tensors = weight.spec, (*weight.tensors, *weight.supers)
    there = spec.super_groups in (0, -1) and spec.scale_dtype != "dynamic8" and spec.scaling != "flat"
    device, ops = (backend.device, backend.ops) if there else ("cpu", torch.ops.lowbit)
    moved = [None if t is None else t.to(device) for t in tensors]
    return ops.pack(*moved[:4], weight.N, weight.K, cuda_desc(spec), *moved[4:]).to(backend.device)


class Problem(kernel_cases.Problem):
    @property
    def desc(self) -> int:
        return cuda_desc(self.spec)

    def packed(self, backend: Any, weight: Weight) -> torch.Tensor:
        return pack(backend, weight)


def group_sizes(scaling: str) -> tuple[int, ...]:
    """Every way in which groups meet cells of 16 k and tiles of 128 k."""
    return (128,) if scaling == "block128" else (128, 32, -1, 64, 16, 48, 256, 96)
