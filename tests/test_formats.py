"""The format table against definitions written elsewhere: this repository's reference, and ml_dtypes where installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reference
from cases import ENUMS, FORMATS, KINDS, SCALED, SHAPES, cpu_desc, desc, specs
from lowbit import _C
from lowbit._checks import SCALE_DTYPES, packed_shape, parse, tables

ROWS = {row["name"]: row for row in _C.format_table()}


def test_every_format_has_a_reference() -> None:
    assert {name: row["bits"] for name, row in ROWS.items()} == reference.BITS
    assert {name for name, row in ROWS.items() if row["kind"] == "code"} == set(reference.CODES)
    assert {name: row["id"] for name, row in ROWS.items()} == ENUMS["format"]


def test_enum_values_never_change() -> None:
    """They are stored in artifacts and in compiled graphs."""
    names = ["int2", "int3", "int4", "int5", "int6", "int8", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4"]
    names += ["iq4_nl", "bnb_fp4"]
    assert list(ENUMS["format"].items())[:12] == [(name, i + 1) for i, name in enumerate(names)]
    assert ENUMS["zero_kind"] == {"none": 0, "int": 1, "float": 2, "offset": 3}
    dtypes = ("float32", "float16", "bfloat16", "e8m0", "e4m3", "uint4", "uint6", "int6", "int8", "dynamic8")
    assert [ENUMS["scale_dtype"][name] for name in dtypes] == list(range(10))
    assert ENUMS["scaling"] == {"group": 0, "block128": 1, "two_level": 2, "flat": 3}
    assert [ENUMS["layout"][name] for name in ("canonical", "cpu_tile16")] == [0, 1]
    assert ENUMS["flags"]["batch_invariant"] == 1


@pytest.mark.parametrize("name", list(reference.CODES))
def test_code_book(name: str) -> None:
    code = np.array(ROWS[name]["code"], np.float32)
    np.testing.assert_array_equal(code, reference.CODES[name])  # NaN equals NaN here
    number = ~np.isnan(code)
    np.testing.assert_array_equal(np.signbit(code[number]), np.signbit(reference.CODES[name][number]))
    finite = code[np.isfinite(code)]
    assert ROWS[name]["max"] == (finite.max() - finite.min()) / 2  # the largest, where both ends are alike


def test_books_ascend() -> None:
    """What the quantizer, which counts midpoints, and readers, which sort codes, take for granted."""
    for name in ("nf4", "iq4_nl", "bnb_fp4"):
        assert sorted(ROWS[name]["code"]) == ROWS[name]["code"], name


@pytest.mark.parametrize("name", list(reference.SCALE_CODES))
def test_scale_codes(name: str) -> None:
    row = next(row for row in _C.scale_table() if row["name"] == name)
    np.testing.assert_array_equal(np.array(row["code"], np.float32), reference.SCALE_CODES[name])
    assert len(row["code"]) == 2 ** row["bits"] and row["id"] == ENUMS["scale_dtype"][name]
    assert row["needs_super"] == (name in reference.SCALE_BITS) and (row["bits"] == reference.SCALE_BITS.get(name, 8))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1"])
def test_code_book_against_ml_dtypes(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "fp4_e2m1": "float4_e2m1fn"}[name]
    codes = np.arange(2 ** reference.BITS[name], dtype=np.uint8)
    expected = codes.view(getattr(ml_dtypes, dtype)).astype(np.float32)
    np.testing.assert_array_equal(reference.CODES[name], expected)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_nearest_code_against_torch(name: str) -> None:
    """The reference's own encoder, on every midpoint and its neighbours; torch's casts round to nearest even."""
    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]
    code = np.sort(reference.CODES[name][np.isfinite(reference.CODES[name])])
    middle = ((code[1:].astype(np.float64) + code[:-1]) / 2).astype(np.float32)
    values = np.concatenate([code, middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)]).astype(
        np.float32
    )
    expected = torch.from_numpy(values).to(dtype).view(torch.uint8).numpy()
    np.testing.assert_array_equal(reference.nearest_code(values, name), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_desc_round_trip(kind: str) -> None:
    for spec, _, _ in specs(kind):
        fields = _C.parse_desc(cpu_desc(spec))
        assert fields["format"] == ENUMS["format"][spec.format]
        assert fields["zero_kind"] == ENUMS["zero_kind"][spec.zero_kind]
        assert fields["scale_dtype"] == ENUMS["scale_dtype"][spec.scale_dtype]
        assert fields["scaling"] == ENUMS["scaling"][spec.scaling]
        assert fields["group_size"] == spec.group_size
        assert bool(fields["has_perm"]) == spec.has_perm
        assert fields["layout"] == _C.preferred_layout("cpu", desc(spec))
        assert _C.make_desc(*(fields[name] for name in DESC_FIELDS)) == cpu_desc(spec)


DESC_FIELDS = ("format", "group_size", "zero_kind", "scale_dtype", "scaling", "has_perm", "layout")


def test_desc_bits() -> None:
    """The picture in csrc/common/desc.h: other programs may build a desc from it."""
    spec = reference.Spec("nf4", group_size=64, scale_dtype="bfloat16", has_perm=True)
    assert desc(spec, layout=1) == 10 | 2 << 12 | 1 << 20 | 1 << 24 | 64 << 32
    assert desc(reference.Spec("int4", "offset", -1, "float16")) == 3 | 3 << 8 | 1 << 12
    assert desc(reference.Spec("fp8_e4m3", "none", 128, scaling="block128")) == 7 | 1 << 16 | 128 << 32
    assert desc(SCALED["q4_k"][0]) == 3 | 3 << 8 | 6 << 12 | 2 << 16 | 1 << 21 | 32 << 32 | 4 << 56
    assert desc(SCALED["nvfp4"][0]) == 9 | 4 << 12 | 2 << 16 | 16 << 32 | 15 << 56
    for name, (spec, _) in SCALED.items():
        fields = _C.parse_desc(desc(spec))
        assert fields["super_groups"] == spec.super_groups, name
        assert fields["super_dtype"] == ENUMS["scale_dtype"][spec.super_dtype], name
    for bit in (23, 60, 61, 62):
        with pytest.raises(ValueError, match="bits set that mean nothing"):
            _C.parse_desc(desc(spec) | 1 << bit)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_agree(kind: str) -> None:
    """The fake kernels' shapes, the library's, and the reference's."""
    for spec, _, _ in specs(kind):
        for N, K in SHAPES:
            if spec.scaling == "group" and spec.group_size > -(-K // 8) * 8:
                continue
            shapes = _C.canonical_shapes(N, K, desc(spec))
            assert tuple(shapes["packed"]) == (N, -(-K * spec.bits // 8))
            assert tuple(shapes["scales"]) == spec.scales_shape(N, K)
            assert shapes["zeros"] == (None if spec.zero_kind == "none" else shapes["scales"])
            assert shapes["perm"] == ((K,) if spec.has_perm else None)
            _assert_same_shapes(spec, N, K)


def _assert_same_shapes(spec: reference.Spec, N: int, K: int) -> None:
    shapes, d = _C.canonical_shapes(N, K, desc(spec)), parse(desc(spec))
    assert packed_shape(N, K, d) == shapes["packed"]
    for name, found in tables(N, K, d)._asdict().items():
        assert (None if found is None else found[0]) == shapes[name], f"{spec} {N}x{K}: {name}"


def test_shapes_of_scales_agree() -> None:
    assert set(SCALE_DTYPES) == set(ENUMS["scale_dtype"])
    for spec, _ in SCALED.values():
        for N, K in SHAPES:
            if spec.scaling in ("flat", "block128") or spec.group_size <= -(-K // 8) * 8:
                _assert_same_shapes(spec, N, K)


def test_every_format_has_kinds() -> None:
    assert {format for format, _, _ in KINDS.values()} == set(FORMATS)
