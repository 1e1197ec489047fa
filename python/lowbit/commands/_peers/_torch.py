"""torch's own: F.linear, and the ops with packed or 8-bit weights that it has for the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.commands._contenders import Contender
from lowbit.commands._measure import copies_for
from lowbit.commands._peers._peer import Peer, codes_in_groups, from_copies, from_tensors

__all__ = ["PEERS"]

_E4M3_MAX = 448.0


def _linear(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    cast = peer.options["dtype"]
    return from_tensors(peer, (weight.to(cast),), F.linear, "F.linear", warm, cast)


def _refused_early(peer: Peer, tensors: tuple[Tensor, ...], multiply: Callable[..., object], x: Tensor) -> None:
    try:
        multiply(x, *tensors)
    except NotImplementedError as error:
        raise RuntimeError(f"not for this machine: {error}") from None


def _int4pack(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    N, K = weight.shape
    group = peer.options["group_size"]
    codes, scales = codes_in_groups(weight, 4, group)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(N, K).to(torch.int32), 2)
    pairs = torch.stack([scales, torch.zeros_like(scales)], 2).transpose(0, 1).contiguous().to(dtype)  # [G, N, 2]
    op = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def multiply(x: Tensor, w: Tensor, s: Tensor) -> Any:
        return op(x, w, group, s)

    return from_tensors(peer, (packed, pairs), multiply, "_weight_int4pack_mm_for_cpu", warm)


def _per_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes [N, K] and scales fp32 [N]."""
    scales = weight.float().abs().amax(1).clamp_min(1e-9) / 127
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def _int8pack(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    codes, scales = _per_row(weight)
    tensors = codes, scales.to(dtype)
    _refused_early(
        peer, tensors, torch._weight_int8pack_mm, torch.ones(1, weight.shape[1], dtype=dtype, device=weight.device)
    )
    return from_tensors(peer, tensors, torch._weight_int8pack_mm, "_weight_int8pack_mm", warm)


def _int_mm(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    """Inputs quantized per token, as one would write it with torch's ops."""

    def multiply(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        x_scales = x.abs().amax(1, keepdim=True).float().clamp_min(1e-9) / 127
        xq = (x / x_scales).round().to(torch.int8)
        return (torch._int_mm(xq, codes.t()) * x_scales * scales).to(dtype)

    return from_tensors(peer, _per_row(weight), multiply, "_int_mm", warm)


def _scaled_mm(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    scales = weight.float().abs().amax(1).clamp_min(1e-9) / _E4M3_MAX
    codes = (weight.float() / scales[:, None]).to(torch.float8_e4m3fn)
    out = dtype if dtype != torch.float16 else torch.bfloat16

    def multiply(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        x_scales = x.abs().amax(1, keepdim=True).float().clamp_min(1e-9) / _E4M3_MAX
        xq = (x / x_scales).to(torch.float8_e4m3fn)
        return torch._scaled_mm(xq, w.t(), x_scales, s, out_dtype=out)

    tensors = codes, scales[None]
    _refused_early(peer, tensors, multiply, torch.ones(1, weight.shape[1], dtype=dtype, device=weight.device))
    return from_tensors(peer, tensors, multiply, "_scaled_mm", warm)


def _linear_dynamic(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    """torch.ao's dynamic linear: fp32 inputs, quantized to uint8 with one scale for all of x."""
    engine = peer.options["engine"]
    if engine not in torch.backends.quantized.supported_engines:
        raise RuntimeError(f"this torch has no quantized engine {engine}")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        scales = (weight.float().abs().amax(1).clamp_min(1e-9) / 127).double()
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # of torch's, that its quantized tensors will go one day
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_channel(weight.float(), scales, zeros, 0, torch.qint8)
        count = copies_for(weight.numel(), warm)
        prepacked = [(torch.ops.quantized.linear_prepack(quantized, None),) for _ in range(count)]
    finally:
        torch.backends.quantized.engine = before
    op = torch.ops.quantized.linear_dynamic.default
    kernel = f"quantized::linear_dynamic, {engine}"
    return from_copies(peer, weight.numel(), prepacked, lambda x, w: op(x, w, False), kernel, torch.float32)


def _onednn(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    """What inductor calls for a quantized linear; inputs are quantized to uint8 with one scale for all of x."""
    codes, scales = _per_row(weight)
    zeros = torch.zeros(len(weight), dtype=torch.long)
    op = torch.ops.onednn.qlinear_pointwise.default
    out = dtype if dtype != torch.float16 else torch.float32

    def multiply(x: Tensor, w: Tensor) -> Any:
        low, high = (float(value) for value in x.aminmax())
        scale = max(high - min(low, 0.0), 1e-9) / 255
        zero = round(-min(low, 0.0) / scale)
        xq = torch.quantize_per_tensor(x.float(), scale, zero, torch.quint8).int_repr()
        return op(xq, scale, zero, w, scales, zeros, None, 1.0, 0, out, "none", [], "")

    # Packed weights are opaque to clone(): each copy is packed anew.
    copies = [(torch.ops.onednn.qlinear_prepack(codes, None),) for _ in range(copies_for(codes.nbytes, warm))]
    return from_copies(peer, codes.nbytes + scales.nbytes, copies, multiply, "onednn::qlinear_pointwise")


def _row(name: str, what: str, kind: str, make: Any, **options: Any) -> Peer:
    return Peer(
        f"torch-{name}", what, kind, "torch", make, options, gpu=make in (_linear, _int8pack, _int_mm, _scaled_mm)
    )


PEERS = (
    _row("bf16", "F.linear in bfloat16", "W16A16", _linear, dtype=torch.bfloat16),
    _row("fp32", "F.linear in float32", "W32A32", _linear, dtype=torch.float32),
    _row("fp16", "F.linear in float16", "W16A16", _linear, dtype=torch.float16),
    _row("int4pack", "torch._weight_int4pack_mm_for_cpu, groups of 128", "W4A16", _int4pack, group_size=128),
    _row("int4pack-g32", "torch._weight_int4pack_mm_for_cpu, groups of 32", "W4A16", _int4pack, group_size=32),
    _row("int8pack", "torch._weight_int8pack_mm, one scale per row", "W8A16", _int8pack),
    _row("int8-mm", "x to int8 per token, then torch._int_mm and scales", "W8A8", _int_mm),
    _row("int8-dynamic", "quantized::linear_dynamic (FBGEMM), one scale for x", "W8A8", _linear_dynamic, engine="fbgemm"),
    _row("int8-onednn", "x to uint8, one scale, then onednn::qlinear_pointwise", "W8A8", _onednn),
    _row("fp8-mm", "x to fp8 per token, then torch._scaled_mm", "W8A8", _scaled_mm),
)  # fmt: skip
