"""What compute-sanitizer, or Metal's validation, watches: every row of the kernel table once or twice, on small ragged problems.

    python -m device.sanitize_cases gemm|gemm_a8|gemm_grad_input|weights|activations [mps]

Everything is prepared on the CPU, so that hardly a kernel but lowbit's runs. Results are not looked at: other tests do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from lowbit import _C, Scheme
from lowbit.commands._target import find_target

__all__ = ["GROUPS", "run"]

#: Two planes of bits, zeros, offsets, codes, blocks: what the kernels branch on at compile time.
SCHEMES: Final = ("int4-g32", "int3-g64-asym", "int8", "int5-g16-offset", "fp8-b128", "nf4-g64", "fp4-g32-fp16")
#: (M, N, K): inside a tile, and over its edges.
SHAPES: Final = ((3, 65, 136), (70, 130, 392))
#: On the CPU, where everything is prepared.
cpu_ops = torch.ops.lowbit


def _rows(op: str, device: str) -> list[str]:
    backend = "metal" if device == "mps" else device
    return [row["name"] for row in _C.kernel_table() if row["backend"] == backend and row["op"] == op]


def _packed(scheme: Scheme, N: int, K: int, device: str) -> tuple[Tensor, int]:
    target = find_target(device)
    packed, scales, zeros = cpu_ops.quantize(torch.randn(N, K), scheme.desc(), False, None)
    desc = scheme.desc(layout=_C.preferred_layout(device, scheme.desc()))
    third = zeros.to(target.device) if zeros.numel() else None
    return target.ops.pack(packed.to(target.device), scales.to(target.device), third, None, N, K, desc), desc


def _forced(op: str, device: str, run: Callable[[Scheme, int, int, int], object]) -> int:
    """Every kernel of the op on every scheme and shape that it takes."""
    ran = 0
    for name in dict.fromkeys(_rows(op, device)):
        if device != "cpu":
            _C.force_kernel(name)
        for text in SCHEMES:
            for M, N, K in SHAPES:
                try:
                    run(Scheme.parse(text), M, N, K)
                except RuntimeError as error:
                    if "forced" not in str(error):
                        raise
                else:
                    ran += 1
    if device != "cpu":
        _C.force_kernel("")
    return ran


def _gemm(device: str) -> int:
    place, ops = find_target(device).device, find_target(device).ops

    def run(scheme: Scheme, M: int, N: int, K: int) -> None:
        w, desc = _packed(scheme, N, K, device)
        for dtype in (torch.bfloat16, torch.float16):
            ops.gemm(torch.randn(M, K).to(dtype).to(place), w, torch.randn(N).to(dtype).to(place), N, K, desc, 0)

    return _forced("gemm", device, run)


def _gemm_a8(device: str) -> int:
    place, ops = find_target(device).device, find_target(device).ops

    def run(scheme: Scheme, M: int, N: int, K: int) -> None:
        w, desc = _packed(scheme, N, K, device)
        for name, symmetric in (("int8", True), ("int8", False), ("fp8_e4m3", True)):
            format_id = _C.enums()["format"][name]
            xq, s, z = cpu_ops.quantize_activation(torch.randn(M, K), format_id, -1, None, None, None, symmetric)
            zeros = None if symmetric else z.to(place)
            ops.gemm_a8(xq.to(place), s.to(place), zeros, w, None, N, K, desc, 0, torch.bfloat16)

    return _forced("gemm_a8", device, run)


def _gradient(device: str) -> int:
    place, ops = find_target(device).device, find_target(device).ops

    def run(scheme: Scheme, M: int, N: int, K: int) -> None:
        w, desc = _packed(scheme, N, K, device)
        ops.gemm_grad_input(torch.randn(M, N).to(torch.bfloat16).to(place), w, N, K, desc, 0)

    return _forced("gemm_grad_input", device, run)


def _weights(device: str) -> int:
    """quantize, pack, unpack, dequantize."""
    place, ops = find_target(device).device, find_target(device).ops
    for text in SCHEMES:
        scheme = Scheme.parse(text)
        for _, N, K in SHAPES:
            weight = torch.randn(N, K).to(place)
            ops.quantize(weight, scheme.desc(), True, None)
            packed, scales, zeros = ops.quantize(weight, scheme.desc(), False, None)
            third = zeros if zeros.numel() else None
            ops.dequantize(packed, scales, third, None, N, K, scheme.desc(), torch.bfloat16)
            desc = scheme.desc(layout=_C.preferred_layout(device, scheme.desc()))
            ops.unpack(ops.pack(packed, scales, third, None, N, K, desc), N, K, desc)
    return len(SCHEMES) * len(SHAPES)


def _activations(device: str) -> int:
    place, ops = find_target(device).device, find_target(device).ops
    for M, _, K in SHAPES:
        x = torch.randn(M, K).to(torch.bfloat16).to(place)
        for name, group, symmetric in (
            ("int8", -1, True),
            ("int8", -1, False),
            ("fp8_e4m3", -1, True),
            ("fp8_e4m3", 128, True),
        ):
            ops.quantize_activation(x, _C.enums()["format"][name], group, None, None, None, symmetric)
    return 4 * len(SHAPES)


GROUPS: Final = {
    "gemm": _gemm,
    "gemm_a8": _gemm_a8,
    "gemm_grad_input": _gradient,
    "weights": _weights,
    "activations": _activations,
}


def run(group: str, device: str = "cuda") -> int:
    """How many problems ran; at least one has to."""
    torch.manual_seed(0)
    ran = GROUPS[group](device)
    find_target(device).finish()
    if ran == 0:
        raise RuntimeError(f"no kernel of {group} took any problem")
    return ran


if __name__ == "__main__":
    print(run(*sys.argv[1:]), "problems")
