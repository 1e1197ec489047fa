"""gemm on CUDA: every instantiation of every kernel against fp64, on the emulator or on a device."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import cases
import problems
import reference
from kernel_cases import check_gemm, expected, forced, gemm, on
from lowbit import _C
from problems import A16, HALVES, Problem, cuda_desc, group_sizes, pack
from reference import Spec, exact16

FAST = [name for name in A16 if name != "general"]
#: (N, K): under one strip and one cell, over both, K that is no multiple of 8, several tiles.
SHAPES = ((130, 320), (63, 136), (65, 100), (1, 16), (64, 128), (200, 24))


def rows_for(kernel: str) -> tuple[int, ...]:
    """M on both sides of a kernel's tile of tokens."""
    tokens = int(kernel.rsplit("_m", 1)[1])
    return (1, tokens - 1, tokens) if kernel in problems.FEW else (1, tokens - 3, tokens + 2)


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "f16"])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("kernel", FAST)
def test_every_instantiation(backend: Any, kernel: str, kind: str, dtype: torch.dtype) -> None:
    """Each kernel x format x zeros x dtype: group sizes, scale dtypes, shapes and numbers of rows take turns."""
    format, zero_kind, scaling = cases.KINDS[kind]
    turn = cases.rng(kernel, kind).integers(0, 1000)
    sizes = group_sizes(scaling)
    with forced(kernel):
        for i in range(3):
            N, K = SHAPES[(turn + i) % len(SHAPES)]
            fitting = [g for g in sizes if cases.fits(g, K)] or [-1]
            group = 128 if scaling == "block128" else fitting[(turn // 7 + i) % len(fitting)]
            scale_dtype = cases.SCALE_DTYPES[(turn + i) % 3]
            spec = Spec(format, zero_kind, group, scale_dtype, scaling)
            M = rows_for(kernel)[(turn + i) % 3]
            check_gemm(backend, Problem(spec, M, N, K, dtype, (None, dtype, torch.float32)[i]))


@pytest.mark.parametrize("kernel", FAST)
def test_every_group_size(backend: Any, kernel: str) -> None:
    """Groups inside a cell's step, across steps and across tiles, with scales in the tile and in the table."""
    with forced(kernel):
        for i, group in enumerate((16, 32, 48, 64, 80, 96, 112, 128, 160, 256, 384, -1)):
            for zero_kind in ("none", "int", "offset"):
                spec = Spec("int4", zero_kind, group, cases.SCALE_DTYPES[i % 3])
                check_gemm(backend, Problem(spec, 5, 70, 400, HALVES[i % 2]))


@pytest.mark.parametrize("M", [*range(1, 18), 31, 33, 64, 65, 129])
def test_every_number_of_rows(backend: Any, M: int) -> None:
    """As selection would have it: no kernel is forced."""
    for i, kind in enumerate(("int4", "int3-int", "fp8_e4m3-block128", "nf4")):
        format, zero_kind, scaling = cases.KINDS[kind]
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 32, "bfloat16", scaling)
        check_gemm(backend, Problem(spec, M, 66, 200, HALVES[i % 2]))


@pytest.mark.parametrize("kernel", FAST)
@pytest.mark.parametrize("sms", [1, 2, 3, 7, 40])
def test_tiles_that_blocks_share(backend: Any, kernel: str, sms: int) -> None:
    """Whatever the number of multiprocessors: ranges that begin and end inside tiles, or hold many of them."""
    backend.set_device(90, sms)
    spec = Spec("int4", "int", 64, "float16")
    with forced(kernel):
        for N, K in ((130, 1300), (400, 640)):
            check_gemm(backend, Problem(spec, 9, N, K, torch.float16, torch.float16))


@pytest.mark.parametrize("kernel", FAST)
def test_thread_order_does_not_matter(backend: Any, kernel: str) -> None:
    """The same bits, whichever thread and whichever block comes first: no barrier is missing, no sum depends on timing."""
    backend.set_device(90, 3)
    with forced(kernel):
        for spec in (
            Spec("int4", "none", 128, "bfloat16"),
            Spec("int3", "int", 32, "float16"),
            Spec("nf4", "none", 64),
        ):
            p = Problem(spec, 11, 140, 800, torch.bfloat16)
            results = []
            for order in ("forward", "reverse", "random"):
                backend.set_order(order)
                results.append(check_gemm(backend, p))
            assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kernel", FAST)
def test_same_bits_every_time(backend: Any, kernel: str) -> None:
    with forced(kernel):
        p = Problem(Spec("int4", "int", 64, "float16"), 9, 200, 640)
        w, x = pack(backend, p.weight), on(backend, p.x())
        first = backend.ops.gemm(x, w, None, p.N, p.K, p.desc, 0)
        for _ in range(backend.repeats):
            assert torch.equal(backend.ops.gemm(x, w, None, p.N, p.K, p.desc, 0), first)


@pytest.mark.parametrize("kernel", A16)
def test_one_hot_rows_read_out_the_weight(backend: Any, kernel: str) -> None:
    """x = a column of the identity: y is that column of W, rounded once, to the last bit."""
    for kind in cases.KINDS:
        if not exact16(cases.KINDS[kind][0]) and kernel in problems.FEW:
            continue  # levels are rounded to 16 bits before the scale: within the bound, not to the bit
        format, zero_kind, scaling = cases.KINDS[kind]
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 32, "bfloat16", scaling)
        p = Problem(spec, 8, 65, 72, torch.bfloat16)
        for start in range(0, p.K, 24):
            x = torch.eye(p.K, dtype=p.dtype)[start : start + 8]
            with forced(kernel):
                y = gemm(backend, p, x)
            assert torch.equal(y, cases.dense(spec, p.N, p.K).t()[start : start + 8].to(p.dtype)), (kind, start)


@pytest.mark.parametrize("kernel", FAST)
def test_an_outlier_spoils_nothing(backend: Any, kernel: str) -> None:
    """One activation of 1500 among values of 0.05, where the weight is zero although its code is not."""
    for kind in ("int4", "int4-int", "int8-offset", "int3-float", "fp8_e4m3", "fp4_e2m1", "nf4"):
        format, zero_kind, _ = cases.KINDS[kind]
        for group, column in ((32, 77), (128, 0), (-1, 263)):
            spec = Spec(format, zero_kind, group)
            weight = cases.with_zero_column(spec, 48, 264, column)
            for dtype in HALVES:
                p = Problem(spec, 3, 48, 264, dtype)
                x = cases.random_x(3, 264) * 0.05
                x[1, column] = 1500.0
                x = x.to(dtype)
                with forced(kernel):
                    y = gemm(backend, p, x, weight)
                reference.assert_close(y, expected(p, x, weight), (kernel, spec, dtype))


@pytest.mark.parametrize("kernel", A16)
def test_nan_and_infinity_stay_in_their_row(backend: Any, kernel: str) -> None:
    spec = Spec("int4", "int", 32, "bfloat16")
    p = Problem(spec, 7, 70, 136, torch.bfloat16)
    for bad in (torch.nan, torch.inf):
        x = p.x()
        x[2, 133] = bad
        with forced(kernel):
            y = gemm(backend, p, x)
        assert not torch.isfinite(y[2]).any()
        assert torch.isfinite(y[torch.arange(7) != 2]).all()
    weight = cases.random_weight(spec, 70, 136)
    scales = weight.scales.clone()
    scales[65, 4] = torch.nan
    weight = dataclasses.replace(weight, scales=scales)
    with forced(kernel):
        y = gemm(backend, p, weight=weight)
    assert y[:, 65].isnan().all() and torch.isfinite(y[:, torch.arange(70) != 65]).all()


def test_activations_as_they_come(backend: Any) -> None:
    """Strides, offsets that are not multiples of 16 bytes, odd K, act-order, leading dimensions."""
    for has_perm, K in itertools.product((False, True), (64, 100, 127, 136)):
        spec = Spec("int4", "int", 32, "float16", has_perm=has_perm)
        for M in (3, 40):
            p = Problem(spec, M, 66, K, torch.float16)
            x, want = p.x(), expected(p)
            w = pack(backend, p.weight)
            wide = torch.full((M, 2 * K + 3), torch.nan, dtype=p.dtype)
            wide[:, 1 : K + 1] = x
            spaced = torch.full((M, 2 * K), torch.nan, dtype=p.dtype)
            spaced[:, ::2] = x
            for form in (
                on(backend, x),
                on(backend, wide)[:, 1 : K + 1],
                on(backend, spaced)[:, ::2],
                on(backend, x.t().contiguous()).t(),
            ):
                y = backend.ops.gemm(form, w, None, p.N, K, p.desc, 0)
                reference.assert_close(y.cpu(), want, (p, form.stride()))
            y = backend.ops.gemm(on(backend, x).view(1, M, 1, K), w, None, p.N, K, p.desc, 0)
            assert y.shape == (1, M, 1, p.N)
            reference.assert_close(y.cpu().view(M, p.N), want, p)
    empty = backend.ops.gemm(on(backend, p.x())[:0], w, None, p.N, K, p.desc, 0)
    assert empty.shape == (0, p.N)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_general_kernel(backend: Any, kind: str) -> None:
    """Group sizes that the others refuse, fp32 activations, perm."""
    format, zero_kind, scaling = cases.KINDS[kind]
    sizes = (128,) if scaling == "block128" else (8, 24, 40, 32, -1)
    for i, group in enumerate(sizes):
        spec = Spec(format, zero_kind, group, cases.SCALE_DTYPES[i % 3], scaling, has_perm=i % 2 == 1)
        for dtype in cases.DTYPES:
            with forced("general"):
                check_gemm(backend, Problem(spec, (1, 5, 9)[i % 3], 37, 104, dtype, (None, dtype)[i % 2]))


def test_batch_invariant(backend: Any) -> None:
    """A row's bits depend neither on M nor on its neighbours."""
    for kind in ("int4", "int3-int", "fp8_e4m3-block128", "int6-offset"):
        format, zero_kind, scaling = cases.KINDS[kind]
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 64, "bfloat16", scaling)
        p = Problem(spec, 70, 130, 320, torch.bfloat16, flags=cases.BATCH_INVARIANT)
        w, x = pack(backend, p.weight), on(backend, p.x())
        whole = backend.ops.gemm(x, w, None, p.N, p.K, p.desc, p.flags)
        reference.assert_close(whole.cpu(), expected(p), p)
        for rows in (slice(0, 1), slice(3, 5), slice(60, 70), slice(2, 35)):
            part = backend.ops.gemm(x[rows].contiguous(), w, None, p.N, p.K, p.desc, p.flags)
            assert torch.equal(part, whole[rows]), (kind, rows)


@pytest.mark.parametrize("kernel", A16)
def test_out_and_workspace(backend: Any, kernel: str) -> None:
    """Poisoned outputs are overwritten; a workspace is used as it is and left clean; too small a one is refused."""
    backend.set_device(90, 5)
    spec = Spec("int4", "int", 32, "float16", has_perm=True)
    for M, N, K in ((3, 130, 640), (20, 66, 1000)):
        p = Problem(spec, M, N, K, torch.float16)
        w, x = pack(backend, p.weight), on(backend, p.x())
        with forced(kernel):
            size = _C.workspace_size("gemm_out", M, N, K, p.desc, backend.model)
            y = backend.ops.gemm(x, w, None, N, K, p.desc, 0)
            workspace = torch.zeros(size, dtype=torch.uint8, device=backend.device)
            for _ in range(3):
                out = torch.full((M, N), torch.nan, dtype=p.dtype, device=backend.device)
                backend.ops.gemm_out(x, w, None, N, K, p.desc, 0, out, workspace)
                assert torch.equal(out, y)
            if size > 1024:
                with pytest.raises(RuntimeError, match="workspace has"):
                    backend.ops.gemm_out(x, w, None, N, K, p.desc, 0, out, workspace[: size // 2])


def test_errors(backend: Any) -> None:
    spec = Spec("int4", "none", 32)
    p = Problem(spec, 3, 64, 64)
    w, x = pack(backend, p.weight), on(backend, p.x())
    with pytest.raises(RuntimeError, match="K=63"):
        backend.ops.gemm(x[:, :63], w, None, 64, 64, p.desc, 0)
    with pytest.raises(RuntimeError, match="cpu_tile16"):
        backend.ops.gemm(x, w, None, 64, 64, cases.cpu_desc(spec), 0)
    with pytest.raises(RuntimeError, match="shape"):
        backend.ops.gemm(x, w[:-1], None, 64, 64, p.desc, 0)
    with pytest.raises(RuntimeError, match="flags=2"):
        backend.ops.gemm(x, w, None, 64, 64, p.desc, 2)
    with pytest.raises(RuntimeError, match="bias"):
        backend.ops.gemm(x, w, on(backend, torch.zeros(65)), 64, 64, p.desc, 0)
    with pytest.raises(RuntimeError, match="int64"):
        backend.ops.gemm(x.long(), w, None, 64, 64, p.desc, 0)
    assert cuda_desc(spec) == p.desc
