"""What quantize_ did, layer by layer: data that prints as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

__all__ = [
    "LayerReport",
    "QuantizeReport",
    "Report",
    "SkippedParameter",
    "error_cells",
    "format_bytes",
    "format_shape",
    "format_table",
]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the reports have in common."""

    def to_dict(self) -> dict[str, Any]:
        """Every number, as plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Args:
        name: its path in the model.
        scheme: as a string.
        shape: (N, K), or (E, N, K) of experts.
        bytes_before, bytes_after: of the weight in memory.
        relative_error: ||W - W'|| / ||W|| (Frobenius); 0 for a weight of zeros.
    """

    name: str
    scheme: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    relative_error: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, in dB; infinite when nothing was lost."""
        return math.inf if self.relative_error == 0 else -20 * math.log10(self.relative_error)


@dataclasses.dataclass(frozen=True)
class SkippedParameter:
    """A Parameter of 1 MB or more that was left as it is, and why; `chosen` when the caller asked for it."""

    name: str
    nbytes: int
    reason: str
    chosen: bool = False


@dataclasses.dataclass(frozen=True)
class QuantizeReport(Report):
    """What quantize_ returns. `print(report)` shows a table; `to_dict()` is JSON.

    Args:
        layers: the quantized layers, in the model's order.
        skipped: Parameters of 1 MB or more that were not quantized.
        bytes_before, bytes_after: Parameters and buffers of the whole model.

    Example:
        >>> report = lowbit.quantize_(model, "int4-g128")
        >>> max(report.layers, key=lambda layer: layer.relative_error).name
        'layers.31.mlp.down_proj'
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedParameter, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        rows = [
            (
                layer.name or "(the model)",
                layer.scheme,
                format_shape(layer.shape),
                format_bytes(layer.bytes_before),
                format_bytes(layer.bytes_after),
                f"{layer.relative_error:.2e}",
                "inf" if math.isinf(layer.sqnr_db) else f"{layer.sqnr_db:.1f}",
            )
            for layer in self.layers
        ]
        head = ("layer", "scheme", "N x K", "before", "after", "error", "SQNR dB")
        lines = [format_table(head, rows, left=2)]
        if self.skipped:
            skipped = [(s.name, format_bytes(s.nbytes), s.reason) for s in self.skipped]
            lines += ["", format_table(("not quantized (1 MB or more)", "size", "reason"), skipped, left=1, wide=True)]
        ratio = self.bytes_before / self.bytes_after if self.bytes_after else 1.0
        lines += [
            "",
            f"{len(self.layers)} layers quantized; model {format_bytes(self.bytes_before)} -> "
            f"{format_bytes(self.bytes_after)} ({ratio:.2f}x smaller)",
        ]
        return "\n".join(lines)


def format_bytes(count: int) -> str:
    """Bytes for people: "512 B", "1.5 MB" (powers of 1000).

    Example:
        >>> format_bytes(5_000_000_000)
        '5.0 GB'
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.95 or unit == "TB":
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def format_shape(shape: Sequence[int]) -> str:
    """A weight's shape for people.

    Example:
        >>> format_shape((64, 256))
        '64 x 256'
    """
    return " x ".join(map(str, shape))


def error_cells(relative: float, largest: float, sqnr_db: float) -> tuple[str, str, str]:
    """The errors of a layer as three cells of a table; a layer without any change shows a 0.

    Example:
        >>> error_cells(0.0, 0.0, float("inf"))
        ('0', '0', 'inf')
    """
    return "0" if relative == 0 else f"{relative:.2e}", f"{largest:.2g}", f"{sqnr_db:.1f}"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int, wide: bool = False) -> str:
    """A plain text table: the first `left` columns to the left, others to the right; `wide`: the last one ragged."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    last = len(head) - 1

    def line(row: Sequence[str]) -> str:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            ragged = wide and i == last
            cells.append(cell if ragged else cell.ljust(width) if i < left else cell.rjust(width))
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])
