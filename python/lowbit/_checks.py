"""What the wrappers and fake kernels of the ops share: the fields of a desc in torch terms, shapes, and checks.

Shapes are computed here once more, beside `_C.canonical_shapes`, because under `torch.compile` N and K of a weight that
is still to be quantized may be symbolic. A test holds the two together. The checks are those of the ops themselves, so
that a wrong call fails while it is traced, not when the compiled graph first runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit import _C

__all__ = [
    "FLOATS",
    "Desc",
    "absent_perm",
    "absent_zeros",
    "canonical_shapes",
    "check",
    "check_bias",
    "check_canonical",
    "check_device",
    "check_float",
    "check_gemm",
    "check_out",
    "check_packed",
    "check_rows",
    "check_tensor",
    "dtype_name",
    "parse",
    "refuse_grad",
]

#: Dtypes of x, of weights to be quantized, and of what comes out.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Desc(NamedTuple):
    """The fields of a desc; `zero_dtype` is None when there is no third tensor."""

    format: str
    bits: int
    zero_kind: str
    group_size: int
    scale_dtype: torch.dtype
    zero_dtype: torch.dtype | None
    block: bool
    has_perm: bool
    layout: int


@functools.cache
def _names(enum: str) -> dict[int, str]:
    return {value: name for name, value in _C.enums()[enum].items()}


@functools.lru_cache(maxsize=4096)
def parse(desc: int) -> Desc:
    """The fields of `desc`; ValueError when it is not one."""
    fields = _C.parse_desc(desc)
    row = next(row for row in _C.format_table() if row["id"] == fields["format"])
    scale_dtype = _SCALE_DTYPES[_names("scale_dtype")[fields["scale_dtype"]]]
    kind = _names("zero_kind")[fields["zero_kind"]]
    return Desc(
        format=row["name"],
        bits=row["bits"],
        zero_kind=kind,
        group_size=fields["group_size"],
        scale_dtype=scale_dtype,
        zero_dtype={"none": None, "int": torch.uint8}.get(kind, scale_dtype),
        block=_names("scaling")[fields["scaling"]] == "block128",
        has_perm=bool(fields["has_perm"]),
        layout=fields["layout"],
    )


def canonical_shapes(N: int, K: int, d: Desc) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of packed and of scales (zeros have the shape of scales); N and K may be symbolic."""
    packed = (N, (K * d.bits + 7) // 8)
    if d.block:
        return packed, ((N + 127) // 128, (K + 127) // 128)
    return packed, (N, 1 if d.group_size == -1 else (K + d.group_size - 1) // d.group_size)


def absent_zeros(desc: int) -> bool:
    """Whether `desc` has no zeros and no offsets. Bit arithmetic, so that Dynamo can trace it."""
    return (desc >> 8) & 0xF == 0


def absent_perm(desc: int) -> bool:
    """Whether `desc` has no perm. Bit arithmetic, so that Dynamo can trace it."""
    return (desc >> 20) & 1 == 0


def check(condition: bool, op: str, message: str) -> None:
    """Raise as the op itself would, with its name in front."""
    if not condition:
        raise RuntimeError(f"lowbit::{op}: {message}")


def dtype_name(dtype: torch.dtype) -> str:
    """As the ops' own messages write it."""
    return str(dtype).removeprefix("torch.")


def check_float(op: str, name: str, dtype: torch.dtype) -> None:
    """Raise unless `dtype` is one of the three float dtypes."""
    check(dtype in FLOATS, op, f"{name} is {dtype_name(dtype)}, expected float32, float16 or bfloat16")


def check_tensor(op: str, name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise unless `tensor` has this shape and dtype."""
    check(tensor.dtype == dtype, op, f"{name} is {dtype_name(tensor.dtype)}, expected {dtype_name(dtype)}")
    check(tuple(tensor.shape) == tuple(shape), op, f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def check_rows(op: str, name: str, tensor: Tensor, letter: str, expected: int) -> None:
    """Raise unless `tensor` is [..., expected]; `letter` is what that dimension is called."""
    check(tensor.dim() >= 1, op, f"{name} is a scalar, expected shape [..., {letter}]")
    found = tensor.shape[-1]
    check(
        found == expected,
        op,
        f"{name} of shape {list(tensor.shape)} has {letter}={found} in its last dimension, the weight has {letter}={expected}",
    )


def check_device(op: str, name: str, tensor: Tensor, w: Tensor) -> None:
    """Raise unless the two are on one device."""
    check(tensor.device == w.device, op, f"{name} is on {tensor.device}, w is on {w.device}")


def refuse_grad(op: str, instead: str, *tensors: Tensor | None) -> None:
    """Raise if autograd would have to pass through `op`, which has no gradient."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"lowbit::{op}: has no gradient, but an input requires grad; {instead}")


def check_canonical(
    op: str, packed: Tensor, scales: Tensor, zeros: Tensor | None, perm: Tensor | None, N: int, K: int, desc: int
) -> None:
    """Raise unless the canonical tensors are what N, K and desc say."""
    d = parse(desc)
    packed_shape, scales_shape = canonical_shapes(N, K, d)
    check_tensor(op, "packed", packed, packed_shape, torch.uint8)
    check_tensor(op, "scales", scales, scales_shape, d.scale_dtype)
    given = "absent" if zeros is None else "given"
    check((zeros is None) == (d.zero_dtype is None), op, f"zeros are {given}, but desc says zeros={d.zero_kind}")
    given, wanted = "absent" if perm is None else "given", "there" if d.has_perm else "not"
    check((perm is not None) == d.has_perm, op, f"perm is {given}, but desc says it is {wanted}")
    if zeros is not None and d.zero_dtype is not None:
        check_tensor(op, "zeros", zeros, scales_shape, d.zero_dtype)
    if perm is not None:
        check_tensor(op, "perm", perm, (K,), torch.int32)


def check_packed(op: str, w: Tensor, N: int, K: int, desc: int) -> None:
    """Raise unless `w` can be a weight in the desc's kernel layout."""
    check_tensor(op, "w", w, (_C.packed_size(N, K, desc),), torch.uint8)


def check_bias(op: str, bias: Tensor | None, N: int) -> None:
    """Raise unless `bias` is absent or one float per row of W."""
    if bias is not None:
        check_float(op, "bias", bias.dtype)
        check_tensor(op, "bias", bias, (N,), bias.dtype)


def check_gemm(op: str, x: Tensor, w: Tensor, bias: Tensor | None, N: int, K: int, desc: int) -> None:
    """The checks of gemm and linear."""
    check_float(op, "x", x.dtype)
    check_packed(op, w, N, K, desc)
    check_rows(op, "x", x, "K", K)
    check_device(op, "x", x, w)
    check_bias(op, bias, N)


def check_out(op: str, out: Tensor, x: Tensor, N: int) -> None:
    """Raise unless `out` is x's shape with N in the last place, in one of the three float dtypes."""
    check_float(op, "out", out.dtype)
    check_tensor(op, "out", out, (*x.shape[:-1], N), out.dtype)
