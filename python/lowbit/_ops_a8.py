"""The ops with 8-bit activations; `lowbit.ops` re-exports them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from lowbit import _C
from lowbit._checks import FLOATS, check, check_bias, check_out, check_packed, check_tensor, refuse_grad

__all__ = ["gemm_a8", "gemm_a8_out", "quantize_activation", "quantize_activation_out"]

_ops = torch.ops.lowbit
_register_fake = torch.library.register_fake
_XQ_DTYPES: Final = {
    _C.enums()["format"]["int8"]: torch.int8,
    _C.enums()["format"]["fp8_e4m3"]: torch.float8_e4m3fn,
}


# -- quantize_activation ------------------------------------------------------------------------------------------------


def quantize_activation(
    x: Tensor,
    format: int,
    group_size: int = -1,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    pre_scale: Tensor | None = None,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize x to 8 bits, per token (group_size -1) or per group along K, with x * pre_scale in place of x if given.

        int8, symmetric     s = amax / 127             xq = clamp(round(x / s), -127, 127)
        int8, asymmetric    s = (hi - lo) / 255        z = clamp(round(-128 - lo / s), -128, 127)       lo <= 0 <= hi
                                                       xq = clamp(round(x / s) + z, -128, 127)
        fp8_e4m3            s = amax / 448             xq = e4m3(clamp(x / s, -448, 448))

    in fp32, ties to even. amax = 0 gives s = 1; a group that holds a NaN gets a NaN scale. With `scale` (and `zero`, if not
    symmetric) these are used for all of x instead, and int8 clamps to [-128, 127]: values outside saturate.

    Args:
        x: [..., K], fp32, bf16 or fp16, any strides.
        format: `_C.enums()["format"]`: int8 or fp8_e4m3.
        group_size: -1, or a multiple of 8 (128 goes with fp8 in 128 x 128 blocks).
        scale: fp32, one element: static quantization.
        zero: int32, one element; with `scale` and not symmetric.
        pre_scale: fp32 [K], as SmoothQuant and AWQ need it.
        symmetric: False for int8 with a zero per token.

    Returns:
        xq [..., K] int8 or float8_e4m3fn; x_scales fp32 [..., ceil(K / group_size)]; x_zeros int32 [..., 1], or None when
        symmetric or fp8.

    Raises:
        RuntimeError: another format, asymmetric fp8, or a shape or dtype that does not fit; x requires grad.

    Example:
        >>> xq, x_scales, _ = quantize_activation(x, _C.enums()["format"]["int8"])
    """
    refuse_grad("quantize_activation", "detach it", x)
    xq, x_scales, x_zeros = _ops.quantize_activation.default(x, format, group_size, scale, zero, pre_scale, symmetric)
    return xq, x_scales, None if symmetric else x_zeros


def _check_activation(
    op: str,
    x: Tensor,
    format: int,
    group_size: int,
    scale: Tensor | None,
    zero: Tensor | None,
    pre_scale: Tensor | None,
    symmetric: bool,
) -> int:
    """Check the inputs; return how many scales a row has."""
    check(x.dim() >= 1, op, "x has no dimensions, must be [..., K]")
    check(x.dtype in FLOATS, op, f"x is {x.dtype}, must be float32, bfloat16 or float16")
    check(format in _XQ_DTYPES, op, f"format={format} is neither int8 nor fp8_e4m3 ({sorted(_XQ_DTYPES)})")
    check(symmetric or _XQ_DTYPES[format] == torch.int8, op, "fp8_e4m3 is symmetric, got symmetric=False")
    check(group_size == -1 or (group_size > 0 and group_size % 8 == 0), op, f"group_size={group_size} is not -1 or 8n")
    if pre_scale is not None:
        check_tensor(op, "pre_scale", pre_scale, x.shape[-1:], torch.float32)
    if scale is not None:
        check(scale.numel() == 1 and scale.dtype == torch.float32, op, "scale must be one float32")
    if zero is not None:
        check(zero.numel() == 1 and zero.dtype == torch.int32, op, "zero must be one int32")
    return 1 if group_size == -1 else (x.shape[-1] + group_size - 1) // group_size


@_register_fake("lowbit::quantize_activation")
def _(
    x: Tensor,
    format: int,
    group_size: int,
    scale: Tensor | None,
    zero: Tensor | None,
    pre_scale: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = _check_activation("quantize_activation", x, format, group_size, scale, zero, pre_scale, symmetric)
    lead = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=_XQ_DTYPES[format]),
        x.new_empty((*lead, groups), dtype=torch.float32),
        x.new_empty((0,) if symmetric else (*lead, 1), dtype=torch.int32),
    )


def quantize_activation_out(
    x: Tensor,
    format: int,
    group_size: int,
    scale: Tensor | None,
    zero: Tensor | None,
    pre_scale: Tensor | None,
    symmetric: bool,
    xq: Tensor,
    x_scales: Tensor,
    x_zeros: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`quantize_activation` into contiguous tensors of the shapes and dtypes it returns; returns them.

    Example:
        >>> quantize_activation_out(x, INT8, -1, None, None, None, True, xq, x_scales)
    """
    refuse_grad("quantize_activation_out", "detach it", x)
    _ops.quantize_activation_out.default(
        x, format, group_size, scale, zero, pre_scale, symmetric, xq, x_scales, x_zeros
    )
    return xq, x_scales, x_zeros


@_register_fake("lowbit::quantize_activation_out")
def _(
    x: Tensor,
    format: int,
    group_size: int,
    scale: Tensor | None,
    zero: Tensor | None,
    pre_scale: Tensor | None,
    symmetric: bool,
    xq: Tensor,
    x_scales: Tensor,
    x_zeros: Tensor | None,
) -> None:
    op = "quantize_activation_out"
    groups = _check_activation(op, x, format, group_size, scale, zero, pre_scale, symmetric)
    check_tensor(op, "xq", xq, x.shape, _XQ_DTYPES[format])
    check_tensor(op, "x_scales", x_scales, (*x.shape[:-1], groups), torch.float32)
    if x_zeros is not None:
        check_tensor(op, "x_zeros", x_zeros, (*x.shape[:-1], 1), torch.int32)


# -- gemm_a8 ------------------------------------------------------------------------------------------------------------


def gemm_a8(
    xq: Tensor,
    x_scales: Tensor,
    x_zeros: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    desc: int,
    flags: int = 0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """y = x @ W.T + bias with x[m,k] = (xq[m,k] - x_zeros[m]) * x_scales[m, k // group].

    int8 activations times an integer format are summed exactly, in int32, within each weight group.

    Args:
        xq: [..., K], int8 or float8_e4m3fn, from `quantize_activation`.
        x_scales: fp32 [..., number of groups].
        x_zeros: int32 [..., 1], or None.
        w, bias, N, K, desc, flags: as for `gemm`; every weight format is accepted. bias is of `out_dtype` or fp32.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        y [..., N] of `out_dtype`.

    Raises:
        RuntimeError: shapes, dtypes, devices or the layout do not fit.

    Example:
        >>> y = gemm_a8(*quantize_activation(x, INT8), w, None, 64, 256, desc)
    """
    return _ops.gemm_a8.default(xq, x_scales, x_zeros, w, bias, N, K, desc, flags, out_dtype)


def _check_gemm_a8(
    op: str,
    xq: Tensor,
    x_scales: Tensor,
    x_zeros: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    desc: int,
    out_dtype: torch.dtype,
) -> None:
    check(xq.dim() >= 1, op, "xq has no dimensions, must be [..., K]")
    check(xq.dtype in _XQ_DTYPES.values(), op, f"xq is {xq.dtype}, must be int8 or float8_e4m3fn")
    check(xq.shape[-1] == K, op, f"xq has K={xq.shape[-1]} in its last dimension, the weight has K={K}")
    check(x_scales.dtype == torch.float32, op, f"x_scales is {x_scales.dtype}, must be torch.float32")
    check(x_scales.dim() == xq.dim(), op, f"x_scales has {x_scales.dim()} dimensions, xq has {xq.dim()}")
    if x_zeros is not None:
        check_tensor(op, "x_zeros", x_zeros, (*xq.shape[:-1], 1), torch.int32)
    check(xq.device == w.device, op, f"xq is on {xq.device}, w on {w.device}")
    check_packed(op, w, N, K, desc)
    check(out_dtype in FLOATS, op, f"out_dtype is {out_dtype}, must be float32, bfloat16 or float16")
    check_bias(op, bias, N, out_dtype)


@_register_fake("lowbit::gemm_a8")
def _(
    xq: Tensor,
    x_scales: Tensor,
    x_zeros: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    desc: int,
    flags: int,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_gemm_a8("gemm_a8", xq, x_scales, x_zeros, w, bias, N, K, desc, out_dtype)
    return xq.new_empty((*xq.shape[:-1], N), dtype=out_dtype)


def gemm_a8_out(
    xq: Tensor,
    x_scales: Tensor,
    x_zeros: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    desc: int,
    flags: int,
    out: Tensor,
    workspace: Tensor | None = None,
) -> Tensor:
    """`gemm_a8` into `out` [..., N], contiguous, of any of the three float dtypes; returns `out`.

    Args:
        workspace: uint8 [at least _C.workspace_size("gemm_a8", M, N, K, desc)]; with it nothing is allocated.

    Example:
        >>> gemm_a8_out(xq, x_scales, None, w, None, 64, 256, desc, 0, torch.empty(8, 64))
    """
    _ops.gemm_a8_out.default(xq, x_scales, x_zeros, w, bias, N, K, desc, flags, out, workspace)
    return out


@_register_fake("lowbit::gemm_a8_out")
def _(
    xq: Tensor,
    x_scales: Tensor,
    x_zeros: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    desc: int,
    flags: int,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    _check_gemm_a8("gemm_a8_out", xq, x_scales, x_zeros, w, bias, N, K, desc, out.dtype)
    check_out("gemm_a8_out", out, xq, N)
