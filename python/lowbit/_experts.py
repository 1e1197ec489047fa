"""ExpertWeights: the weights of a mixture's experts in canonical form, one scheme and one shape for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lowbit._canonical import check_importance, check_shape, preferred_layout, same_tensor, stored_tensors
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["ExpertWeights"]


class ExpertWeights:
    """Weights W[E, N, K]: the canonical tensors of each expert, stacked along a leading dimension.

    Constructing one checks shapes, dtypes and devices; `quantize` and `from_tensors` also check values. The tensors are not
    copied and must not be changed afterwards.

    Args:
        scheme: what the tensors mean.
        shape: (E, N, K).
        tensors: as in `QuantizedWeight.tensors()`, each with a leading dimension of E.

    Raises:
        ValueError: a tensor is missing, unknown, or has another shape, dtype or device than scheme and shape ask for.

    Example:
        >>> w = ExpertWeights.quantize(torch.randn(8, 64, 256), "int4-g64")
        >>> w[3].dequantize().shape, w.shape
        (torch.Size([64, 256]), torch.Size([8, 64, 256]))
    """

    __slots__ = ("_tensors", "scheme", "shape")

    scheme: Scheme
    shape: torch.Size

    def __init__(self, scheme: Scheme | str, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        self.scheme = Scheme.parse(scheme)
        self.shape = _check_shape(self.scheme, shape)
        wanted = stored_tensors(self.scheme, self.shape, "perm" in tensors)
        if tensors.keys() != wanted.keys():
            raise ValueError(f"the experts of a {self.scheme} weight need {sorted(wanted)}, got {sorted(tensors)}")
        self._tensors = {name: tensors[name] for name in wanted}
        for name, (dtype, want) in wanted.items():
            tensor = self._tensors[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != want:
                raise ValueError(
                    f"{name} of {self.scheme} experts {list(self.shape)} must be {dtype} {list(want)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.device != self.device:
                raise ValueError(f"{name} is on {tensor.device}, packed is on {self.device}")

    # -- making them ----------------------------------------------------------------------------------------------------

    @classmethod
    def quantize(cls, weight: Tensor, scheme: Scheme | str, importance: Tensor | None = None) -> ExpertWeights:
        """Quantize dense weights, one expert after another; the result is that of `QuantizedWeight.quantize` for each.

        Args:
            weight: [E, N, K], fp32, bf16 or fp16.
            scheme: a Scheme or its string.
            importance: optional, [K] for all experts or [E, K].

        Raises:
            ValueError: as `QuantizedWeight.quantize`; the message names the expert.

        Example:
            >>> ExpertWeights.quantize(torch.randn(8, 64, 256), "nf4-g64").nbytes
            69632
        """
        scheme = Scheme.parse(scheme)
        if weight.dim() != 3:
            raise ValueError(f"the weights of experts are [E, N, K], got {list(weight.shape)}")
        shape = _check_shape(scheme, weight.shape)
        if importance is not None:
            rows = importance if importance.dim() == 2 else importance.expand(shape[0], -1)
            if len(rows) != shape[0]:
                raise ValueError(
                    f"importance must be [K={shape[2]}] or [E={shape[0]}, K], got {list(importance.shape)}"
                )
            importance = torch.stack([check_importance(row, shape[2]) for row in rows])

        def made() -> Iterator[QuantizedWeight]:
            for e in range(shape[0]):
                columns = None if importance is None else importance[e]
                try:
                    yield QuantizedWeight.quantize(weight[e].contiguous(), scheme, columns)
                except ValueError as error:
                    raise ValueError(f"expert {e}: {error}") from None

        return cls.stack(made(), shape[0])

    @classmethod
    def stack(cls, weights: Iterator[QuantizedWeight] | Sequence[QuantizedWeight], count: int) -> ExpertWeights:
        """Join the weights of `count` experts, which are taken one at a time and may be dropped then.

        Raises:
            ValueError: schemes or shapes differ, or only some have a permutation; the message names the expert.

        Example:
            >>> ExpertWeights.stack([w[0], w[1]], 2).shape
            torch.Size([2, 64, 256])
        """
        first: QuantizedWeight | None = None
        tensors: dict[str, Tensor] = {}
        for e, weight in zip(range(count), weights, strict=True):
            parts = weight.tensors()
            if first is None:
                first = weight
                shape = (count, *weight.shape)
                wanted = stored_tensors(weight.scheme, shape, weight.has_perm)
                for name, (dtype, want) in wanted.items():
                    tensors[name] = torch.empty(want, dtype=dtype, device=weight.device)
            elif weight.shape != first.shape or not weight.scheme.same_storage(first.scheme):
                raise ValueError(
                    f"expert {e} is {weight.scheme} {list(weight.shape)}, expert 0 is {first.scheme} {list(first.shape)}"
                )
            elif parts.keys() != tensors.keys():
                raise ValueError(f"expert {e} has {sorted(parts)}, expert 0 has {sorted(tensors)}")
            for name, tensor in parts.items():
                tensors[name][e].copy_(tensor)
        if first is None:
            raise ValueError("there must be at least one expert")
        return cls(first.scheme, (count, *first.shape), tensors)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor | None], scheme: Scheme | str, shape: Sequence[int]
    ) -> ExpertWeights:
        """Take canonical tensors written elsewhere, checking shapes, dtypes and values.

        Raises:
            ValueError: as `QuantizedWeight.from_tensors`.

        Example:
            >>> ExpertWeights.from_tensors(w.tensors(), w.scheme, w.shape) == w
            True
        """
        made = cls(scheme, shape, {name: tensor for name, tensor in tensors.items() if tensor is not None})
        for e in range(len(made)):
            try:
                made[e]  # which checks values
            except ValueError as error:
                raise ValueError(f"expert {e}: {error}") from None
        return made

    # -- using them -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> QuantizedWeight:
        """The weight of one expert; its tensors are views."""
        if not -len(self) <= expert < len(self):
            raise IndexError(f"expert {expert} of {len(self)}")
        parts = {name: tensor[expert] for name, tensor in self._tensors.items()}
        return QuantizedWeight.from_tensors(parts, self.scheme, self.shape[1:])

    def __iter__(self) -> Iterator[QuantizedWeight]:
        return (self[e] for e in range(len(self)))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weights [E, N, K].

        Example:
            >>> w.dequantize(torch.bfloat16).shape
            torch.Size([8, 64, 256])
        """
        made = torch.empty(self.shape, dtype=dtype, device=self.device)
        for e, weight in enumerate(self):
            made[e] = weight.dequantize(dtype)
        return made

    def pack(self, layout: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """The weights in the layout that kernels read: uint8 [E, bytes], a row for each expert.

        Args:
            layout: value of the layout enum; by default the one preferred on the device.
            device: where the result is wanted; by default where the weights are.

        Example:
            >>> w.pack().shape[0]
            8
        """
        device = self.device if device is None else torch.device(device)
        if layout is None:
            layout = preferred_layout(device, self.scheme, self.has_perm)
        packed: Tensor | None = None
        for e, weight in enumerate(self):
            row = weight.pack(layout, device)
            if packed is None:
                packed = row.new_empty((len(self), row.numel()))
            packed[e] = row
        assert packed is not None
        return packed

    @classmethod
    def unpack(
        cls, weight: Tensor, scheme: Scheme | str, shape: Sequence[int], layout: int, has_perm: bool = False
    ) -> ExpertWeights:
        """The exact inverse of `pack`.

        Raises:
            ValueError: the tensor has not a row for each expert.
            RuntimeError: a row has another size than the arguments ask for.
        """
        scheme = Scheme.parse(scheme)
        shape = _check_shape(scheme, shape)
        if weight.dim() != 2 or len(weight) != shape[0]:
            raise ValueError(f"packed experts {list(shape)} have {shape[0]} rows, got {list(weight.shape)}")
        rows = (QuantizedWeight.unpack(row, scheme, shape[1:], layout, has_perm) for row in weight)
        return cls.stack(rows, shape[0])

    # -- the rest -------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._tensors["packed"].device

    @property
    def is_meta(self) -> bool:
        """Whether the tensors have no values."""
        return self._tensors["packed"].is_meta

    @property
    def has_perm(self) -> bool:
        """Whether columns are stored in another order, one of its own for each expert."""
        return "perm" in self._tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all canonical tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def tensors(self) -> dict[str, Tensor]:
        """The canonical tensors that are present, by the names that files have for them."""
        return dict(self._tensors)

    def to(self, device: torch.device | str) -> ExpertWeights:
        """The same weights with their tensors on `device`."""
        return ExpertWeights(self.scheme, self.shape, {name: t.to(device) for name, t in self._tensors.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExpertWeights):
            return NotImplemented
        return (
            self.scheme.same_storage(other.scheme)
            and self.shape == other.shape
            and self._tensors.keys() == other._tensors.keys()
            and all(same_tensor(tensor, other._tensors[name]) for name, tensor in self._tensors.items())
        )

    __hash__ = None  # type: ignore[assignment]  # holds tensors, which are compared by value

    def __repr__(self) -> str:
        E, N, K = self.shape
        return f"ExpertWeights({str(self.scheme)!r}, E={E}, N={N}, K={K}, {self.device})"


def _check_shape(scheme: Scheme, shape: Sequence[int]) -> torch.Size:
    if len(shape) != 3 or not all(isinstance(d, int) and not isinstance(d, bool) for d in shape) or shape[0] < 1:
        raise ValueError(f"the weights of experts have shape (E, N, K), got {list(shape)}")
    return torch.Size((shape[0], *check_shape(scheme, tuple(shape[1:]))))
