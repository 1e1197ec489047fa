"""Who is compared: lowbit, torch's own kernels, and packages that happen to be installed.

Each is made from the same dense W[N, K] and x[M, K] in bf16 and quantizes W its own way. Whoever cannot do a case raises,
and stands in the table with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from device.cells import Case
from device.timing import Call, copies_for
from lowbit import _C, Scheme, explain
from lowbit.commands._target import Target, find_target

__all__ = ["PEERS", "Contender", "Inputs", "lowbit_contenders", "make_peer"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """W [N, K] and x [M, K] (gradients: dy [M, N]), bf16, normally distributed, on the device."""

    case: Case
    device: str
    weight: Tensor
    x: Tensor

    @property
    def target(self) -> Target:
        return find_target(self.device)

    @staticmethod
    def make(case: Case, device: str) -> Inputs:
        place = find_target(device).device
        generator = torch.Generator(place).manual_seed(case.M * 7919 + case.N + case.K)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=place, dtype=torch.float32).to(torch.bfloat16)

        return Inputs(case, device, normal(case.N, case.K) / 8, normal(case.M, case.N if case.op == "grad" else case.K))


@dataclasses.dataclass(frozen=True)
class Contender:
    """Somebody's form of the weight, and how to multiply with it.

    Args:
        nbytes: of one copy of the weight.
        copies: how many there are.
        call: with the number of the call; copies take turns.
        kernel: what ran, where that is known.
    """

    name: str
    nbytes: int
    copies: int
    call: Call
    kernel: str = ""


def _rotating(
    name: str, tensors: tuple[Tensor, ...], inputs: Inputs, call: Callable[..., Any], kernel: str = ""
) -> Contender:
    """Copies of `tensors` take turns as the arguments of `call`."""
    call(*tensors)  # refused here rather than in the middle of a run
    nbytes = sum(t.nbytes for t in tensors)
    count = copies_for(nbytes, inputs.device)
    sets = [tensors] + [tuple(t.clone() for t in tensors) for _ in range(count - 1)]
    return Contender(name, nbytes, count, lambda i: call(*sets[i % count]), kernel)


# ---- lowbit --------------------------------------------------------------------------------------------------------------

_QUANTIZED: Final = {
    "int8": ("int8", -1, "int8"),
    "fp8": ("fp8_e4m3", -1, "float8_e4m3fn"),
    "fp8-128": ("fp8_e4m3", 128, "float8_e4m3fn"),
}


def _pack(inputs: Inputs) -> tuple[Tensor, int]:
    """W in the layout of the device's kernels, and its desc."""
    case, ops = inputs.case, inputs.target.ops
    scheme = Scheme.parse(case.scheme)
    packed, scales, zeros = ops.quantize(inputs.weight, scheme.desc(), False, None)
    desc = scheme.desc(layout=_C.preferred_layout(inputs.device, scheme.desc()))
    return ops.pack(packed, scales, zeros if zeros.numel() else None, None, case.N, case.K, desc), desc


def _kernel(inputs: Inputs, op: str, dtype: str) -> str:
    case = inputs.case
    model = inputs.target.model
    return str(explain(op, M=case.M, N=case.N, K=case.K, scheme=case.scheme, device=model, dtype=dtype).chosen)


def lowbit_contenders(inputs: Inputs) -> list[Contender]:
    """The product; with 8-bit inputs also the product including their quantization, as a layer runs it."""
    case, ops = inputs.case, inputs.target.ops
    N, K = case.N, case.K
    w, desc = _pack(inputs)
    if case.op == "grad":
        call = lambda w: ops.gemm_grad_input(inputs.x, w, N, K, desc, 0)  # noqa: E731
        return [_rotating("lowbit", (w,), inputs, call, _kernel(inputs, "gemm_grad_input", "bfloat16"))]
    if case.inputs == "bf16":
        call = lambda w: ops.gemm(inputs.x, w, None, N, K, desc, 0)  # noqa: E731
        return [_rotating("lowbit", (w,), inputs, call, _kernel(inputs, "gemm", "bfloat16"))]
    format_name, group, dtype = _QUANTIZED[case.inputs]
    format_id = _C.enums()["format"][format_name]
    xq, x_scales, _ = ops.quantize_activation(inputs.x, format_id, group, None, None, None, True)

    def whole(w: Tensor) -> Tensor:
        q, s, _ = ops.quantize_activation(inputs.x, format_id, group, None, None, None, True)
        return ops.gemm_a8(q, s, None, w, None, N, K, desc, 0, torch.bfloat16)

    def product(w: Tensor) -> Tensor:
        return ops.gemm_a8(xq, x_scales, None, w, None, N, K, desc, 0, torch.bfloat16)

    kernel = _kernel(inputs, "gemm_a8", dtype)
    return [
        _rotating("lowbit", (w,), inputs, product, kernel),
        _rotating("lowbit, quantizing x", (w,), inputs, whole, f"quantize_activation, {kernel}"),
    ]


# ---- torch ---------------------------------------------------------------------------------------------------------------


def _torch_bf16(inputs: Inputs) -> Contender:
    x = inputs.x
    if inputs.case.op == "grad":
        return _rotating("torch-bf16", (inputs.weight,), inputs, lambda w: x @ w, "matmul")
    return _rotating("torch-bf16", (inputs.weight,), inputs, lambda w: F.linear(x, w), "F.linear")


def _torch_int4pack(inputs: Inputs) -> Contender:
    group, inner = 128, 8
    if inputs.device == "cpu":
        raise RuntimeError("its CPU form is part of lowbit bench")
    N, K = inputs.weight.shape
    grouped = inputs.weight.float().view(N, K // group, group)
    scales = grouped.abs().amax(2).clamp_min(1e-6) / 7.5
    codes = ((grouped / scales[..., None]).round() + 8).clamp(0, 15).to(torch.uint8).view(N, K)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), inner)
    zeros = torch.zeros_like(scales)
    both = torch.stack([scales, zeros], 2).transpose(0, 1).contiguous().to(torch.bfloat16)  # [K / group, N, 2]
    multiply = torch.ops.aten._weight_int4pack_mm
    return _rotating("torch-int4pack", (packed, both), inputs, lambda w, s: multiply(inputs.x, w, group, s), "tinygemm")


def _channels(weight: Tensor, top: float) -> Tensor:
    return weight.float().abs().amax(1).clamp_min(1e-6) / top


def _torch_int8pack(inputs: Inputs) -> Contender:
    scales = _channels(inputs.weight, 127)
    codes = (inputs.weight.float() / scales[:, None]).round().to(torch.int8)
    tensors = (codes, scales.to(torch.bfloat16))
    return _rotating("torch-int8pack", tensors, inputs, lambda w, s: torch._weight_int8pack_mm(inputs.x, w, s))


def _int8(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W codes and scales, x codes and scales; one scale per row."""
    w_scales, x_scales = _channels(inputs.weight, 127), _channels(inputs.x, 127)
    codes = (inputs.weight.float() / w_scales[:, None]).round().to(torch.int8)
    xq = (inputs.x.float() / x_scales[:, None]).round().to(torch.int8)
    return codes, w_scales, xq, x_scales


def _torch_int_mm(inputs: Inputs) -> Contender:
    """The product alone, as int32: what cuBLASLt does before anybody scales it."""
    codes, _, xq, _ = _int8(inputs)
    return _rotating("torch-int-mm", (codes,), inputs, lambda w: torch._int_mm(xq, w.t()), "cuBLASLt, int32 out")


def _torch_int_mm_scaled(inputs: Inputs) -> Contender:
    """The same result as lowbit's: scales and bf16, fused as far as torch.compile fuses them."""
    codes, w_scales, xq, x_scales = _int8(inputs)

    def scaled(w: Tensor, s: Tensor) -> Tensor:
        return (torch._int_mm(xq, w.t()).float() * x_scales[:, None] * s).to(torch.bfloat16)

    compiled = torch.compile(scaled, dynamic=False) if inputs.device == "cuda" else scaled
    return _rotating("torch-int-mm-scaled", (codes, w_scales), inputs, compiled, "compiled")


def _fp8(values: Tensor, scales: Tensor) -> Tensor:
    return (values.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn)


def _torch_scaled_mm(inputs: Inputs) -> Contender:
    w_scales, x_scales = _channels(inputs.weight, 448)[None], _channels(inputs.x, 448)[:, None]
    w8, x8 = _fp8(inputs.weight, w_scales.t()), _fp8(inputs.x, x_scales)

    def call(w: Tensor, s: Tensor) -> Tensor:
        return torch._scaled_mm(x8, w.t(), scale_a=x_scales, scale_b=s, out_dtype=torch.bfloat16)

    return _rotating("torch-scaled-mm", (w8, w_scales), inputs, call, "row-wise scales")


def _torch_scaled_mm_blocks(inputs: Inputs) -> Contender:
    """Scales per 1x128 of x and 128x128 of W; cuBLASLt wants x's by columns and W's by rows."""
    M, (N, K) = inputs.case.M, inputs.weight.shape
    blocks = inputs.weight.float().view(N // 128, 128, K // 128, 128)
    w_scales = blocks.abs().amax((1, 3)) / 448  # [N / 128, K / 128]
    w8 = (blocks / w_scales[:, None, :, None]).to(torch.float8_e4m3fn).view(N, K)
    groups = inputs.x.float().view(M, K // 128, 128)
    x_scales = groups.abs().amax(2) / 448  # [M, K / 128]
    x8 = (groups / x_scales[..., None]).to(torch.float8_e4m3fn).view(M, K)
    by_columns = x_scales.t().contiguous().t()

    def call(w: Tensor, s: Tensor) -> Tensor:
        return torch._scaled_mm(x8, w.t(), scale_a=by_columns, scale_b=s.t(), out_dtype=torch.bfloat16)

    return _rotating("torch-scaled-mm-blocks", (w8, w_scales), inputs, call, "1x128 and 128x128 scales")


# ---- packages ------------------------------------------------------------------------------------------------------------

_HUMMING_WEIGHTS: Final = {"int4-g128": ("int4", 128), "int8": ("int8", 0), "fp8": ("float8e4m3", 0)}
_HUMMING_INPUTS: Final = {"bf16": None, "int8": "int8", "fp8": "float8e4m3"}


def _humming(inputs: Inputs) -> Contender:
    """humming-kernels: compiles at first use; quantizes x inside where x is 8-bit, so compare with that row of lowbit."""
    from humming.layer import HummingLayer

    case = inputs.case
    dtype, group = _HUMMING_WEIGHTS[case.scheme]
    weight_config: dict[str, Any] = {"dtype": dtype} | ({"group_size": group} if group else {})
    x_dtype = _HUMMING_INPUTS[case.inputs]
    layers = []
    nbytes = inputs.weight.numel() * (4 if dtype == "int4" else 8) // 8
    count = copies_for(nbytes, inputs.device)
    for _ in range(count):
        layer = HummingLayer(
            shape_n=case.N,
            shape_k=case.K,
            weight_config=weight_config,
            input_config={"dtype": x_dtype} if x_dtype else None,
            torch_dtype=torch.bfloat16,
        ).to(inputs.target.device)
        layer.load_from_unquantized(inputs.weight)
        layer.transform()
        layers.append(layer)
    layers[0](inputs.x)
    return Contender("humming", nbytes, count, lambda i: layers[i % count](inputs.x), str(weight_config))


def _gemlite(inputs: Inputs) -> Contender:
    """gemlite: Triton; tunes at first use."""
    from gemlite.helper import A16W8_INT8, A16Wn

    case, weight = inputs.case, inputs.weight
    N, K = weight.shape
    if case.scheme == "int4-g128":
        grouped = weight.float().view(N, K // 128, 128)
        scales = grouped.abs().amax(2, keepdim=True).clamp_min(1e-6) / 7.5
        codes = ((grouped / scales).round() + 8).clamp(0, 15).to(torch.uint8).view(N, K)
        flat = scales.view(-1, 1).to(torch.bfloat16)

        def make() -> Any:
            maker = A16Wn(device="cuda:0", dtype=torch.bfloat16)
            return maker.from_weights(codes.clone(), flat.clone(), torch.full_like(flat, 8), 4, 128)
    else:

        def make() -> Any:
            return A16W8_INT8(device="cuda:0", dtype=torch.bfloat16).from_weights(weight.clone(), None)

    nbytes = N * K * (4 if case.scheme == "int4-g128" else 8) // 8
    count = copies_for(nbytes, inputs.device)
    layers = [make() for _ in range(count)]
    layers[0](inputs.x)
    return Contender("gemlite", nbytes, count, lambda i: layers[i % count](inputs.x), "Triton")


PEERS: Final[dict[str, Callable[[Inputs], Contender]]] = {
    "torch-bf16": _torch_bf16,
    "torch-int4pack": _torch_int4pack,
    "torch-int8pack": _torch_int8pack,
    "torch-int-mm": _torch_int_mm,
    "torch-int-mm-scaled": _torch_int_mm_scaled,
    "torch-scaled-mm": _torch_scaled_mm,
    "torch-scaled-mm-blocks": _torch_scaled_mm_blocks,
    "humming": _humming,
    "gemlite": _gemlite,
}


def make_peer(name: str, inputs: Inputs) -> Contender:
    """Raises whatever its library raises where it cannot do the case."""
    return PEERS[name](inputs)
