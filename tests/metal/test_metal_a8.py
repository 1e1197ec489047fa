"""gemm_a8 on Metal: every kernel and format, exact where the sums are integers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import cases
import reference
from kernel_cases import ACTIVATIONS, Quantized, forced, on, quantized
from kernel_cases import expected_a8 as expected
from lowbit import _C
from metal_problems import A8, group_sizes, metal_desc, pack
from reference import Spec, Weight, exact16

SHAPES = ((70, 264), (33, 136), (65, 100), (1, 16), (64, 128), (130, 24))


def gemm_a8(
    metal: Any, a: Quantized, weight: Weight, bias: torch.Tensor | None, out: torch.dtype, flags: int = 0
) -> torch.Tensor:
    moved = [on(metal, t) for t in a]
    w = pack(metal, weight)
    y = metal.ops.gemm_a8(*moved, w, on(metal, bias), weight.N, weight.K, metal_desc(weight.spec), flags, out)
    assert y.dtype == out
    return y.cpu()


def takes(kernel: str, kind: str, group: int) -> bool:
    """What each kernel is for; selection has the same rules, in C++."""
    format, zero_kind, _ = cases.KINDS[kind]
    if not kernel.startswith("matrix_exact"):
        return True
    return zero_kind in ("none", "int") and exact16(format) and (group == -1 or group % 32 == 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("kernel", ["stream_m1", "stream_m8", "matrix_exact_m64", "general"])
def test_every_format(metal: Any, kernel: str, kind: str, activation: str) -> None:
    format, zero_kind, scaling = cases.KINDS[kind]
    turn = int(cases.rng(kernel, kind, activation).integers(0, 1000))
    with forced(kernel):
        for i in range(2):
            N, K = SHAPES[(turn + i) % len(SHAPES)]
            fitting = [g for g in group_sizes(scaling) if cases.fits(g, K) and takes(kernel, kind, g)] or [-1]
            group = 128 if scaling == "block128" else fitting[(turn // 7 + i) % len(fitting)]
            if not takes(kernel, kind, group):
                continue
            spec = Spec(format, zero_kind, group, cases.SCALE_DTYPES[(turn + i) % 3], scaling)
            M = 1 if kernel == "stream_m1" else (2, 5, 8)[(turn + i) % 3]
            a, x_group = quantized(activation, M, K)
            out = cases.DTYPES[(turn + i) % 3]
            bias = (None, cases.random_x(N))[i]
            weight = cases.random_weight(spec, N, K)
            y = gemm_a8(metal, a, weight, bias, out)
            reference.assert_close(y, expected(weight, a, x_group, bias, out), (kernel, spec, M, N, K, activation))


@pytest.mark.parametrize("zero_kind", ["none", "int"])
@pytest.mark.parametrize("kernel", ["stream_m4", "matrix_exact_m64", "general"])
def test_int8_times_integers_is_exact(metal: Any, kernel: str, zero_kind: str) -> None:
    """Scales that are powers of two and one group: y is the integer sum, rounded once. The largest codes are among them, and
    more k than fp32 sums exactly in one piece."""
    for format in ("int2", "int4", "int8"):
        for M, N, K in ((3, 9, 264), (4, 5, 1100)):
            weight = cases.random_weight(Spec(format, zero_kind, -1), N, K)
            weight = dataclasses.replace(weight, scales=torch.full_like(weight.scales, 0.5))
            xq = torch.randint(-128, 128, (M, K), generator=cases.generator(M, K)).to(torch.int8)
            xq[0] = -128
            scales = 2.0 ** torch.randint(-3, 3, (M, 1), generator=cases.generator(M))
            for zeros in (None, torch.randint(-128, 128, (M, 1), generator=cases.generator(K), dtype=torch.int32)):
                with forced(kernel):
                    y = gemm_a8(metal, (xq, scales, zeros), weight, None, torch.float32)
                exact = reference.dequantize_activation(xq, scales, zeros) @ weight.dense().double().t()
                assert torch.equal(y, exact.float()), (M, N, K, zeros is None)


@pytest.mark.parametrize("M", [1, 2, 4, 8, 9, 65])
def test_every_number_of_rows(metal: Any, M: int) -> None:
    """As selection would have it; nf4 with many rows is the general kernel's."""
    for kind, activation in (("int4-int", "int8-asym"), ("fp8_e4m3-block128", "fp8-g128"), ("nf4", "int8")):
        format, zero_kind, scaling = cases.KINDS[kind]
        weight = cases.random_weight(Spec(format, zero_kind, 128, "float32", scaling), 66, 264)
        a, x_group = quantized(activation, M, 264)
        y = gemm_a8(metal, a, weight, None, torch.bfloat16)
        reference.assert_close(y, expected(weight, a, x_group, None, torch.bfloat16), (kind, activation, M))


@pytest.mark.parametrize("kernel", ["stream_m8", "matrix_exact_m64", "general"])
def test_thread_order_does_not_matter(metal: Any, kernel: str) -> None:
    weight = cases.random_weight(Spec("int4", "int", 64, "float16"), 70, 1100)
    a, x_group = quantized("int8-asym", 3, 1100)
    results = []
    for order in ("forward", "reverse", "random"):
        metal.set_order(order, seed=3)
        with forced(kernel):
            results.append(gemm_a8(metal, a, weight, None, torch.float16))
    reference.assert_close(results[0], expected(weight, a, x_group, None, torch.float16), kernel)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_perm_strides_and_empty(metal: Any) -> None:
    for kind, activation in (("int4-int", "int8-asym"), ("fp8_e4m3", "fp8"), ("int4", "fp8-g128")):
        format, zero_kind, _ = cases.KINDS[kind]
        spec = Spec(format, zero_kind, 32, "bfloat16", has_perm=True)
        K = 200 if activation == "fp8-g128" else 100
        weight = cases.random_weight(spec, 66, K)
        (q, s, z), group = quantized(activation, 9, K)
        want = expected(weight, (q, s, z), group, None, torch.bfloat16)
        wide = torch.zeros(9, K + 103, dtype=torch.int8).view(q.dtype)
        wide[:, 1 : K + 1] = q
        for form in (q, wide[:, 1 : K + 1]):
            reference.assert_close(gemm_a8(metal, (form, s, z), weight, None, torch.bfloat16), want, (kind, activation))
        empty = gemm_a8(metal, (q[:0], s[:0], None if z is None else z[:0]), weight, None, torch.float32)
        assert empty.shape == (0, 66)


def test_out_is_the_same(metal: Any) -> None:
    weight = cases.random_weight(Spec("int4", "int", 32), 20, 64)
    (q, s, z), _ = quantized("int8-asym", 3, 64)
    y = gemm_a8(metal, (q, s, z), weight, None, torch.float16)
    out = torch.empty(3, 20, dtype=torch.float16, device=metal.device)
    moved = [on(metal, t) for t in (q, s, z)]
    metal.ops.gemm_a8_out(*moved, pack(metal, weight), None, 20, 64, metal_desc(weight.spec), 0, out, None)
    assert torch.equal(out.cpu(), y)


def test_refusals_are_explained() -> None:
    def why(spec: Spec, x: str = "int8", flags: int = 0) -> str:
        rows = dict(_C.explain("gemm_a8", "apple9", 64, 128, 256, metal_desc(spec), x, flags))
        return str(rows["metal_matrix_exact_m64_apple7"])

    assert why(Spec("int4", "int", 32)) == ""
    assert why(Spec("nf4", "none", 32)) == "nf4's levels are not exact in half"
    assert why(Spec("int4", "float", 32)) == "weights with zeros=float are not exact in half"
    assert why(Spec("int4", "none", 40)) == "group_size=40 is not a multiple of 32"
    assert why(Spec("int4", "none", 32), flags=cases.BATCH_INVARIANT).startswith("batch_invariant is set")
    assert {row for row in A8 if row != "general"} == {
        "stream_m1",
        "stream_m2",
        "stream_m4",
        "stream_m8",
        "matrix_exact_m64",
    }
