"""What formats share on the way to a canonical weight: zeros that say nothing, columns sorted by group."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["group_about", "integer_weight", "sort_by_group"]


def group_about(bits: int, group_size: int) -> str:
    """ "int4, groups of 128", or "int8, one scale per row"."""
    return f"int{bits}, " + ("one scale per row" if group_size == -1 else f"groups of {group_size}")


def integer_weight(
    bits: int,
    shape: tuple[int, int],
    group_size: int,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
    activation: str | None = None,
) -> QuantizedWeight:
    """A weight of integers; zeros that are all 2^(bits-1), which is what no zeros means, are left out.

    Args:
        packed: uint8 [N, ceil(K*bits/8)].
        scales: [N, G], fp16, bf16 or fp32.
        zeros: uint8 [N, G].
        perm: int32 [K].
    """
    if zeros is not None and bool((zeros == 1 << (bits - 1)).all()):
        zeros = None
    scheme = Scheme(
        f"int{bits}",
        group_size=group_size,
        zero_kind="none" if zeros is None else "int",
        scale_dtype=str(scales.dtype).removeprefix("torch."),
        activation=activation,
    )
    tensors = {"packed": packed, "scales": scales.contiguous()}
    if zeros is not None:
        tensors["zeros"] = zeros.contiguous()
    if perm is not None:
        tensors["perm"] = perm
    return QuantizedWeight.from_tensors(tensors, scheme, shape)


def sort_by_group(g_idx: Tensor, group_size: int) -> Tensor | None:
    """perm [K], int64, that brings the columns of each group together; None when they are in order already.

    Column k uses the scales of group g_idx[k]. Sorting is stable, so that columns of a group keep their order.

    Args:
        g_idx: int32 [K].
        group_size: of every group but the last, or -1.

    Raises:
        ValueError: a group has another size, so that no permutation makes the groups regular.
    """
    K = g_idx.numel()
    groups = torch.arange(K, dtype=torch.int64) // (K if group_size == -1 else group_size)
    g_idx = g_idx.long()
    if torch.equal(g_idx, groups):
        return None
    low, high, last = int(g_idx.min()), int(g_idx.max()), int(groups[-1])
    if low < 0 or high > last:
        raise ValueError(f"g_idx runs from {low} to {high}; K={K} has {last + 1} groups of {group_size}")
    ordered, perm = torch.sort(g_idx, stable=True)
    if not torch.equal(ordered, groups):
        counts = torch.bincount(g_idx, minlength=last + 1)
        odd = int((counts != torch.bincount(groups)).nonzero()[0])
        raise ValueError(
            f"g_idx gives group {odd} {int(counts[odd])} columns of K={K}; groups of {group_size} would have "
            f"{int((groups == odd).sum())}, and groups of unequal size are not supported"
        )
    return perm
