"""dequantize: exactly the formula in fp32, rounded once to the output dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reference
from cases import DTYPES, KINDS, LARGE, desc, random_weight, specs
from lowbit import ops


@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind: str, isa: str) -> None:
    for spec, N, K in specs(kind):
        weight = random_weight(spec, N, K)
        expected = weight.dense()
        for dtype in DTYPES:
            W = ops.dequantize(*weight.tensors, N, K, desc(spec), dtype)
            assert W.shape == (N, K) and W.dtype == dtype
            assert torch.equal(W, expected.to(dtype)), f"{spec} {N}x{K} {dtype}"


@pytest.mark.parametrize("format", list(reference.CODES))
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_every_code(format: str, scale_dtype: str, isa: str) -> None:
    """NaN, infinities and signed zeros of the formats included."""
    count = 2 ** reference.BITS[format]
    spec = reference.Spec(format, scale_dtype=scale_dtype)
    scales = torch.tensor([[0.75], [-1.25]]).to(reference.DTYPES[scale_dtype])
    codes = np.tile(np.arange(count), (2, 1))
    stream = torch.from_numpy(reference.pack_stream(codes, spec.bits))
    for dtype in DTYPES:
        W = ops.dequantize(stream, scales, None, None, 2, count, desc(spec), dtype)
        expected = (torch.from_numpy(reference.CODES[format]) * scales.float()).to(dtype)
        torch.testing.assert_close(W, expected, rtol=0, atol=0, equal_nan=True)
        finite = ~expected.isnan()
        assert torch.equal(W.signbit()[finite], expected.signbit()[finite])


def test_output_dtype_rounds_once() -> None:
    """Values halfway between two outputs go to the even one; fp16 overflow is infinite, subnormals are kept."""
    scales = torch.tensor([[1 + 2.0**-8], [1 + 3 * 2.0**-8], [1 + 2.0**-11], [70000.0], [2.0**-24], [2.0**-140]])
    stream = torch.full((6, 1), 129, dtype=torch.uint8)  # int8 code 129: the value 1
    for dtype in DTYPES:
        W = ops.dequantize(stream, scales, None, None, 6, 1, desc(reference.Spec("int8")), dtype)
        assert torch.equal(W, scales.to(dtype))


def test_special_scales(isa: str) -> None:
    """A NaN or infinite scale reaches every weight of its group and no other."""
    for kind in ("int4", "int3-float", "int8-offset", "fp8_e4m3", "nf4"):
        spec, N, K = reference.Spec(KINDS[kind][0], KINDS[kind][1], 16), 3, 48
        weight = random_weight(spec, N, K)
        scales = weight.scales.clone()
        scales[0, 1], scales[2, 2] = torch.nan, torch.inf
        changed = reference.Weight(spec, N, K, weight.codes, weight.packed, scales, weight.zeros)
        W = ops.dequantize(*changed.tensors, N, K, desc(spec))
        torch.testing.assert_close(W, changed.dense(), rtol=0, atol=0, equal_nan=True)
        assert W[0, 16:32].isnan().all() and W[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_variant(dtype: torch.dtype) -> None:
    for kind in ("int4-int", "fp8_e5m2-block128", "nf4"):
        for spec, N, K in specs(kind):
            weight = random_weight(spec, N, K)
            out = torch.full((N, K), torch.nan, dtype=dtype)
            assert ops.dequantize_out(*weight.tensors, N, K, desc(spec), out) is out
            assert torch.equal(out, weight.dense().to(dtype))


def test_same_bits_whatever_the_threads(threads: None) -> None:
    N, K = LARGE
    for spec in (
        reference.Spec("int5", "float", 40, has_perm=True),
        reference.Spec("fp8_e4m3", "none", 128, scaling="block128"),
    ):
        weight = random_weight(spec, N, K)
        expected = weight.dense()
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.dequantize(*weight.tensors, N, K, desc(spec)), expected)
