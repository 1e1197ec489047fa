"""What the tests of CUDA's and of Metal's kernels share: inputs, and what must come out."""

from __future__ import annotations

import dataclasses

import torch

import cases
import reference
from lowbit import ops
from reference import UNIT, Spec, Weight

# ---- 8-bit activations -----------------------------------------------------------------------------------------------

#: format, group size, symmetric.
ACTIVATIONS = {
    "int8": (cases.INT8, -1, True),
    "int8-asym": (cases.INT8, -1, False),
    "int8-g128": (cases.INT8, -1, True),
    "fp8": (cases.FP8, -1, True),
    "fp8-g128": (cases.FP8, 128, True),
}
Quantized = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]


def quantized(activation: str, M: int, K: int) -> tuple[Quantized, int]:
    """x as the op takes it, and its group size. int8 with a scale per 128 of K is not made by our quantizer, but taken."""
    format, group, symmetric = ACTIVATIONS[activation]
    q, s, z = ops.quantize_activation(cases.random_x(M, K) + 0.25, format, group, symmetric=symmetric)
    if activation == "int8-g128":
        groups = -(-K // 128)
        s = s * torch.linspace(0.5, 2, groups)
        group = -1 if groups == 1 else 128
    return (q, s.contiguous(), z), group


def expected_a8(
    weight: Weight, a: Quantized, group: int, bias: torch.Tensor | None, out: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in fp64 and its bound: codes are exact, so only fp32 sums and scales round."""
    xd, W = reference.dequantize_activation(*a, group), weight.dense().double()
    y, size = xd @ W.t(), xd.abs() @ W.abs().t()
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    within = (weight.K + 6) * reference.UNIT[torch.float32] * size
    return y, within + reference.UNIT[out] * (y.abs() + within) + 1e-30


# ---- gradients -------------------------------------------------------------------------------------------------------


def expected_grad(dy: torch.Tensor, spec: Spec, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    W = cases.dense(spec, N, K).t().contiguous()
    y, bound = reference.product(dy, W, None, 0.0 if dy.dtype == torch.float32 else UNIT[dy.dtype], dy.dtype)
    if dy.dtype == torch.float16:  # weights below fp16's range are rounded to a multiple of 2^-24
        bound = bound + 2.0**-25 * dy.double().abs().sum(-1, keepdim=True)
    return y, bound


# ---- bits ------------------------------------------------------------------------------------------------------------

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.cpu().view(INTEGERS[a.element_size()]), b.view(INTEGERS[b.element_size()])
    )


def same_but_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN for NaN, and otherwise the same bits."""
    a = a.cpu()
    nan = b.isnan()
    return torch.equal(a.isnan(), nan) and same_bits(a.masked_fill(nan, 0), b.masked_fill(nan, 0))


def any_codes(spec: Spec, N: int, K: int) -> Weight:
    """A weight with every code among its own, NaN codes too."""
    codes = cases.rng(spec, N, K).integers(0, 2**spec.bits, (N, K))
    stream = torch.from_numpy(reference.pack_stream(codes, spec.bits))
    return dataclasses.replace(cases.random_weight(spec, N, K), codes=codes, packed=stream)
