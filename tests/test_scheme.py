"""Scheme: the grammar, its canonical spelling, validation, and what is derived from it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import _C, QuantizedWeight, Scheme
from lowbit.scheme import ACTIVATIONS, PRESETS, format_info

FORMATS = [row["name"] for row in _C.format_table()]
INTEGERS = [row["name"] for row in _C.format_table() if row["kind"] == "int"]


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    name = draw(st.sampled_from(FORMATS))
    blocks = name.startswith("fp8") and draw(st.booleans())
    groups = st.one_of(st.just(-1), st.integers(1, 2000).map(lambda i: 8 * i))
    return Scheme(
        name,
        group_size=-1 if blocks else draw(groups),
        zero_kind=draw(st.sampled_from(["none", "int", "float", "offset"])) if name in INTEGERS else "none",
        scale_dtype=draw(st.sampled_from([None, "float32", "float16", "bfloat16"])),
        scaling="block128" if blocks else "group",
        activation=draw(st.sampled_from([None, *ACTIVATIONS])),
        search=draw(st.sampled_from([None, True, False])),
    )


@settings(deadline=None)
@given(schemes())
def test_string_and_dict_round_trip(scheme: Scheme) -> None:
    text = str(scheme)
    assert Scheme.parse(text) == scheme
    assert str(Scheme.parse(text)) == text
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert pickle.loads(pickle.dumps(scheme)) == scheme
    assert hash(Scheme.parse(text)) == hash(scheme)


@settings(deadline=None)
@given(schemes(), schemes())
def test_equal_exactly_when_the_strings_are(a: Scheme, b: Scheme) -> None:
    assert (a == b) == (str(a) == str(b))


@settings(deadline=None)
@given(schemes(), st.sampled_from([0, 1]), st.booleans())
def test_desc_holds_what_is_stored(scheme: Scheme, layout: int, has_perm: bool) -> None:
    desc = scheme.desc(layout, has_perm)
    fields = _C.parse_desc(desc)
    assert (fields["layout"], bool(fields["has_perm"])) == (layout, has_perm)
    assert Scheme.from_desc(desc).same_storage(scheme)


@settings(deadline=None)
@given(schemes(), st.randoms(use_true_random=False))
def test_options_come_in_any_order_and_case(scheme: Scheme, random: object) -> None:
    head, *options = str(scheme).split("-")
    random.shuffle(options)  # type: ignore[attr-defined]
    assert Scheme.parse(" " + "-".join([head, *options]).upper() + "\n") == scheme


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("int4-g128", {"format": "int4", "group_size": 128, "scale_dtype": "bfloat16", "search": True}),
        ("int4-g32-asym", {"zero_kind": "int", "group_size": 32}),
        ("int4-g64-fzero", {"zero_kind": "float"}),
        ("int3-g64-offset", {"format": "int3", "zero_kind": "offset"}),
        ("fp8", {"format": "fp8_e4m3", "group_size": -1, "scale_dtype": "float32", "search": False}),
        ("fp8_e5m2", {"format": "fp8_e5m2"}),
        ("fp8-b128", {"scaling": "block128", "group_size": 128, "scale_dtype": "float32"}),
        ("fp8-b128-a8", {"activation": "fp8_g128"}),
        ("int8", {"format": "int8", "activation": None, "search": False}),
        ("int8-a8", {"activation": "int8"}),
        ("int8-aint8_static_asym", {"activation": "int8_static_asym"}),
        ("int4-g128-a8", {"activation": "int8"}),
        ("nf4-g64-a8", {"activation": "fp8"}),
        ("fp4-g32", {"format": "fp4_e2m1"}),
        ("int4-g128-fp16-rtn", {"scale_dtype": "float16", "search": False}),
    ],
)
def test_examples(text: str, fields: dict[str, object]) -> None:
    scheme = Scheme.parse(text)
    assert {name: getattr(scheme, name) for name in fields} == fields
    assert str(scheme) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("FP8_E4M3", "fp8"), ("fp4_e2m1-g32", "fp4-g32"), ("int4-bf16-g128", "int4-g128"), ("int8-aint8", "int8-a8"),
     ("int8-fp32-rtn", "int8"), ("fp8-b128-afp8_g128", "fp8-b128-a8"), ("int4-g32-search", "int4-g32")],
)  # fmt: skip
def test_other_spellings(text: str, canonical: str) -> None:
    assert str(Scheme.parse(text)) == canonical


@pytest.mark.parametrize("text", PRESETS)
def test_presets_are_canonical_and_work(text: str) -> None:
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    assert QuantizedWeight.quantize(weight, scheme).dequantize().shape == weight.shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "unknown format 'int9'"),
        ("", "unknown format ''"),
        ("int4_g128", "unknown format 'int4_g128'; .*; did you mean 'int4-g128'[?]"),
        ("in4-g128", "unknown format 'in4'; .*; did you mean 'int4'[?]"),
        ("q4_k_m", "unknown format 'q4_k_m'; the formats are [^;]*$"),
        ("int4-g12", "group_size=12 is neither -1 nor a positive multiple of 8"),
        ("int4-g0", "group_size=0"),
        ("int4-g999999999", "multiple of 8"),
        ("int4-g999999992", "group_size=999999992 is too large"),
        ("int4-g", "option 'g' is not one of"),
        ("int4-g32-g64", "says groups twice"),
        ("int4-asym-offset", "says zero twice"),
        ("int4--g32", "option '' is not one of"),
        ("nf4-g64-asym", "zero_kind='int' needs an integer format; nf4"),
        ("int4-b128", "needs an fp8 format, not int4"),
        ("int4-g٣٢", "option"),
        ("int8-a7", "option 'a7'"),
    ],
)
def test_bad_strings_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Scheme.parse(text)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_parses_or_raises_value_error(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except ValueError:
        return
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "int4", "zero_kind": "half"}, "unknown zero_kind 'half'"),
        ({"format": "int4", "scale_dtype": "float8"}, "scale_dtype 'float8' is not supported"),
        ({"format": "int4", "scaling": "three_level"}, "scaling 'three_level' is not supported"),
        ({"format": "int4", "scaling": "two_level"}, "scaling=two_level with super_groups=0"),
        (
            {"format": "int4", "scale_dtype": "e4m3", "super_groups": 3},
            "super_groups=3 is neither -1 nor a power of two",
        ),
        (
            {"format": "int4", "scale_dtype": "e4m3", "super_groups": -1, "super_dtype": "e4m3"},
            "super_dtype 'e4m3' is not",
        ),
        ({"format": "int4", "scale_dtype": "e4m3", "super_groups": True}, "super_groups must be an int, got True"),
        ({"format": "int4", "activation": "int4"}, "unknown activation 'int4'"),
        ({"format": "fp8", "scaling": "block128", "group_size": 64}, "means group_size=128, got 64"),
        ({"format": "int4", "group": 8}, "unknown scheme fields"),
        ({"group_size": 8}, "needs a format"),
        ({"format": 4}, "must be a string"),
        ({"format": "int4", "group_size": True}, "must be an int"),
        ({"format": "int4", "group_size": 8.0}, "must be an int"),
        ({"format": "int4", "search": 1}, "must be a bool"),
        ({"format": "int4", "activation": 8}, "must be a string or None"),
    ],
)
def test_bad_fields_say_what_is_wrong(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme.from_dict(fields)


def test_not_a_string() -> None:
    with pytest.raises(TypeError, match="got 4"):
        Scheme.parse(4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="JSON object"):
        Scheme.from_dict([])  # type: ignore[arg-type]


def test_is_frozen_and_takes_torch_dtypes() -> None:
    scheme = Scheme("int4", 32, scale_dtype=torch.float16)  # type: ignore[arg-type]
    assert scheme.scale_dtype == "float16"
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.group_size = 64  # type: ignore[misc]


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_agree_with_the_core(name: str) -> None:
    zero_kinds = ["none", "int", "float", "offset"] if name in INTEGERS else ["none"]
    for zero_kind, group, (N, K) in itertools.product(zero_kinds, (-1, 8, 64), ((1, 64), (130, 72), (7, 257))):
        scheme = Scheme(name, group, zero_kind)
        weight = QuantizedWeight.quantize(torch.randn(N, K), scheme)
        assert scheme.nbytes(N, K) == weight.nbytes
        assert scheme.bits_per_weight(N, K) == weight.nbytes * 8 / (N * K)
    if name.startswith("fp8"):
        scheme = Scheme(name, scaling="block128")
        assert scheme.nbytes(130, 257) == 130 * 257 + 2 * 3 * 4


def test_shape_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="group_size=128 is larger than K=100"):
        Scheme.parse("int4-g128").check_shape(4, 100)
    Scheme.parse("int4-g104").check_shape(4, 100)  # K rounded up to 8: one ragged group
    Scheme.parse("fp8-b128").check_shape(1, 1)
    with pytest.raises(ValueError, match="N=0, K=8"):
        Scheme.parse("int8").check_shape(0, 8)


def test_activation_properties() -> None:
    scheme = Scheme.parse("int8-aint8_static_asym")
    assert (scheme.activation_format, scheme.activation_static, scheme.activation_symmetric) == ("int8", True, False)
    blocks = Scheme.parse("fp8-b128-a8")
    assert (blocks.activation_format, blocks.activation_group_size) == ("fp8_e4m3", 128)
    assert Scheme.parse("int4").activation_format is None
    assert Scheme("int8", activation="fp8-g128").activation == "fp8_g128"


def test_format_info_names_what_exists() -> None:
    assert format_info("fp8").name == "fp8_e4m3"
    with pytest.raises(
        ValueError, match="the formats are int2, int3, int4, int5, int6, int8, fp8, fp8_e5m2, fp4, nf4, iq4_nl, bnb_fp4"
    ):
        format_info("fp6")
