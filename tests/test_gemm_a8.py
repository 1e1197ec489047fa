"""gemm_a8: 8-bit activations times every weight format."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import reference
from cases import (
    BATCH_INVARIANT,
    DTYPES,
    FP8,
    INT8,
    INT_FORMATS,
    KINDS,
    LARGE,
    MANY_ROWS,
    cpu_desc,
    dense,
    desc,
    generator,
    pack,
    packed,
    random_weight,
    random_x,
    rng,
    specs,
)
from lowbit import _C, ops
from reference import Spec, Weight

#: How x may be quantized: format, group size, symmetric.
ACTIVATIONS = {
    "int8": (INT8, -1, True),
    "int8-asym": (INT8, -1, False),
    "fp8": (FP8, -1, True),
    "fp8-g128": (FP8, 128, True),
}


def _expected(
    weight: Weight, activation: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], group: int,
    bias: torch.Tensor | None, out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The product in fp64 and its bound: as `reference.product`, with the activation's scale as one more factor."""
    xd = reference.dequantize_activation(*activation, group)
    y = xd @ weight.dense().double().t()
    size = xd.abs() @ weight.dense().double().abs().t()
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    within = (weight.K + 6) * reference.UNIT[torch.float32] * size
    return y, within + reference.UNIT[out_dtype] * (y.abs() + within) + 1e-30


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_within_the_bound(kind: str, activation: str) -> None:
    format, group, symmetric = ACTIVATIONS[activation]
    before = _C.isa()
    try:
        for i, (spec, N, K) in enumerate(specs(kind)):
            weight, w = random_weight(spec, N, K), packed(spec, N, K)
            for M in (i % 18, (4, 8, 17, *MANY_ROWS)[i % 7]):
                a = ops.quantize_activation(random_x(M, K) + 0.5, format, group, symmetric=symmetric)
                dtype = DTYPES[(i + M) % 3]
                bias = (None, random_x(N, dtype=dtype), random_x(N))[(i + M) // 3 % 3]
                expected = _expected(weight, a, group, bias, dtype)  # slower than all of what follows
                for level in _C.isa_levels():
                    _C.set_isa(level)
                    flags = BATCH_INVARIANT if i % 4 == 0 else 0
                    y = ops.gemm_a8(*a, w, bias, N, K, cpu_desc(spec), flags, dtype)
                    assert y.dtype == dtype
                    reference.assert_close(y, expected, (level, spec, N, K, M, dtype))
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("format", INT_FORMATS)
@pytest.mark.parametrize("zero_kind", ["none", "int"])
def test_int8_times_integers_is_exact(format: str, zero_kind: str, isa: str) -> None:
    """Whatever the codes: with scales that are powers of two and one group, y is the integer sum, rounded once."""
    for N, K in ((1, 1), (17, 31), (48, 100), (33, 264), (16, 2056)):
        spec = Spec(format, zero_kind, -1)
        weight = random_weight(spec, N, K)
        weight = dataclasses.replace(weight, scales=torch.full_like(weight.scales, 0.5))
        W = weight.dense().double()
        for M in (1, 2, 3, 4, 5, 8, 9, 17):
            r = generator("int8", M, K)
            xq = torch.randint(-128, 128, (M, K), generator=r).to(torch.int8)
            xq[0] = -128  # the largest sums there are
            for zeros in (None, torch.randint(-128, 128, (M, 1), generator=r, dtype=torch.int32)):
                x_scales = 2.0 ** torch.randint(-3, 3, (M, 1), generator=r)
                y = ops.gemm_a8(xq, x_scales, zeros, pack(weight), None, N, K, cpu_desc(spec), 0, torch.float32)
                exact = reference.dequantize_activation(xq, x_scales, zeros) @ W.t()
                assert torch.equal(y, exact.float()), (N, K, M)


def test_int32_does_not_overflow(isa: str) -> None:
    """One group of 140,000: the largest codes sum to 4.5e9, beyond int32."""
    N, K = 3, 140_000
    for zero_kind, codes in (("int", 255), ("none", 255), ("none", 0)):
        spec = Spec("int8", zero_kind)
        stream = torch.full((N, K), codes, dtype=torch.uint8)
        zeros = torch.zeros(N, 1, dtype=torch.uint8) if zero_kind == "int" else None
        weight = Weight(spec, N, K, stream.numpy().astype(np.int64), stream, torch.ones(N, 1), zeros)
        for value, x_zero in ((127, None), (-128, None), (-128, 127), (127, -128)):
            xq = torch.full((2, K), value, dtype=torch.int8)
            x_zeros = None if x_zero is None else torch.full((2, 1), x_zero, dtype=torch.int32)
            a = (xq, torch.ones(2, 1), x_zeros)
            y = ops.gemm_a8(*a, pack(weight), None, N, K, cpu_desc(spec), 0, torch.float32)
            exact = (value - (x_zero or 0)) * (codes - (0 if zero_kind == "int" else 128)) * K
            assert torch.allclose(y.double(), torch.full((2, N), float(exact), dtype=torch.float64), rtol=1e-6), y


@pytest.mark.parametrize("zero_kind", ["float", "offset"])
@pytest.mark.parametrize("distance", [0.1, 1e-3, 1e-5])
def test_fractional_zeros_near_the_codes(zero_kind: str, distance: float, isa: str) -> None:
    """Weights that are small by cancellation, activations of one sign: zeros must not be taken off the sums in fp32."""
    N, K = 17, 256
    spec = Spec("int4", zero_kind, 64)
    r = rng("near", zero_kind)
    codes = r.integers(7, 10, (N, K)) if distance == 0.1 else np.full((N, K), 8)
    scales = torch.from_numpy(r.uniform(0.5, 1.5, (N, 4))).float()
    zeros = torch.from_numpy(r.uniform(8 - distance, 8 + distance, (N, 4))).float()
    zeros = -zeros * scales if zero_kind == "offset" else zeros
    weight = Weight(spec, N, K, codes, torch.from_numpy(reference.pack_stream(codes, 4)), scales, zeros)
    a = ops.quantize_activation(random_x(5, K).abs() + 3, INT8, symmetric=False)
    y = ops.gemm_a8(*a, pack(weight), None, N, K, cpu_desc(spec), 0, torch.float32)
    reference.assert_close(y, _expected(weight, a, -1, None, torch.float32))


def test_one_hot_rows_read_out_the_weight(isa: str) -> None:
    for kind in KINDS:
        for i, (spec, N, K) in enumerate(specs(kind)):
            if i % 4 or spec.zero_kind in ("float", "offset"):
                continue
            w, W = packed(spec, N, K), dense(spec, N, K)
            for xq in (torch.eye(K).to(torch.int8), torch.eye(K).to(torch.float8_e4m3fn)):
                for part in (xq[:1], xq[:8], xq):
                    x_scales = torch.ones(len(part), 1)
                    y = ops.gemm_a8(part, x_scales, None, w, None, N, K, cpu_desc(spec), 0, torch.float32)
                    assert torch.equal(y, W.t()[: len(part)]), (spec, N, K, len(part))


def test_group_scales_of_x(isa: str) -> None:
    """x_scales [.., ceil(K / 128)] against fp8 in 128 x 128 blocks, ragged at both edges."""
    spec = Spec("fp8_e4m3", group_size=128, scaling="block128")
    for N, K in ((130, 257), (100, 130), (144, 384), (7, 15)):
        x = random_x(9, K) * torch.logspace(-2, 2, K)
        a = ops.quantize_activation(x, FP8, 128)
        y = ops.gemm_a8(*a, packed(spec, N, K), None, N, K, cpu_desc(spec), 0, torch.float32)
        reference.assert_close(y, _expected(random_weight(spec, N, K), a, 128, None, torch.float32), (N, K))


def test_leading_dimensions_and_strides() -> None:
    spec = Spec("int4", "int", 32, "bfloat16", has_perm=True)
    N, K = 33, 100
    x = random_x(24, K)
    xq, xs, xz = ops.quantize_activation(x, INT8, symmetric=False)
    assert xz is not None
    y = ops.gemm_a8(xq, xs, xz, packed(spec, N, K), None, N, K, cpu_desc(spec))
    assert y.dtype == torch.bfloat16

    def again(q: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return ops.gemm_a8(q, s, z, packed(spec, N, K), None, N, K, cpu_desc(spec))

    assert torch.equal(again(xq.view(2, 12, K), xs.view(2, 12, 1), xz.view(2, 12, 1)), y.view(2, 12, N))
    assert torch.equal(again(xq.t().contiguous().t(), xs, xz), y)
    assert torch.equal(again(xq.repeat_interleave(2, 1)[:, ::2], xs, xz), y)
    torch.testing.assert_close(again(xq[0], xs[0], xz[0]), y[0])
    assert again(xq[:0], xs[:0], xz[:0]).shape == (0, N)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_variant(dtype: torch.dtype) -> None:
    spec = Spec("int4", "int", 32, "bfloat16")
    N, K = 33, 100
    for M in (1, 3, 20):
        a = ops.quantize_activation(random_x(M, K), INT8)
        y = ops.gemm_a8(*a, packed(spec, N, K), None, N, K, cpu_desc(spec), 0, dtype)
        size = _C.workspace_size("gemm_a8", M, N, K, cpu_desc(spec))
        for workspace in (None, torch.full((size,), 0xFF, dtype=torch.uint8)):
            out = torch.full((M, N), torch.nan, dtype=dtype)
            assert ops.gemm_a8_out(*a, packed(spec, N, K), None, N, K, cpu_desc(spec), 0, out, workspace) is out
            assert torch.equal(out, y)


def test_nan_scales_reach_their_row(isa: str) -> None:
    for kind in ("int4", "int8-offset", "fp8_e4m3", "nf4"):
        spec = Spec(KINDS[kind][0], KINDS[kind][1], 32)
        for M in (1, 5, 20):
            xq, xs, _ = ops.quantize_activation(random_x(M, 64), INT8)
            xs[M // 2] = torch.nan
            y = ops.gemm_a8(xq, xs, None, packed(spec, 17, 64), None, 17, 64, cpu_desc(spec), 0, torch.float32)
            assert torch.equal(y.isnan().all(1), torch.arange(M) == M // 2)
            assert torch.equal(y.isnan().any(1), torch.arange(M) == M // 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_bits_every_time_and_in_any_company(activation: str, isa: str, threads: None) -> None:
    format, group, symmetric = ACTIVATIONS[activation]
    N, K = LARGE
    for kind in ("int4", "int3-float", "int8-offset", "fp8_e4m3-block128", "nf4"):
        spec = Spec(KINDS[kind][0], KINDS[kind][1], 128 if "block" in kind else 40, scaling=KINDS[kind][2])
        q, s, z = ops.quantize_activation(random_x(17, K), format, group, symmetric=symmetric)

        def run(rows: slice, flags: int, a=(q, s, z), spec: Spec = spec) -> torch.Tensor:
            q, s, z = a
            part = (q[rows], s[rows], None if z is None else z[rows])
            return ops.gemm_a8(*part, packed(spec, N, K), None, N, K, cpu_desc(spec), flags, torch.float32)

        for flags in (0, BATCH_INVARIANT):
            first = run(slice(0, 17), flags)
            for threads_now in (1, 2):
                torch.set_num_threads(threads_now)
                assert torch.equal(run(slice(0, 17), flags), first), kind
        for M in (1, 2, 4, 7, 8, 9):
            assert torch.equal(run(slice(0, M), BATCH_INVARIANT), first[:M]), (kind, M)


def test_quality_of_the_whole_chain() -> None:
    """Gaussian x and W, int8 by int8: the product keeps its direction, as a sanity check of what users will see."""
    weight, x = torch.randn(256, 512), torch.randn(32, 512)
    spec = Spec("int8")
    stream, scales, _ = ops.quantize(weight, desc(spec))
    w = ops.pack(stream, scales, None, None, 256, 512, cpu_desc(spec))
    y = ops.gemm_a8(*ops.quantize_activation(x, INT8), w, None, 256, 512, cpu_desc(spec), 0, torch.float32)
    assert torch.nn.functional.cosine_similarity(y.flatten(), (x @ weight.t()).flatten(), dim=0) > 0.9999
