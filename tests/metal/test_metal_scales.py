"""Scales of one byte and of two levels, and blocks that run across rows, on Metal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import cases
import reference
from cases import SCALED
from kernel_cases import ORDERS, expected, forced, moved, on, same_bits, same_but_nan
from lowbit import _C
from metal_problems import A8, GEMM, GRAD, metal_desc, pack
from metal_problems import Problem as GemmProblem
from reference import UNIT, Spec

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def _takes(kernel: str, spec: Spec, K: int) -> bool:
    """A chunk of 8 k takes one scale per row."""
    return kernel == "general" or spec.scaling != "flat" or math.gcd(K, spec.group_size) % 8 == 0


@pytest.mark.parametrize("name", SCALED)
def test_gemm(metal: Any, name: str) -> None:
    spec, shapes = SCALED[name]
    for i, (N, K) in enumerate(shapes):
        for j, kernel in enumerate(("stream_m2", "matrix_m32", "general")):
            if not _takes(kernel, spec, K):
                continue
            p = GemmProblem(spec, 3, N, K, TYPES[(i + j) % 3])
            assert kernel in GEMM
            with forced(kernel):
                y = metal.ops.gemm(on(metal, p.x()), pack(metal, p.weight), None, N, K, p.desc, 0).cpu()
            reference.assert_close(y, expected(p), (kernel, p))


@pytest.mark.parametrize("name", SCALED)
def test_grad(metal: Any, name: str) -> None:
    spec, shapes = SCALED[name]
    for i, (N, K) in enumerate(shapes):
        kernel, dtype = GRAD[i % 2] if _takes(GRAD[i % 2], spec, K) else "general", TYPES[i % 3]
        w, dy = cases.random_weight(spec, N, K), cases.random_x(5, N, dtype=dtype)
        with forced(kernel):
            dx = metal.ops.gemm_grad_input(on(metal, dy), pack(metal, w), N, K, metal_desc(spec), 0).cpu()
        unit = 0.0 if dtype == torch.float32 else UNIT[dtype]
        ref, bound = reference.product(dy, w.dense().T, None, unit, dtype)
        if dtype == torch.float16:
            bound = bound + 2.0**-25 * dy.double().abs().sum(-1, keepdim=True)
        reference.assert_close(dx, (ref, bound), (kernel, spec, N, K))


def test_8_bit_activations(metal: Any) -> None:
    for name, kernel in (("mxfp8", "matrix_exact_m64"), ("q3_k", "stream_m4"), ("q5_k", "general")):
        assert kernel in A8
        spec, shapes = SCALED[name]
        N, K = shapes[0]
        w = cases.random_weight(spec, N, K)
        xq, x_scales, _ = reference.quantize_activation(cases.random_x(4, K), "int8")
        x = [on(metal, t) for t in (xq, x_scales)]
        with forced(kernel):
            y = metal.ops.gemm_a8(*x, None, pack(metal, w), None, N, K, metal_desc(spec), 0, torch.float32).cpu()
        dequantized = reference.dequantize_activation(xq, x_scales, None)
        bound = reference.product(dequantized, w.dense(), None, UNIT[torch.bfloat16], torch.float32)
        reference.assert_close(y, bound, (name, kernel))


def test_what_fast_kernels_refuse() -> None:
    spec = SCALED["nested"][0]
    row = _C.explain("gemm", "apple9", 1, 11, 51, metal_desc(spec), "bfloat16", 0)[0]
    assert "blocks of 64 across rows of K=51 have no more than 1 k in common" in row[1]
    assert _C.explain("gemm", "apple9", 1, 40, 192, metal_desc(spec), "bfloat16", 0)[0][1] == ""


@pytest.mark.parametrize("name", SCALED)
def test_pack_unpack_and_dequantize(metal: Any, name: str) -> None:
    """The CPU's bits."""
    spec, shapes = SCALED[name]
    for i, (N, K) in enumerate(shapes):
        metal.set_order(ORDERS[i % 3], seed=i)
        weight, d = cases.random_weight(spec, N, K), metal_desc(spec)
        w = metal.ops.pack(*moved(metal, weight), N, K, d, *(on(metal, t) for t in weight.supers))
        assert same_bits(w, torch.ops.lowbit.pack(*weight.tensors, N, K, d, *weight.supers)), (N, K)
        for j, (now, was) in enumerate(
            zip(metal.ops.unpack(w, N, K, d), (*weight.tensors, *weight.supers), strict=True)
        ):
            assert (now.numel() == 0) if was is None else same_bits(now, was), (N, K, j)
        rest = N, K, cases.desc(spec), TYPES[i % 3]
        W = metal.ops.dequantize(*moved(metal, weight), *rest, *(on(metal, t) for t in weight.supers))
        assert same_but_nan(W, torch.ops.lowbit.dequantize(*weight.tensors, *rest, *weight.supers)), (N, K)
