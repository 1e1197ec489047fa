"""The op that gathers rows of a packed weight; `lowbit.ops` re-exports it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from lowbit import _C, _cuda, _metal
from lowbit._checks import check, check_device, check_float, check_packed, dtype_name, parse

__all__ = ["embedding"]

_ops = torch.ops.lowbit
_LAYOUTS: Final = _C.enums()["layout"]
# Rows of W in a strip of each layout: what can be cut out of a packed weight as a packed weight.
_STRIP_ROWS: Final = {_LAYOUTS["cpu_tile16"]: 16, _LAYOUTS["cuda_tile64"]: 64, _LAYOUTS["metal_tile4"]: 4}
_CHUNK: Final = 256  # indices whose strips are decoded at a time


def embedding(indices: Tensor, w: Tensor, N: int, K: int, desc: int, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of W: out[..., k] = W[indices[...], k], rounded once to `out_dtype`.

    On the CPU only the rows that are asked for are decoded. On CUDA and Metal the strips of rows that hold them are unpacked
    and dequantized by those ops, 64 and 4 rows for one, 256 indices at a time; of weights with scales of two levels or blocks
    over several rows, all of W is.

    Args:
        indices: int64 or int32, any shape; 0 <= index < N, which only the CPU looks at.
        w: uint8, made by `pack` with the same N, K and desc.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [..., K] of `out_dtype`. The values are those of `dequantize`, to the bit.

    Raises:
        RuntimeError: an index is out of range, or dtypes, devices, sizes or the layout do not fit.

    Example:
        >>> embedding(torch.tensor([3, 1]), w, 64, 256, desc).shape
        torch.Size([2, 256])
    """
    return _ops.embedding.default(indices, w, N, K, desc, out_dtype)


@torch.library.register_fake("lowbit::embedding")
def _(indices: Tensor, w: Tensor, N: int, K: int, desc: int, out_dtype: torch.dtype) -> Tensor:
    check_packed("embedding", w, N, K, desc)
    check_float("embedding", "out_dtype", out_dtype)
    known = indices.dtype in (torch.int64, torch.int32)
    check(known, "embedding", f"indices are {dtype_name(indices.dtype)}, expected int64 or int32")
    check_device("embedding", "indices", indices, w)
    return w.new_empty((*indices.shape, K), dtype=out_dtype)


def gather_strips(indices: Tensor, w: Tensor, N: int, K: int, desc: int, out_dtype: torch.dtype) -> Tensor:
    """`embedding` by way of unpack and dequantize, on the device of the tensors."""
    d = parse(desc)
    flat = indices.reshape(-1)
    if flat.numel() == 0:
        return w.new_empty((*indices.shape, K), dtype=out_dtype)
    if d.scaling != "group" or d.has_perm or d.super_groups != 0:  # no strip is a weight of its own
        return _dense(w, N, K, desc, out_dtype).index_select(0, flat).reshape(*indices.shape, K)
    rows = _STRIP_ROWS[d.layout]
    strip_bytes = _C.packed_size(2 * rows, K, desc) - _C.packed_size(rows, K, desc)
    strips = w[: -(-N // rows) * strip_bytes].view(-1, strip_bytes)
    parts = []
    for some in flat.split(_CHUNK):
        cut = strips.index_select(0, some // rows).reshape(-1)
        dense = _dense(cut, len(some) * rows, K, desc, out_dtype).view(len(some), rows, K)
        parts.append(dense[torch.arange(len(some), device=some.device), some % rows])
    return torch.cat(parts).reshape(*indices.shape, K)


def _dense(w: Tensor, N: int, K: int, desc: int, out_dtype: torch.dtype) -> Tensor:
    packed, scales, *others = _ops.unpack.default(w, N, K, desc)
    zeros, perm, *supers = (None if tensor.numel() == 0 else tensor for tensor in others)
    canonical = desc & ~(255 << 24)  # the layout's field
    return _ops.dequantize.default(packed, scales, zeros, perm, N, K, canonical, out_dtype, *supers)


if _cuda.loaded():
    torch.library.impl("lowbit::embedding", "CUDA", gather_strips)
if _metal.loaded():
    torch.library.impl("lowbit::embedding", "MPS", gather_strips)
