"""quantize on Metal: the CPU's bits, for every format, with and without the search, whatever the weights are.

Also on a Mac, and there above all: the shaders' arithmetic (csrc/metal/shaders/ieee.h) must not depend on what the GPU makes of
subnormal numbers, division and contraction.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import cases
from cases import DTYPES, KINDS, SCALE_DTYPES, desc
from kernel_cases import ORDERS, on, same_bits, same_but_nan
from metal_problems import metal_desc
from reference import Spec

#: What a row of a weight may hold.
STYLES = {
    "gaussian": lambda r: r,
    "heavy": lambda r: r**3,
    "zeros of both signs": lambda r: r * 0,
    "constant": lambda r: r * 0 + 0.3,
    "negative": lambda r: -r.abs() - 1,
    "from zero": lambda r: r.relu(),
    "up to zero": lambda r: -r.relu(),
    "outlier": lambda r: torch.cat([r[:-1], r[-1:] * 1e4]),
    "ties": lambda r: (r * 4).round() / 2,
    "one value": lambda r: torch.nn.functional.one_hot(torch.tensor(3), len(r)).float() * 7,
    "small": lambda r: r * 1e-12,
    "tiny": lambda r: r * 1e-30,
    "subnormal": lambda r: r * 1e-41,
    "large": lambda r: r * 1e13,
    "huge": lambda r: r * 1e38,
    "infinite": lambda r: torch.cat([r[:-1], r[-1:].sign() * torch.inf]),
    "NaN first": lambda r: torch.cat([r[:1] * torch.nan, r[1:]]),
    "NaN": lambda r: torch.cat([r[:-1], r[-1:] * torch.nan]),
}


def weight_of(K: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A row of each style."""
    rows = torch.randn(len(STYLES), K, generator=cases.generator(K, seed))
    return torch.stack([make(row) for make, row in zip(STYLES.values(), rows, strict=True)]).to(dtype)


def check(metal: Any, weight: torch.Tensor, spec: Spec, search: bool, *rest: torch.Tensor | None) -> None:
    found = metal.ops.quantize(on(metal, weight), desc(spec), search, *(on(metal, t) for t in rest))
    expected = torch.ops.lowbit.quantize(weight, desc(spec), search, *rest)
    for name, a, b in zip(("codes", "scales", "zeros"), found, expected, strict=True):
        assert a.device.type == metal.device and a.shape == b.shape and a.dtype == b.dtype
        same = same_bits if b.element_size() == 1 else same_but_nan
        if same(a, b):
            continue
        wrong = (a.cpu().float() != b.float()).flatten(1).any(1).nonzero().flatten().tolist()
        raise AssertionError(f"{spec} {list(weight.shape)} {weight.dtype} search={search}: {name} of rows {wrong}")


@pytest.mark.parametrize("search", [False, True], ids=["nearest", "search"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("block128")])
def test_every_format(metal: Any, kind: str, search: bool) -> None:
    """Group sizes and K on every side of 8 codes and 16 lanes; dtypes, scales, importance and orders take turns."""
    format, zero_kind, _ = KINDS[kind]
    for i, (size, K) in enumerate(((8, 13), (40, 40), (24, 100), (-1, 75), (-1, 7))):
        metal.set_order(ORDERS[i % 3], seed=i)
        spec = Spec(format, zero_kind, size, SCALE_DTYPES[(i + len(kind)) % 3])
        importance = torch.rand(K, generator=cases.generator(K)) ** 4 if i % 2 else None
        check(metal, weight_of(K, DTYPES[(i + search) % 3], i), spec, search, importance)


@pytest.mark.parametrize("search", [False, True], ids=["nearest", "search"])
def test_every_scale_dtype(metal: Any, search: bool) -> None:
    for i, (kind, scale_dtype) in enumerate(
        itertools.product(
            ("int4", "int3-int", "int2-float", "int6-offset", "nf4", "iq4_nl", "fp4_e2m1"),
            (*SCALE_DTYPES, "e8m0", "e4m3"),
        )
    ):
        format, zero_kind, _ = KINDS[kind]
        if zero_kind in ("float", "offset") and scale_dtype in ("e8m0", "e4m3"):
            continue
        metal.set_order(ORDERS[i % 3], seed=i)
        check(metal, weight_of(35, DTYPES[i % 3], i), Spec(format, zero_kind, 16, scale_dtype), search, None)


def test_a_scale_of_all_scales(metal: Any) -> None:
    spec = Spec("fp4_e2m1", "none", 16, "e4m3", "two_level", False, -1, "float32")
    for i, unit in enumerate((0.01, 3.7, 1e-20)):
        check(metal, weight_of(50, DTYPES[i], i), spec, bool(i % 2), None, torch.tensor([unit]))


@pytest.mark.parametrize("search", [False, True], ids=["nearest", "search"])
def test_long_groups(metal: Any, search: bool) -> None:
    """Eight SIMD-groups share one: rows of 1024 and more, and blocks."""
    for i, (kind, K) in enumerate((("int4-offset", 1031), ("nf4", 2056), ("int3", 1024))):
        metal.set_order(ORDERS[i], seed=i)
        format, zero_kind, _ = KINDS[kind]
        weight = weight_of(K, DTYPES[i], i)[[0, 2, 7, 11 + i]]
        check(metal, weight, Spec(format, zero_kind, -1, SCALE_DTYPES[i]), search, torch.rand(K) if i == 2 else None)
    for i, kind in enumerate(("fp8_e4m3-block128", "fp8_e5m2-block128")):
        format, zero_kind, scaling = KINDS[kind]
        for N, K in ((130, 131), (5, 260)):
            weight = cases.random_x(N, K, dtype=DTYPES[i])
            check(metal, weight, Spec(format, zero_kind, 128, SCALE_DTYPES[i], scaling), search, torch.rand(K))


@pytest.mark.parametrize("kind", ["int2", "int4-int", "int8", "int8-offset", "fp8_e4m3"])
def test_the_search_where_estimates_say_little(metal: Any, kind: str) -> None:
    """Weights that a candidate meets exactly, and importance that no bound holds for: then all are summed."""
    format, zero_kind, _ = KINDS[kind]
    K = 64
    levels = torch.randint(-3, 4, (6, K), generator=cases.generator(K)) * torch.tensor(
        [[1.0], [0.37], [1e-3], [7.0], [3e-7], [1e8]]
    )
    noisy = levels * (1 + 1e-6 * torch.randn(6, K, generator=cases.generator(K, 1)))
    rand = torch.rand(K, generator=cases.generator(K, 2))
    importances = (None, rand, rand * 1e-30, rand * 1e30, rand - 0.1, rand * 0, rand.where(rand > 0.1, torch.nan))
    for importance in importances:
        check(metal, torch.cat([levels, noisy]), Spec(format, zero_kind, 32, "float32"), True, importance)


def test_strides_do_not_matter(metal: Any) -> None:
    wide = cases.random_x(7, 101)
    spec = Spec("int4", "int", 16, "float16")
    for view in (wide[:, 3:83], wide[::2, :80], wide[:, 1:81:2], cases.random_x(20, 31).t()):
        check(metal, view, spec, False, None)
        check(metal, view, spec, True, torch.rand(view.shape[1]))


def test_what_is_packed_stays_on_the_device(metal: Any) -> None:
    """quantize, then pack, without the CPU: the weight that the CPU makes."""
    spec = Spec("int4", "int", 32, "bfloat16")
    weight = cases.random_x(21, 96)
    codes, scales, zeros = metal.ops.quantize(on(metal, weight), desc(spec), True, None)
    w = metal.ops.pack(codes, scales, zeros, None, 21, 96, metal_desc(spec))
    on_cpu = torch.ops.lowbit.quantize(weight, desc(spec), True, None)
    assert w.device.type == metal.device
    assert same_bits(w, torch.ops.lowbit.pack(*on_cpu, None, 21, 96, metal_desc(spec)))
