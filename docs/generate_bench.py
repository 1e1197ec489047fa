"""Writes the speed table of README.md from a result of bench/record.py.

python docs/generate_bench.py                                    # from the newest file in bench/results
python docs/generate_bench.py bench/results/NAME.json 4096x4096 1       # this file, shape N x K, threads
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
#: Half the distance between the quartiles, as a fraction of the median, above which a number stands in parentheses.
NOISY = 0.1


def block(path: Path, shape: str = "4096x4096", threads: int = 1) -> str:
    """The lines between the markers: how many times as fast as torch's bf16 F.linear everybody was."""
    result = json.loads(path.read_text())
    N, K = (int(part) for part in shape.split("x"))
    rows = [r for r in result["rows"] if r["shape"] == [N, K] and r["threads"] == threads]
    Ms = sorted({r["M"] for r in rows})
    cells = {(r["name"], r["M"]): r for r in rows}
    names = [name for name in dict.fromkeys(r["name"] for r in rows) if name != "torch-bf16"]
    lines = [
        f"How many times as fast as `F.linear` in bf16: x in {result['dtype']}, W {N} x {K} and {result['weights']} in cache, "
        f"{threads} thread{'s' if threads > 1 else ''} of an {result['device']} ({result['isa']}), torch {result['torch']}. "
        "Rows called `torch-` are torch's own kernels. In parentheses: numbers that varied by more than a tenth, "
        "or that other processes disturbed.",
        "",
        f"| | {' | '.join(f'M = {M}' for M in Ms)} |",
        f"|---|{'---|' * len(Ms)}",
        *(f"| `{name}` | {' | '.join(_cell(cells.get((name, M))) for M in Ms)} |" for name in names),
        "",
        f"All of it, and how it was measured: [{path.stem}]({path.relative_to(ROOT).with_suffix('.md').as_posix()}), "
        f"{result['date'][:10]}. {result.get('note', '')}".rstrip(),
    ]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["vs_torch_bf16"] is None:
        return ""
    text = f"{row['vs_torch_bf16']:.2f}"
    return f"({text})" if row["spread"] > NOISY or row.get("contended") else text


def newest() -> Path:
    """The result that was measured last."""
    return max((ROOT / "bench" / "results").glob("*.json"), key=lambda path: json.loads(path.read_text())["date"])


def main(arguments: list[str]) -> None:
    """Rewrite the block."""
    path = (ROOT / arguments[0]).resolve() if arguments else newest()
    shape, threads = (arguments[1], int(arguments[2])) if len(arguments) > 2 else ("4096x4096", 1)
    text = README.read_text()
    markers = r"(<!-- bench:begin -->\n).*?(\n<!-- bench:end -->)"
    README.write_text(re.sub(markers, lambda m: m[1] + block(path, shape, threads) + m[2], text, flags=re.S))


if __name__ == "__main__":
    main(sys.argv[1:])
