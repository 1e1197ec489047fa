"""hypothesis: any format, any ragged shape, any activations."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

import reference
from cases import (
    BATCH_INVARIANT,
    DTYPES,
    GROUP_SIZES,
    INT8,
    KINDS,
    SCALE_DTYPES,
    cpu_desc,
    desc,
    fits,
    generator,
    pack,
    random_weight,
)
from lowbit import ops
from reference import Spec

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Spec, int, int]:
    """(spec, N, K), small enough to be quick, with every tail."""
    format, zero_kind, scaling = draw(st.sampled_from(list(KINDS.values())))
    N, K = draw(st.integers(1, 70)), draw(st.integers(1, 150))
    sizes = (128,) if scaling == "block128" else tuple(size for size in (*GROUP_SIZES, 48, 56, 72, 96) if fits(size, K))
    scale_dtype = draw(st.sampled_from(SCALE_DTYPES))
    return Spec(format, zero_kind, draw(st.sampled_from(sizes)), scale_dtype, scaling, draw(st.booleans())), N, K


#: Floats that have broken quantizers: zeros, ties, subnormals, extremes of fp16.
VALUES = st.floats(
    width=32, allow_nan=False, allow_infinity=False, min_value=-65504, max_value=65504
) | st.sampled_from([0.0, -0.0, 0.5, 1.5, -2.5, 6e-8, 1e-38, 1e-42, 65504.0])


@SETTINGS
@given(problems())
def test_pack_round_trip(problem: tuple[Spec, int, int]) -> None:
    spec, N, K = problem
    weight = random_weight(spec, N, K)
    for before, after in zip(weight.tensors, ops.unpack(pack(weight), N, K, cpu_desc(spec))[:4], strict=True):
        assert before is after is None or torch.equal(before, after)


@SETTINGS
@given(problems(), st.sampled_from(DTYPES))
def test_dequantize(problem: tuple[Spec, int, int], dtype: torch.dtype) -> None:
    spec, N, K = problem
    weight = random_weight(spec, N, K)
    assert torch.equal(ops.dequantize(*weight.tensors, N, K, desc(spec), dtype), weight.dense().to(dtype))


@SETTINGS
@given(problems(), st.integers(0, 20), st.sampled_from(DTYPES), st.sampled_from([0, BATCH_INVARIANT]), st.floats(-3, 3))
def test_gemm(problem: tuple[Spec, int, int], M: int, dtype: torch.dtype, flags: int, spread: float) -> None:
    spec, N, K = problem
    weight = random_weight(spec, N, K)
    magnitudes = torch.exp2(spread * torch.randn(M, K, generator=generator(M, K, spread)))
    x = (torch.randn(M, K, generator=generator(K, M)) * magnitudes).to(dtype)
    w, W, d = pack(weight), weight.dense(), cpu_desc(spec)
    unit = 0 if dtype == torch.float32 else reference.UNIT[dtype]
    reference.assert_close(ops.gemm(x, w, None, N, K, d, flags), reference.product(x, W, None, unit, dtype))
    dy = torch.randn(M, N, generator=generator(M, N)).to(dtype)
    reference.assert_close(ops.gemm_grad_input(dy, w, N, K, d), reference.product(dy, W.t(), None, unit, dtype))


@SETTINGS
@given(problems(), st.lists(VALUES, min_size=1, max_size=40))
def test_quantize(problem: tuple[Spec, int, int], values: list[float]) -> None:
    spec, N, K = problem
    spec = Spec(spec.format, spec.zero_kind, spec.group_size, spec.scale_dtype, spec.scaling)
    N = min(N, 5)
    weight = torch.tensor(values).repeat(-(-N * K // len(values)))[: N * K].view(N, K)
    packed, scales, zeros = ops.quantize(weight, desc(spec))
    expected = reference.quantize(weight, spec)
    assert torch.equal(packed, expected.packed) and torch.equal(scales, expected.scales)
    assert (zeros is None) == (expected.zeros is None)
    assert zeros is None or expected.zeros is None or torch.equal(zeros, expected.zeros)


@SETTINGS
@given(problems(), st.lists(VALUES, min_size=1, max_size=40))
def test_search_is_never_worse(problem: tuple[Spec, int, int], values: list[float]) -> None:
    spec, _, K = problem
    spec = Spec(spec.format, spec.zero_kind, -1 if spec.scaling == "group" else 128, spec.scale_dtype, spec.scaling)
    K = min(K, 128)
    weight = torch.tensor(values).repeat(-(-K // len(values)))[:K].view(1, K)
    errors = []
    for search in (True, False):
        tensors = ops.quantize(weight, desc(spec), search)
        W = ops.dequantize(*tensors, None, 1, K, desc(spec)).double()
        errors.append(((W - weight.double()) ** 2).sum().item())
    assert not errors[0] > errors[1] * (1 + 1e-12)


@SETTINGS
@given(st.lists(VALUES, min_size=1, max_size=60), st.booleans(), st.sampled_from(DTYPES))
def test_quantize_activation(values: list[float], symmetric: bool, dtype: torch.dtype) -> None:
    x = torch.tensor([values]).to(dtype)
    got = ops.quantize_activation(x, INT8, symmetric=symmetric)
    for a, b in zip(got, reference.quantize_activation(x, "int8", symmetric=symmetric), strict=True):
        assert a is b is None or torch.equal(a, b)


@SETTINGS
@given(problems(), st.integers(1, 9), st.booleans())
def test_gemm_a8_one_hot(problem: tuple[Spec, int, int], M: int, symmetric: bool) -> None:
    """Reads out single weights: exact for every format but those whose zeros are fractional."""
    spec, N, K = problem
    weight = random_weight(spec, N, K)
    rows = torch.randint(0, K, (M,), generator=generator(M, K))
    xq = torch.zeros(M, K, dtype=torch.int8)
    xq[torch.arange(M), rows] = 1
    zeros = None if symmetric else torch.zeros(M, 1, dtype=torch.int32)
    y = ops.gemm_a8(xq, torch.ones(M, 1), zeros, pack(weight), None, N, K, cpu_desc(spec), 0, torch.float32)
    torch.testing.assert_close(y, weight.dense().t()[rows], rtol=0 if spec.zero_kind in ("none", "int") else 1e-5, atol=0 if
                               spec.zero_kind in ("none", "int") else 1e-5)  # fmt: skip
