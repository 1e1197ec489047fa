"""The tables that people read, from the JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["markdown", "verdict"]

Row = Mapping[str, Any]


def _us(limit: float) -> Callable[..., bool]:
    return lambda row, rows, rates: row["us"] <= limit


def _against(limit: float, *names: str) -> Callable[..., bool]:
    """At least `limit` times as fast as the best of these that ran; not met if none did."""

    def met(row: Row, rows: list[Row], rates: Mapping[str, float]) -> bool:
        times = [other["us"] for other in rows if other["name"] in names]
        return bool(times) and min(times) / row["us"] >= limit

    return met


def _share(limit: float, of: str) -> Callable[..., bool]:
    return lambda row, rows, rates: of in rates and row["bytes_per_s"] >= limit * rates[of]


def _rate(limit: float) -> Callable[..., bool]:
    return lambda row, rows, rates: row["operations_per_s"] >= limit


def _either(*ways: Callable[..., bool]) -> Callable[..., bool]:
    return lambda *args: any(way(*args) for way in ways)


def _both(*ways: Callable[..., bool]) -> Callable[..., bool]:
    return lambda *args: all(way(*args) for way in ways)


_PACKED: Final = ("torch-int4pack", "humming", "gemlite", "torch-int8pack")
_DECODE: Final = (1, 4, 8, 16)

#: (section, which M, what is asked for, on which device, whether a row has it). Times are for 8192 x 8192.
TARGETS: Final = (
    ("W4A16", _DECODE, "10 us, and 1.8x the best peer or 85% of the read bandwidth", "H200",
     _both(_us(10), _either(_against(1.8, *_PACKED), _share(0.85, "read")))),
    ("W4A16", (64,), "20 us", "H200", _us(20)),
    ("W4A16", (256,), "50 us", "H200", _us(50)),
    ("W4A16", (1024, 4096), "0.98x torch bf16", "", _against(0.98, "torch-bf16")),
    ("W4A16 shapes", (1, 16), "80% of the read bandwidth", "", _share(0.8, "read")),
    ("W8A16 int8", _DECODE, "80% of the read bandwidth", "", _share(0.8, "read")),
    ("W8A16 fp8", _DECODE, "80% of the read bandwidth", "", _share(0.8, "read")),
    ("W4A8-fp8", (256,), "30 us", "H200", _us(30)),
    ("W4A8-fp8", (4096,), "1300 TFLOP/s", "H200", _rate(1300e12)),
    ("FP8 W8A8", (4096,), "torch._scaled_mm and 1300 TFLOP/s", "H200", _both(_against(1, "torch-scaled-mm"), _rate(1300e12))),
    ("FP8 W8A8", (), "torch._scaled_mm", "", _against(1, "torch-scaled-mm")),
    ("FP8 blocks", (), "torch._scaled_mm", "", _against(1, "torch-scaled-mm-blocks")),
    ("INT8 W8A8", (), "1.2x torch._int_mm with scales, 1.0x without", "",
     _both(_against(1.2, "torch-int-mm-scaled"), _against(1, "torch-int-mm"))),
    ("dequantize", (), "85% of the copy bandwidth", "", _share(0.85, "copy")),
    ("quantize_activation", (), "85% of the copy bandwidth", "", _share(0.85, "copy")),
)  # fmt: skip


def verdict(case: Mapping[str, Any], rows: list[Row], rates: Mapping[str, float], device: str) -> str:
    """What was asked of lowbit in this case, and whether it is met; "" where nothing was, or for another device."""
    if device.startswith("Apple"):
        return ""  # nothing yet: the targets are for NVIDIA's GPUs and what runs on them
    own = next((row for row in rows if row["name"] == "lowbit"), None)
    for section, Ms, text, where, met in TARGETS:
        named = case["section"] == section or (
            not section.startswith("W") and case["section"].startswith(f"{section} ")
        )
        if own is not None and named and (not Ms or case["M"] in Ms) and where in device:
            return f"{text}: {'met' if met(own, rows, rates) else 'missed'}"
    return ""


def markdown(data: Mapping[str, Any]) -> str:
    """All of a result file."""
    stages = data["stages"]
    lines = [f"# lowbit on {data['device']}", "", *_head(data), ""]
    for stage in ("build", "correct", "sanitize"):
        if stage in stages:
            lines += [f"## {stage}", "", "| | |", "|---|---|"]
            for key, cell in stages[stage].items():
                lines.append(f"| {key} | {_cell_text(cell)} |")
            lines.append("")
            lines += [f"- `{name}`" for cell in stages[stage].values() for name in cell.get("failures", [])]
    if "bench" in stages:
        lines += _bench(stages["bench"], data["device"])
    return "\n".join(lines).rstrip() + "\n"


def _cell_text(cell: Mapping[str, Any]) -> str:
    text = str(cell.get("summary") or cell.get("error") or "").splitlines()
    state = (
        "ok" if cell.get("ok") else "unfinished" if cell.get("unfinished") and not cell.get("failures") else "FAILED"
    )
    return f"{state}, {cell['seconds']:.0f} s. {text[0] if text else ''}".replace("|", "/")


def _head(data: Mapping[str, Any]) -> list[str]:
    machine = data["machine"]
    lines = [f"- commit {machine.get('commit', 'unknown')}, sources {data['sources']}"]
    if versions := machine.get("versions"):
        lines.append("- " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if "macos" in machine:
        memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
        lines.append(f"- macOS {machine['macos']}, GPU taken for {machine['model']}, memory {memory}")
    if "capability" in machine:
        lines.append(
            f"- compute capability {machine['capability']}, {machine['multiprocessors']} multiprocessors, "
            f"L2 {machine['l2_bytes'] >> 20} MiB, memory {machine['memory_bytes'] / 2**30:.0f} GiB"
        )
    for when in ("before", "after"):
        if said := machine.get(f"clocks_{when}"):
            lines.append(f"- {when}: " + ", ".join(f"{name} {value}" for name, value in said.items() if name != "name"))
    return lines


def _bench(cells: Mapping[str, Any], device: str) -> list[str]:
    rates = next((cell["rates"] for cell in cells.values() if cell.get("rates")), {})
    lines = ["## bench", ""]
    how = "given for 20 ms on end" if device.startswith("Apple") else "in CUDA graphs"
    if rates:
        names = {
            "copy": "copy {:.2f} TB/s (read and written)",
            "read": "read {:.2f} TB/s",
            "bf16": "bf16 product {:.0f} TFLOP/s",
        }
        lines += ["Measured here: " + ", ".join(names[n].format(rate / 1e12) for n, rate in rates.items()) + ".", ""]
    lines += [
        f"Times are medians of rounds in which everybody takes turns, {how}, weights cold in cache. Percentages are of",
        "the measured read bandwidth, for the weight, x and y moved once. In parentheses: half the distance of the quartiles.",
        "",
    ]
    sections = dict.fromkeys(cell["case"]["section"] for cell in cells.values() if cell.get("rows"))
    for section in sections:
        lines += [
            f"### {section}",
            "",
            "| M | N x K | who | us | TB/s | % | TFLOP/s | lowbit is .. times as fast | |",
            "|---" * 9 + "|",
        ]
        chosen = [cell for cell in cells.values() if cell.get("rows") and cell["case"]["section"] == section]
        for cell in sorted(chosen, key=lambda cell: (cell["case"]["N"], cell["case"]["K"], cell["case"]["M"])):
            lines += _case_lines(cell, rates, device)
        lines.append("")
    failed = [
        f"- {key}: {cell.get('error') or cell.get('summary')}" for key, cell in cells.items() if not cell.get("ok")
    ]
    return lines + (["### failed", "", *failed, ""] if failed else [])


def _case_lines(cell: Mapping[str, Any], rates: Mapping[str, float], device: str) -> list[str]:
    case, rows = cell["case"], cell["rows"]
    own = next((row["us"] for row in rows if row["name"] == "lowbit"), None)
    lines = []
    for row in rows:
        share = f"{100 * row['bytes_per_s'] / rates['read']:.0f}" if "read" in rates else ""
        ratio = f"{row['us'] / own:.2f}" if own else ""
        note = (
            row["kernel"]
            if row["name"] != "lowbit"
            else "; ".join(filter(None, [row["kernel"], verdict(case, rows, rates, device)]))
        )
        lines.append(
            f"| {case['M']} | {case['N']} x {case['K']} | {row['name']} | {row['us']:.1f} ({100 * row['spread']:.0f}%) | "
            f"{row['bytes_per_s'] / 1e12:.2f} | {share} | {row['operations_per_s'] / 1e12:.0f} | {ratio} | {note} |".replace(
                "||", "|"
            )
        )
    for name, reason in cell.get("refused", {}).items():
        lines.append(
            f"| {case['M']} | {case['N']} x {case['K']} | {name} | | | | | | {str(reason).replace('|', '/')} |"
        )
    return lines
