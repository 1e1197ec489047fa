"""What a layer has besides its weight: bias, and how its input is quantized."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor

from lowbit.formats._module import SCALE_DTYPES, Module
from lowbit.formats._record import LinearRecord
from lowbit.weight import QuantizedWeight

__all__ = ["Inputs"]

_FLOATS: Final = tuple(SCALE_DTYPES)
_ONE: Final[tuple[tuple[int, ...], ...]] = ((), (1,), (1, 1))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tensors of a layer that are not its weight, checked when planned and read with it.

    Args:
        module: the layer.
        activation: of the scheme; None where inputs are not quantized.
        scale, zero, pre_scale: what the format calls these tensors; None where it has no such thing.
    """

    module: Module
    activation: str | None
    scale: str | None = None
    zero: str | None = None
    pre_scale: str | None = None

    @property
    def static(self) -> bool:
        """Whether the input has a calibrated scale."""
        return self.activation is not None and "static" in self.activation

    @property
    def leaves(self) -> tuple[str, ...]:
        """Tensors it is made of, whether or not this layer has them."""
        return ("bias", *(leaf for leaf in (self.scale, self.zero, self.pre_scale) if leaf is not None))

    def check(self, N: int, K: int) -> None:
        """Refuse a tensor of the wrong dtype or shape, one that is missing, one that the config has no use for."""
        self.module.check_bias(N)
        if self.static:
            assert self.scale is not None
            self.module.check(self.scale, _FLOATS, *_ONE)
            if self.zero is not None and (self.zero in self.module or "asym" in str(self.activation)):
                self.module.check(self.zero, (torch.int8, torch.int32, torch.uint8, *_FLOATS), *_ONE)
        elif self.scale is not None and self.scale in self.module:
            raise self.module.fail(f"has {self.scale}, a calibrated scale, but the config does not say static")
        if self.pre_scale is not None and self.pre_scale in self.module:
            self.module.check(self.pre_scale, _FLOATS, (K,))

    def record(self, weight: QuantizedWeight) -> LinearRecord:
        """The record of the layer with this weight.

        Raises:
            ValueError: a scale is not finite and above 0, or a zero not a whole number of 8 bits.
        """
        module = self.module
        scale = zero = pre_scale = None
        if self.static:
            assert self.scale is not None
            scale = _positive(module.read(self.scale), self.scale).reshape(1)
            if "asym" in str(self.activation):
                zero = self._zero()
        if self.pre_scale is not None and self.pre_scale in module:
            pre_scale = _positive(module.read(self.pre_scale), self.pre_scale)
        return LinearRecord(weight, module.bias(), scale, zero, pre_scale)

    def _zero(self) -> Tensor:
        assert self.zero is not None
        value = self.module.read(self.zero).double().reshape(1)
        if not bool((value == value.round()).all() and value.abs().max() <= 128 and value.max() < 128):
            raise ValueError(f"{self.zero} is {value.tolist()}, not an int8")
        return value.to(torch.int32)


def _positive(tensor: Tensor, what: str) -> Tensor:
    values = tensor.float()
    bad = ~(torch.isfinite(values) & (values > 0))
    if bool(bad.any()):
        raise ValueError(f"{what} holds {values[bad][0].item():g}; a scale is finite and above 0")
    return values
