"""The ops with 8-bit activations; `lowbit.ops` re-exports them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from lowbit import _C
from lowbit._checks import (
    check,
    check_bias,
    check_device,
    check_float,
    check_out,
    check_packed,
    check_rows,
    check_tensor,
    dtype_name,
    refuse_grad,
)

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
        group_size: -1; or for fp8 a multiple of 8 (`gemm_a8` takes 128).
        scale: fp32 [1]: static quantization.
        zero: int32 [1], with `scale` and not symmetric.
        pre_scale: fp32 [K], as SmoothQuant and AWQ need it.
        symmetric: False for int8 with a zero per token.

    Returns:
        xq [..., K] int8 or float8_e4m3fn; x_scales fp32 [..., ceil(K / group_size)]; x_zeros int32 [..., 1], or None when
        symmetric or fp8.

    Raises:
        RuntimeError: another format, asymmetric fp8, grouped int8, a scale that is not positive or a zero outside
            -128..127, or a shape or dtype that does not fit; x requires grad.

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
    check(x.dim() >= 1, op, "x is a scalar, expected shape [..., K]")
    check_float(op, "x", x.dtype)
    check(format in _XQ_DTYPES, op, f"format={format} is not an activation format; expected int8 or fp8_e4m3")
    is_int8 = _XQ_DTYPES[format] == torch.int8
    check(
        group_size == -1 or (group_size >= 8 and group_size % 8 == 0),
        op,
        f"group_size={group_size} is neither -1 nor a positive multiple of 8",
    )
    check(not is_int8 or group_size == -1, op, f"group_size={group_size} with int8, which has one scale per token (-1)")
    check(is_int8 or symmetric, op, "fp8 has no zeros, got symmetric=False")
    static_zero = scale is not None and not symmetric
    check(
        (zero is not None) == static_zero, op, "zero goes with a static scale, int8 and symmetric=False, and only there"
    )
    if pre_scale is not None:
        check_tensor(op, "pre_scale", pre_scale, x.shape[-1:], torch.float32)
    if scale is not None:
        check_tensor(op, "scale", scale, (1,), torch.float32)
    if zero is not None:
        check_tensor(op, "zero", zero, (1,), torch.int32)
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
    given = "given" if x_zeros is not None else "absent"
    check((x_zeros is not None) != symmetric, op, f"x_zeros is {given}, but symmetric={symmetric}")
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

    int8 activations times an integer format are summed exactly, in int32, over each weight group (on CUDA over parts of it,
    of 64 k or more).

    Args:
        xq: [..., K], int8 or float8_e4m3fn, from `quantize_activation`.
        x_scales: fp32 [..., 1] (per token) or [..., ceil(K / 128)].
        x_zeros: int32 [..., 1], or None.
        w, bias, N, K, desc, flags: as for `gemm`; every weight format is accepted.
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
    check_packed(op, w, N, K, desc)
    check(xq.dtype in _XQ_DTYPES.values(), op, f"xq is {dtype_name(xq.dtype)}, expected int8 or float8_e4m3fn")
    check_rows(op, "xq", xq, "K", K)
    check_device(op, "xq", xq, w)
    check(x_scales.dim() >= 1, op, "x_scales is a scalar, expected shape [..., 1] or [..., ceil(K / 128)]")
    groups = x_scales.shape[-1]
    check(
        groups in (1, (K + 127) // 128),
        op,
        f"x_scales of shape {list(x_scales.shape)} has neither one scale per row nor one per 128 of K={K} in its last dimension",
    )
    check_tensor(op, "x_scales", x_scales, (*xq.shape[:-1], groups), torch.float32)
    if x_zeros is not None:
        check(xq.dtype == torch.int8, op, f"x_zeros are given with {dtype_name(xq.dtype)} activations, which have none")
        check_tensor(op, "x_zeros", x_zeros, (*xq.shape[:-1], 1), torch.int32)
    check_float(op, "out_dtype", out_dtype)
    check_bias(op, bias, N)


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
        workspace: uint8 [at least _C.workspace_size("gemm_a8", M, N, K, desc)]; with it nothing is allocated. As for
            `gemm_out`, and the two may share one.

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
    check_out("gemm_a8_out", out, xq, N)
    _check_gemm_a8("gemm_a8_out", xq, x_scales, x_zeros, w, bias, N, K, desc, out.dtype)
