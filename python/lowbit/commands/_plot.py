"""A roofline plot: operations per byte against operations per second, a line per contender and shape, a point per M."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["draw", "require_matplotlib"]

_INK: Final = "0.25"
_QUIET: Final = "0.55"
_LOWBIT_MARKERS: Final = "osD^vP*Xhp"
_PEER_MARKERS: Final = "<>osD^vpHd"
_PEER_COLORS: Final = ("#7a7a7a", "#b08d57", "#6f8fa8", "#8a9a5b", "#a07a9a", "#a86f6f")
_LABEL: Final = {"fontsize": "x-small", "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}}
# How far below the top of a panel, in decades, a point may be and still decide where the panel ends.
_DECADES: Final = 3.5


def require_matplotlib() -> None:
    """Raise RuntimeError, with what to run, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib: pip install 'lowbit[bench]'")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write a plot of a result of `run_benchmark`, one panel per number of threads; the suffix says the file's format."""
    from matplotlib.figure import Figure

    rooflines = result["roofline"]
    styles = _styles(result["rows"])
    figure = Figure(figsize=(6.4 * len(rooflines) + 3.0, 5.6), layout="constrained")
    panels = figure.subplots(1, len(rooflines), squeeze=False, sharey=True)[0]
    for axes, roof in zip(panels, rooflines, strict=True):
        rows = [row for row in result["rows"] if row["threads"] == roof["threads"]]
        axes.set(xscale="log", yscale="log", xlabel="operations per byte of weight, input and output")
        _draw_roof(axes, roof, rows)
        for name, style in styles.items():
            for line in _lines(rows, name):
                axes.plot(*zip(*line, strict=True), **style)
        _name_rows(axes, rows)
        axes.set_title(f"{roof['threads']} thread{'s' * (roof['threads'] > 1)}", fontsize="medium", color=_INK)
        axes.grid(which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", colors=_INK, labelsize="small")
    panels[0].set_ylabel("TFLOP/s")
    handles = [panels[0].plot([], [], label=name, **style)[0] for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small", frameon=False, labelcolor=_INK)
    shapes = ", ".join(dict.fromkeys(f"{row['shape'][0]} x {row['shape'][1]}" for row in result["rows"]))
    figure.suptitle(
        f"{result['device']} ({result['isa']}), x in {result['dtype']}, W {shapes}, {result['weights']} in cache",
        fontsize="medium", color=_INK,
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def _styles(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ours in strong colours, solid and filled; the others' thin, dashed and hollow, one muted colour per library."""
    names = dict.fromkeys((row["name"], row["baseline"]) for row in rows)
    ours = [name for name, baseline in names if not baseline]
    peers = [name for name, baseline in names if baseline]
    styles: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(ours):
        marker = _LOWBIT_MARKERS[i % len(_LOWBIT_MARKERS)]
        styles[name] = {"color": f"C{i % 10}", "marker": marker, "markersize": 5.5, "linewidth": 1.8, "zorder": 4}
    libraries = list(dict.fromkeys(_library(name) for name in peers))
    for name in peers:
        library = _library(name)
        nth = [peer for peer in peers if _library(peer) == library].index(name)
        styles[name] = {
            "color": _PEER_COLORS[libraries.index(library) % len(_PEER_COLORS)],
            "marker": _PEER_MARKERS[nth % len(_PEER_MARKERS)], "markersize": 5, "markerfacecolor": "white",
            "linewidth": 0.8, "linestyle": "--", "zorder": 3,
        }  # fmt: skip
    return styles


def _library(name: str) -> str:
    """Whose a peer is: one colour each."""
    return name.split("-")[0].split(" ")[0]


def _lines(rows: Sequence[Mapping[str, Any]], name: str) -> list[list[tuple[float, float]]]:
    """The points of a contender, one line per shape, by M."""
    lines: dict[tuple[int, ...], list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: int(row["M"])):
        if row["name"] == name:
            lines.setdefault(tuple(row["shape"]), []).append((row["operations"] / row["bytes"], row["TFLOPs"]))
    return list(lines.values())


def _draw_roof(axes: Any, roof: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The slope of the memory and a ceiling per dtype, and the limits of the panel."""
    intensities = [row["operations"] / row["bytes"] for row in rows] or [1.0, 10.0]
    peaks = {name: peak for name, peak in roof["TFLOPs"].items() if peak}
    slope = roof["read_GBps"] / 1e3
    top = max(peaks.values())
    low, high = min(intensities) / 1.6, max(*intensities, top / slope) * 2.5
    axes.plot([low, top / slope], [low * slope, top], color=_INK, linewidth=1.4, zorder=2)
    for name, peak in peaks.items():
        axes.plot([peak / slope, high], [peak, peak], color=_INK, linewidth=1.4 if peak == top else 0.9, zorder=2)
        axes.annotate(
            f"{name} matmul, {peak:.3g} TFLOP/s", (high, peak), xytext=(0, 3), textcoords="offset points",
            ha="right", va="bottom", color=_INK, zorder=6, **_LABEL,
        )  # fmt: skip
    rates = [row["TFLOPs"] for row in rows if row["TFLOPs"] > top * 10**-_DECADES]
    bottom = min([*rates, low * slope]) / 1.6
    axes.set(xlim=(low, high), ylim=(bottom, top * 1.9))
    middle = (low * min(peaks.values()) / slope) ** 0.5
    axes.annotate(
        f"read {roof['read_GBps']:.3g} GB/s", (middle, middle * slope), xytext=(-4, 4), textcoords="offset points",
        ha="right", va="bottom", color=_INK, zorder=6, **_LABEL,
    )  # fmt: skip


def _name_rows(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """M beside the points of the first contender's first shape."""
    if not rows:
        return
    first = [row for row in rows if (row["name"], row["shape"]) == (rows[0]["name"], rows[0]["shape"])]
    for row in first:
        axes.annotate(
            f"M={row['M']}", (row["operations"] / row["bytes"], row["TFLOPs"]), xytext=(5, -9),
            textcoords="offset points", color=_QUIET, zorder=5, **_LABEL,
        )  # fmt: skip
