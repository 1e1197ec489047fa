"""The formats that are written, one row each."""

from __future__ import annotations

from typing import Final

from lowbit.formats import (
    _artifact_writer,
    awq_writer,
    compressed_tensors_writer,
    gguf_writer,
    gptq_writer,
)
from lowbit.formats._writer import Writer

__all__ = ["WRITERS", "writer"]

WRITERS: Final[tuple[Writer, ...]] = (
    _artifact_writer.WRITER,
    compressed_tensors_writer.WRITER,
    gptq_writer.WRITER,
    awq_writer.WRITER,
    gguf_writer.WRITER,
)


def writer(name: str) -> Writer:
    """The row called `name`; ValueError, with the names there are, when there is none."""
    for row in WRITERS:
        if row.name == name:
            return row
    raise ValueError(f"there is no writer {name!r}; {', '.join(row.name for row in WRITERS)}")
