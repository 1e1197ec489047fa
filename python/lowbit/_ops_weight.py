"""The ops that make and read packed weights: wrapper, documentation and fake kernel each; see lowbit.ops for the terms."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import _C
from lowbit._checks import (
    Tables,
    absent_perm,
    absent_super_zeros,
    absent_supers,
    absent_zeros,
    check,
    check_canonical,
    check_float,
    check_packed,
    check_tensor,
    packed_shape,
    parse,
    refuse_grad,
    tables,
)

__all__ = ["dequantize", "dequantize_out", "pack", "quantize", "unpack"]

_ops = torch.ops.lowbit
_register_fake = torch.library.register_fake


# -- quantize -----------------------------------------------------------------------------------------------------------


def quantize(
    weight: Tensor,
    desc: int,
    search: bool = False,
    importance: Tensor | None = None,
    super_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize W to canonical tensors.

    Per group (or 128 x 128 block), in fp32 with IEEE division and ties to even, so that every ISA, thread count and
    backend gives the same bits:

        symmetric, coded    scales = absmax / max        max: 2^(bits-1) - 0.5, or the largest |code|
        e8m0 scales         scales = 2^(floor(log2 absmax) - floor(log2 max))           (OCP MX)
        int zeros           scales = (hi - lo) / (2^bits - 1)       zeros = round(-lo / scales)      lo <= 0 <= hi
        float zeros         the same scales                         zeros = -lo / scales
        offset              scales = (hi - lo) / (2^bits - 1)       zeros = lo

    Codes are computed against the scales and zeros as stored, after rounding to their dtype.

    Args:
        weight: [N, K], fp32, bf16 or fp16, any strides.
        desc: the scheme, without perm; its layout is ignored.
        search: look for the scale with the least squared error instead; never worse than the above on any group.
        importance: fp32 [K], weighs the squared error of each column in the search.
        super_scales: fp32 [1] where one scale lies above all scales (NVFP4), else None. Scales are stored in units of it.

    Returns:
        packed uint8 [N, ceil(K * bits / 8)], scales [N, G] (blocks: [ceil(N/128), ceil(K/128)]), zeros [N, G] or None.
        A group that holds a NaN gets a NaN scale, one with an infinity an infinite scale.

    Raises:
        RuntimeError: weight is not 2-D or not one of the three dtypes; desc has a perm; group_size exceeds K;
            importance is not fp32 [K]; the scheme's scales are codes of K-quants or bitsandbytes, or its blocks run across
            rows: those are read from files and not made.

    Example:
        >>> packed, scales, zeros = quantize(torch.randn(64, 256), Scheme.parse("int4-g128").desc())
    """
    refuse_grad("quantize", "quantize weight.detach()", weight)
    packed, scales, zeros = _ops.quantize.default(weight, desc, search, importance, super_scales)
    return packed, scales, None if absent_zeros(desc) else zeros


@_register_fake("lowbit::quantize")
def _(
    weight: Tensor, desc: int, search: bool, importance: Tensor | None, super_scales: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    d = parse(desc)
    check(weight.dim() == 2, "quantize", f"weight has shape {list(weight.shape)}, expected [N, K]")
    check_float("quantize", "weight", weight.dtype)
    check(not d.has_perm, "quantize", "desc has a perm; quantize the permuted weight and give the perm to pack")
    if importance is not None:
        check_tensor("quantize", "importance", importance, weight.shape[1:], torch.float32)
    N, K = weight.shape
    given = "absent" if super_scales is None else "given"
    says = f"but desc says super_groups={d.super_groups}"
    check((super_scales is None) == (d.super_groups == 0), "quantize", f"super_scales are {given}, {says}")
    scales, zeros, _, _ = _empty(weight, tables(N, K, d))
    return weight.new_empty(packed_shape(N, K, d), dtype=torch.uint8), scales, zeros


def _empty(like: Tensor, specs: Tables) -> list[Tensor]:
    """Tensors for a fake kernel to return; those that do not exist have no elements."""
    found = [((0,), torch.uint8) if spec is None else spec for spec in specs]
    return [like.new_empty(shape, dtype=dtype) for shape, dtype in found]


# -- dequantize ---------------------------------------------------------------------------------------------------------


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    N: int,
    K: int,
    desc: int,
    out_dtype: torch.dtype = torch.float32,
    super_scales: Tensor | None = None,
    super_zeros: Tensor | None = None,
) -> Tensor:
    """W from canonical tensors, by the formulas at the head of this module, rounded once to `out_dtype`.

    Args:
        packed: uint8 [N, ceil(K * bits / 8)], a little-endian bit stream along K.
        scales: [N, G] or, for blocks, [ceil(N/128), ceil(K/128)], in the desc's scale dtype.
        zeros: [N, G] if the desc's zero kind asks for it, else None.
        perm: int32 [K] if the desc says so, else None: packed column j is column perm[j] of W.
        out_dtype: float32, bfloat16 or float16.
        super_scales, super_zeros: the second level, where the desc has one, else None: see docs/format.md.

    Returns:
        W [N, K], columns in their original order.

    Raises:
        RuntimeError: a tensor is missing or superfluous, or its shape, dtype or device is not what desc, N and K say.

    Example:
        >>> W = dequantize(packed, scales, None, None, 64, 256, desc, torch.bfloat16)
    """
    return _ops.dequantize.default(packed, scales, zeros, perm, N, K, desc, out_dtype, super_scales, super_zeros)


@_register_fake("lowbit::dequantize")
def _(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    N: int,
    K: int,
    desc: int,
    out_dtype: torch.dtype,
    super_scales: Tensor | None = None,
    super_zeros: Tensor | None = None,
) -> Tensor:
    check_canonical("dequantize", packed, scales, zeros, perm, N, K, desc, super_scales, super_zeros)
    check_float("dequantize", "out_dtype", out_dtype)
    return packed.new_empty((N, K), dtype=out_dtype)


def dequantize_out(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    N: int,
    K: int,
    desc: int,
    out: Tensor,
    super_scales: Tensor | None = None,
    super_zeros: Tensor | None = None,
) -> Tensor:
    """`dequantize` into `out` [N, K], contiguous, of any of the three float dtypes; returns `out`.

    Example:
        >>> dequantize_out(packed, scales, None, None, 64, 256, desc, torch.empty(64, 256))
    """
    _ops.dequantize_out.default(packed, scales, zeros, perm, N, K, desc, out, super_scales, super_zeros)
    return out


@_register_fake("lowbit::dequantize_out")
def _(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    N: int,
    K: int,
    desc: int,
    out: Tensor,
    super_scales: Tensor | None = None,
    super_zeros: Tensor | None = None,
) -> None:
    check_canonical("dequantize_out", packed, scales, zeros, perm, N, K, desc, super_scales, super_zeros)
    check_float("dequantize_out", "out", out.dtype)
    check_tensor("dequantize_out", "out", out, (N, K), out.dtype)


# -- pack, unpack -------------------------------------------------------------------------------------------------------


def pack(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    N: int,
    K: int,
    desc: int,
    super_scales: Tensor | None = None,
    super_zeros: Tensor | None = None,
) -> Tensor:
    """The weight in the kernel layout that `desc` names: codes, scales, zeros and perm in one opaque tensor.

    Args:
        packed, scales, zeros, perm, super_scales, super_zeros: canonical tensors, as for `dequantize`.
        desc: with the layout to produce; `_C.preferred_layout(device_type, desc)` gives a device's own.

    Returns:
        uint8 [_C.packed_size(N, K, desc)]. `unpack` is the exact inverse.

    Raises:
        RuntimeError: as for `dequantize`.

    Example:
        >>> w = pack(packed, scales, None, None, 64, 256, scheme.desc(layout))
    """
    return _ops.pack.default(packed, scales, zeros, perm, N, K, desc, super_scales, super_zeros)


@_register_fake("lowbit::pack")
def _(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    N: int,
    K: int,
    desc: int,
    super_scales: Tensor | None = None,
    super_zeros: Tensor | None = None,
) -> Tensor:
    check_canonical("pack", packed, scales, zeros, perm, N, K, desc, super_scales, super_zeros)
    return packed.new_empty(_C.packed_size(N, K, desc))


def unpack(
    w: Tensor, N: int, K: int, desc: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The canonical tensors of a weight in a kernel layout: packed, scales, zeros, perm, super_scales, super_zeros.

    Args:
        w: uint8 [_C.packed_size(N, K, desc)], made by `pack` with the same N, K and desc.

    Returns:
        The six tensors; None for those that the desc does not have.

    Raises:
        RuntimeError: w has another size, dtype or device type than the desc's layout.

    Example:
        >>> packed, scales, zeros, perm, _, _ = unpack(w, 64, 256, desc)
    """
    packed, scales, zeros, perm, supers, super_zeros = _ops.unpack.default(w, N, K, desc)
    return (
        packed,
        scales,
        None if absent_zeros(desc) else zeros,
        None if absent_perm(desc) else perm,
        None if absent_supers(desc) else supers,
        None if absent_super_zeros(desc) else super_zeros,
    )


@_register_fake("lowbit::unpack")
def _(w: Tensor, N: int, K: int, desc: int) -> tuple[Tensor, ...]:
    d = parse(desc)
    check_packed("unpack", w, N, K, desc)
    scales, zeros, super_scales, super_zeros = _empty(w, tables(N, K, d))
    perm = w.new_empty(K if d.has_perm else 0, dtype=torch.int32)
    return w.new_empty(packed_shape(N, K, d)), scales, zeros, perm, super_scales, super_zeros
