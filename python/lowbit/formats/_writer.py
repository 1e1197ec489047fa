"""A row of the registry of writers: what a format can hold, and how a layer's tensors are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit._artifact import Spec
from lowbit._canonical import canonical_tensors
from lowbit._progress import Advance
from lowbit.formats._record import LinearRecord, PlannedTensor
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["Contents", "FolderWriter", "LayerSpec", "PlannedLayer", "WriteOptions", "Writer", "to_half"]


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What is known of a quantized layer before it is read.

    Args:
        scheme: of the weight; how its input is quantized included.
        shape: (N, K).
        has_perm: the weight has a column permutation.
        bias: dtype of the bias, or None.
        inputs: those of "input_scale", "input_zero", "input_pre_scale" that the layer has.
    """

    scheme: Scheme
    shape: tuple[int, int]
    has_perm: bool = False
    bias: torch.dtype | None = None
    inputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: LinearRecord) -> LayerSpec:
        """Of a layer that has been read."""
        weight = record.weight
        bias = None if record.bias is None else record.bias.dtype
        inputs = tuple(
            name for name in ("input_scale", "input_zero", "input_pre_scale") if getattr(record, name) is not None
        )
        return cls(weight.scheme, (weight.N, weight.K), weight.perm is not None, bias, inputs)

    def beside(self) -> dict[str, Spec]:
        """What the layer has beside its weight."""
        N, K = self.shape
        known: dict[str, Spec] = {
            "input_scale": (torch.float32, (1,)),
            "input_zero": (torch.int32, (1,)),
            "input_pre_scale": (torch.float32, (K,)),
        }
        found: dict[str, Spec] = {} if self.bias is None else {"bias": (self.bias, (N,))}
        return found | {name: known[name] for name in self.inputs}

    def tensors(self) -> LinearRecord:
        """A record with tensors of the right shapes and dtypes on the meta device, to see what a writer makes of it."""
        N, K = self.shape
        made = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in canonical_tensors(self.scheme, N, K, self.has_perm).items()
        }
        weight = QuantizedWeight.from_tensors(made, self.scheme, self.shape)
        return LinearRecord(weight, None if self.bias is None else torch.empty(N, dtype=self.bias, device="meta"))


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """A layer to be written, not read yet.

    Args:
        spec: what is known of it.
        about: what it is in the source, for people: a scheme, or "bfloat16".
        nbytes: of its weight in the source.
        read: gives the record, and the weight that it stands for, which errors are measured against.
    """

    spec: LayerSpec
    about: str
    nbytes: int
    read: Callable[[], tuple[LinearRecord, Tensor | QuantizedWeight]] = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass
class Contents:
    """A model as it is converted: everything by name, nothing read yet.

    Args:
        where: the source, for messages.
        layers: path of the module -> quantized layer.
        tensors: full name -> any other tensor.
        config: config.json without what says how the source is quantized.
        root: the folder of config.json and the tokenizer; None where there is none.
        aliases, layer_aliases: names that share a tensor or a layer with another one (of an artifact).
        gguf: the GGUF file that names and keys come from, if any.
        metadata: of that file.
    """

    where: str
    layers: dict[str, PlannedLayer]
    tensors: dict[str, PlannedTensor]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    root: Path | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layer_aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf: Path | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the source."""
        return sum(x.nbytes for x in self.layers.values()) + sum(x.nbytes for x in self.tensors.values())


#: Told of each layer written: its name, what it was in the source, the record as it was written.
Written = Callable[[str, QuantizedWeight, Tensor | QuantizedWeight, int], None]


@dataclasses.dataclass(frozen=True)
class Writer:
    """A format that is written.

    Args:
        name: in `--to`.
        about: one line for people.
        is_file: a file is written, else a folder.
        scale_dtype: that all scales have in the format; None: any. Weights are then quantized with such scales.
        dense: which layers can only be written dense: "embeddings", "outputs" (lm_head), or both.
        target: the scheme that a layer has in the format. Raises ValueError, with the reason, for a layer that the format
            cannot hold. Asked for every layer before anything is written.
        check: raises ValueError for contents that fit layer by layer but not together.
        write: writes everything to the path, which is in a folder that vanishes when this raises.
    """

    name: str
    about: str
    is_file: bool
    scale_dtype: str | None
    dense: frozenset[str]
    target: Callable[[LayerSpec], Scheme]
    check: Callable[[Contents], None]
    write: Callable[[Contents, Path, WriteOptions], None]


@dataclasses.dataclass(frozen=True)
class WriteOptions:
    """How `Writer.write` is to work.

    Args:
        max_shard_bytes: size above which another file is begun.
        advance: told of the work done.
        written: told of each layer: its name, the weight as it is stored, the weight it stands for, its bytes.
        note: told of what is left out, for the report.
    """

    max_shard_bytes: int
    advance: Advance
    written: Written
    note: Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class FolderWriter:
    """What a format of safetensors files and a config adds to what all of these share.

    Args:
        adapt: the weight as the format holds it, whose scheme is `Writer.target`'s: scales in another dtype.
        encode: the tensors of a layer by the last part of their names. Also called with tensors on the meta device, to
            learn dtypes and shapes.
        config: quantization_config of config.json.
        more: further JSON files by name.
    """

    adapt: Callable[[QuantizedWeight], QuantizedWeight]
    encode: Callable[[LinearRecord], dict[str, Tensor]]
    config: Callable[[Contents], dict[str, Any]]
    more: Callable[[Contents], dict[str, Any]] = lambda contents: {}


def to_half(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight with scales (and offsets) in fp16, each rounded once.

    Exact for bf16 scales from 2^-17 to 65280, as fp16 has three more bits.

    Raises:
        ValueError: a scale or an offset is too large for fp16.
    """
    if weight.scheme.scale_dtype == "float16":
        return weight
    tensors = dict(weight.tensors())
    for name in ("scales", "offsets", "zeros"):
        if name in tensors and tensors[name].is_floating_point():
            half = tensors[name].half()
            if not half.is_meta and bool(torch.isinf(half).any()):
                largest = float(tensors[name].float().abs().max())
                raise ValueError(f"{name} reach {largest:g}, and the format keeps them in fp16, up to 65504")
            tensors[name] = half
    scheme = dataclasses.replace(weight.scheme, scale_dtype="float16")
    return QuantizedWeight.from_tensors(tensors, scheme, weight.shape)
