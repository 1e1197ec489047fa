"""gemm: the same bits run after run and on any number of threads; with batch_invariant, whatever the other rows are."""

from __future__ import annotations

import pytest
import torch

from cases import BATCH_INVARIANT, DTYPES, INT8, KINDS, LARGE, cpu_desc, packed, random_x
from lowbit import ops
from reference import Spec

SHAPES = ((33, 100), (144, 384))
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 130, 257)


def _specs() -> list[Spec]:
    specs = []
    for i, (format, zero_kind, scaling) in enumerate(KINDS.values()):
        group_size = 128 if scaling == "block128" else (32, 40, 16, -1)[i % 4]
        specs.append(Spec(format, zero_kind, group_size, "bfloat16", scaling))
    return specs


@pytest.mark.parametrize("M", [1, 3, 8, 20, 257])
@pytest.mark.parametrize("flags", [0, BATCH_INVARIANT])
def test_same_bits_every_time(M: int, flags: int, isa: str, threads: None) -> None:
    shapes = [LARGE] if M < 8 else [(33, 100), (144, 384)] if M < 200 else [(33, 100)]
    for spec in _specs()[M % 3 :: 3]:
        for N, K in shapes:
            x, w = random_x(M, K), packed(spec, N, K)
            results = []
            for count in (1, 2, 2, 3):
                torch.set_num_threads(count)
                results.append(ops.gemm(x, w, None, N, K, cpu_desc(spec), flags))
            assert all(torch.equal(y, results[0]) for y in results), (spec, N, K)


@pytest.mark.parametrize("N", [5, 16, 48, 80])
def test_same_bits_where_threads_share_a_strip(N: int, isa: str, threads: None) -> None:
    """Fewer strips of 16 output features than threads, or not a multiple: rows are cut as well."""
    K = 160
    for i, spec in enumerate(_specs()[N % 4 :: 4]):
        w, d = packed(spec, N, K), cpu_desc(spec)
        for M in (63, 64, 129 + 64 * (i % 2)):
            x = random_x(M, K, dtype=DTYPES[i % len(DTYPES)])
            xq = ops.quantize_activation(x, INT8, symmetric=i % 2 == 0)
            results = []
            for count in (1, 2, 3, 4, 7):
                torch.set_num_threads(count)
                y = ops.gemm(x, w, None, N, K, d), ops.gemm_a8(*xq, w, None, N, K, d, 0, torch.float32)
                results.append(torch.cat([part.float() for part in y]))
            assert all(torch.equal(y, results[0]) for y in results), (spec, M)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant(dtype: torch.dtype, isa: str, threads: None) -> None:
    """A row alone, a row among others, a row among NaN: the same bits."""
    for i, spec in enumerate(_specs()):
        N, K = SHAPES[i % 2]
        w, d = packed(spec, N, K), cpu_desc(spec)
        x = random_x(257, K, dtype=dtype)
        alone = torch.cat([ops.gemm(x[m : m + 1], w, None, N, K, d, BATCH_INVARIANT) for m in range(20)])
        for M in ROWS:
            torch.set_num_threads(1 + M % 2)
            y = ops.gemm(x[:M], w, None, N, K, d, BATCH_INVARIANT)
            assert torch.equal(y[:20], alone[:M]), (spec, N, K, M)
        for m in (0, 6, 19):
            neighbours = torch.full_like(x[:20], torch.nan)
            neighbours[m] = x[m]
            y = ops.gemm(neighbours, w, None, N, K, d, BATCH_INVARIANT)
            assert torch.equal(y[m], alone[m]), (spec, N, K, m)


def test_position_in_the_batch_does_not_matter() -> None:
    """batch_invariant again: shuffled rows give shuffled results."""
    spec = Spec("int4", "none", 32, "bfloat16")
    N, K = SHAPES[1]
    x = random_x(70, K)
    order = torch.randperm(70)
    y = ops.gemm(x, packed(spec, N, K), None, N, K, cpu_desc(spec), BATCH_INVARIANT)
    shuffled = ops.gemm(x[order], packed(spec, N, K), None, N, K, cpu_desc(spec), BATCH_INVARIANT)
    assert torch.equal(shuffled, y[order])


def test_neighbours_never_leak_without_the_flag(isa: str) -> None:
    """Bits may depend on M, but never on what stands in other rows."""
    for spec in _specs()[::4]:
        N, K = SHAPES[0]
        for M in (2, 4, 8, 20):
            x = random_x(M, K)
            y = ops.gemm(x, packed(spec, N, K), None, N, K, cpu_desc(spec))
            for m in (0, M - 1):
                other = torch.full_like(x, torch.nan)
                other[m] = x[m]
                assert torch.equal(ops.gemm(other, packed(spec, N, K), None, N, K, cpu_desc(spec))[m], y[m])
