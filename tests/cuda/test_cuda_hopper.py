"""The decode kernels for Hopper: every way to cut a problem into strips and clusters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import cases
import problems
import reference
from emulator.library import ORDERS
from kernel_cases import check_gemm, expected, forced, gemm, on
from lowbit import _C
from problems import Problem, pack
from reference import Spec

KERNELS = [name for name in problems.A16 if name.startswith("hopper_stream_m")]
PLANS = [f"{strips}x{cluster}" for strips in (1, 2, 4) for cluster in (1, 2, 4, 8)]
INT4 = Spec("int4", "int", 32, "float16")


def of_integers(spec: Spec, N: int, K: int) -> Any:
    """A weight of whole numbers: scales and zeros of every row and group are powers of two and small."""
    weight = cases.random_weight(spec, N, K)
    scales = torch.exp2(torch.arange(weight.scales.numel()) % 3).view_as(weight.scales).to(weight.scales.dtype)
    return dataclasses.replace(weight, scales=scales)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_whole_numbers_exactly_however_it_is_cut(backend: Any, kernel: str, plan: str) -> None:
    """x and W of whole numbers whose sums fp32 and fp16 hold: no error is small enough to pass. N ends within a block's
    strips, within a strip and within a vector; K within a tile and a cell; M within a tile of tokens; and stages are refilled."""
    tokens = int(kernel.rsplit("_m", 1)[1])
    for M, N, K in ((tokens, 300, 1100), (tokens + 3, 129, 1032), (1, 64, 3200)):
        spec = Spec("int4", "int", 64, "float16")
        p = Problem(spec, M, N, K, torch.float16)
        x = (torch.arange(M * K).view(M, K) * 7 % 3 - 1).to(p.dtype)
        x[:, ::5] = 0
        x[:, K // 3 : -2] *= (torch.arange(K - 2 - K // 3) % 16 == 0).to(
            p.dtype
        )  # or sums leave what fp16 holds exactly
        weight = of_integers(spec, N, K)
        want = x.double() @ weight.dense().double().t()
        assert want.abs().max() < 2048
        with forced(f"{kernel}:{plan}"):
            assert torch.equal(gemm(backend, p, x, weight).double(), want), (M, N, K)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_plan_within_the_bound(backend: Any, kernel: str, plan: str) -> None:
    """Against fp64, with scales in tiles, in tables (whose groups tiles share) and in blocks; and a bias."""
    turn = PLANS.index(plan)
    tokens = int(kernel.rsplit("_m", 1)[1])
    specs = (
        INT4,
        Spec("int3", "offset", 48, "float32"),
        Spec("int8", "int", 192, "bfloat16"),
        Spec("fp8_e4m3", "none", 128, "float32", "block128"),
        Spec("bnb_fp4", "none", -1, "bfloat16"),
        Spec("int2", "float", 16, "bfloat16"),
    )
    for i in range(2):
        spec = specs[(turn + 3 * i) % len(specs)]
        M = (tokens, 1, tokens - 3)[(turn + i) % 3]
        with forced(f"{kernel}:{plan}"):
            check_gemm(backend, Problem(spec, M, 200 + 64 * i, 1048, problems.HALVES[turn % 2], torch.float32))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_order_of_threads_and_blocks_does_not_matter(backend: Any, kernel: str) -> None:
    for plan in ("1x1", "1x8", "2x4", "4x2"):
        p = Problem(INT4, 7, 270, 1100, torch.bfloat16)
        results = []
        with forced(f"{kernel}:{plan}"):
            for seed, order in enumerate((*ORDERS, ORDERS[2])):
                backend.set_order(order, seed)
                results.append(gemm(backend, p))
        reference.assert_close(results[0], expected(p), (kernel, plan))
        assert all(torch.equal(results[0], other) for other in results[1:]), plan


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_the_launch_before_has_written(backend: Any, kernel: str) -> None:
    """x comes from a kernel of its own where it is gathered or not aligned: the wait for it must not be missing."""
    for has_perm, stride in ((True, 0), (False, 3)):
        spec = dataclasses.replace(INT4, has_perm=has_perm)
        p = Problem(spec, 5, 130, 520, torch.bfloat16)
        w, wide = pack(backend, p.weight), torch.full((5, 520 + stride), torch.nan, dtype=p.dtype)
        wide[:, :520] = p.x()
        with forced(kernel):
            y = backend.ops.gemm(on(backend, wide)[:, :520], w, None, p.N, p.K, p.desc, 0)
        reference.assert_close(y.cpu(), expected(p), p)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_plan_that_does_not_fit_is_refused(backend: Any, kernel: str) -> None:
    """A cluster of eight has no eight tiles of K to share out."""
    p = Problem(INT4, 3, 64, 896, torch.bfloat16)
    with (
        forced(f"{kernel}:1x8"),
        pytest.raises(
            RuntimeError,
            match=r"forced and cannot run .* clusters of 8 blocks have no share each in the 7 tiles of K=896",
        ),
    ):
        gemm(backend, p)
    with forced(f"{kernel}:1x4"):
        check_gemm(backend, p)


@pytest.mark.parametrize("plan", ["", "0x1", "1x", "2x4x", "a"])
def test_plans_are_spelled_out(plan: str) -> None:
    with pytest.raises(ValueError, match=r"only Hopper's take a plan, such as hopper_stream_m8:2x4"):
        _C.force_kernel(f"hopper_stream_m8:{plan}")
    with pytest.raises(ValueError, match="only Hopper's take a plan"):
        _C.force_kernel("stream_m8:2x4")
