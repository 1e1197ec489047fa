"""What the wrappers and fake kernels of the ops share: the fields of a desc in torch terms, shapes, and checks.

Shapes are computed here once more, beside `_C.canonical_shapes`, because under `torch.compile` N and K of a weight that
is still to be quantized may be symbolic. A test holds the two together. The checks are those of the ops themselves, so
that a wrong call fails while it is traced, not when the compiled graph first runs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lowbit import _C

__all__ = [
    "FLOATS",
    "SCALE_DTYPES",
    "Desc",
    "Tables",
    "absent_perm",
    "absent_super_zeros",
    "absent_supers",
    "absent_zeros",
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
    "packed_shape",
    "parse",
    "refuse_grad",
    "tables",
]

#: Dtypes of x, of weights to be quantized, and of what comes out.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

#: Dtype of scales in a desc -> of the tensor that holds them. Codes are bytes, or a bit stream of 4 or 6 bits each.
SCALE_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
    **{row["name"]: torch.uint8 for row in _C.scale_table() if row["needs_super"]},
}
_SCALE_BITS: Final = {row["name"]: row["bits"] for row in _C.scale_table()}

#: Shape and dtype of a tensor.
Spec = tuple[tuple[int, ...], torch.dtype]


class Desc(NamedTuple):
    """The fields of a desc."""

    format: str
    bits: int
    zero_kind: str
    group_size: int
    scale_dtype: str
    scaling: str
    has_perm: bool
    layout: int
    super_dtype: str
    super_groups: int


class Tables(NamedTuple):
    """What stands beside the codes: shape and dtype of each tensor, None where there is none."""

    scales: Spec
    zeros: Spec | None
    super_scales: Spec | None
    super_zeros: Spec | None


@functools.cache
def _names(enum: str) -> dict[int, str]:
    return {value: name for name, value in _C.enums()[enum].items()}


@functools.lru_cache(maxsize=4096)
def parse(desc: int) -> Desc:
    """The fields of `desc`; ValueError when it is not one."""
    fields = _C.parse_desc(desc)
    row = next(row for row in _C.format_table() if row["id"] == fields["format"])
    return Desc(
        format=row["name"],
        bits=row["bits"],
        zero_kind=_names("zero_kind")[fields["zero_kind"]],
        group_size=fields["group_size"],
        scale_dtype=_names("scale_dtype")[fields["scale_dtype"]],
        scaling=_names("scaling")[fields["scaling"]],
        has_perm=bool(fields["has_perm"]),
        layout=fields["layout"],
        super_dtype=_names("scale_dtype")[fields["super_dtype"]],
        super_groups=fields["super_groups"],
    )


def packed_shape(N: int, K: int, d: Desc) -> tuple[int, int]:
    """Shape of packed; N and K may be symbolic, here and in `tables`."""
    return N, (K * d.bits + 7) // 8


def tables(N: int, K: int, d: Desc) -> Tables:
    """Shapes and dtypes of scales, zeros and the second level of both."""
    size, every = d.group_size, d.super_groups
    groups = 1 if size == -1 else (K + size - 1) // size
    dtype, bits = SCALE_DTYPES[d.scale_dtype], _SCALE_BITS[d.scale_dtype]
    blocks = (N * K + size - 1) // size if d.scaling == "flat" else 0
    shape: tuple[int, ...] = (N, groups if bits >= 8 else (groups * bits + 7) // 8)
    if d.scaling == "flat":
        shape = (blocks,)
    elif d.scaling == "block128":
        shape = ((N + 127) // 128, groups)
    zeros: Spec | None = None
    if d.zero_kind != "none":
        zeros = ((N, groups), torch.uint8) if d.zero_kind == "int" else (shape, dtype)
    if every == 0:
        return Tables((shape, dtype), zeros, None, None)
    above: tuple[int, ...] = (N, (groups + every - 1) // every)
    if every == -1:
        above = (1,)
    elif d.scaling == "flat":
        above = ((blocks + every - 1) // every,)
    super_dtype = SCALE_DTYPES[d.super_dtype]
    super_zeros: Spec | None = (above, super_dtype) if d.zero_kind == "offset" else None
    if d.scale_dtype == "dynamic8":
        super_zeros = ((1,), super_dtype)
    return Tables((shape, dtype), zeros, (above, super_dtype), super_zeros)


def absent_zeros(desc: int) -> bool:
    """Whether `desc` has no zeros and no offsets. Bit arithmetic, so that Dynamo can trace it."""
    return (desc >> 8) & 0xF == 0


def absent_perm(desc: int) -> bool:
    """Whether `desc` has no perm. Bit arithmetic, so that Dynamo can trace it."""
    return (desc >> 20) & 1 == 0


def absent_supers(desc: int) -> bool:
    """Whether `desc` has scales of one level. Bit arithmetic, so that Dynamo can trace it."""
    return (desc >> 56) & 0xF == 0


def absent_super_zeros(desc: int) -> bool:
    """Whether there are no super zeros: two levels have them with offsets (3) and with dynamic8 scales (9)."""
    return absent_supers(desc) or ((desc >> 8) & 0xF != 3 and (desc >> 12) & 0xF != 9)


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
    op: str,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    N: int,
    K: int,
    desc: int,
    super_scales: Tensor | None = None,
    super_zeros: Tensor | None = None,
) -> None:
    """Raise unless the canonical tensors are what N, K and desc say."""
    d = parse(desc)
    check_tensor(op, "packed", packed, packed_shape(N, K, d), torch.uint8)
    levels = f"scaling={d.scaling} super_groups={d.super_groups} scales={d.scale_dtype}"
    given_tables = (scales, zeros, super_scales, super_zeros)
    for name, tensor, wanted in zip(Tables._fields, given_tables, tables(N, K, d), strict=True):
        given = "absent" if tensor is None else "given"
        says = f"zeros={d.zero_kind}" if name == "zeros" else levels
        check((tensor is None) == (wanted is None), op, f"{name} are {given}, but desc says {says}")
        if tensor is not None and wanted is not None:
            check_tensor(op, name, tensor, *wanted)
    given, there = "absent" if perm is None else "given", "there" if d.has_perm else "not"
    check((perm is not None) == d.has_perm, op, f"perm is {given}, but desc says it is {there}")
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
