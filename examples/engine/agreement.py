"""Whether shards compute what the whole weight does, within the bound of docs/numerics.md: engine.py's check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit import QuantizedWeight

if TYPE_CHECKING:
    from engine import Decoder


def combine(outputs: Sequence[Tensor], parts: int, dim: int) -> Tensor:
    """The outputs [M, N] of a projection from those of its ranks, in fp64, where adding them up rounds nothing.

    Args:
        outputs: one per rank: partial sums [M, N] for dim 1, for dim 0 outputs [M, N / ranks].
        parts: how many linears the projection joins: a rank has rows of the first, then of the second, and so on.
    """
    if dim == 1:
        return torch.stack([output.double() for output in outputs]).sum(0)
    pieces = [output.double().chunk(parts, -1) for output in outputs]
    return torch.cat([piece[i] for i in range(parts) for piece in pieces], -1)


def part_of_bound(whole: Tensor, shards: Sequence[Tensor], parts: int, dim: int, x: Tensor, W: Tensor) -> float:
    """The largest |difference| between the outputs of the whole weight and of its shards, as a part of its bound.

        |y - exact|  <=  ((K + 6) u + u_y) sum_k |x_k| |w_nk|  +  u_y |y|        u = 2^-24

    holds for every product. u_y is half a step of y's dtype: y is rounded to it, and a kernel may round the weight to it.
    Partial sums are products too, each over its own columns, so that together they owe the sum over all of them once.
    """
    y, z = whole.double(), combine(shards, parts, dim)
    rounded = y.abs() + combine([shard.abs() for shard in shards], parts, dim)
    u_y = torch.finfo(whole.dtype).eps / 2
    size = x.double().abs() @ W.double().abs().T
    bound = 2 * ((W.shape[1] + 6) * 2.0**-24 + u_y) * size + u_y * rounded
    return float(((y - z).abs() / bound).max())


def check(
    whole: Decoder,
    sharded: Decoder,
    checkpoint: Mapping[str, QuantizedWeight],
    projections: Mapping[str, tuple[Sequence[str], int]],
) -> float:
    """The largest difference between the projections of a decoder of one rank and one of several, as a part of its bound.

    Every projection gets an input of its own, so that an error in one does not show in the next.
    """
    world, worst = len(sharded.ranks), []
    for (layer, name), linear in whole.ranks[0].linears.items():
        parts, dim = projections[name]
        x = torch.randn(len(whole.h), linear.K).to(whole.h)
        inputs = [x] * world if dim == 0 else x.chunk(world, -1)
        shards = [rank.run(layer, name, part) for rank, part in zip(sharded.ranks, inputs, strict=True)]
        W = torch.cat([checkpoint[f"{layer}.{part}"].dequantize() for part in parts]).to(x.device)
        worst.append(part_of_bound(whole.ranks[0].run(layer, name, x), shards, len(parts), dim, x, W))
    return float(torch.tensor(worst).max())  # a NaN stays one
