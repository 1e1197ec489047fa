"""gemm_grad_input on Metal: dx = dy @ W against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
import reference
from kernel_cases import expected_grad as expected
from kernel_cases import forced, on
from metal_problems import GRAD, group_sizes, metal_desc, pack
from reference import Spec


def grad(metal: Any, dy: torch.Tensor, spec: Spec, N: int, K: int, flags: int = 0) -> torch.Tensor:
    w = pack(metal, cases.random_weight(spec, N, K))
    return metal.ops.gemm_grad_input(on(metal, dy), w, N, K, metal_desc(spec), flags).cpu()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("kernel", GRAD)
def test_every_instantiation(metal: Any, kernel: str, kind: str, dtype: torch.dtype) -> None:
    format, zero_kind, scaling = cases.KINDS[kind]
    turn = int(cases.rng("grad", kind, str(dtype)).integers(0, 1000))
    shapes = ((3, 70, 72), (66, 33, 24), (5, 130, 100))
    with forced(kernel):
        for i in range(2):
            M, N, K = shapes[(turn + i) % 3]
            fitting = [g for g in group_sizes(scaling) if cases.fits(g, K)] or [-1]
            group = 128 if scaling == "block128" else fitting[(turn + i) % len(fitting)]
            spec = Spec(format, zero_kind, group, cases.SCALE_DTYPES[(turn + i) % 3], scaling, has_perm=i == 1)
            dy = cases.random_x(M, N, dtype=dtype)
            reference.assert_close(grad(metal, dy, spec, N, K), expected(dy, spec, N, K), (kernel, spec, M))


@pytest.mark.parametrize("kernel", GRAD)
def test_orders_strides_and_empty(metal: Any, kernel: str) -> None:
    spec = Spec("int4", "int", 32, "bfloat16", has_perm=True)
    dy = cases.random_x(5, 130, dtype=torch.bfloat16)
    want = expected(dy, spec, 130, 100)
    wide = torch.full((5, 263), torch.nan, dtype=dy.dtype)
    wide[:, 1:131] = dy
    with forced(kernel):
        results = []
        for order in ("forward", "reverse", "random"):
            metal.set_order(order)
            for form in (dy, wide[:, 1:131]):
                results.append(grad(metal, form, spec, 130, 100))
        reference.assert_close(results[0], want, kernel)
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert grad(metal, dy[:0], spec, 130, 100).shape == (0, 100)


@pytest.mark.parametrize("kernel", GRAD)
def test_nan_stays_in_its_row(metal: Any, kernel: str) -> None:
    spec = Spec("int8", "none", 32)
    dy = cases.random_x(5, 70, dtype=torch.bfloat16)
    dy[3, 69] = torch.nan
    with forced(kernel):
        dx = grad(metal, dy, spec, 70, 40)
    assert torch.equal(dx.isnan().all(1), torch.arange(5) == 3)
    assert torch.equal(dx.isnan().any(1), torch.arange(5) == 3)
