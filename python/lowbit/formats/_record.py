"""What a reader gives: a record per quantized layer, a plan of the whole checkpoint made from headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from lowbit.errors import ArtifactError
from lowbit.experts import ExpertWeights, QuantizedExperts
from lowbit.formats._source import Source, natural
from lowbit.linear import QuantizedLinear
from lowbit.weight import QuantizedWeight

__all__ = ["ExpertsRecord", "LinearRecord", "Plan", "PlannedLinear", "PlannedTensor", "kinds_of", "plain_tensors"]


@dataclasses.dataclass(frozen=True, eq=False)
class LinearRecord:
    """One quantized layer of a checkpoint: y = quantize(x * input_pre_scale) @ W.T + bias.

    How x is quantized is `weight.scheme.activation`; None leaves it as it is.

    Args:
        weight: W[N, K], canonical.
        bias: [N], in the dtype of the file.
        input_scale, input_zero: fp32 [1] and int32 [1], of schemes with static activations.
        input_pre_scale: fp32 [K]: x is multiplied by it first.

    Example:
        >>> for name, record in lowbit.formats.read("model"):
        ...     if isinstance(record, lowbit.formats.LinearRecord):
        ...         engine.add_linear(name, record.weight.pack(), record.weight.scheme)
    """

    weight: QuantizedWeight
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    input_pre_scale: Tensor | None = None

    def linear(self, *, batch_invariant: bool = False) -> QuantizedLinear:
        """The layer as a module, ready to run.

        Raises:
            ValueError: a tensor has another shape than weight and scheme ask for.

        Example:
            >>> record.linear()(x).shape
            torch.Size([8, 64])
        """
        return QuantizedLinear.from_weight(
            self.weight,
            self.bias,
            input_scale=self.input_scale,
            input_zero=self.input_zero,
            input_pre_scale=self.input_pre_scale,
            batch_invariant=batch_invariant,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertsRecord:
    """The weights of a mixture's experts, where a checkpoint keeps them in one tensor.

    Args:
        weight: W[E, N, K], canonical.

    Example:
        >>> for weight in record.weight:  # a QuantizedWeight for each expert
        ...     engine.add_expert(weight.pack(), weight.scheme)
    """

    weight: ExpertWeights

    def experts(self, *, batch_invariant: bool = False) -> QuantizedExperts:
        """The layer as a module, ready to run.

        Example:
            >>> record.experts()(x, counts).shape
            torch.Size([8, 64])
        """
        return QuantizedExperts.from_weight(self.weight, batch_invariant=batch_invariant)


@dataclasses.dataclass(frozen=True)
class PlannedLinear:
    """A quantized layer that has not been read yet.

    Args:
        shape: (N, K), or (E, N, K) of the experts in one tensor.
        about: how it is stored, for people: "int4, groups of 128, act-order".
        sources: names of the tensors it is made of.
        nbytes: their bytes in the file.
        read: gives the record; may raise ValueError, which `Plan.read` turns into an ArtifactError with the layer's name.
    """

    shape: tuple[int, ...]
    about: str
    sources: tuple[str, ...]
    nbytes: int
    read: Callable[[], LinearRecord | ExpertsRecord] = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is not quantized, not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor] = dataclasses.field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes it will take."""
        return math.prod(self.shape) * self.dtype.itemsize


class Plan:
    """A checkpoint that has been understood and not yet read: which layers and tensors it holds, and how to get each.

    Only headers, configs and tensors of a few bytes have been read, and everything that can be checked with those has
    been. Usable while the context that made it is open.

    Attributes:
        where: the path, for messages.
        format: name of the row in the registry: "gptq".
        variant: what kind of it, for people: "v2, 4 bits, groups of 64".
        layers: path of the module ("model.layers.0.mlp.up_proj") -> quantized layer.
        tensors: full name ("model.norm.weight") -> tensor that is not quantized.

    Example:
        >>> with lowbit.formats.plan("model") as plan:
        ...     record = plan.read("model.layers.0.mlp.up_proj")
    """

    def __init__(
        self,
        where: str,
        format: str,
        variant: str,
        layers: Mapping[str, PlannedLinear],
        tensors: Mapping[str, PlannedTensor],
    ) -> None:
        self.where = where
        self.format = format
        self.variant = variant
        self.layers = dict(sorted(layers.items(), key=lambda item: natural(item[0])))
        self.tensors = dict(sorted(tensors.items(), key=lambda item: natural(item[0])))
        if both := sorted(self.layers.keys() & self.tensors.keys()):
            raise ArtifactError(f"{where}: {both[0][:200]!r} is the name of a tensor and of a layer")

    def fail(self, message: str) -> ArtifactError:
        """An error about this checkpoint; raise it."""
        return ArtifactError(f"{self.where}: {message[:1000]}")

    @property
    def names(self) -> list[str]:
        """Of layers and tensors, in natural order."""
        return sorted((*self.layers, *self.tensors), key=natural)

    def read(self, name: str) -> LinearRecord | ExpertsRecord | Tensor:
        """A layer's record or a plain tensor; KeyError when there is none of that name.

        Raises:
            ArtifactError: its values make no sense; the message names file and layer.
        """
        planned = self.layers[name] if name in self.layers else self.tensors[name]
        try:
            return planned.read()
        except (ValueError, RuntimeError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{self.where}: {name[:200]}: {error}") from None

    def __iter__(self) -> Iterator[tuple[str, LinearRecord | ExpertsRecord | Tensor]]:
        for name in self.names:
            yield name, self.read(name)


def kinds_of(layers: Mapping[str, PlannedLinear]) -> str:
    """What kinds of layers there are, for people: each once."""
    return "; ".join(sorted({layer.about for layer in layers.values()}))


def plain_tensors(source: Source, layers: Iterable[PlannedLinear]) -> dict[str, PlannedTensor]:
    """Every tensor of the source that no layer is made of."""
    taken = {name for layer in layers for name in layer.sources}

    def later(name: str) -> Callable[[], Tensor]:
        return lambda: source.read(name)

    return {
        name: PlannedTensor(info.dtype, info.shape, later(name))
        for name, info in source.tensors.items()
        if name not in taken
    }


#: Tensors that may stand in a layer of any format without being part of its weight: scales of a quantized KV cache.
KV_SCALES: Final = ("k_scale", "v_scale", "output_scale", "output_zero_point")
