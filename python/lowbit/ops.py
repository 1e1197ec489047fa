"""Every op of the `lowbit` namespace: wrapper, documentation, fake kernel and autograd; the canonical ones in _ops_weight.py,
the one that gathers rows in _ops_embedding.py, those with 8-bit inputs in _ops_a8.py.

The terms: W[N, K] is the weight, x[..., K] its input, y = x @ W.T + bias. Weights are *canonical* (packed, scales,
zeros, perm: what files hold) or in a *kernel layout* (one opaque uint8 tensor, made by `pack`). `desc` is the int that
`Scheme.desc(layout, has_perm)` returns. `zeros` is the tensor beside the scales, whatever it holds: integer zeros (uint8),
fractional zeros, or offsets (both of the scales' dtype). With G = ceil(K / group_size), and q the stored codes:

    integer formats     W[n,k] = (q[n,k] - zeros[n,g]) * scales[n,g]        no zeros: 2^(bits-1)
                        W[n,k] =  q[n,k] * scales[n,g] + zeros[n,g]         zero kind "offset"
    coded formats       W[n,k] = code[q[n,k]] * scales[n,g]

Scales and offsets of two levels are codes times a `super_scales` and a `super_zeros` that several of them share.

These functions add what an op cannot have (defaults, None for absent tensors, a refusal to drop gradients silently);
`torch.ops.lowbit.*` are the same ops for callers who count microseconds. Every op works under `torch.compile` and
`torch.export`. Errors are RuntimeError, carry the values, and are raised before any work.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from lowbit._checks import (
    FLOATS,
    check_device,
    check_float,
    check_gemm,
    check_packed,
    check_rows,
    check_tensor,
    refuse_grad,
)
from lowbit._ops_a8 import gemm_a8, gemm_a8_out, quantize_activation, quantize_activation_out
from lowbit._ops_embedding import embedding
from lowbit._ops_weight import dequantize, dequantize_out, pack, quantize, unpack

__all__ = [
    "dequantize",
    "dequantize_out",
    "embedding",
    "gemm",
    "gemm_a8",
    "gemm_a8_out",
    "gemm_grad_input",
    "gemm_out",
    "linear",
    "pack",
    "quantize",
    "quantize_activation",
    "quantize_activation_out",
    "unpack",
]

_ops = torch.ops.lowbit
_register_fake = torch.library.register_fake
_DISPATCH_KEYS: Final = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "mps": "AutocastMPS"}


# -- gemm ---------------------------------------------------------------------------------------------------------------


def gemm(x: Tensor, w: Tensor, bias: Tensor | None, N: int, K: int, desc: int, flags: int = 0) -> Tensor:
    """y = x @ W.T + bias, decoding W as it is read.

    W is rounded at most once (to x's dtype), products are summed in fp32, y is rounded once. Under autocast x and
    bias are cast to the autocast dtype first.

    Args:
        x: [..., K], fp32, bf16 or fp16, any strides, any leading dimensions (0 included).
        w: uint8, made by `pack` with the same N, K and desc.
        bias: [N], fp32, bf16 or fp16, or None.
        flags: 0, or `_C.enums()["flags"]["batch_invariant"]`: a row of y depends on no other row of x, nor on how
            many there are, to the last bit.

    Returns:
        y [..., N] of x's dtype.

    Raises:
        RuntimeError: shapes, dtypes, devices or the layout do not fit; x requires grad (use `linear`, which is this
            with autograd); LOWBIT_STRICT is set and only the general kernel takes the problem.

    Example:
        >>> y = gemm(x, w, None, 64, 256, desc)
    """
    if x.requires_grad and torch.is_grad_enabled():
        refuse_grad("gemm", "call lowbit.ops.linear", x)
    return _gemm(x, w, bias, N, K, desc, flags)


_gemm = _ops.gemm.default


@_register_fake("lowbit::gemm")
def _(x: Tensor, w: Tensor, bias: Tensor | None, N: int, K: int, desc: int, flags: int) -> Tensor:
    check_gemm("gemm", x, w, bias, N, K, desc)
    return x.new_empty((*x.shape[:-1], N))


def gemm_out(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    desc: int,
    flags: int,
    out: Tensor,
    workspace: Tensor | None = None,
) -> Tensor:
    """`gemm` into `out` [..., N], contiguous, of x's dtype; returns `out`. Allocates nothing if given a workspace.

    Args:
        workspace: uint8 [at least _C.workspace_size("gemm", M, N, K, desc)], M the product of the leading dimensions. On
            CUDA it must have been filled with zeros once, when it was made; calls leave it ready for others of any shape
            that follow on the same stream.

    Example:
        >>> gemm_out(x, w, None, 64, 256, desc, 0, torch.empty(8, 64))
    """
    refuse_grad("gemm_out", "call lowbit.ops.linear", x)
    _ops.gemm_out.default(x, w, bias, N, K, desc, flags, out, workspace)
    return out


@_register_fake("lowbit::gemm_out")
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    desc: int,
    flags: int,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    check_gemm("gemm_out", x, w, bias, N, K, desc)
    check_tensor("gemm_out", "out", out, (*x.shape[:-1], N), x.dtype)


# -- linear -------------------------------------------------------------------------------------------------------------


def linear(x: Tensor, w: Tensor, bias: Tensor | None, N: int, K: int, desc: int, flags: int = 0) -> Tensor:
    """`gemm` with autograd: dx = dy @ W, dbias = dy summed over its rows. The weight is frozen.

    A separate op, because carrying a gradient formula doubles the cost of a call.

    Raises:
        RuntimeError: as for `gemm`; and in a backward pass that is itself to be differentiated (create_graph=True).

    Example:
        >>> linear(x.requires_grad_(), w, bias, 64, 256, desc).sum().backward()
    """
    return _ops.linear.default(x, w, bias, N, K, desc, flags)


@_register_fake("lowbit::linear")
def _(x: Tensor, w: Tensor, bias: Tensor | None, N: int, K: int, desc: int, flags: int) -> Tensor:
    check_gemm("linear", x, w, bias, N, K, desc)
    return x.new_empty((*x.shape[:-1], N))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, w, bias, ctx.N, ctx.K, ctx.desc, ctx.flags = inputs
    ctx.save_for_backward(w)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if dy.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("lowbit::linear: second derivatives are not supported (create_graph=True)")
    (w,) = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _ops.gemm_grad_input.default(dy, w, ctx.N, ctx.K, ctx.desc, ctx.flags)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        dbias = dy.reshape(-1, ctx.N).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, dbias, None, None, None, None


torch.library.register_autograd("lowbit::linear", _linear_backward, setup_context=_linear_setup)


def gemm_grad_input(dy: Tensor, w: Tensor, N: int, K: int, desc: int, flags: int = 0) -> Tensor:
    """dx = dy @ W, the gradient of `gemm` with respect to x.

    Args:
        dy: [..., N], fp32, bf16 or fp16, any strides.
        w, desc, flags: as for `gemm`.

    Returns:
        dx [..., K] of dy's dtype, in the original column order.

    Raises:
        RuntimeError: as for `gemm`.

    Example:
        >>> dx = gemm_grad_input(dy, w, 64, 256, desc)
    """
    refuse_grad("gemm_grad_input", "second derivatives are not supported", dy)
    return _ops.gemm_grad_input.default(dy, w, N, K, desc, flags)


@_register_fake("lowbit::gemm_grad_input")
def _(dy: Tensor, w: Tensor, N: int, K: int, desc: int, flags: int) -> Tensor:
    op = "gemm_grad_input"
    check_float(op, "dy", dy.dtype)
    check_packed(op, w, N, K, desc)
    check_rows(op, "dy", dy, "N", N)
    check_device(op, "dy", dy, w)
    return dy.new_empty((*dy.shape[:-1], K))


# -- autocast -----------------------------------------------------------------------------------------------------------


def _register_autocast(op: torch._ops.OpOverload) -> None:
    """Cast x and bias of `op` (gemm or linear) to the autocast dtype; scales are inside w and stay as they are.

    As dispatcher kernels these cost nothing while autocast is off, and serve callers of torch.ops.lowbit too.
    """

    def kernel_for(device_type: str) -> Any:
        def cast(tensor: Tensor) -> Tensor:  # as torch: float64 is left alone, for the op to refuse
            return tensor.to(torch.get_autocast_dtype(device_type)) if tensor.dtype in FLOATS else tensor

        def kernel(x: Tensor, w: Tensor, bias: Tensor | None, N: int, K: int, desc: int, flags: int) -> Tensor:
            x, bias = cast(x), None if bias is None else cast(bias)
            torch.set_autocast_enabled(device_type, False)  # what torch.autocast does, at a fifth of its cost
            try:
                return op(x, w, bias, N, K, desc, flags)
            finally:
                torch.set_autocast_enabled(device_type, True)

        return kernel

    for device_type, key in _DISPATCH_KEYS.items():
        _library.impl(op, kernel_for(device_type), key)


_library: Final = torch.library.Library("lowbit", "IMPL")
_register_autocast(_ops.gemm.default)
_register_autocast(_ops.linear.default)
