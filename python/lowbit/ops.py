"""Every op of the `lowbit` namespace: wrapper, documentation, fake kernel and autograd, in the order of schema.cpp.

The terms: W[N, K] is the weight, x[..., K] its input, y = x @ W.T + bias. Weights are *canonical* (packed, scales,
zeros, perm: what files hold) or in a *kernel layout* (one opaque uint8 tensor, made by `pack`). `desc` is the int that
`Scheme.desc(layout, has_perm)` returns. `zeros` is the tensor beside the scales, whatever it holds: integer zeros (uint8),
fractional zeros, or offsets (both of the scales' dtype). With G = ceil(K / group_size), and q the stored codes:

    integer formats     W[n,k] = (q[n,k] - zeros[n,g]) * scales[n,g]        no zeros: 2^(bits-1)
                        W[n,k] =  q[n,k] * scales[n,g] + zeros[n,g]         zero kind "offset"
    coded formats       W[n,k] = code[q[n,k]] * scales[n,g]

These functions add what an op cannot have (defaults, None for absent tensors, a refusal to drop gradients silently);
`torch.ops.lowbit.*` are the same ops for callers who count microseconds. Every op works under `torch.compile` and
`torch.export`. Errors are RuntimeError, carry the values, and are raised before any work.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from lowbit import _C
from lowbit._checks import (
    FLOATS,
    absent_perm,
    absent_zeros,
    canonical_shapes,
    check,
    check_canonical,
    check_device,
    check_float,
    check_gemm,
    check_packed,
    check_rows,
    check_tensor,
    parse,
    refuse_grad,
)
from lowbit._ops_a8 import gemm_a8, gemm_a8_out, quantize_activation, quantize_activation_out

__all__ = [
    "dequantize",
    "dequantize_out",
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


# -- quantize -----------------------------------------------------------------------------------------------------------


def quantize(
    weight: Tensor, desc: int, search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize W to canonical tensors.

    Per group (or 128 x 128 block), in fp32 with IEEE division and ties to even, so that every ISA, thread count and
    backend gives the same bits:

        symmetric, coded    scales = absmax / max        max: 2^(bits-1) - 0.5, or the largest |code|
        int zeros           scales = (hi - lo) / (2^bits - 1)       zeros = round(-lo / scales)      lo <= 0 <= hi
        float zeros         the same scales                         zeros = -lo / scales
        offset              scales = (hi - lo) / (2^bits - 1)       zeros = lo

    Codes are computed against the scales and zeros as stored, after rounding to their dtype.

    Args:
        weight: [N, K], fp32, bf16 or fp16, any strides.
        desc: the scheme, without perm; its layout is ignored.
        search: look for the scale with the least squared error instead; never worse than the above on any group.
        importance: fp32 [K], weighs the squared error of each column in the search.

    Returns:
        packed uint8 [N, ceil(K * bits / 8)], scales [N, G] (blocks: [ceil(N/128), ceil(K/128)]), zeros [N, G] or None.
        A group that holds a NaN gets a NaN scale, one with an infinity an infinite scale.

    Raises:
        RuntimeError: weight is not 2-D or not one of the three dtypes; desc has a perm; group_size exceeds K;
            importance is not fp32 [K].

    Example:
        >>> packed, scales, zeros = quantize(torch.randn(64, 256), Scheme.parse("int4-g128").desc())
    """
    refuse_grad("quantize", "quantize weight.detach()", weight)
    packed, scales, zeros = _ops.quantize.default(weight, desc, search, importance)
    return packed, scales, None if absent_zeros(desc) else zeros


@_register_fake("lowbit::quantize")
def _(weight: Tensor, desc: int, search: bool, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    d = parse(desc)
    check(weight.dim() == 2, "quantize", f"weight has shape {list(weight.shape)}, expected [N, K]")
    check_float("quantize", "weight", weight.dtype)
    check(not d.has_perm, "quantize", "desc has a perm; quantize the permuted weight and give the perm to pack")
    if importance is not None:
        check_tensor("quantize", "importance", importance, weight.shape[1:], torch.float32)
    packed, scales = canonical_shapes(weight.shape[0], weight.shape[1], d)
    return (
        weight.new_empty(packed, dtype=torch.uint8),
        weight.new_empty(scales, dtype=d.scale_dtype),
        weight.new_empty(0 if d.zero_dtype is None else scales, dtype=d.zero_dtype or torch.uint8),
    )


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
) -> Tensor:
    """W from canonical tensors, by the formulas at the head of this module, rounded once to `out_dtype`.

    Args:
        packed: uint8 [N, ceil(K * bits / 8)], a little-endian bit stream along K.
        scales: [N, G] or, for blocks, [ceil(N/128), ceil(K/128)], in the desc's scale dtype.
        zeros: [N, G] if the desc's zero kind asks for it, else None.
        perm: int32 [K] if the desc says so, else None: packed column j is column perm[j] of W.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        W [N, K], columns in their original order.

    Raises:
        RuntimeError: a tensor is missing or superfluous, or its shape, dtype or device is not what desc, N and K say.

    Example:
        >>> W = dequantize(packed, scales, None, None, 64, 256, desc, torch.bfloat16)
    """
    return _ops.dequantize.default(packed, scales, zeros, perm, N, K, desc, out_dtype)


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
) -> Tensor:
    check_canonical("dequantize", packed, scales, zeros, perm, N, K, desc)
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
) -> Tensor:
    """`dequantize` into `out` [N, K], contiguous, of any of the three float dtypes; returns `out`.

    Example:
        >>> dequantize_out(packed, scales, None, None, 64, 256, desc, torch.empty(64, 256))
    """
    _ops.dequantize_out.default(packed, scales, zeros, perm, N, K, desc, out)
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
) -> None:
    check_canonical("dequantize_out", packed, scales, zeros, perm, N, K, desc)
    check_float("dequantize_out", "out", out.dtype)
    check_tensor("dequantize_out", "out", out, (N, K), out.dtype)


# -- pack, unpack -------------------------------------------------------------------------------------------------------


def pack(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, perm: Tensor | None, N: int, K: int, desc: int
) -> Tensor:
    """The weight in the kernel layout that `desc` names: codes, scales, zeros and perm in one opaque tensor.

    Args:
        packed, scales, zeros, perm: canonical tensors, as for `dequantize`.
        desc: with the layout to produce; `_C.preferred_layout(device_type, desc)` gives a device's own.

    Returns:
        uint8 [_C.packed_size(N, K, desc)]. `unpack` is the exact inverse.

    Raises:
        RuntimeError: as for `dequantize`.

    Example:
        >>> w = pack(packed, scales, None, None, 64, 256, scheme.desc(layout))
    """
    return _ops.pack.default(packed, scales, zeros, perm, N, K, desc)


@_register_fake("lowbit::pack")
def _(packed: Tensor, scales: Tensor, zeros: Tensor | None, perm: Tensor | None, N: int, K: int, desc: int) -> Tensor:
    check_canonical("pack", packed, scales, zeros, perm, N, K, desc)
    return packed.new_empty(_C.packed_size(N, K, desc))


def unpack(w: Tensor, N: int, K: int, desc: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The canonical tensors (packed, scales, zeros or None, perm or None) of a weight in a kernel layout.

    Args:
        w: uint8 [_C.packed_size(N, K, desc)], made by `pack` with the same N, K and desc.

    Raises:
        RuntimeError: w has another size, dtype or device type than the desc's layout.

    Example:
        >>> packed, scales, zeros, perm = unpack(w, 64, 256, desc)
    """
    packed, scales, zeros, perm = _ops.unpack.default(w, N, K, desc)
    return packed, scales, None if absent_zeros(desc) else zeros, None if absent_perm(desc) else perm


@_register_fake("lowbit::unpack")
def _(w: Tensor, N: int, K: int, desc: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = parse(desc)
    check_packed("unpack", w, N, K, desc)
    packed, scales = canonical_shapes(N, K, d)
    return (
        w.new_empty(packed),
        w.new_empty(scales, dtype=d.scale_dtype),
        w.new_empty(0 if d.zero_dtype is None else scales, dtype=d.zero_dtype or torch.uint8),
        w.new_empty(K if d.has_perm else 0, dtype=torch.int32),
    )


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
