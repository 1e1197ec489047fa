"""Cutting and joining weights: what stays together, and how much of each tensor goes with a row or a column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit._canonical import attribute_name, canonical_tensors, same_tensor

if TYPE_CHECKING:
    from lowbit.weight import QuantizedWeight

__all__ = ["join", "rows", "shard_columns", "shard_rows"]


def _shared(w: QuantizedWeight) -> set[str]:
    """Attributes that hold one number for the whole weight, or belong to its columns."""
    names = {"perm"}
    if w.scheme.super_groups == -1:
        names |= {"super_scales", "super_zeros"}
    if w.scheme.scale_dtype == "dynamic8":
        names.add("super_zeros")
    return names


def _cut_by(w: QuantizedWeight, row: int) -> str | None:
    """What a cut before this row goes through, or None."""
    scheme = w.scheme
    if scheme.scaling == "block128" and row % 128:
        return "a 128 x 128 block"
    if scheme.scaling == "flat":
        if row * w.K % scheme.group_size:
            return f"a block of {scheme.group_size}"
        if scheme.super_groups > 0 and row * w.K % (scheme.group_size * scheme.super_groups):
            return f"a super block of {scheme.super_groups} blocks"
    return None


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """`QuantizedWeight.cat`."""
    if not weights:
        raise ValueError("cat needs at least one weight")
    first = weights[0]
    shared = _shared(first)
    for i, other in enumerate(weights[1:], 1):
        if not first.scheme.same_storage(other.scheme) or first.scheme.activation != other.scheme.activation:
            raise ValueError(f"cannot join {first.scheme} and {other.scheme} (weight {i})")
        if other.K != first.K:
            raise ValueError(f"cannot join K={first.K} and K={other.K} (weight {i})")
        for name in sorted(shared):
            if not same_tensor(getattr(first, name), getattr(other, name)):
                raise ValueError(f"cannot join weights whose {name} differs (weights 0 and {i})")
    for i, weight in enumerate(weights[:-1]):
        if what := _cut_by(weight, weight.N):
            raise ValueError(f"cannot join after N={weight.N} (weight {i}): it would cut {what}")
    joined = {}
    for name in first.tensors():
        attribute = attribute_name(name)
        parts = [getattr(w, attribute) for w in weights]
        joined[attribute] = parts[0] if attribute in shared else torch.cat(parts)
    return type(first)(first.scheme, (sum(w.N for w in weights), first.K), **joined)


def rows(w: QuantizedWeight, begin: int, end: int) -> QuantizedWeight:
    """`QuantizedWeight.rows`."""
    for row in (begin, end):
        if row < w.N and (what := _cut_by(w, row)):
            raise ValueError(f"rows {begin} to {end} of N={w.N} would cut {what}")
    cut = {}
    for name, tensor in w.tensors().items():
        attribute = attribute_name(name)
        cut[attribute] = tensor if attribute in _shared(w) else _rows_of(w, attribute, tensor, begin, end)
    return type(w)(w.scheme, (end - begin, w.K), **cut)


def _rows_of(w: QuantizedWeight, attribute: str, tensor: Tensor, begin: int, end: int) -> Tensor:
    if attribute == "packed" or w.scheme.scaling not in ("block128", "flat"):
        return tensor[begin:end]
    if w.scheme.scaling == "block128":
        return tensor[begin // 128 : -(-end // 128)]
    size = w.scheme.group_size * (w.scheme.super_groups if attribute == "super_scales" else 1)
    return tensor[begin * w.K // size : -(-end * w.K // size)]


def shard_rows(w: QuantizedWeight, rank: int, step: int) -> QuantizedWeight:
    """Rows [rank * step, (rank + 1) * step), as tensors of their own."""
    if what := _cut_by(w, step):
        raise ValueError(f"a shard of {step} rows (N={w.N}) would cut {what}")
    part = rows(w, rank * step, (rank + 1) * step)
    own = {attribute_name(name): tensor.contiguous() for name, tensor in part.tensors().items()}
    return type(w)(w.scheme, part.shape, **own)


def shard_columns(w: QuantizedWeight, rank: int, step: int) -> QuantizedWeight:
    """Columns [rank * step, (rank + 1) * step), as tensors of their own."""
    scheme, group, every = w.scheme, w.scheme.group_size, w.scheme.super_groups
    what = None
    if w.perm is not None:
        raise ValueError("a weight with perm cannot be cut along K: its columns are not in order")
    if scheme.scaling == "flat":
        raise ValueError(f"a weight in blocks of {group} that run across rows cannot be cut along K")
    if group != -1 and step % group:
        what = "a 128 x 128 block" if scheme.scaling == "block128" else f"a group of {group}"
    elif group != -1 and every > 0 and step // group % every:
        what = f"a super block of {every} groups"
    if what is not None:
        raise ValueError(f"a shard of {step} columns (K={w.K}) would cut {what}")
    if step * scheme.bits % 8:
        raise ValueError(f"a shard of {step} columns of {scheme.bits} bits (K={w.K}) would cut a byte")
    cut = {}
    wanted = canonical_tensors(scheme, w.N, step)
    for name, tensor in w.tensors().items():
        attribute, columns = attribute_name(name), wanted[name][1][-1]
        if attribute in _shared(w) or (group == -1 and attribute != "packed"):
            cut[attribute] = tensor
            continue
        if columns * (w.K // step) != tensor.shape[1]:
            raise ValueError(f"a shard of {step} columns (K={w.K}) would cut a byte of {name}")
        cut[attribute] = tensor[:, rank * columns : (rank + 1) * columns].contiguous()
    return type(w)(scheme, (w.N, step), **cut)
