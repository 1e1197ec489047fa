"""How far one weight is from another, some rows at a time, so that no second dense weight is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.convert import _ERROR_CHUNK, _row_slices, _sum_of_squares
from lowbit.weight import QuantizedWeight

__all__ = ["WeightError", "weight_error"]

#: A weight, dense or quantized.
Weight = Tensor | QuantizedWeight


@dataclasses.dataclass(frozen=True)
class WeightError:
    """The difference of a weight W' from W.

    Args:
        relative: ||W - W'|| / ||W|| (Frobenius); 0 where both are zeros, infinite where only W is.
        largest: max |W - W'|.
    """

    relative: float
    largest: float

    @property
    def sqnr_db(self) -> float:
        """Signal to noise in dB: infinite when nothing differs."""
        return (
            math.inf
            if self.relative == 0
            else -20 * math.log10(self.relative)
            if self.relative < math.inf
            else -math.inf
        )


def weight_error(reference: Weight, other: Weight) -> WeightError:
    """How far `other` [N, K] is from `reference` [N, K]; sums in fp64.

    Raises:
        ValueError: their shapes differ.

    Example:
        >>> weight_error(dense, QuantizedWeight.quantize(dense, "int8")).sqnr_db
        42.1
    """
    if tuple(reference.shape) != tuple(other.shape):
        raise ValueError(f"the weights are {list(reference.shape)} and {list(other.shape)}")
    if reference is other or (isinstance(reference, QuantizedWeight) and reference == other):
        return WeightError(0.0, 0.0)
    noise = signal = largest = 0.0
    rows = max(128, _ERROR_CHUNK // reference.shape[1] // 128 * 128)  # multiples of a block
    for mine, theirs in zip(_dense_rows(reference, rows), _dense_rows(other, rows), strict=True):
        signal += _sum_of_squares(mine)
        difference = mine - theirs
        noise += _sum_of_squares(difference)
        largest = max(largest, float(difference.abs().max()))
    if signal == 0:
        return WeightError(0.0 if noise == 0 else math.inf, largest)
    return WeightError(math.sqrt(noise / signal), largest)


def _dense_rows(weight: Weight, rows: int) -> Iterator[Tensor]:
    if isinstance(weight, QuantizedWeight):
        for _, part in _row_slices(weight, rows):
            yield part.dequantize()
    else:
        for dense in torch.split(weight.detach(), rows):
            yield dense.float()
