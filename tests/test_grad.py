"""gemm_grad_input and linear: dx = dy @ W, through autograd and by itself."""

from __future__ import annotations

import warnings
from itertools import count

import pytest
import torch

import reference
from cases import DTYPES, FEW_ROWS, KINDS, LARGE, cpu_desc, dense, desc, packed, random_x, specs
from lowbit import ops
from reference import UNIT, Spec

SPEC = Spec("int4", "int", 32, "float16", has_perm=True)
N, K = 33, 100
DESC = cpu_desc(SPEC)


def _linear(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return ops.linear(x, packed(SPEC, N, K), bias, N, K, DESC)


@pytest.mark.parametrize("kind", KINDS)
def test_within_the_bound(kind: str, isa: str) -> None:
    turn = count()
    for spec, n, k in specs(kind):
        for dtype in DTYPES:
            M = (*FEW_ROWS, 40, 130)[next(turn) % 20]
            dy = random_x(M, n, dtype=dtype)
            dx = ops.gemm_grad_input(dy, packed(spec, n, k), n, k, cpu_desc(spec))
            assert dx.dtype == dtype
            unit = 0 if dtype == torch.float32 else UNIT[dtype]
            reference.assert_close(dx, reference.product(dy, dense(spec, n, k).t(), None, unit, dtype), (spec, n, k, M))


def test_one_hot_rows_read_out_the_weight(isa: str) -> None:
    for kind in KINDS:
        for spec, n, k in list(specs(kind))[::3]:
            dx = ops.gemm_grad_input(torch.eye(n), packed(spec, n, k), n, k, cpu_desc(spec))
            assert torch.equal(dx, dense(spec, n, k)), (spec, n, k)


def test_an_outlier_spoils_nothing(isa: str) -> None:
    dy = random_x(3, N) * 0.05
    dy[1, 5] = 1500.0
    dx = ops.gemm_grad_input(dy, packed(SPEC, N, K), N, K, DESC)
    reference.assert_close(dx, reference.product(dy, dense(SPEC, N, K).t(), None, 0, torch.float32))


def test_leading_dimensions_and_strides() -> None:
    dy = random_x(12, N)
    dx = ops.gemm_grad_input(dy, packed(SPEC, N, K), N, K, DESC)
    for view, shape in (
        (dy.view(3, 4, N), (3, 4, K)),
        (dy.t().contiguous().t(), (12, K)),
        (dy.repeat_interleave(2, 1)[:, ::2], (12, K)),
    ):
        got = ops.gemm_grad_input(view, packed(SPEC, N, K), N, K, DESC)
        assert got.shape == shape and torch.equal(got.reshape(12, K), dx)
    expanded = torch.ones(()).expand(12, N)  # what y.sum().backward() sends
    want = ops.gemm_grad_input(expanded.contiguous(), packed(SPEC, N, K), N, K, DESC)
    assert torch.equal(ops.gemm_grad_input(expanded, packed(SPEC, N, K), N, K, DESC), want)
    assert ops.gemm_grad_input(dy[:0], packed(SPEC, N, K), N, K, DESC).shape == (0, K)


def test_same_bits_every_time(isa: str, threads: None) -> None:
    n, k = LARGE
    dy = random_x(3, n)
    results = []
    for many in (1, 2, 5):
        torch.set_num_threads(many)
        results.append(ops.gemm_grad_input(dy, packed(SPEC, n, k), n, k, DESC))
    assert all(torch.equal(dx, results[0]) for dx in results)


def test_nan_stays_in_its_row(isa: str) -> None:
    dy = random_x(20, N)
    dy[7, 3] = torch.nan
    dx = ops.gemm_grad_input(dy, packed(SPEC, N, K), N, K, DESC)
    assert torch.equal(dx.isnan(), (torch.arange(20) == 7)[:, None].expand(20, K))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_linear_is_gemm_with_gradients(dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    x = random_x(2, 3, K, dtype=dtype).requires_grad_()
    bias = None if bias_dtype is None else random_x(N, dtype=bias_dtype).requires_grad_()
    y = _linear(x, bias)
    with torch.no_grad():
        assert torch.equal(y, ops.gemm(x, packed(SPEC, N, K), bias, N, K, DESC))
    dy = random_x(2, 3, N, dtype=dtype)
    y.backward(dy)
    assert x.grad is not None and x.grad.dtype == dtype
    assert torch.equal(x.grad, ops.gemm_grad_input(dy, packed(SPEC, N, K), N, K, DESC))
    if bias is not None:
        assert bias.grad is not None and bias.grad.dtype == bias_dtype
        assert torch.equal(bias.grad, dy.reshape(-1, N).float().sum(0).to(bias_dtype))


def test_only_what_is_asked_for() -> None:
    x, bias = random_x(4, K), random_x(N).requires_grad_()
    _linear(x, bias).sum().backward()
    assert x.grad is None and torch.equal(bias.grad, torch.full((N,), 4.0))
    x.requires_grad_()
    with torch.no_grad():
        assert not _linear(x, bias).requires_grad
    with torch.inference_mode():
        assert _linear(x, bias).is_inference()
    empty = torch.zeros(0, K, requires_grad=True)
    bias.grad = None
    _linear(empty, bias).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, K)
    assert torch.equal(bias.grad, torch.zeros(N))


def test_gradcheck() -> None:
    """torch's own check. In fp32 its differences are inexact, so weights and steps are chosen to make them exact."""
    spec = Spec("int3", "int", 8)
    weight = reference.quantize(torch.randint(-3, 4, (5, 17)).float(), spec)
    weight.scales.fill_(0.5)
    w = torch.ops.lowbit.pack(*weight.tensors, 5, 17, cpu_desc(spec))
    x = torch.randint(-4, 5, (3, 17)).float().requires_grad_()
    bias = torch.randint(-4, 5, (5,)).float().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for fp64
        assert torch.autograd.gradcheck(
            lambda x, b: ops.linear(x, w, b, 5, 17, cpu_desc(spec)), (x, bias), eps=0.25, atol=1e-6, rtol=0
        )


def test_adjoint() -> None:
    """<dy, x W^T> = <dy W, x> for any x and dy, in fp64 within rounding."""
    for kind in KINDS:
        for spec, n, k in list(specs(kind))[::6]:
            x, dy = random_x(6, k), random_x(6, n)
            w, d = packed(spec, n, k), cpu_desc(spec)
            forward = (ops.gemm(x, w, None, n, k, d).double() * dy).sum()
            backward = (ops.gemm_grad_input(dy, w, n, k, d).double() * x).sum()
            size = (dy.double().abs() @ dense(spec, n, k).double().abs() * x.abs()).sum()
            assert (forward - backward).abs() <= 1e-5 * size, (spec, n, k)


def test_second_derivative_is_refused() -> None:
    x = random_x(2, K).requires_grad_()
    y = _linear(x).square().sum()
    with pytest.raises(
        RuntimeError, match=r"lowbit::linear: second derivatives are not supported \(create_graph=True\)"
    ):
        torch.autograd.grad(y, x, create_graph=True)


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    x = random_x(4, K).requires_grad_()
    checkpoint(_linear, x, use_reentrant=False).square().sum().backward()
    recomputed, x.grad = x.grad, None
    _linear(x).square().sum().backward()
    assert torch.equal(recomputed, x.grad)


@pytest.mark.parametrize("op", ["gemm", "gemm_out", "gemm_grad_input", "quantize_activation", "quantize"])
def test_gradients_are_never_dropped_silently(op: str) -> None:
    x = random_x(2, K).requires_grad_()
    w = packed(SPEC, N, K)
    calls = {
        "gemm": lambda: ops.gemm(x, w, None, N, K, DESC),
        "gemm_out": lambda: ops.gemm_out(x, w, None, N, K, DESC, 0, torch.empty(2, N)),
        "gemm_grad_input": lambda: ops.gemm_grad_input(torch.ones(2, N, requires_grad=True), w, N, K, DESC),
        "quantize_activation": lambda: ops.quantize_activation(x, 6),
        "quantize": lambda: ops.quantize(x, desc(Spec("int4"))),
    }
    with pytest.raises(RuntimeError, match=f"lowbit::{op}: has no gradient, but an input requires grad"):
        calls[op]()
    with torch.no_grad():
        calls[op]()
