"""Run the comparison that is published, and write it to results/ as JSON and as a table, with what it was run on.

    python bench/record.py                                   the standard cases, about five minutes
    python bench/record.py --name llama-8b --model llama-3.1-8b --M 1,16 --threads 1

Options beside --name and --note are those of `lowbit bench`; the standard cases fill in what is not given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from lowbit import _C
from lowbit.cli import make_parser
from lowbit.commands import bench
from lowbit.commands._benchmark import run_benchmark
from lowbit.commands._cases import STANDARD_MS, STANDARD_SCHEMES
from lowbit.commands._output import _finite

RESULTS = Path(__file__).parent / "results"
STANDARD = {
    "--M": ",".join(map(str, STANDARD_MS)),
    "--scheme": ",".join(STANDARD_SCHEMES),
    "--baseline": "torch-bf16,torch-fp32,torch-int4pack,torch-int8pack",
    "--threads": ",".join(str(n) for n in sorted({1, os.cpu_count() or 1})),
    "--time-budget": "300",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the files; by default device and instruction set")
    parser.add_argument("--note", default="", help="a sentence about the conditions, such as what else was running")
    args, rest = parser.parse_known_args()
    for option, value in STANDARD.items():
        if not any(given == option or given.startswith(f"{option}=") for given in rest):
            rest += [option, value]
    settings = bench.make_settings(make_parser().parse_args(["bench", *rest]))
    result = run_benchmark(settings, lambda text: print(text, file=sys.stderr, flush=True))
    result |= {"commit": _commit(), "note": args.note, "python": platform.python_version(), "build": _C.build_info()}
    result["command"] = "python bench/record.py " + " ".join(rest)
    name = args.name or re.sub(r"[^a-z0-9]+", "-", f"{result['device']}-{result['isa']}".lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(_finite(result), indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(_markdown(result))
    print(RESULTS / f"{name}.md")
    return 130 if result["interrupted"] else 0


def _commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../python", "../cmake")
    return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")


def _markdown(result: dict[str, Any]) -> str:
    lines = [f"# {result['device']}, {result['isa']}", ""]
    if result["note"]:
        lines += [result["note"], ""]
    lines += [f"- {note}" for note in bench.notes(result)]
    before, after = result["load_average_before"], result["load_average_after"]
    if before and after:
        lines.append(f"- load average (1, 5, 15 minutes) before {before}, after {after}")
    lines += [f"- {result['date']}, commit {result['commit']}", f"- `{result['command']}`", ""]
    for shape in list(dict.fromkeys(tuple(row["shape"]) for row in result["rows"])):
        for threads in list(dict.fromkeys(row["threads"] for row in result["rows"])):
            rows = [row for row in result["rows"] if tuple(row["shape"]) == shape and row["threads"] == threads]
            if rows:
                lines += [f"## N = {shape[0]}, K = {shape[1]}, {threads} thread{'s' if threads > 1 else ''}", ""]
                lines += [*_ratios(rows), "", *_table(rows), ""]
    return "\n".join(lines)


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Times faster than torch bf16, one row per contender and one column per M."""
    Ms = list(dict.fromkeys(row["M"] for row in rows))
    if not any(row["vs_torch_bf16"] for row in rows):
        return []
    ratio = {(row["name"], row["M"]): bench.cells(row)[-1] + ("*" if row.get("contended") else "") for row in rows}
    lines = [
        "| times as fast as torch bf16 | " + " | ".join(f"M = {M}" for M in Ms) + " |",
        "|---" * (len(Ms) + 1) + "|",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        lines.append(f"| {name} | " + " | ".join(ratio.get((name, M), "") for M in Ms) + " |")
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    keep = [i for i, head in enumerate(bench.HEAD) if head not in ("N x K", "threads")]
    lines = ["| " + " | ".join(bench.HEAD[i] for i in keep) + " |", "|---" * len(keep) + "|"]
    return lines + ["| " + " | ".join(bench.cells(row)[i] for i in keep) + " |" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
