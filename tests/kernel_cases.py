"""What the tests of CUDA's and of Metal's kernels share: inputs, and what must come out."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import cases
import reference
from lowbit import _C, ops
from reference import UNIT, Spec, Weight

ORDERS = ("forward", "reverse", "random")


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Inside, only this kernel may run; an op that it refuses raises."""
    _C.force_kernel(kernel)
    try:
        yield
    finally:
        _C.force_kernel("")


def on(backend: Any, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(backend.device)


def moved(backend: Any, w: Weight) -> list[torch.Tensor | None]:
    return [on(backend, t) for t in w.tensors]


# ---- products --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem(abc.ABC):
    """y = x @ W.T (+ bias) for a random weight of a spec. How a weight is packed is the backend's: a subclass says."""

    spec: Spec
    M: int
    N: int
    K: int
    dtype: torch.dtype = torch.bfloat16
    bias: torch.dtype | None = None
    flags: int = 0

    @property
    @abc.abstractmethod
    def desc(self) -> int:
        """Of the weight in the kernel layout."""

    @abc.abstractmethod
    def packed(self, backend: Any, weight: Weight) -> torch.Tensor:
        """The weight in the kernel layout, on the backend's device."""

    @property
    def weight(self) -> Weight:
        return cases.random_weight(self.spec, self.N, self.K)

    def x(self) -> torch.Tensor:
        return cases.random_x(self.M, self.K, dtype=self.dtype)

    def bias_tensor(self) -> torch.Tensor | None:
        return None if self.bias is None else cases.random_x(self.N, dtype=self.bias)


def gemm(backend: Any, p: Problem, x: torch.Tensor | None = None, weight: Weight | None = None) -> torch.Tensor:
    """The op's result, on the CPU."""
    x = p.x() if x is None else x
    w = p.packed(backend, p.weight if weight is None else weight)
    y = backend.ops.gemm(on(backend, x), w, on(backend, p.bias_tensor()), p.N, p.K, p.desc, p.flags)
    assert y.dtype == p.dtype and y.device.type == backend.device
    return y.cpu()


def expected(
    p: Problem, x: torch.Tensor | None = None, weight: Weight | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 product and its componentwise bound: weights may be rounded once, to the activations' dtype.

    fp16 has no exponents below -24: a weight rounded to it may move by half its smallest number, whatever its own size.
    """
    x = p.x() if x is None else x
    W = cases.dense(p.spec, p.N, p.K) if weight is None else weight.dense()
    unit = 0.0 if p.dtype == torch.float32 else UNIT[p.dtype]
    y, bound = reference.product(x, W, p.bias_tensor(), unit, p.dtype)
    if p.dtype == torch.float16:
        bound = bound + 2.0**-25 * x.double().abs().sum(-1, keepdim=True)
    return y, bound


def check_gemm(backend: Any, p: Problem) -> torch.Tensor:
    y = gemm(backend, p)
    reference.assert_close(y, expected(p), (backend.name, p))
    return y


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


def check_activation(backend: Any, x: torch.Tensor, *rest: Any) -> None:
    """quantize_activation has the CPU's bits."""
    arguments = [a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in (x, *rest)]
    found = backend.ops.quantize_activation(*arguments)
    expected = torch.ops.lowbit.quantize_activation(x, *rest)
    where = f"{tuple(x.shape)} stride {x.stride()} {x.dtype}, {rest}"
    assert same_bits(found[0], expected[0]), f"{where}: codes"
    assert same_but_nan(found[1], expected[1]), f"{where}: scales"
    assert same_bits(found[2], expected[2]), f"{where}: zeros"


def check_sign_of_zero(backend: Any) -> None:
    """(q - zero) * scale is -0 where q = zero and the scale is negative; offsets add, and make it +0."""
    for zero_kind in cases.ZERO_KINDS:
        spec = Spec("int4", zero_kind, 8)
        codes = np.tile(np.arange(16), (3, 2))
        scales = torch.tensor([[1.0], [-1.0], [-0.5]]).expand(3, 4).contiguous()
        zeros = {"int": torch.full((3, 4), 3, dtype=torch.uint8), "float": torch.full((3, 4), 3.0)}.get(zero_kind)
        if zero_kind == "offset":
            zeros = torch.tensor([0.0, -0.0, 1.0, -1.0]).expand(3, 4).contiguous()
        w = Weight(spec, 3, 32, codes, torch.from_numpy(reference.pack_stream(codes, 4)), scales, zeros)
        W = backend.ops.dequantize(*moved(backend, w), 3, 32, cases.desc(spec), torch.float32)
        expected = torch.ops.lowbit.dequantize(*w.tensors, 3, 32, cases.desc(spec), torch.float32)
        assert same_bits(W, expected), zero_kind


def any_codes(spec: Spec, N: int, K: int) -> Weight:
    """A weight with every code among its own, NaN codes too."""
    codes = cases.rng(spec, N, K).integers(0, 2**spec.bits, (N, K))
    stream = torch.from_numpy(reference.pack_stream(codes, spec.bits))
    return dataclasses.replace(cases.random_weight(spec, N, K), codes=codes, packed=stream)
