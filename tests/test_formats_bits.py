"""The bit stream, and regular expressions that come from a file."""

from __future__ import annotations

import re
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import stream, unstream
from lowbit.formats import _bits
from lowbit.formats._bits import byte_rows, clear_tail, pack_codes, permute_codes, unpack_codes
from lowbit.formats._pattern import Pattern, PatternError

# -- bits ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_pack_and_unpack(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    packed = pack_codes(torch.from_numpy(codes).to(torch.uint8), bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert np.array_equal(packed.numpy(), stream(codes, bits, 8))
    assert np.array_equal(unpack_codes(packed, bits, count).numpy(), codes)
    # From words, which are longer than they need to be.
    words = torch.from_numpy(stream(codes, bits, 32))
    assert np.array_equal(unpack_codes(byte_rows(words), bits, count).numpy(), codes)
    assert np.array_equal(unstream(words.numpy(), bits, count), codes)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 4)])
def test_bytes_of_transposed_words(shape: tuple[int, int]) -> None:
    """A tensor with a dimension of 1 calls itself contiguous whatever its strides are."""
    words = torch.arange(shape[0] * shape[1], dtype=torch.int32).view(shape).t()
    wanted = words.numpy().astype("<i4").tobytes()
    assert byte_rows(words).numpy().tobytes() == wanted and byte_rows(words).shape == (shape[1], 4 * shape[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_permuted_in_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    codes, perm = rng.integers(0, 1 << bits, (10, 37)), rng.permutation(37)
    packed = torch.from_numpy(stream(codes, bits, 8))
    wanted = torch.from_numpy(stream(codes[:, perm], bits, 8))
    assert torch.equal(permute_codes(packed, bits, torch.from_numpy(perm)), wanted)
    monkeypatch.setattr(_bits, "_CHUNK", 3 * 37)
    assert torch.equal(permute_codes(packed, bits, torch.from_numpy(perm)), wanted)


def test_clear_tail() -> None:
    packed = torch.full((2, 2), 255, dtype=torch.uint8)
    assert clear_tail(packed.clone(), 3, 5).tolist() == [[255, 127], [255, 127]]
    assert clear_tail(packed.clone(), 4, 4).tolist() == [[255, 255], [255, 255]]


# -- patterns ------------------------------------------------------------------------------------------------------------

NAMES = [
    "", "a", "ab", "b", "aaa", "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.12.mlp.experts.3.down_proj",
    "model.layers.1.mlp.gate", "visual.blocks.0.attn.qkv", "model-layers", "a\n", "x y", "Ünï.3",
]  # fmt: skip
REAL = [
    r".*lm_head", r"model\.layers\.\d+\..*", r".*self_attn\.(q|k|v|o)_proj$", r".*mlp\.gate$", r"^model\.layers\.(0|1|2)\.",
    r".*(gate|up|down)_proj", r"visual.*", r"(?!.*experts).*_proj", r"model.layers.[0-9]+.mlp", r".*layers\.(1[0-9]|2[0-3])\..*",
    r".*\.experts\.\d{1,3}\..*", r"(?:a|b)+?$", r"[^.]+$", r"\w+\.\w+", r"a{2,}", r"a{,2}b?", r"(a|ab)(b|)$", r"", r"a||b",
    r"[]a]+", r"[\d\-x]", r"\bq_proj|.*\bgate\b", r"(a*)*b", r"()*a", r"(?=a).b", r"x\sy", r"\D\S\W?", r"a\Z", r"[a-]", r"$^",
    ".*Ü.*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REAL)
def test_matches_as_python_does(pattern: str) -> None:
    compiled, wanted = Pattern(pattern), re.compile(pattern)
    for name in NAMES:
        assert compiled.match(name) == bool(wanted.match(name)), name


_PIECES = st.recursive(
    st.sampled_from(["a", "b", ".", r"\d", "[ab]", "[^a]", "1", r"\.", ""]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(lambda p: f"({p[0]}){p[1]}"),
        inner.map(lambda p: f"(?={p})"),
        inner.map(lambda p: f"^{p}$"),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(_PIECES, st.text("ab1.", max_size=8))
def test_any_pattern_matches_as_python_does(pattern: str, text: str) -> None:
    if re.search(r"\(\?=.*\(\?=", pattern):
        return  # a lookahead inside another, perhaps
    assert Pattern(pattern).match(text) == bool(re.match(pattern, text))


@settings(deadline=None, max_examples=300)
@given(st.text("ab().*+?{}[]^$|\\d0,-:!=<", max_size=12))
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    try:
        compiled = Pattern(text)
    except PatternError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "[[": what it means may change
        assert compiled.match("ab0.") == bool(re.match(text, "ab0."))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|aa)+$",
        "(a|a)*b",
        ".*a.*a.*a.*a.*a.*a.*b",
        "(?:a{0,30}){0,30}b",
        "(?=(a+)+b)a",
        "a?" * 40 + "a" * 40,
    ],
)
def test_no_pattern_takes_for_ever(pattern: str) -> None:
    begin = time.perf_counter()
    assert Pattern(pattern).match("a" * 300 + "c") == (pattern[:2] == "a?")
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not closed"),
        (")", "unbalanced"),
        ("[a", "not closed"),
        ("*a", "nothing to repeat"),
        ("a**", "multiple repeat"),
        ("^*", "nothing to repeat"),
        (r"(a)\1", "escape"),
        ("(?<=a)b", "not supported"),
        ("(?i)a", "not supported"),
        ("(?P<x>a)", "not supported"),
        ("a{x}", "no repetition"),
        ("a{3,2}", "repetition"),
        ("a{99999}", "repetition"),
        ("(a{1000}){1000}", "too large"),
        ("(((((){999}){999}){999}){999})", "too large"),
        ("(" * 100 + ")" * 100, "nested too deeply"),
        ("a" * 3000, "too long"),
        ("[b-a]", "range"),
        ("\\", "escape"),
        ("(?=a(?=b))", "inside another"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        Pattern(pattern)
