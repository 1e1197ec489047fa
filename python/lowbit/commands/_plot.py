"""A roofline plot: operations per byte against operations per second, every case a point."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw", "require_matplotlib"]


def require_matplotlib() -> None:
    """Raise RuntimeError, with what to run, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib: pip install 'lowbit[bench]'")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write a plot of a result of `run_benchmark`, one panel per number of threads; the suffix says the file's format."""
    from matplotlib.figure import Figure

    rooflines = result["roofline"]
    figure = Figure(figsize=(7 * len(rooflines), 5), layout="constrained")
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    for axes, roof in zip(figure.subplots(1, len(rooflines), squeeze=False)[0], rooflines, strict=True):
        count = roof["threads"]
        rows = [row for row in result["rows"] if row["threads"] == count]
        _draw_roof(axes, roof, rows)
        for i, name in enumerate(names):
            points = [(row["operations"] / row["bytes"], row["TFLOPs"]) for row in rows if row["name"] == name]
            if points:
                axes.plot(*zip(*points, strict=True), "os^Dv*PX<>"[i % 10], label=name, color=f"C{i % 10}")
        axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
        axes.set_title(
            f"{result['device']}, {result['isa']}, {count} thread{'s' * (count > 1)}, x in {result['dtype']}"
        )
        axes.grid(which="both", alpha=0.2)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_roof(axes: Any, roof: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> None:
    intensities = sorted(row["operations"] / row["bytes"] for row in rows) or [1.0]
    low, high = intensities[0] / 2, intensities[-1] * 2
    for name, peak in roof["TFLOPs"].items():
        if not peak:
            continue
        ridge = peak * 1e3 / roof["read_GBps"]
        corners = [x for x in (low, ridge, high) if low <= x <= high]
        roofs = [min(x * roof["read_GBps"] / 1e3, peak) for x in corners]
        axes.plot(corners, roofs, "-", linewidth=1, color="0.4")
        axes.annotate(f"{name} {peak:.2f}", (high, roofs[-1]), ha="right", va="bottom", fontsize="x-small", color="0.4")
