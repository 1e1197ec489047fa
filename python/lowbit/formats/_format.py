"""A row of the registry: how a format is recognised, and how it is read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

from lowbit.formats._record import Plan
from lowbit.formats._settings import Settings
from lowbit.formats._source import Source

__all__ = ["Container", "Format", "by_method"]


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to keep quantized layers in safetensors files.

    Args:
        name: of the row, as in reports and errors.
        about: one line for people.
        by_config: what in one of the configs says that it is this format ("quant_method is 'gptq'"), or None.
        by_tensors: what in the names, dtypes and shapes of the tensors says so, or None.
        plan: understands a checkpoint from headers and configs. Raises ArtifactError, naming the layer or the key, for
            anything it does not know for certain.
    """

    name: str
    about: str
    by_config: Callable[[Settings], str | None]
    by_tensors: Callable[[Source], str | None]
    plan: Callable[[Source, list[Settings]], Plan]


def by_method(name: str) -> Callable[[Settings], str | None]:
    """The `by_config` of a format that every config of its own names as quant_method."""

    def by_config(settings: Settings) -> str | None:
        return f"quant_method is {name!r}" if settings.values.get("quant_method") == name else None

    return by_config


@dataclasses.dataclass(frozen=True)
class Container:
    """A kind of file that describes itself, known by its first bytes.

    Args:
        name, about: as in Format.
        magic: the first bytes.
        open_plan: opens the file; the plan is usable inside the context.
    """

    name: str
    about: str
    magic: bytes
    open_plan: Callable[[Path], contextlib.AbstractContextManager[Plan]]
