"""Run the comparisons that are published, and write them to results/ as JSON, as tables and as a plot, with what they were
run on.

    python bench/record.py                                     every suite, in about ten minutes
    python bench/record.py --suite peers,calls --time-budget 120
    python bench/record.py --name llama-8b --model llama-3.1-8b --M 1,16 --threads 1

Suites: peers (everybody who multiplies with the same weight), shapes, formats, batch-invariant, small (the layers of a small
encoder), calls (the cost of one call). Any other option is one of `lowbit bench`, and makes one suite, "custom", of what it
asks for. `python docs/generate_bench.py` then writes the tables of README.md and docs/speed.md from the newest result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit import _C
from lowbit.cli import make_parser
from lowbit.commands import _calls, _plot, bench
from lowbit.commands._benchmark import Settings, run_benchmark
from lowbit.commands._cases import (
    OTHER_SCHEMES,
    SMALL_SHAPES,
    STANDARD_A8_SCHEMES,
    STANDARD_MS,
    STANDARD_SCHEMES,
    STANDARD_SHAPES,
    Shape,
)
from lowbit.commands._output import _finite
from lowbit.commands._peers import expand
from lowbit.scheme import Scheme

RESULTS = Path(__file__).parent / "results"
#: Of the whole run, in seconds of measuring; making weights comes on top.
SECONDS = 400.0
FEW_PEERS = (
    "torch-bf16", "torch-int4pack", "torch-int8pack", "torch-int8-dynamic", "onnxruntime-int4-g32-a8", "ggml-q4_0",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Suite:
    """One comparison: what, and its share of the time."""

    settings: Settings
    share: float


def _suites() -> dict[str, Suite]:
    threads = sorted({1, os.cpu_count() or 1})
    square = [Shape(4096, 4096)]
    Ms = [*STANDARD_MS, 1024]
    main = [Scheme.parse(text) for text in (*STANDARD_SCHEMES, *STANDARD_A8_SCHEMES)]
    few = [Scheme.parse(text) for text in ("int4-g128", "int8", *STANDARD_A8_SCHEMES)]
    pairs = [Scheme.parse(text) for text in ("int4-g128", "int8", "fp8", "nf4-g64")]
    small = [Scheme.parse(text) for text in ("int4-g32", "int8", "nf4-g64", "int4-g32-a8")]
    everybody = [name for name in expand(["peers"]) if name != "torch-fp16"]
    others = [*STANDARD_SHAPES[1:], Shape(2048, 2048)]
    all_ms = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    return {
        "peers": Suite(Settings(square, Ms, main, everybody, threads=threads), 0.45),
        "shapes": Suite(Settings(others, Ms, few, FEW_PEERS, threads=threads), 0.3),
        "formats": Suite(
            Settings(square, (1, 4, 16, 256), [Scheme.parse(text) for text in OTHER_SCHEMES], ["torch-bf16"]), 0.07
        ),
        "batch-invariant": Suite(Settings(square, STANDARD_MS, pairs, ["torch-bf16"], batch_invariant=True), 0.07),
        "small": Suite(
            Settings(SMALL_SHAPES, all_ms, small, ["torch-fp32"], dtype="fp32", threads=threads, warm=True), 0.11
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the files; by default device and instruction set")
    parser.add_argument("--note", default="", help="a sentence about the conditions, such as what else was running")
    parser.add_argument("--suite", help="separated by commas; all by default")
    parser.add_argument(
        "--time-budget", type=float, default=SECONDS, help="seconds of measuring (default: %(default)g)"
    )
    args, rest = parser.parse_known_args()
    began = time.perf_counter()
    suites = _chosen(args.suite, rest, args.time_budget)
    record: dict[str, Any] = {**_about(args.note), "suites": {}}
    for name, settings in suites.items():
        _say(f"== {name}, {settings.seconds:.0f} s")
        record["suites"][name] = run_benchmark(settings, _say)
        if record["suites"][name]["interrupted"]:
            break
    if _interrupted(record) is False and (not rest and (args.suite is None or "calls" in args.suite.split(","))):
        _say("== calls")
        record["calls"] = _calls.measure_calls()
    record["seconds"] = round(time.perf_counter() - began, 1)
    print(_write(record, args.name))
    return 130 if _interrupted(record) else 0


def _interrupted(record: dict[str, Any]) -> bool:
    return any(result["interrupted"] for result in record["suites"].values())


def _chosen(asked: str | None, rest: Sequence[str], seconds: float) -> dict[str, Settings]:
    """What to run, each with its seconds; SystemExit for a suite that there is not."""
    if rest:
        settings = bench.make_settings(make_parser().parse_args(["bench", *rest]))
        return {"custom": dataclasses.replace(settings, seconds=seconds)}
    suites = _suites()
    names = [*suites, "calls"] if asked is None else asked.split(",")
    for name in names:
        if name not in (*suites, "calls"):
            raise SystemExit(f"record.py: no suite is called {name}; there are {', '.join(suites)} and calls")
    chosen = {name: suite for name, suite in suites.items() if name in names}
    total = sum(suite.share for suite in chosen.values())
    return {
        name: dataclasses.replace(suite.settings, seconds=seconds * suite.share / total)
        for name, suite in chosen.items()
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _about(note: str) -> dict[str, Any]:
    return {
        "format": 2,
        "commit": _commit(),
        "note": note,
        "command": " ".join(["python bench/record.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "build": _C.build_info(),
        "openmp": torch.backends.openmp.is_available(),
    }


def _commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../python", "../cmake")
    return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")


# -- writing it down ---------------------------------------------------------------------------------------------------


def _write(record: dict[str, Any], name: str | None) -> Path:
    """The three files; returns the page."""
    first = next(iter(record["suites"].values()), None)
    if name is None:
        about = "calls" if first is None else f"{first['device']}-{first['isa']}"
        name = re.sub(r"[^a-z0-9]+", "-", about.lower()).strip("-")
    record |= (
        {key: first[key] for key in ("device", "cores", "isa", "date", "lowbit", "torch", "versions")} if first else {}
    )
    RESULTS.mkdir(exist_ok=True)
    plotted = record["suites"].get("peers") or first
    image = RESULTS / f"{name}.png"
    if plotted and plotted["rows"] and _has_matplotlib():
        _plot.draw(plotted, image)
    (RESULTS / f"{name}.json").write_text(json.dumps(_finite(record), indent=1) + "\n")
    page = RESULTS / f"{name}.md"
    page.write_text(_markdown(record, image if image.exists() else None))
    return page


def _has_matplotlib() -> bool:
    try:
        _plot.require_matplotlib()
    except RuntimeError:
        return False
    return True


def _markdown(record: dict[str, Any], image: Path | None) -> str:
    lines = [f"# {record.get('device', 'Calls')}, {record.get('isa', '')}", ""]
    if record["note"]:
        lines += [record["note"], ""]
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    lines += [
        f"- {record.get('date', '')}, commit {record['commit']}, {record['seconds']:.0f} seconds",
        f"- Python {record['python']}, {record['system']}; {versions}",
        f"- `{record['command']}`",
        "",
    ]
    if image is not None:
        lines += [f"![Roofline]({image.name})", ""]
    for name, result in record["suites"].items():
        lines += [f"## {name}", "", *(f"- {note}" for note in bench.notes(result)), ""]
        before, after = result["load_average_before"], result["load_average_after"]
        if before and after:
            lines += [f"Load average (1, 5, 15 minutes) before {before}, after {after}.", ""]
        for shape in list(dict.fromkeys(tuple(row["shape"]) for row in result["rows"])):
            for threads in list(dict.fromkeys(row["threads"] for row in result["rows"])):
                rows = [row for row in result["rows"] if tuple(row["shape"]) == shape and row["threads"] == threads]
                if rows:
                    plural = "s" if threads > 1 else ""
                    lines += [f"### {name}: N = {shape[0]}, K = {shape[1]}, {threads} thread{plural}", ""]
                    lines += [*_ratios(rows), "", *_table(rows), ""]
    if "calls" in record:
        lines += ["## calls", "", "| x | what | median us | best us | x F.linear |", "|---|---|---|---|---|"]
        lines += [
            f"| {row['dtype']} | {row['what']} | {row['median_us']:.2f} | {row['best_us']:.2f} | {row['ratio']:.2f} |"
            for row in record["calls"]
        ]
        lines.append("")
    return "\n".join(lines)


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Contenders by M: how many times as fast as the dense product in torch."""
    baseline = next((name for name in ("torch-bf16", "torch-fp32") if any(row["name"] == name for row in rows)), None)
    if baseline is None:
        return []
    Ms = sorted({row["M"] for row in rows})
    times = {(row["name"], row["M"]): row["median_us"] for row in rows}
    head = f"| times as fast as {baseline.replace('-', ' ')} | {' | '.join(f'M = {M}' for M in Ms)} |"
    lines = [head, f"|---|{'---|' * len(Ms)}"]
    for name in dict.fromkeys(row["name"] for row in rows):
        values = [(times.get((baseline, M)), times.get((name, M))) for M in Ms]
        shown = " | ".join("" if not dense or not mine else f"{dense / mine:.2f}" for dense, mine in values)
        lines.append(f"| {name} | {shown} |")
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    shown = [i for i, name in enumerate(bench.HEAD) if name not in ("N x K", "threads")]
    lines = [f"| {' | '.join(bench.HEAD[i] for i in shown)} |", f"|{'---|' * len(shown)}"]
    for row in rows:
        cells = bench.cells(row)
        lines.append(f"| {' | '.join(cells[i] for i in shown)} |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
