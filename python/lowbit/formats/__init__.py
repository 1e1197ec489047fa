"""Readers of checkpoints that others wrote: any layout on disk to the canonical weight, bit-exactly.

    for name, record in lowbit.formats.read("model"):       # engines: a LinearRecord or a plain tensor at a time
        ...
    report = lowbit.load_checkpoint("model", make_model)    # people: a module that runs

What is read, and what is refused and why: docs/checkpoints.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from torch import Tensor

from lowbit.formats._format import Container, Format
from lowbit.formats._load import CheckpointReport, LoadedLayer, load_checkpoint
from lowbit.formats._record import ExpertsRecord, LinearRecord, Plan, PlannedLinear, PlannedTensor
from lowbit.formats._registry import CONTAINERS, FORMATS, open_plan
from lowbit.formats.gguf import GGUFModel, load_gguf

__all__ = [
    "CONTAINERS",
    "FORMATS",
    "CheckpointReport",
    "Container",
    "Detection",
    "ExpertsRecord",
    "Format",
    "GGUFModel",
    "LinearRecord",
    "LoadedLayer",
    "Plan",
    "PlannedLinear",
    "PlannedTensor",
    "detect",
    "load_checkpoint",
    "load_gguf",
    "plan",
    "read",
]


@dataclasses.dataclass(frozen=True)
class Detection:
    """What a checkpoint is.

    Args:
        format: name of the row in FORMATS or CONTAINERS.
        variant: what kind of it, for people.
        why: what in config and tensors says so.
    """

    format: str
    variant: str
    why: str


def detect(path: str | os.PathLike[str]) -> Detection:
    """What kind of quantized checkpoint a folder or file is, from its config and tensors; only headers are read.

    Raises:
        ArtifactError: it cannot be told, or config and tensors contradict each other; the message says why.

    Example:
        >>> lowbit.formats.detect("Llama-3.1-8B-GPTQ").variant
        'v1, 4 bits, groups of 128'
    """
    with open_plan(path) as (found, why):
        return Detection(found.format, found.variant, why)


@contextlib.contextmanager
def plan(path: str | os.PathLike[str], format: str | None = None) -> Iterator[Plan]:
    """Understand a checkpoint without reading it; inside the context, layers and tensors can be read in any order.

    Args:
        path: a folder of safetensors files with its config.json, or one file.
        format: a name from FORMATS, to skip the detection.

    Raises:
        ArtifactError: as `read`.

    Example:
        >>> with lowbit.formats.plan("model") as plan:
        ...     mine = [plan.read(name) for name in plan.layers if belongs_to_this_rank(name)]
    """
    with open_plan(path, format) as (found, _):
        yield found


def read(
    path: str | os.PathLike[str], format: str | None = None
) -> Iterator[tuple[str, LinearRecord | ExpertsRecord | Tensor]]:
    """Every quantized layer and every other tensor of a checkpoint, one at a time, in natural order of names.

    The whole checkpoint is understood from its headers before the first one is given, and never more than one layer
    is in memory.

    Args:
        path: a folder of safetensors files with its config.json, or one file.
        format: a name from FORMATS, to skip the detection.

    Yields:
        (path of the module, LinearRecord) for a quantized layer, (path, ExpertsRecord) for experts that are kept in one
        tensor, (full name, Tensor) for everything else.

    Raises:
        ArtifactError: the format is not known for certain, a tensor is missing, has another dtype or shape than the
            format asks for, or holds values that make no sense. The message names file, layer and value.

    Example:
        >>> for name, record in lowbit.formats.read("Llama-3.1-8B-AWQ"):
        ...     print(name, record.shape if isinstance(record, torch.Tensor) else record.weight)
    """
    with open_plan(path, format) as (found, _):
        yield from found
