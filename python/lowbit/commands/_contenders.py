"""Who takes part in a comparison: lowbit's schemes, and what else torch can do with the same weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit import _selection, ops
from lowbit._canonical import preferred_layout
from lowbit.commands._measure import Call, copies_for
from lowbit.scheme import Scheme, format_info
from lowbit.weight import QuantizedWeight

__all__ = ["Contender", "make_baseline", "make_dequantize", "make_scheme"]

_CPU = torch.device("cpu")
_BASELINE_DTYPES = {"torch-bf16": torch.bfloat16, "torch-fp32": torch.float32, "torch-fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A weight W[N, K] in one form, and how to multiply with it.

    Args:
        name: in tables.
        nbytes: of one copy of the weight.
        bind: given x [M, K], a function of the number of the call; copies are used in rotation.
        kernel: the kernel's name for M rows of x.
        int8: whether inputs are quantized, so that 8-bit matmul sets its roof.
    """

    name: str
    nbytes: int
    bind: Callable[[Tensor], Call]
    kernel: Callable[[int], str]
    int8: bool = False
    baseline: bool = False


def _copies(tensors: tuple[Tensor, ...], warm: bool) -> list[tuple[Tensor, ...]]:
    count = copies_for(sum(t.nbytes for t in tensors), warm)
    return [tensors] + [tuple(t.clone() for t in tensors) for _ in range(count - 1)]


def _rotate(copies: list[tuple[Tensor, ...]], call: Callable[..., object]) -> Call:
    count = len(copies)
    return lambda i: call(*copies[i % count])


def make_scheme(scheme: Scheme, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    """lowbit: the op that `QuantizedLinear` calls; for schemes with activations, quantizing the input is included."""
    N, K = weight.shape
    quantized = QuantizedWeight.quantize(weight, dataclasses.replace(scheme, search=False))
    desc = scheme.desc(preferred_layout(_CPU, scheme))
    copies = _copies((quantized.pack(),), warm)
    gemm, quantize, gemm_a8 = (getattr(torch.ops.lowbit, n).default for n in ("gemm", "quantize_activation", "gemm_a8"))
    if scheme.activation is None:
        op, asked = "gemm", str(dtype)

        def bind(x: Tensor) -> Call:
            return _rotate(copies, lambda w: gemm(x, w, None, N, K, desc, 0))
    else:
        info = format_info(str(scheme.activation_format))
        group, symmetric = scheme.activation_group_size, scheme.activation_symmetric
        op, asked = "gemm_a8", "int8" if info.kind == "int" else "float8_e4m3fn"
        fixed = (torch.ones(1), None if symmetric else torch.zeros(1, dtype=torch.int32))
        scale, zero = fixed if scheme.activation_static else (None, None)

        def bind(x: Tensor) -> Call:
            def call(w: Tensor) -> Tensor:
                xq, scales, zeros = quantize(x, info.id, group, scale, zero, None, symmetric)
                return gemm_a8(xq, scales, None if symmetric else zeros, w, None, N, K, desc, 0, x.dtype)

            return _rotate(copies, call)

    def kernel(M: int) -> str:
        return str(_selection.explain(op, M=M, N=N, K=K, scheme=scheme, dtype=asked).chosen)

    return Contender(str(scheme), copies[0][0].nbytes, bind, kernel, int8=scheme.activation is not None)


def make_dequantize(scheme: Scheme, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    """What one does without a kernel: dequantize the whole weight, then F.linear."""
    N, K = weight.shape
    q = QuantizedWeight.quantize(weight, dataclasses.replace(scheme, search=False))
    desc, third = scheme.desc(), q.zeros is not None
    copies = _copies(tuple(t for t in (q.packed, q.scales, q.zeros) if t is not None), warm)

    def bind(x: Tensor) -> Call:
        def call(packed: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
            return F.linear(x, ops.dequantize(packed, scales, zeros if third else None, None, N, K, desc, dtype))

        return _rotate(copies, call)

    name = f"dequant {scheme}"
    return Contender(name, q.nbytes, bind, lambda M: "dequantize, F.linear", baseline=True)


def make_baseline(name: str, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    """One of torch's own.

    Raises:
        RuntimeError: torch cannot do it here; the message says why.
    """
    K = weight.shape[1]
    if name in _BASELINE_DTYPES:
        cast = _BASELINE_DTYPES[name]
        copies = _copies((weight.to(cast),), warm)

        def bind(x: Tensor) -> Call:
            inputs = x.to(cast)
            return _rotate(copies, lambda w: F.linear(inputs, w))

        return Contender(name, copies[0][0].nbytes, bind, lambda M: "F.linear", baseline=True)
    made = _int8pack(weight, dtype) if name == "torch-int8pack" else _int4pack(name, weight, dtype)
    tensors, multiply, kernel = made
    multiply(torch.ones(1, K, dtype=dtype), *tensors)  # refused here rather than in the middle of a run
    copies = _copies(tensors, warm)
    nbytes = sum(t.nbytes for t in tensors)
    return Contender(
        name, nbytes, lambda x: _rotate(copies, lambda *w: multiply(x, *w)), lambda M: kernel, baseline=True
    )


def _int8pack(weight: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Callable[..., Any], str]:
    scales = weight.float().abs().amax(1) / 127
    codes = (weight.float() / scales[:, None]).round().to(torch.int8)
    return (codes, scales.to(dtype)), torch._weight_int8pack_mm, "_weight_int8pack_mm"


def _int4pack(name: str, weight: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Callable[..., Any], str]:
    N, K = weight.shape
    group = 32 if name.endswith("-g32") else 128
    if K % group:
        raise RuntimeError(f"K={K} is not a multiple of {group}")
    grouped = weight.float().view(N, K // group, group)
    scales = grouped.abs().amax(2).clamp_min(1e-6) / 7.5
    codes = ((grouped / scales[..., None]).round() + 8).clamp(0, 15).to(torch.int32).view(N, K)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    pairs = torch.stack([scales, torch.zeros_like(scales)], 2).transpose(0, 1).contiguous().to(dtype)  # [G, N, 2]
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return (packed, pairs), lambda x, w, s: multiply(x, w, group, s), "_weight_int4pack_mm_for_cpu"
