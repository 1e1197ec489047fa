"""gemm: what x, bias, w and out may look like; NaN and infinities."""

from __future__ import annotations

import pytest
import torch

import reference
from cases import DTYPES, KINDS, cpu_desc, dense, desc, pack, packed, random_weight, random_x
from lowbit import _C, ops
from reference import Spec, Weight

SPEC = Spec("int4", "int", 32, "float16")
N, K = 33, 100
DESC = cpu_desc(SPEC)


def _gemm(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return ops.gemm(x, packed(SPEC, N, K), bias, N, K, DESC)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,), (2, 0, 3), (1, 1, 1, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random_x(*shape, K, dtype=dtype)
    y = _gemm(x)
    assert y.shape == (*shape, N) and y.is_contiguous()
    if x.numel():
        assert torch.equal(y.reshape(-1, N), _gemm(x.reshape(-1, K)))


@pytest.mark.parametrize("M", [1, 3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(M: int, dtype: torch.dtype, isa: str) -> None:
    x = random_x(M, K, dtype=dtype)
    y = _gemm(x)
    wide = torch.full((M, 3, K + 7), torch.nan, dtype=dtype)
    wide[:, 1, 5 : 5 + K] = x
    views = {
        "transposed": x.t().contiguous().t(),
        "every second column": x.repeat_interleave(2, 1)[:, ::2],
        "every second row": x.repeat_interleave(2, 0)[::2],
        "inside a larger tensor": wide[:, 1, 5 : 5 + K],
        "rows in reverse": x.flip(0).contiguous().flip(0),
    }
    for name, view in views.items():
        assert torch.equal(view, x), name
        assert torch.equal(_gemm(view), y), name
    assert torch.equal(_gemm(x.t().contiguous().t().unsqueeze(1)), y.unsqueeze(1))


def test_expanded(isa: str) -> None:
    x = random_x(1, K)
    y = _gemm(x)
    assert torch.equal(_gemm(x.expand(6, K)), ops.gemm(x.repeat(6, 1), packed(SPEC, N, K), None, N, K, DESC))
    torch.testing.assert_close(_gemm(x.expand(6, K)), y.expand(6, N), rtol=1e-5, atol=1e-5)
    column = x[:, :1].expand(4, K)
    assert torch.equal(_gemm(column), _gemm(column.contiguous()))
    assert _gemm(x.expand(2, 3, K)).shape == (2, 3, N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias(dtype: torch.dtype, bias_dtype: torch.dtype, isa: str) -> None:
    for M in (1, 4, 20):
        x, bias = random_x(M, K, dtype=dtype), (random_x(N) * 3).to(bias_dtype)
        unit = 0 if dtype == torch.float32 else reference.UNIT[dtype]
        expected = reference.product(x, dense(SPEC, N, K), bias, unit, dtype)
        reference.assert_close(_gemm(x, bias), expected)


def test_bias_in_fp32_is_not_rounded_first() -> None:
    x = torch.zeros(1, K, dtype=torch.bfloat16)
    x[0, 0] = 1
    W = dense(SPEC, N, K)
    bias = torch.full((N,), 1 + 2.0**-12)
    expected = (W[:, 0].double() + bias.double()).float().to(torch.bfloat16)
    assert torch.equal(_gemm(x, bias)[0], expected)


def test_perm(isa: str) -> None:
    """Packed column j holds original column perm[j]: the same result as the weight in its original order."""
    for kind in ("int4", "int2-float", "fp8_e4m3", "nf4"):
        spec = Spec(KINDS[kind][0], KINDS[kind][1], 16, "bfloat16", has_perm=True)
        w, W = packed(spec, N, K), dense(spec, N, K)
        for M in (1, 5, 20):
            for dtype in DTYPES:
                x = random_x(M, K, dtype=dtype)
                unit = 0 if dtype == torch.float32 else reference.UNIT[dtype]
                expected = reference.product(x, W, None, unit, dtype)
                reference.assert_close(ops.gemm(x, w, None, N, K, cpu_desc(spec)), expected)
                view = x.repeat_interleave(2, 1)[:, ::2]
                reference.assert_close(ops.gemm(view, w, None, N, K, cpu_desc(spec)), expected)


def test_identity_perm() -> None:
    """The identity as a permutation changes no bit."""
    weight = random_weight(Spec("int4", "none", 32), N, K)
    same = Weight(
        Spec("int4", "none", 32, has_perm=True), N, K, weight.codes, weight.packed, weight.scales,
        perm=torch.arange(K, dtype=torch.int32),
    )  # fmt: skip
    for M in (1, 20):
        x = random_x(M, K)
        assert torch.equal(
            ops.gemm(x, pack(weight), None, N, K, cpu_desc(weight.spec)),
            ops.gemm(x, pack(same), None, N, K, cpu_desc(same.spec)),
        )


def test_weight_at_any_address() -> None:
    w = packed(SPEC, N, K)
    x = random_x(3, K)
    for offset in (1, 2, 8):
        buffer = torch.zeros(len(w) + offset, dtype=torch.uint8)
        buffer[offset:] = w
        assert torch.equal(ops.gemm(x, buffer[offset:], None, N, K, DESC), _gemm(x))


@pytest.mark.parametrize("M", [1, 3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_variant(M: int, dtype: torch.dtype) -> None:
    x, bias = random_x(M, K, dtype=dtype), random_x(N, dtype=dtype)
    y = _gemm(x, bias)
    size = _C.workspace_size("gemm", M, N, K, DESC)
    for workspace in (
        None,
        torch.full((size,), 0xFF, dtype=torch.uint8),
        torch.full((size + 100,), 7, dtype=torch.uint8),
    ):
        out = torch.full((M, N), torch.nan, dtype=dtype)
        assert ops.gemm_out(x, packed(SPEC, N, K), bias, N, K, DESC, 0, out, workspace) is out
        assert torch.equal(out, y)
    out = torch.empty(0, N, dtype=dtype)
    ops.gemm_out(x[:0], packed(SPEC, N, K), bias, N, K, DESC, 0, out)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_x_stays_in_its_row(kind: str, isa: str) -> None:
    for spec, n, k in list(specs_of(kind)):
        w = packed(spec, n, k)
        for M in (1, 3, 8, 20):
            x = random_x(M, k)
            clean = ops.gemm(x, w, None, n, k, cpu_desc(spec))
            x[M // 2, k - 1] = torch.nan
            y = ops.gemm(x, w, None, n, k, cpu_desc(spec))
            assert y[M // 2].isnan().all(), (spec, M)
            others = torch.arange(M) != M // 2
            assert torch.equal(y[others], clean[others]), (spec, M)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_in_x(kind: str, dtype: torch.dtype, isa: str) -> None:
    """Infinite where the weight is not zero, NaN where it is, as in exact arithmetic."""
    for spec, n, k in list(specs_of(kind)):
        w, W = packed(spec, n, k), dense(spec, n, k)
        for M in (1, 3, 8, 20):
            x = random_x(M, k, dtype=dtype)
            x[M // 2, k // 2] = -torch.inf
            y = ops.gemm(x, w, None, n, k, cpu_desc(spec))
            ref = x.double() @ W.double().t()
            assert torch.equal(y.isnan(), ref.isnan()), (spec, M)
            assert torch.equal(y.isinf() & (y > 0), ref == torch.inf), (spec, M)
            assert torch.equal(y.isinf() & (y < 0), ref == -torch.inf), (spec, M)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_the_weight_reaches_its_column(kind: str, isa: str) -> None:
    for spec, n, k in list(specs_of(kind)):
        weight = random_weight(spec, n, k)
        scales = weight.scales.clone()
        scales[-1, -1] = torch.nan
        changed = Weight(spec, n, k, weight.codes, weight.packed, scales, weight.zeros, weight.perm)
        nan_rows = changed.dense().isnan().any(1)
        for M in (1, 3, 20):
            y = ops.gemm(random_x(M, k), pack(changed), None, n, k, cpu_desc(spec))
            assert torch.equal(y.isnan(), nan_rows.expand(M, n)), (spec, M)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF - 2**32, 0xFF800001 - 2**32])
def test_every_nan_stays_nan_when_rounded(bits: int, isa: str) -> None:
    """Rounding to 16 bits must not carry a NaN's payload into the exponent, nor drop it and leave an infinity."""
    spec = Spec("int4", group_size=32)
    weight = random_weight(spec, N, 64)
    scales = torch.full((N, 2), bits, dtype=torch.int32).view(torch.float32)
    changed = Weight(spec, N, 64, weight.codes, weight.packed, scales)
    for dtype in DTYPES:
        assert ops.dequantize(*changed.tensors, N, 64, desc(spec), dtype).isnan().all()
        for M in (1, 3, 20):
            assert ops.gemm(random_x(M, 64, dtype=dtype), pack(changed), None, N, 64, cpu_desc(spec)).isnan().all()
            bias = torch.full((N,), bits, dtype=torch.int32).view(torch.float32)
            assert ops.gemm(random_x(M, 64, dtype=dtype), pack(weight), bias, N, 64, cpu_desc(spec)).isnan().all()
            x = torch.full((M, 64), bits, dtype=torch.int32).view(torch.float32).to(dtype)
            assert ops.gemm(x, pack(weight), None, N, 64, cpu_desc(spec)).isnan().all()


def test_overflow_of_the_output_is_infinite() -> None:
    x = torch.full((1, K), 6e4, dtype=torch.float16)
    weight = random_weight(Spec("int4", "int", -1, "float32"), N, K)
    weight = Weight(weight.spec, N, K, weight.codes * 0, weight.packed * 0, weight.scales.abs(), weight.zeros)
    assert weight.zeros is not None
    y = ops.gemm(x, pack(weight), None, N, K, cpu_desc(weight.spec))
    assert torch.equal(y[0] == -torch.inf, weight.zeros[:, 0] > 0)


def specs_of(kind: str) -> list[tuple[Spec, int, int]]:
    """One grouped shape and one ragged one."""
    format, zero_kind, scaling = KINDS[kind]
    sizes = (128, 128) if scaling == "block128" else (32, 40)
    shapes = ((48, 64), (17, 100))
    return [
        (Spec(format, zero_kind, size, "float32", scaling), *shape) for size, shape in zip(sizes, shapes, strict=True)
    ]
