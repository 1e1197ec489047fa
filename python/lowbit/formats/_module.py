"""One module of a checkpoint: the tensors under its name, each checked before it is used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Final

import torch
from torch import Tensor

from lowbit._safetensors import TensorInfo, dtype_name
from lowbit.errors import ArtifactError
from lowbit.experts import ExpertWeights
from lowbit.formats._record import KV_SCALES, ExpertsRecord, LinearRecord, PlannedLinear
from lowbit.formats._source import Source
from lowbit.weight import QuantizedWeight

__all__ = ["SCALE_DTYPES", "Module", "describe", "modules", "plan_experts", "scale_name"]

#: Dtypes that canonical scales keep as they are, and their names in a Scheme.
SCALE_DTYPES: Final = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_BIAS: Final = tuple(SCALE_DTYPES)


def describe(info: TensorInfo) -> str:
    """Dtype and shape for a message: "I32 [64, 32]"."""
    return f"{info.dtype_name} {list(info.shape)}"


def scale_name(info: TensorInfo) -> str:
    """The name that a Scheme has for the dtype of scales."""
    return SCALE_DTYPES[info.dtype]


class Module:
    """The tensors directly under one name of a checkpoint.

    Args:
        source: where they are.
        path: of the module: "model.layers.0.mlp.up_proj".
        names: last part of a tensor's name -> full name.
    """

    def __init__(self, source: Source, path: str, names: dict[str, str]) -> None:
        self.source = source
        self.path = path
        self.names = names

    def __contains__(self, leaf: str) -> bool:
        return leaf in self.names

    def fail(self, message: str) -> ArtifactError:
        """An error about this module; raise it."""
        return ArtifactError(f"{self.source.path}: {self.path[:200]}: {message}")

    def info(self, leaf: str) -> TensorInfo:
        """Dtype and shape of a tensor that has to be there."""
        if leaf not in self.names:
            raise self.fail(f"has {', '.join(sorted(self.names))[:200]}, but no {leaf}")
        return self.source.tensors[self.names[leaf]]

    def scaled_weight(self, dtypes: Collection[torch.dtype], *scales: str) -> str | None:
        """Which `weight` of one of the dtypes stands beside which of `scales`, in words; None where none does."""
        scale = next((leaf for leaf in scales if leaf in self), None)
        if scale is None or "weight" not in self or self.info("weight").dtype not in dtypes:
            return None
        return f"{self.path} has weight {describe(self.info('weight'))} and {scale} {describe(self.info(scale))}"

    def check(self, leaf: str, dtypes: Collection[torch.dtype], *shapes: tuple[int, ...] | None) -> TensorInfo:
        """Dtype and shape of a tensor, which must have one of `dtypes` and one of `shapes` (None: any with 2 dims)."""
        info = self.info(leaf)
        fits = any(info.shape == shape if shape is not None else len(info.shape) == 2 for shape in shapes)
        if info.dtype not in dtypes or not fits:
            kinds = " or ".join(dtype_name(dtype) for dtype in dtypes)
            wanted = " or ".join("[., .]" if shape is None else str(list(shape)) for shape in shapes)
            raise self.fail(f"{leaf} is {describe(info)}, it must be {kinds} {wanted}")
        return info

    def positive(self, N: int, K: int) -> None:
        """Refuse a weight without rows or columns, before anything is computed from them."""
        if N < 1 or K < 1:
            raise self.fail(f"a weight of N={N}, K={K}")

    def only(self, known: Collection[str]) -> None:
        """Refuse tensors that the format does not have: what they mean is not known, and leaving them out is no answer."""
        for leaf in sorted(self.names):
            if leaf not in known and leaf not in KV_SCALES:
                info = self.source.tensors[self.names[leaf]]
                raise self.fail(f"has a tensor {leaf[:200]!r} ({describe(info)}) that is not part of this format")

    def read(self, leaf: str) -> Tensor:
        """The tensor."""
        return self.source.read(self.names[leaf])

    def check_bias(self, N: int) -> None:
        """The bias, where there is one, must be floating point [N]."""
        if "bias" in self:
            self.check("bias", _BIAS, (N,))

    def bias(self) -> Tensor | None:
        """The bias, or None."""
        return self.read("bias") if "bias" in self else None

    def planned(
        self,
        shape: tuple[int, ...],
        about: str,
        leaves: Collection[str],
        read: Callable[[], LinearRecord | ExpertsRecord],
    ) -> PlannedLinear:
        """The layer made of those of `leaves` that are there."""
        sources = tuple(self.names[leaf] for leaf in leaves if leaf in self.names)
        nbytes = sum(self.source.tensors[name].nbytes for name in sources)
        return PlannedLinear(shape, about, sources, nbytes, read)


def modules(source: Source, *leaves: str) -> Iterator[Module]:
    """Every module that has at least one tensor called one of `leaves`, in natural order."""
    found: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        path, _, leaf = name.rpartition(".")
        found.setdefault(path, {})[leaf] = name
    for path, names in found.items():
        if any(leaf in names for leaf in leaves):
            yield Module(source, path, names)


class _Expert(Module):
    """One expert's part of a module whose tensors all have a leading dimension for experts."""

    def __init__(self, whole: Module, index: int, held: dict[str, Tensor]) -> None:
        super().__init__(whole.source, whole.path, whole.names)
        self._index, self._held = index, held

    def info(self, leaf: str) -> TensorInfo:
        """Of this expert's part."""
        info = super().info(leaf)
        return TensorInfo(info.dtype, info.shape[1:])

    def read(self, leaf: str) -> Tensor:
        """This expert's part; the tensor is read once for all of them."""
        if leaf not in self._held:
            self._held[leaf] = super().read(leaf)
        return self._held[leaf][self._index]


def plan_experts(module: Module, weight: str, plan: Callable[[Module], PlannedLinear]) -> PlannedLinear:
    """The layer that `plan` makes of a module; where its weight has three dimensions, that of every expert, joined.

    Args:
        weight: the leaf whose shape says whether there is a dimension for experts.
        plan: what is done with the tensors of one layer, without that dimension.
    """
    shape = module.info(weight).shape
    if len(shape) != 3:
        return plan(module)
    count = shape[0]
    for leaf in sorted(module.names):
        if module.info(leaf).shape[:1] != (count,):
            raise module.fail(f"{weight} is of {count} experts, {leaf[:200]} is {describe(module.info(leaf))}")
    if count < 1:
        raise module.fail(f"{weight} is of {count} experts")
    first = plan(_Expert(module, 0, {}))
    if len(first.shape) != 2:
        raise module.fail(f"{weight} is {describe(module.info(weight))}")

    def read() -> ExpertsRecord:
        held: dict[str, Tensor] = {}

        def weights() -> Iterator[QuantizedWeight]:
            for index in range(count):
                record = plan(_Expert(module, index, held)).read()
                assert isinstance(record, LinearRecord)
                for beside in ("bias", "input_scale", "input_zero", "input_pre_scale"):
                    if getattr(record, beside) is not None:
                        raise module.fail(f"has {beside} of each expert, which experts in one weight do not take")
                yield record.weight

        return ExpertsRecord(ExpertWeights.stack(weights(), count))

    nbytes = sum(module.source.tensors[name].nbytes for name in first.sources)
    return PlannedLinear((count, *first.shape), f"{first.about}, {count} experts", first.sources, nbytes, read)
