"""What canonical tensors look like and where they are made: shared by weight.py, linear.py and convert.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from lowbit import _C, _cuda, _metal
from lowbit._checks import Tables, packed_shape, parse, tables
from lowbit.scheme import Scheme

__all__ = [
    "all_finite",
    "attribute_name",
    "canonical_tensors",
    "check_dense",
    "check_importance",
    "check_shape",
    "device_layout",
    "preferred_layout",
    "runs_on",
    "same_tensor",
    "scale_codes",
    "stored_tensors",
    "super_scale_of",
    "tensor_name",
    "to_device",
]

_ATTRIBUTES: Final = {"offsets": "zeros", "super_offsets": "super_zeros", "scale_offset": "super_zeros"}
_FLOATS: Final = ("float32", "float16", "bfloat16")
_CUDA_SCALES: Final = (*_FLOATS, "e8m0", "e4m3")
_CUDA_LAYOUT: Final = _C.enums()["layout"]["cuda_tile64"]
_METAL_LAYOUT: Final = _C.enums()["layout"]["metal_tile4"]
_WEIGHT_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def canonical_tensors(
    scheme: Scheme, N: int, K: int, has_perm: bool = False
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every canonical tensor of W[N, K]."""
    _C.canonical_shapes(N, K, scheme.desc(0, has_perm))  # refuses sizes beyond any weight
    d = parse(scheme.desc(0, has_perm))
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"packed": (torch.uint8, packed_shape(N, K, d))}
    for attribute, spec in zip(Tables._fields, tables(N, K, d), strict=True):
        if spec is not None:
            found[tensor_name(scheme, attribute)] = (spec[1], spec[0])
    if has_perm:
        found["perm"] = (torch.int32, (K,))
    return found


def stored_tensors(
    scheme: Scheme, shape: Sequence[int], has_perm: bool = False
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """`canonical_tensors` of a weight (N, K), or of the weights of E experts (E, N, K), which are stacked."""
    *experts, N, K = shape
    return {
        name: (dtype, (*experts, *want)) for name, (dtype, want) in canonical_tensors(scheme, N, K, has_perm).items()
    }


def tensor_name(scheme: Scheme, attribute: str) -> str:
    """What files call an attribute of QuantizedWeight: zeros that are added are offsets."""
    if attribute == "zeros" and scheme.zero_kind == "offset":
        return "offsets"
    if attribute == "super_zeros":
        return "super_offsets" if scheme.zero_kind == "offset" else "scale_offset"
    return attribute


def attribute_name(name: str) -> str:
    """The inverse of `tensor_name`."""
    return _ATTRIBUTES.get(name, name)


def check_dense(weight: Tensor, scheme: Scheme) -> None:
    """Raise ValueError, with the values, when `weight` cannot be quantized to `scheme`."""
    if weight.dim() == 3:
        raise ValueError(
            f"weight{list(weight.shape)} has an expert dimension, which is reserved: quantize each expert alone"
        )
    if weight.dim() != 2:
        raise ValueError(f"a weight is [N, K], got {list(weight.shape)}")
    if weight.dtype not in _WEIGHT_DTYPES:
        raise ValueError(f"a weight must be float32, bfloat16 or float16, got {weight.dtype}")
    scheme.check_shape(*weight.shape)
    scheme.check_quantizable()
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values to quantize")
    if not all_finite(weight.detach()):
        bad = int((~torch.isfinite(weight.detach())).sum())
        raise ValueError(f"{bad} of {weight.numel()} weights are NaN or infinite")


def super_scale_of(weight: Tensor, scheme: Scheme) -> Tensor | None:
    """fp32 [1]: the scale of all scales, with which the largest one is the largest number of its dtype; or None.

    s = max |W| / (largest code * largest scale), NVFP4's rule: 6 * 448.
    """
    if scheme.super_groups == 0:
        return None
    row = next(row for row in _C.format_table() if row["name"] == scheme.format)
    top = max(value for value in scale_codes(str(scheme.scale_dtype)) if math.isfinite(value))
    largest = weight.detach().abs().amax().float()
    return torch.where(largest == 0, 1.0, largest / (row["max"] * top)).reshape(1)


def scale_codes(dtype: str) -> list[float]:
    """The values of scales that are codes, by code: "e4m3", "dynamic8", ...."""
    return next(row["code"] for row in _C.scale_table() if row["name"] == dtype)


def check_importance(importance: Tensor, K: int) -> Tensor:
    """`importance` as fp32 [K]; ValueError when it is not one finite value >= 0 per column."""
    if tuple(importance.shape) != (K,):
        raise ValueError(f"importance must be [K={K}], got {list(importance.shape)}")
    values = importance.detach().float()
    if not all_finite(values) or float(values.min()) < 0:
        raise ValueError("importance must be finite and >= 0")
    return values


def preferred_layout(device: torch.device, scheme: Scheme, has_perm: bool = False) -> int:
    """The layout that kernels of this device read; ValueError, with the reason, where there are none."""
    if device.type in ("cuda", "mps"):
        reason = _cuda.absent_reason() if device.type == "cuda" else _metal.absent_reason()
        if reason is not None:
            raise ValueError(f"no kernels for device '{device}': {reason}")
    return _C.preferred_layout(device.type, scheme.desc(0, has_perm))


def device_layout(device: torch.device, scheme: Scheme, has_perm: bool = False) -> int | None:
    """`preferred_layout`, or None where there are no kernels for the device."""
    try:
        return preferred_layout(device, scheme, has_perm)
    except ValueError:
        return None


def check_shape(scheme: Scheme, shape: Any) -> torch.Size:
    """`shape` as (N, K); ValueError, with the values, when no weight of this scheme can have it."""
    if len(shape) == 3:
        raise ValueError(f"shape {list(shape)} has an expert dimension, which is reserved")
    if len(shape) != 2 or not all(isinstance(d, int) and not isinstance(d, bool) for d in shape):
        raise ValueError(f"a weight has shape (N, K), got {list(shape)}")
    scheme.check_shape(*shape)
    return torch.Size(shape)


def runs_on(op: str, device: torch.device, scheme: Scheme, layout: int | None = None) -> torch.device:
    """`device` when the op has a kernel there (that takes the layout and the scheme), else the CPU, which has them all."""
    if device.type in ("cpu", "meta"):
        return device
    key = {"cuda": "CUDA", "mps": "MPS"}.get(device.type)
    there = key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"lowbit::{op}", key)
    if device.type == "cuda":
        there = _cuda.loaded()  # what is registered may be an op that only says why there are no kernels
        there = there and layout in (None, _CUDA_LAYOUT) and _on_cuda(op, scheme)
    if device.type == "mps":
        there = there and layout in (None, _METAL_LAYOUT)
    return device if there else torch.device("cpu")


def _on_cuda(op: str, scheme: Scheme) -> bool:
    """Scales that are codes of codes, and blocks across rows, are packed and unpacked by the CPU."""
    if op == "quantize" and scheme.super_groups != 0:
        return False
    plain = scheme.super_groups in (0, -1) and scheme.super_dtype == "float32" and scheme.scaling != "flat"
    return plain and str(scheme.scale_dtype) in _CUDA_SCALES


def to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The tensor on `device`; None stays None."""
    return None if tensor is None else tensor.to(device)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.cpu().float()  # no GPU converts all of these
    # aminmax propagates NaN and shows infinities, in one pass and without a temporary as large as the tensor.
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal in shape, dtype and every value, on whatever devices; or both None."""
    if a is None or b is None:
        return a is b
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.itemsize == 1:  # torch has no comparison of float8
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a.to(b.device), b)
