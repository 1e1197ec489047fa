"""gemm_grad_input on CUDA: dx = dy @ W against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
import reference
from kernel_cases import expected_grad as expected
from kernel_cases import forced, on
from problems import GRAD, HALVES, cuda_desc, group_sizes, pack
from reference import Spec


def grad(backend: Any, dy: torch.Tensor, spec: Spec, N: int, K: int, flags: int = 0) -> torch.Tensor:
    w = pack(backend, cases.random_weight(spec, N, K))
    return backend.ops.gemm_grad_input(on(backend, dy), w, N, K, cuda_desc(spec), flags).cpu()


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "f16"])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("kernel", GRAD)
def test_every_instantiation(backend: Any, kernel: str, kind: str, dtype: torch.dtype) -> None:
    format, zero_kind, scaling = cases.KINDS[kind]
    sizes = group_sizes(scaling)
    turn = int(cases.rng("grad", kind).integers(0, 1000))
    with forced(kernel):
        for i, (M, N, K) in enumerate(((3, 130, 136), (66, 65, 200), (17, 200, 24))):
            fitting = [g for g in sizes if cases.fits(g, K)] or [-1]
            group = 128 if scaling == "block128" else fitting[(turn + i) % len(fitting)]
            spec = Spec(format, zero_kind, group, cases.SCALE_DTYPES[i], scaling, has_perm=i == 1)
            dy = cases.random_x(M, N, dtype=dtype)
            reference.assert_close(grad(backend, dy, spec, N, K), expected(dy, spec, N, K), (kernel, spec, M))


def test_general_cells(backend: Any) -> None:
    for i, group in enumerate((8, 24, 40, -1)):
        spec = Spec("int5", "float", group, cases.SCALE_DTYPES[i % 3], has_perm=i % 2 == 0)
        for dtype in cases.DTYPES:
            dy = cases.random_x(4, 70, dtype=dtype)
            reference.assert_close(grad(backend, dy, spec, 70, 104), expected(dy, spec, 70, 104), (spec, dtype))


@pytest.mark.parametrize("kernel", GRAD)
def test_orders_strides_and_empty(backend: Any, kernel: str) -> None:
    spec = Spec("int4", "int", 32, "bfloat16", has_perm=True)
    dy = cases.random_x(20, 130, dtype=torch.bfloat16)
    want = expected(dy, spec, 130, 100)
    wide = torch.full((20, 263), torch.nan, dtype=dy.dtype)
    wide[:, 1:131] = dy
    with forced(kernel):
        results = []
        for order in ("forward", "reverse", "random"):
            backend.set_order(order)
            for form in (dy, wide[:, 1:131]):
                results.append(grad(backend, form, spec, 130, 100))
        reference.assert_close(results[0], want, kernel)
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert grad(backend, dy[:0], spec, 130, 100).shape == (0, 100)


@pytest.mark.parametrize("kernel", GRAD)
def test_nan_stays_in_its_row(backend: Any, kernel: str) -> None:
    spec = Spec("int8", "none", 32)
    dy = cases.random_x(5, 70, dtype=torch.bfloat16)
    dy[3, 69] = torch.nan
    with forced(kernel):
        dx = grad(backend, dy, spec, 70, 40)
    assert torch.equal(dx.isnan().all(1), torch.arange(5) == 3)
    assert torch.equal(dx.isnan().any(1), torch.arange(5) == 3)
