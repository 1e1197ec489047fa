"""quantize_activation: exactly the reference's codes, scales and zeros."""

from __future__ import annotations

import pytest
import torch

import reference
from cases import DTYPES, FP8, INT8, generator
from lowbit import ops

SHAPES = ((1, 1), (3, 7), (5, 16), (17, 33), (2, 128), (4, 130), (3, 384), (1, 1000))
IDS = {"int8": INT8, "fp8_e4m3": FP8}
ODD_ROWS = torch.tensor(
    [
        [0.0] * 8,
        [1.0] * 8,
        [-2.0] * 8,
        [1, 2, 3, 4, 5, 6, 7, 8],
        [-1, -2, -3, -4, -5, -6, -7, -0.5],
        [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 127],  # ties, with scale 1
        [1e-30, 1e-38, -1e-30, 0, 0, 0, 0, 0],
        [1e30, -1e30, 1, 0, 0, 0, 0, 0],
        [1500, 0.05, -0.05, 0.04, 0.03, 0.02, 0.01, 0],
    ]
)


def _x(M: int, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(M, K, generator=generator(M, K)) * 3).to(dtype)


def _assert_same(
    got: tuple[torch.Tensor | None, ...], want: tuple[torch.Tensor | None, ...], where: object = ""
) -> None:
    for name, a, b in zip(("xq", "x_scales", "x_zeros"), got, want, strict=True):
        if b is None:
            assert a is None, f"{where}: {name} appeared"
            continue
        assert a is not None and a.dtype == b.dtype and a.shape == b.shape, f"{where}: {name}"
        same = a.view(torch.uint8) == b.view(torch.uint8) if a.dtype == torch.float8_e4m3fn else a == b
        assert same.all(), f"{where}: {name}, {int((~same).sum())} differ"


@pytest.mark.parametrize(
    ("format", "group_size", "symmetric"),
    [("int8", -1, True), ("int8", -1, False), ("fp8_e4m3", -1, True), ("fp8_e4m3", 128, True), ("fp8_e4m3", 40, True)],
)
def test_dynamic(format: str, group_size: int, symmetric: bool, isa: str) -> None:
    for M, K in SHAPES:
        for dtype in DTYPES:
            x = _x(M, K, dtype)
            got = ops.quantize_activation(x, IDS[format], group_size, symmetric=symmetric)
            want = reference.quantize_activation(x, format, group_size, symmetric=symmetric)
            _assert_same(got, want, (M, K, dtype))
    got = ops.quantize_activation(ODD_ROWS, IDS[format], group_size, symmetric=symmetric)
    _assert_same(got, reference.quantize_activation(ODD_ROWS, format, group_size, symmetric=symmetric))


@pytest.mark.parametrize(("format", "symmetric"), [("int8", True), ("int8", False), ("fp8_e4m3", True)])
def test_static(format: str, symmetric: bool, isa: str) -> None:
    """One scale for everything: what is outside saturates, at -128 too."""
    zero = None if symmetric else -37
    for scale in (0.01, 0.05, 1.0):
        x = _x(5, 100)
        got = ops.quantize_activation(
            x,
            IDS[format],
            -1,
            torch.tensor([scale]),
            None if zero is None else torch.tensor([zero], dtype=torch.int32),
            symmetric=symmetric,
        )
        _assert_same(got, reference.quantize_activation(x, format, -1, scale, zero, symmetric=symmetric), scale)
    if format == "int8" and symmetric:
        xq, _, _ = ops.quantize_activation(torch.tensor([[-500.0, 500.0]]), INT8, -1, torch.tensor([1.0]))
        assert xq.tolist() == [[-128, 127]]


@pytest.mark.parametrize(("format", "symmetric"), [("int8", True), ("int8", False), ("fp8_e4m3", True)])
def test_pre_scale(format: str, symmetric: bool, isa: str) -> None:
    for M, K in SHAPES:
        pre_scale = torch.rand(K, generator=generator(K)) + 0.1
        x = _x(M, K, torch.bfloat16)
        got = ops.quantize_activation(x, IDS[format], -1, None, None, pre_scale, symmetric)
        _assert_same(got, reference.quantize_activation(x, format, -1, None, None, pre_scale, symmetric), (M, K))


def test_leading_dimensions_and_strides() -> None:
    x = _x(24, 48)
    xq, x_scales, x_zeros = ops.quantize_activation(x, INT8, symmetric=False)
    assert x_zeros is not None
    views = {
        "3-d": x.view(2, 12, 48),
        "transposed": x.t().contiguous().t(),
        "strided": x.repeat_interleave(2, 1)[:, ::2],
        "rows apart": torch.cat([x, x], 1)[:, :48],
    }
    for name, view in views.items():
        q, s, z = ops.quantize_activation(view, INT8, symmetric=False)
        assert z is not None and q.shape == view.shape and s.shape == z.shape == (*view.shape[:-1], 1), name
        assert q.is_contiguous()
        assert torch.equal(q.reshape(24, 48), xq) and torch.equal(s.reshape(24, 1), x_scales), name
        assert torch.equal(z.reshape(24, 1), x_zeros), name
    q, s, _ = ops.quantize_activation(x[0], INT8)
    assert q.shape == (48,) and s.shape == (1,)
    q, s, _ = ops.quantize_activation(x[:0], FP8, 128)
    assert q.shape == (0, 48) and s.shape == (0, 1)
    q, s, z = ops.quantize_activation(x[:1].expand(3, 48), INT8, symmetric=False)
    assert torch.equal(q, xq[:1].expand(3, 48))


def test_nan_marks_its_group(isa: str) -> None:
    for format, group_size in ((INT8, -1), (FP8, -1), (FP8, 16)):
        for position in (0, 7, 20, 33):
            x = _x(3, 40)
            x[1, position] = torch.nan
            _, x_scales, _ = ops.quantize_activation(x, format, group_size)
            hit = torch.zeros_like(x_scales, dtype=torch.bool)
            hit[1, 0 if group_size == -1 else position // group_size] = True
            assert torch.equal(x_scales.isnan(), hit)
    x = _x(2, 8)
    x[0, 2] = torch.nan
    for static in (torch.tensor([0.1]), None):
        _, x_scales, _ = ops.quantize_activation(x, INT8, -1, static)
        assert x_scales[0].isnan().all() and x_scales[1].isfinite().all()


def test_infinity_is_not_hidden() -> None:
    for format, symmetric in ((INT8, True), (INT8, False), (FP8, True)):
        x = _x(2, 8)
        x[0, 2] = torch.inf
        xq, x_scales, x_zeros = ops.quantize_activation(x, format, symmetric=symmetric)
        assert not reference.dequantize_activation(xq, x_scales, x_zeros)[0].isfinite().all()
        assert x_scales[1].isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_out_variant(symmetric: bool) -> None:
    x = _x(6, 40)
    want = ops.quantize_activation(x, INT8, symmetric=symmetric)
    out = [torch.empty_like(t) if t is not None else None for t in want]
    assert out[0] is not None and out[1] is not None
    got = ops.quantize_activation_out(x, INT8, -1, None, None, None, symmetric, out[0], out[1], out[2])
    assert got[0] is out[0]
    _assert_same(got, want)


def test_same_bits_whatever_the_threads(threads: None) -> None:
    x = _x(300, 1000)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(ops.quantize_activation(x, INT8, symmetric=False))
    for result in results[1:]:
        _assert_same(result, results[0])
