"""gemm: exact where the result is representable, within the componentwise bound everywhere else."""

from __future__ import annotations

import dataclasses
from itertools import count

import numpy as np
import pytest
import torch

import reference
from cases import (
    BATCH_INVARIANT,
    DTYPES,
    FEW_ROWS,
    KINDS,
    KINDS_WITH_ZERO,
    MANY_ROWS,
    SHAPES,
    cpu_desc,
    dense,
    generator,
    pack,
    packed,
    random_weight,
    random_x,
    rng,
    specs,
    with_zero_column,
)
from lowbit import ops
from reference import UNIT, Spec, Weight, exact16

#: Formats whose codes can make W a matrix of small integers (the levels of NF4, and fractions of 192, cannot).
INTEGER_KINDS = [kind for kind in KINDS if kind not in ("nf4", "bnb_fp4")]


def integer_weight(spec: Spec, N: int, K: int) -> Weight:
    """Like `random_weight`, but W is small integers times a power of two, so that sums of it are exact in fp32."""
    w = random_weight(spec, N, K)
    r = rng("integer", spec, N, K)
    scales = torch.from_numpy(2.0 ** r.integers(-2, 3, w.scales.shape)).to(w.scales.dtype)
    codes, zeros = w.codes, w.zeros
    if spec.coded:
        values = reference.CODES[spec.format]
        whole = np.flatnonzero((np.abs(values) <= 128) & (values * 2 == np.round(values * 2)))
        codes = whole[r.integers(0, len(whole), (N, K))]
    elif zeros is not None and spec.zero_kind != "int":
        zeros = torch.from_numpy(r.integers(0, 2**spec.bits, zeros.shape)).to(zeros.dtype)
    if spec.zero_kind == "offset":
        assert zeros is not None
        zeros = (-zeros.float() * scales.float()).to(zeros.dtype)
    stream = torch.from_numpy(reference.pack_stream(codes, spec.bits))
    return dataclasses.replace(w, codes=codes, packed=stream, scales=scales, zeros=zeros)


def offset_parts(w: Weight) -> torch.Tensor:
    """|q s| + |o| of every weight, [N, K], columns in original order."""
    assert w.zeros is not None
    scales = reference.spread(w.scales.double().numpy(), w.spec, w.N, w.K)
    offsets = reference.spread(w.zeros.double().numpy(), w.spec, w.N, w.K)
    parts = np.abs(w.codes * scales) + np.abs(offsets)
    original = np.empty_like(parts)
    original[:, slice(None) if w.perm is None else w.perm.numpy()] = parts
    return torch.from_numpy(original)


@pytest.mark.parametrize("kind", KINDS)
def test_within_the_bound(kind: str, isa: str) -> None:
    """Every group size, scale dtype, activation dtype and kind of bias; M runs through 0..17 several times."""
    turn = count()
    for spec, N, K in specs(kind):
        w, W = packed(spec, N, K), dense(spec, N, K)
        for dtype in DTYPES:
            i = next(turn)
            x = random_x(FEW_ROWS[i % len(FEW_ROWS)], K, dtype=dtype)
            bias = (None, random_x(N, dtype=dtype), random_x(N))[i // 2 % 3]
            y = ops.gemm(x, w, bias, N, K, cpu_desc(spec), BATCH_INVARIANT if i % 5 == 0 else 0)
            assert y.dtype == dtype
            # Weights may be rounded once, to the activations' dtype; fp32 activations leave them alone.
            unit = 0 if dtype == torch.float32 else UNIT[dtype]
            reference.assert_close(y, reference.product(x, W, bias, unit, dtype), (spec, N, K, len(x), dtype))


@pytest.mark.parametrize("M", [*FEW_ROWS, *MANY_ROWS])
def test_every_number_of_rows(M: int, isa: str) -> None:
    for kind in ("int4", "int3-int", "int8-offset", "fp8_e4m3-block128", "nf4"):
        format, zero_kind, scaling = KINDS[kind]
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 32, "bfloat16", scaling)
        for N, K in ((33, 64), (100, 130), (130, 257)):
            w, W = packed(spec, N, K), dense(spec, N, K)
            for dtype in DTYPES:
                x = random_x(M, K, dtype=dtype)
                y = ops.gemm(x, w, None, N, K, cpu_desc(spec))
                unit = 0 if dtype == torch.float32 else UNIT[dtype]
                reference.assert_close(y, reference.product(x, W, None, unit, dtype), (spec, N, K, M, dtype))


@pytest.mark.parametrize("M", [1, 2, 5, 8, 17, 130])
def test_every_shape(M: int, isa: str) -> None:
    for N, K in SHAPES:
        for spec in (Spec("int4", "int", -1), Spec("int5", "float", 8, "float16"), Spec("fp4_e2m1", group_size=8)):
            w, W = packed(spec, N, K), dense(spec, N, K)
            x = random_x(M, K)
            y = ops.gemm(x, w, None, N, K, cpu_desc(spec))
            reference.assert_close(y, reference.product(x, W, None, 0, torch.float32), (spec, N, K, M))


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_rows_read_out_the_weight(kind: str, isa: str) -> None:
    """x = a column of the identity: y is that column of W, rounded once, to the last bit.

    With offsets, kernels that multiply integers compute (q - r) * s + (r * s + o), where `dequantize` has q * s + o: they may
    differ by a rounding or two of q * s and of o. `stream_bf16` rounds levels that bf16 does not hold, besides y.
    """
    for i, (spec, N, K) in enumerate(specs(kind)):
        if i % 2 and K > 64:
            continue
        w, W = packed(spec, N, K), dense(spec, N, K)
        dtype = DTYPES[i % 3]
        x = torch.eye(K, dtype=dtype)
        for step in (1, 3, 8, K):  # rows per call: each serves another kernel
            few = K if K <= 33 or step > 1 else 33
            rows = [ops.gemm(part, w, None, N, K, cpu_desc(spec)) for part in x[:few].split(step)]
            y, expected = torch.cat(rows), W.t()[:few].to(dtype)
            if spec.zero_kind == "offset":
                parts = offset_parts(random_weight(spec, N, K)).t()[:few]
                bound = 4 * UNIT[torch.float32] * parts + UNIT[dtype] * expected.double().abs()
                assert ((y.double() - W.t()[:few].double()).abs() <= bound).all(), (spec, N, K, dtype, step)
            elif isa == "avx512bf16" and not exact16(KINDS[kind][0]) and dtype == torch.bfloat16:
                bound = 2.01 * UNIT[dtype] * W.t()[:few].double().abs()
                assert ((y.double() - W.t()[:few].double()).abs() <= bound).all(), (spec, N, K, dtype, step)
            else:
                assert torch.equal(y, expected), (spec, N, K, dtype, step)


@pytest.mark.parametrize("M", [1, 3, 20])
@pytest.mark.parametrize("format", ["int2", "int3", "int4"])
def test_large_zeros(format: str, M: int, isa: str) -> None:
    """Zeros of 255 are legal for few bits too: q - zero is exact, and not what a table of small differences says."""
    N, K = 49, 256
    weight = random_weight(Spec(format, "int", 64), N, K)
    assert weight.zeros is not None
    zeros = weight.zeros.clone()
    zeros[::2, 1:] = torch.tensor([16, 17, 255], dtype=torch.uint8)
    weight = dataclasses.replace(weight, zeros=zeros)
    for dtype in DTYPES:
        x = random_x(M, K, dtype=dtype)
        y = ops.gemm(x, pack(weight), None, N, K, cpu_desc(weight.spec))
        reference.assert_close(y, reference.product(x, weight.dense(), None, 0, dtype), (format, M, dtype))


@pytest.mark.parametrize("kind", INTEGER_KINDS)
def test_integers_are_exact(kind: str, isa: str) -> None:
    """Activations of -2..2 and weights that are integers: every order of summation gives the same, exact, result."""
    for i, (spec, N, K) in enumerate(specs(kind)):
        weight = integer_weight(spec, N, K)
        w, W = pack(weight), weight.dense().double()
        r = generator(spec, N, K)
        dtype = DTYPES[i % 3]
        for M in (1, 2, 4, 7, 17, 40):
            x = torch.randint(-2, 3, (M, K), generator=r).to(dtype)
            bias = torch.randint(-64, 64, (N,), generator=r).float()
            y = ops.gemm(x, w, bias, N, K, cpu_desc(spec))
            assert torch.equal(y, (x.double() @ W.t() + bias).to(dtype)), (spec, N, K, M, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_representable_weights_need_no_allowance(dtype: torch.dtype, isa: str) -> None:
    """Where W is exact in the activations' dtype, 16-bit activations cost only the rounding of y."""
    for kind in INTEGER_KINDS:
        for spec, N, K in list(specs(kind))[::3]:
            weight = integer_weight(spec, N, K)
            if spec.bits == 8 and dtype == torch.bfloat16 and not spec.coded:
                continue  # differences of 8-bit integers take nine bits with their sign: one too many for bf16
            for M in (1, 4, 20):
                x = random_x(M, K, dtype=dtype)
                y = ops.gemm(x, pack(weight), None, N, K, cpu_desc(spec))
                reference.assert_close(y, reference.product(x, weight.dense(), None, 0, dtype), (spec, N, K, M))


@pytest.mark.parametrize("kind", KINDS_WITH_ZERO)
def test_an_outlier_spoils_nothing(kind: str, isa: str) -> None:
    """One activation of 1500 among values of 0.05, as real ones are, where the weight is zero.

    The bound does not see it, so a kernel that scales activations by their largest, or subtracts zeros from sums
    instead of from weights, exceeds it.
    """
    format, zero_kind, scaling = KINDS[kind]
    N, K = 48, 264
    for group_size in (128,) if scaling == "block128" else (32, 40, 128, -1):
        spec = Spec(format, zero_kind, group_size, "float32", scaling)
        for column in (0, 77, 263):
            weight = with_zero_column(spec, N, K, column)
            w, W = pack(weight), weight.dense()
            assert not W[:, column].any()
            for M in (1, 3, 8, 20):
                for dtype in DTYPES:
                    x = random_x(M, K) * 0.05
                    x[M // 2, column] = 1500.0 if dtype != torch.float32 else 1501.2345
                    x = x.to(dtype)
                    y = ops.gemm(x, w, None, N, K, cpu_desc(spec))
                    unit = 0 if dtype == torch.float32 else UNIT[dtype]
                    where = (spec, column, M, dtype)
                    reference.assert_close(y, reference.product(x, W, None, unit, dtype), where)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_small_activations(dtype: torch.dtype, isa: str) -> None:
    """Magnitudes from 2^-12 to 2^12 within a row: small ones count where nothing large stands beside them."""
    spec = Spec("int4", "int", 32, "float32")
    N, K = 64, 128
    x = random_x(9, K) * torch.exp2(torch.randint(-12, 13, (9, K), generator=generator("magnitudes")))
    x = x.to(dtype)
    y = ops.gemm(x, packed(spec, N, K), None, N, K, cpu_desc(spec))
    unit = 0 if dtype == torch.float32 else UNIT[dtype]
    reference.assert_close(y, reference.product(x, dense(spec, N, K), None, unit, dtype))


def test_long_rows(isa: str) -> None:
    """K where plain fp32 summation has had time to drift; the bound grows with K, the error does not."""
    spec = Spec("int4", "none", 128, "bfloat16")
    N, K = 16, 16384 + 8
    w, W = packed(spec, N, K), dense(spec, N, K)
    for M in (1, 5, 20):
        x = random_x(M, K)
        y = ops.gemm(x, w, None, N, K, cpu_desc(spec))
        ref, bound = reference.product(x, W, None, 0, torch.float32)
        reference.assert_close(y, (ref, bound))
        # With terms of random sign the k-th partial sum is about sqrt(k) terms large, and K roundings of that, of random
        # sign too, add up to u K terms: a few u sum|x||w|, whatever K is.
        assert ((y - ref).abs() <= 4 * UNIT[torch.float32] * (x.double().abs() @ W.double().abs().t())).all()
