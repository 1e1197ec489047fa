"""gemm on Metal: every instantiation of every kernel against fp64, on the emulator or on a Mac."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import cases
import reference
from kernel_cases import check_gemm, expected, forced, gemm, on
from lowbit import _C
from metal_problems import GEMM, Problem, group_sizes, pack
from reference import Spec

FAST = [name for name in GEMM if name != "general"]
#: (N, K): one strip and one chunk, ragged ones, K beyond 32 chunks, K that one SIMD-group cannot take alone.
SHAPES = ((70, 264), (5, 9), (33, 100), (64, 128), (130, 24), (6, 1032))


def rows_for(kernel: str) -> tuple[int, ...]:
    """M on both sides of a kernel's tile of tokens."""
    if kernel == "general":
        return (1, 2, 3)
    tokens = int(kernel.rsplit("_m", 1)[1])
    return (1, max(1, tokens - 1), tokens) if kernel.startswith("stream") else (1, tokens - 3, tokens + 2)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("kernel", GEMM)
def test_every_instantiation(metal: Any, kernel: str, kind: str, dtype: torch.dtype) -> None:
    """Each kernel x format x zeros x dtype: group sizes, scale dtypes, perm, shapes and numbers of rows take turns."""
    format, zero_kind, scaling = cases.KINDS[kind]
    turn = int(cases.rng(kernel, kind, str(dtype)).integers(0, 1000))
    sizes = group_sizes(scaling)
    with forced(kernel):
        for i in range(2):
            N, K = SHAPES[(turn + i) % len(SHAPES)]
            fitting = [g for g in sizes if cases.fits(g, K)] or [-1]
            group = 128 if scaling == "block128" else fitting[(turn // 7 + i) % len(fitting)]
            spec = Spec(format, zero_kind, group, cases.SCALE_DTYPES[(turn + i) % 3], scaling, (turn + i) % 4 == 0)
            M = rows_for(kernel)[(turn + i) % 3]
            check_gemm(metal, Problem(spec, M, N, K, dtype, (None, dtype, torch.float32)[(turn + i) % 3]))


@pytest.mark.parametrize("kernel", ["stream_m1", "stream_m4", "matrix_m32"])
def test_every_group_size(metal: Any, kernel: str) -> None:
    """Groups of one chunk, of powers of two and of others, one that K cuts short, and one over all of K."""
    with forced(kernel):
        for i, group in enumerate((8, 16, 24, 32, 40, 64, 96, 128, 256, 384, -1)):
            for zero_kind in ("none", "int", "offset"):
                spec = Spec("int4", zero_kind, group, cases.SCALE_DTYPES[i % 3])
                check_gemm(metal, Problem(spec, 3 if kernel == "stream_m4" else 1, 11, 400, cases.DTYPES[i % 3]))


@pytest.mark.parametrize("M", [*range(1, 11), 31, 33, 64, 65])
def test_every_number_of_rows(metal: Any, M: int) -> None:
    """As selection would have it: no kernel is forced."""
    for i, kind in enumerate(("int4", "int3-int", "fp8_e4m3-block128", "nf4")):
        format, zero_kind, scaling = cases.KINDS[kind]
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 32, "bfloat16", scaling)
        check_gemm(metal, Problem(spec, M, 66, 136, cases.DTYPES[i % 3]))


@pytest.mark.parametrize("K", [256, 512, 1032, 2100])
def test_thread_order_does_not_matter(metal: Any, K: int) -> None:
    """The same bits, whichever thread and whichever threadgroup comes first. A K beyond one SIMD-group's 256 k gives
    others work: a missing barrier shows only then."""
    spec = Spec("int4", "int", 64, "float16")
    for kernel, M in (("stream_m1", 1), ("stream_m4", 3), ("matrix_m32", 9), ("matrix_m64", 9), ("general", 2)):
        if K == 2100 and kernel != "stream_m1":
            continue
        with forced(kernel):
            p = Problem(spec, M, 20, K, torch.bfloat16)
            results = []
            for order in ("forward", "reverse", "random"):
                metal.set_order(order, seed=K)
                results.append(check_gemm(metal, p))
            assert all(torch.equal(results[0], other) for other in results[1:]), kernel


@pytest.mark.parametrize("kernel", GEMM)
def test_one_hot_rows_read_out_the_weight(metal: Any, kernel: str) -> None:
    """x = a column of the identity: y is that column of W, rounded once, to the last bit."""
    for kind in cases.KINDS:
        format, zero_kind, scaling = cases.KINDS[kind]
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 32, "bfloat16", scaling)
        p = Problem(spec, 8, 5, 40, torch.bfloat16)
        tokens = 1 if kernel == "stream_m1" else 2 if kernel == "stream_m2" else 4 if kernel == "stream_m4" else 8
        for start in range(0, p.K, 8 if tokens >= 8 else 20):
            x = torch.eye(p.K, dtype=p.dtype)[start : start + tokens]
            with forced(kernel):
                y = gemm(metal, p, x)
            assert torch.equal(y, cases.dense(spec, p.N, p.K).t()[start : start + tokens].to(p.dtype)), (kind, start)


def test_rows_do_not_depend_on_each_other(metal: Any) -> None:
    """batch_invariant: a row's bits are the same at every M, and next to any neighbours."""
    for kind in ("int4", "int5-float", "fp8_e5m2"):
        format, zero_kind, _ = cases.KINDS[kind]
        p = Problem(Spec(format, zero_kind, 64, "float16"), 19, 37, 1100, torch.float16, flags=cases.BATCH_INVARIANT)
        x = p.x()
        whole = gemm(metal, p, x)
        for first, last in itertools.pairwise((0, 1, 3, 7, 15, 19)):
            assert torch.equal(gemm(metal, p, x[first:last]), whole[first:last]), (kind, first, last)


@pytest.mark.parametrize("kernel", FAST)
def test_outliers_do_not_spoil_the_others(metal: Any, kernel: str) -> None:
    """One activation of 1500 among values of 0.05, and weights of zero under it: the componentwise bound holds."""
    M = 1 if kernel == "stream_m1" else 2
    for zero_kind in ("none", "int", "float", "offset"):
        p = Problem(Spec("int4", zero_kind, 32, "float32"), M, 9, 96, torch.float32)
        x = 0.05 * cases.random_x(M, p.K)
        x[:, 7] = 1500.0
        with forced(kernel):
            y = gemm(metal, p, x)
        reference.assert_close(y, expected(p, x), (kernel, zero_kind))


@pytest.mark.parametrize("kernel", GEMM)
def test_nan_and_infinity_stay_in_their_row(metal: Any, kernel: str) -> None:
    M = 1 if kernel == "stream_m1" else 2
    p = Problem(Spec("int4", "none", 32, "float32"), M, 9, 70, torch.float32)
    for value in (float("nan"), float("inf")):
        x = p.x()
        x[M - 1, 69] = value
        with forced(kernel):
            y = gemm(metal, p, x)
        assert not y[M - 1].isfinite().any() and (M == 1 or y[0].isfinite().all())


def test_inputs_of_any_shape(metal: Any) -> None:
    """Leading dimensions, strides, rows that start anywhere, none at all."""
    p = Problem(Spec("int4", "int", 32, "float16"), 6, 10, 100, torch.bfloat16)
    w = pack(metal, p.weight)
    for x in (
        cases.random_x(2, 3, p.K, dtype=p.dtype),
        cases.random_x(6, p.K + 3, dtype=p.dtype)[:, 1 : p.K + 1],
        cases.random_x(p.K, 6, dtype=p.dtype).t(),
        cases.random_x(12, p.K, dtype=p.dtype)[::2],
        cases.random_x(p.K, dtype=p.dtype),
        cases.random_x(0, p.K, dtype=p.dtype),
    ):
        y = metal.ops.gemm(on(metal, x), w, None, p.N, p.K, p.desc, 0).cpu()
        assert y.shape == (*x.shape[:-1], p.N)
        reference.assert_close(y, expected(p, x), x.shape)


def test_linear_and_out_are_gemm(metal: Any) -> None:
    p = Problem(Spec("int6", "none", 32, "bfloat16"), 3, 10, 64, torch.float16, torch.float32)
    y, w, x = gemm(metal, p), pack(metal, p.weight), on(metal, p.x())
    bias = on(metal, p.bias_tensor())
    assert torch.equal(metal.ops.linear(x, w, bias, p.N, p.K, p.desc, 0).cpu(), y)
    out = torch.empty(3, 10, dtype=p.dtype, device=metal.device)
    metal.ops.gemm_out(x, w, bias, p.N, p.K, p.desc, 0, out, None)
    assert torch.equal(out.cpu(), y)


def test_wrong_arguments_are_refused_with_their_values(metal: Any) -> None:
    p = Problem(Spec("int4"), 2, 8, 64)
    w, x = pack(metal, p.weight), on(metal, p.x())
    ops = metal.ops
    with pytest.raises(RuntimeError, match=r"x of shape \[2, 63\] has K=63 in its last dimension, the weight has K=64"):
        ops.gemm(x[:, :63], w, None, 8, 64, p.desc, 0)
    with pytest.raises(
        RuntimeError, match="the weight's layout is cpu_tile16, the Metal kernels read metal_tile4; pack"
    ):
        ops.gemm(x, w, None, 8, 64, cases.desc(p.spec, 1), 0)
    with pytest.raises(RuntimeError, match=r"w has shape \[\d+\], expected \[\d+\]"):
        ops.gemm(x, w, None, 12, 64, p.desc, 0)
    with pytest.raises(RuntimeError, match="x is int64, expected float32, float16 or bfloat16"):
        ops.gemm(x.long(), w, None, 8, 64, p.desc, 0)
    with pytest.raises(RuntimeError, match="flags=2 has unknown bits"):
        ops.gemm(x, w, None, 8, 64, p.desc, 2)
    buffer = torch.empty(w.numel() + 1, dtype=torch.uint8, device=metal.device)
    buffer[1:] = w
    with pytest.raises(RuntimeError, match="w must start on a 16-byte boundary"):
        ops.gemm(x, buffer[1:], None, 8, 64, p.desc, 0)


def test_strict_refuses_the_general_kernel(metal: Any) -> None:
    p = Problem(Spec("int4"), 2, 8, 64)
    _C.set_strict(True)
    try:
        gemm(metal, p)
        with forced("general"), pytest.raises(RuntimeError, match="LOWBIT_STRICT is set and only the general kernel"):
            gemm(metal, p)
    finally:
        _C.set_strict(False)


def test_explain_says_what_runs(metal: Any) -> None:
    """What explain() promises for the emulated device is what is launched."""
    if metal.name != "emulator":
        pytest.skip("only the emulator counts launches")
    for M in (1, 2, 3, 8, 9, 33):
        p = Problem(Spec("int4", "none", 32), M, 20, 64, torch.bfloat16)
        chosen = [
            name for name, reason in _C.explain("gemm", metal.model, M, p.N, p.K, p.desc, "bfloat16", 0) if not reason
        ]
        before = metal.kernels()
        gemm(metal, p)
        ran = [name for name, (launches, _) in metal.kernels().items() if launches != before[name][0]]
        assert ran == [f"{chosen[0].removeprefix('metal_').removesuffix('_apple7')}_int4_bf16"], (M, chosen)
