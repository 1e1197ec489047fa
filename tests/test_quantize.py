"""quantize: the same bits as the reference's round-to-nearest, on every ISA and thread count."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

import reference
from cases import DTYPES, KINDS, LARGE, SCALE_DTYPES, desc, generator, specs
from lowbit import _C, ops
from reference import Spec


def _gaussian(N: int, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, K, generator=generator(N, K)).to(dtype)


def _assert_same(
    got: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], want: reference.Weight, where: str
) -> None:
    packed, scales, zeros = got
    assert scales.dtype == want.scales.dtype and torch.equal(scales, want.scales), f"{where}: scales"
    if want.zeros is None:
        assert zeros is None, f"{where}: zeros appeared"
    else:
        assert zeros is not None and zeros.dtype == want.zeros.dtype, f"{where}: zeros"
        assert torch.equal(zeros, want.zeros), f"{where}: zeros"
    codes = reference.unpack_stream(packed.numpy(), want.K, want.spec.bits)
    wrong = np.argwhere(codes != want.codes)
    assert len(wrong) == 0, f"{where}: {len(wrong)} codes differ, the first at {wrong[0]}"
    assert torch.equal(packed, want.packed), f"{where}: bits past K are not zero"


@functools.cache  # the reference is slow, and the same for every ISA
def _expected(kind: str) -> list[tuple[torch.Tensor, reference.Weight]]:
    cases = []
    for i, (spec, N, K) in enumerate(specs(kind)):
        if N * spec.groups(K) > 1500:  # a group is a step of a Python loop there
            continue
        weight = _gaussian(N, K, DTYPES[i % 3])
        cases.append((weight, reference.quantize(weight, dataclasses.replace(spec, has_perm=False))))
    return cases


@pytest.mark.parametrize("kind", KINDS)
def test_round_to_nearest_exactly(kind: str, isa: str) -> None:
    for weight, expected in _expected(kind):
        _assert_same(ops.quantize(weight, desc(expected.spec)), expected, f"{expected.spec} {list(weight.shape)}")


ODD_ROWS = {
    "zeros": lambda r: r * 0,
    "constant": lambda r: r * 0 + 0.3,
    "negative constant": lambda r: r * 0 - 2.5,
    "positive": lambda r: r.abs() + 1,
    "negative": lambda r: -r.abs() - 1,
    "one outlier": lambda r: torch.cat([r[:-1], r[-1:] * 1e4]),
    "tiny": lambda r: r * 1e-30,
    "subnormal scales": lambda r: r * 1e-8,
    "large": lambda r: r * 1e4,
    "one value": lambda r: torch.nn.functional.one_hot(torch.tensor(3), len(r)).float() * 7,
    "ties": lambda r: (r * 4).round() / 2,
}


@functools.cache
def _expected_odd(kind: str) -> list[tuple[torch.Tensor, reference.Weight]]:
    format, zero_kind, scaling = KINDS[kind]
    weight = torch.stack([make(_gaussian(1, 40)[0]) for make in ODD_ROWS.values()])
    # In a block of 128 x 128 the rows would share a scale, so there each is a weight of its own.
    weights = list(weight.split(1)) if scaling == "block128" else [weight]
    size = 128 if scaling == "block128" else 40
    kinds = [Spec(format, zero_kind, size, scale_dtype, scaling) for scale_dtype in SCALE_DTYPES]
    return [(w, reference.quantize(w, spec)) for spec in kinds for w in weights]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_groups(kind: str, isa: str) -> None:
    for weight, expected in _expected_odd(kind):
        _assert_same(ops.quantize(weight, desc(expected.spec)), expected, str(expected.spec))


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_at_most_half_a_step(kind: str) -> None:
    """What round-to-nearest promises; the reference could share a wrong formula, this cannot."""
    format, zero_kind, scaling = KINDS[kind]
    spec = Spec(format, zero_kind, 128 if scaling == "block128" else 32, "float32", scaling)
    N, K = 17, 96
    weight = _gaussian(N, K)
    packed, scales, zeros = ops.quantize(weight, desc(spec))
    W = ops.dequantize(packed, scales, zeros, None, N, K, desc(spec))
    step = torch.from_numpy(reference.spread(scales.numpy(), spec, N, K))
    error = (W - weight).abs()
    if not spec.coded:
        # Symmetric codes reach from -2^(b-1) to 2^(b-1) - 1 and absmax stands at 2^(b-1) - 1/2: half a step from both ends.
        assert (error <= 0.5001 * step).all()
        return
    code = np.sort(reference.CODES[format][np.isfinite(reference.CODES[format])])
    gap = torch.from_numpy(np.diff(code)).max() * step
    assert (error <= 0.5001 * gap).all()
    relative = {"fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3, "fp4_e2m1": 2.0**-2}.get(format)
    if relative is not None:
        smallest = float(code[code > 0].min()) * step
        assert (error <= 1.0001 * torch.maximum(relative * weight.abs(), 0.5 * smallest)).all()


def test_representable_weights_come_back() -> None:
    """What was dequantized quantizes to the same values again, where the extremes of a group are codes.

    Not so for symmetric integers, whose absmax lies half a step beyond the largest positive code, nor for IQ4_NL, which has no
    code for absmax either.
    """
    for kind, (format, zero_kind, scaling) in KINDS.items():
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 16, "float32", scaling)
        if (not spec.coded and zero_kind == "none") or format == "iq4_nl":
            continue
        first = ops.dequantize(*ops.quantize(_gaussian(5, 64), desc(spec)), None, 5, 64, desc(spec))
        again = ops.dequantize(*ops.quantize(first, desc(spec)), None, 5, 64, desc(spec))
        torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-6, msg=kind)


@pytest.mark.parametrize("search", [False, True])
def test_same_bits_on_every_isa_and_thread_count(search: bool, threads: None) -> None:
    before = _C.isa()
    weight = _gaussian(*LARGE)
    weight[3, 7] = 40.0
    try:
        for kind, (format, zero_kind, scaling) in KINDS.items():
            spec = Spec(format, zero_kind, 128 if scaling == "block128" else 40, "bfloat16", scaling)
            rows = weight[: 140 if scaling == "block128" else 20] if search else weight
            results = []
            for i, level in enumerate(_C.isa_levels()):
                _C.set_isa(level)
                torch.set_num_threads((1, 2, 3, 5)[i % 4])
                results.append(ops.quantize(rows, desc(spec), search))
            _C.set_isa(before)
            torch.set_num_threads(7)
            results.append(ops.quantize(rows, desc(spec), search))
            for packed, scales, zeros in results[1:]:
                assert torch.equal(packed, results[0][0]), kind
                assert torch.equal(scales, results[0][1]), kind
                assert zeros is None or torch.equal(zeros, results[0][2]), kind
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_its_group_and_no_other(kind: str, isa: str) -> None:
    format, zero_kind, scaling = KINDS[kind]
    block = scaling == "block128"
    spec = Spec(format, zero_kind, 128 if block else 16, "bfloat16", scaling)
    N, K = 130 if block else 4, 160
    for position in (0, 5, 15):
        weight = _gaussian(N, K)
        weight[2, 128 + position] = torch.nan
        for search in (False, True):
            packed, scales, zeros = ops.quantize(weight, desc(spec), search)
            W = ops.dequantize(packed, scales, zeros, None, N, K, desc(spec))
            hit = torch.zeros(N, K, dtype=torch.bool)
            hit[(slice(0, 128), slice(128, 160)) if block else (2, slice(128, 144))] = True
            assert scales.isnan().sum() == 1
            assert W[hit].isnan().all() and W[~hit].isfinite().all()


def test_infinity_is_not_hidden() -> None:
    for kind, (format, zero_kind, scaling) in KINDS.items():
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 16, "float32", scaling)
        for value in (torch.inf, -torch.inf):
            weight = _gaussian(2, 32)
            weight[1, 3] = value
            for search in (False, True):
                packed, scales, zeros = ops.quantize(weight, desc(spec), search)
                W = ops.dequantize(packed, scales, zeros, None, 2, 32, desc(spec))
                assert not W[1, 3].isfinite(), (kind, value)
                assert scaling == "block128" or W[0].isfinite().all()


def test_strides_do_not_matter() -> None:
    spec = Spec("int4", "int", 16, "float16")
    weight = _gaussian(31, 48)
    expected = ops.quantize(weight, desc(spec))
    wide = torch.zeros(62, 97)
    wide[::2, 1:] = weight.repeat_interleave(2, 1)
    for view in (weight.t().contiguous().t(), wide[::2, 1::2]):
        assert torch.equal(view, weight) and not view.is_contiguous()
        for got, want in zip(ops.quantize(view, desc(spec)), expected, strict=True):
            assert torch.equal(got, want)
    column = weight[:, :1].expand(31, 48)
    for got, want in zip(ops.quantize(column, desc(spec)), ops.quantize(column.contiguous(), desc(spec)), strict=True):
        assert torch.equal(got, want)


def test_layout_is_ignored() -> None:
    weight = _gaussian(16, 32)
    plain = ops.quantize(weight, desc(Spec("int4", group_size=16)))
    other = ops.quantize(weight, desc(Spec("int4", group_size=16), layout=1))
    assert torch.equal(plain[0], other[0]) and torch.equal(plain[1], other[1])


@pytest.mark.parametrize("kind", KINDS)
def test_flush_to_zero_changes_nothing(kind: str, isa: str) -> None:
    """torch.set_flush_denormal is a thread's setting: it must not decide what an artifact contains."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush")
    try:
        got = [ops.quantize(weight, desc(expected.spec)) for weight, expected in _expected_odd(kind)]
    finally:
        torch.set_flush_denormal(False)
    for result, (_, expected) in zip(got, _expected_odd(kind), strict=True):
        _assert_same(result, expected, str(expected.spec))
