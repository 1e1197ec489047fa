"""Writes the speed tables of README.md and docs/speed.md from a result of bench/record.py.

python docs/generate_bench.py                                    # from the newest file in bench/results
python docs/generate_bench.py bench/results/NAME.json
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/speed.md")
#: Half the distance between the quartiles, as a fraction of the median, above which a number stands in parentheses.
NOISY = 0.1
#: What counts as the same work: bits of the weight and of its inputs.
KINDS = ("W4A16", "W4A8", "W8A16", "W8A8")

Record = Mapping[str, Any]
Row = Mapping[str, Any]


def blocks(record: Record, stem: str) -> dict[str, str]:
    """The text between the markers of each block, by its name; a suite that was not run has a sentence instead.

    Args:
        record: what bench/record.py wrote.
        stem: of its file.
    """
    makers: dict[str, Callable[[Record], list[str]]] = {
        "bench": _readme,
        "peers-1": lambda r: _peers(r, 1),
        "peers-2": lambda r: _peers(r, _most_threads(r)),
        "shapes": _shapes,
        "formats": _formats,
        "batch-invariant": _batch_invariant,
        "threads": _threads,
        "small": _small,
        "calls": _calls,
    }
    made = {}
    for name, make in makers.items():
        try:
            lines = make(record)
        except KeyError as missing:
            lines = [f"Not part of the last run ({missing})."]
        made[name] = "\n".join(lines)
    folder = "bench/results"
    made["bench"] += (
        f"\n\nWho they were, two threads, other shapes, the cost of a call: [docs/speed.md](docs/speed.md). {_about(record)}"
    )
    made["source"] = f"From [{stem}](../{folder}/{stem}.md), where every time stands. {_about(record)}"
    return made


def _about(record: Record) -> str:
    note = f" {record['note']}" if record["note"] else ""
    return f"Commit {record['commit'][:12]}, {record['date'][:10]}.{note}"


def _suite(record: Record, name: str) -> Record:
    result: Record = record["suites"][name]
    return result


def _most_threads(record: Record) -> int:
    return max(int(roof["threads"]) for roof in _suite(record, "peers")["roofline"])


def _plural(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _where(result: Record, shape: Sequence[int], threads: int) -> str:
    return (
        f"x in {result['dtype']}, W {shape[0]} x {shape[1]} and {result['weights']} in cache, {_plural(threads)} of an "
        f"{result['device']} ({result['isa']}), torch {result['torch']}"
    )


_PARENTHESES = "In parentheses: numbers that varied by more than a tenth, or that other processes disturbed."


def _doubtful(*rows: Row) -> bool:
    return any(row["spread"] > NOISY or row.get("contended") for row in rows)


def _number(value: float, *rows: Row, digits: int = 2) -> str:
    text = f"{value:.{digits}f}"
    return f"({text})" if _doubtful(*rows) else text


class _Cells:
    """Rows of one shape and number of threads, by contender and M."""

    def __init__(self, result: Record, shape: Sequence[int], threads: int) -> None:
        self.rows = [r for r in result["rows"] if r["shape"] == list(shape) and r["threads"] == threads]
        if not self.rows:
            raise KeyError(f"{shape[0]} x {shape[1]}, {_plural(threads)}")
        self.Ms = sorted({r["M"] for r in self.rows})
        self._by_name = {(r["name"], r["M"]): r for r in self.rows}

    def names(self, baseline: bool) -> list[str]:
        """Ours, or the others."""
        return list(dict.fromkeys(r["name"] for r in self.rows if r["baseline"] == baseline))

    def kind(self, name: str) -> str:
        """Bits of weight and inputs."""
        return str(next(r["kind"] for r in self.rows if r["name"] == name))

    def row(self, name: str, M: int) -> Row | None:
        """One measurement, if there is one."""
        return self._by_name.get((name, M))

    def ratio(self, name: str, M: int, to: str) -> str:
        """How many times as fast as `to`."""
        mine, other = self.row(name, M), self.row(to, M)
        return "" if mine is None or other is None else _number(other["median_us"] / mine["median_us"], mine, other)

    def ratios(self, name: str, to: str) -> str:
        """The same for every M, as cells of a row."""
        return " | ".join(self.ratio(name, M, to) for M in self.Ms)

    def best(self, kind: str, M: int) -> Row | None:
        """The fastest of the others that do the same work."""
        rows = [r for r in self.rows if r["baseline"] and r["kind"] == kind and r["M"] == M]
        return min(rows, key=lambda r: float(r["median_us"]), default=None)


def _head(first: str, Ms: Sequence[int]) -> list[str]:
    columns = first.count("|") + 1
    return [f"| {first} | {' | '.join(f'M = {M}' for M in Ms)} |", f"|{'---|' * (columns + len(Ms))}"]


def _readme(record: Record) -> list[str]:
    cells, where = _one_shape(record, "peers")
    lines = [
        f"How many times as fast as `F.linear` in bf16: {where}. W4A8: 4-bit weights, inputs quantized to 8 "
        f"bits, which is part of the time. {_PARENTHESES}",
        "",
        *_head(" | ", cells.Ms),
    ]
    for kind in KINDS:
        for name in cells.names(baseline=False):
            if cells.kind(name) == kind:
                lines.append(f"| {kind} | `{name}` | {cells.ratios(name, 'torch-bf16')} |")
        best = [cells.best(kind, M) for M in cells.Ms]
        shown = [
            "" if r is None else cells.ratio(r["name"], M, "torch-bf16") for r, M in zip(best, cells.Ms, strict=True)
        ]
        if any(shown):
            lines.append(f"| {kind} | the best other | {' | '.join(shown)} |")
    return lines


def _peers(record: Record, threads: int) -> list[str]:
    result = _suite(record, "peers")
    shape = result["rows"][0]["shape"]
    cells = _Cells(result, shape, threads)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"Times as fast as `F.linear` in bf16: {_where(result, shape, threads)}. {_PARENTHESES}",
        "",
        *_head(" | error | ", cells.Ms),
    ]
    for name in (*cells.names(baseline=False), *cells.names(baseline=True)):
        errors = [r["error"] for r in cells.rows if r["name"] == name and r["error"] is not None]
        error = f"{statistics.median(errors):.2g}" if errors else ""
        ratios = cells.ratios(name, "torch-bf16")
        lines.append(f"| `{name}` | {cells.kind(name)} | {error} | {ratios} |")
    lines[2] = lines[2].replace("|  | error |  |", "| contender | work | error |")
    missing = [f"`{entry['name']}`: {entry['why']}" for entry in result["absent"]]
    refused = dict.fromkeys(
        f"`{entry['name']}`: {entry['why']}" for entry in result["left_out"]
        if "name" in entry and entry.get("threads", threads) == threads
    )  # fmt: skip
    lines += ["", f"Versions: {versions}."]
    if missing or refused:
        lines += ["", "Not timed:", "", *(f"- {line}" for line in (*missing, *refused))]
    return lines


def _shapes(record: Record) -> list[str]:
    result = _suite(record, "shapes")
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in result["rows"]))
    lines = [f"Times as fast as `F.linear` in bf16, one thread. {_PARENTHESES}", ""]
    cells = [_Cells(result, shape, 1) for shape in shapes]
    lines += _head("W | contender | work", cells[0].Ms)
    for shape, table in zip(shapes, cells, strict=True):
        for name in (*table.names(baseline=False), *table.names(baseline=True)):
            if name != "torch-bf16":
                ratios = " | ".join(table.ratio(name, M, "torch-bf16") for M in cells[0].Ms)
                lines.append(f"| {shape[0]} x {shape[1]} | `{name}` | {table.kind(name)} | {ratios} |")
    return lines


def _one_shape(record: Record, suite: str) -> tuple[_Cells, str]:
    """The cells of a suite that times one shape on one thread, and where that was."""
    result = _suite(record, suite)
    shape = result["rows"][0]["shape"]
    return _Cells(result, shape, 1), _where(result, shape, 1)


def _formats(record: Record) -> list[str]:
    cells, where = _one_shape(record, "formats")
    lines = [
        f"Times as fast as `F.linear` in bf16, and at M = 1 the share of the roofline, which there is the time to read the "
        f"weight: {where}. {_PARENTHESES}",
        "",
        *_head("scheme | MB | roofline", cells.Ms),
    ]
    for name in cells.names(baseline=False):
        one = cells.row(name, cells.Ms[0])
        if one is not None:
            ratios = cells.ratios(name, "torch-bf16")
            share = _number(one["roofline_percent"], one, digits=0)
            lines.append(f"| `{name}` | {one['bytes'] / 1e6:.1f} | {share}% | {ratios} |")
    return lines


def _batch_invariant(record: Record) -> list[str]:
    cells, where = _one_shape(record, "batch-invariant")
    lines = [
        f"Time with `batch_invariant`, divided by the time without: {where}. {_PARENTHESES}",
        "",
        *_head("scheme", cells.Ms),
    ]
    for name in cells.names(baseline=False):
        if not name.endswith(" batch-invariant"):
            ratios = cells.ratios(name, f"{name} batch-invariant")
            lines.append(f"| `{name}` | {ratios} |")
    return lines


def _threads(record: Record) -> list[str]:
    result = _suite(record, "peers")
    most = _most_threads(record)
    if most == 1:
        raise KeyError("more than one thread")
    shape = result["rows"][0]["shape"]
    one, many = _Cells(result, shape, 1), _Cells(result, shape, most)
    roof = {r["threads"]: r["read_GBps"] for r in result["roofline"]}
    lines = [
        f"Time on one thread divided by the time on {most}: {_where(result, shape, most)}. A streaming read reaches "
        f"{roof[1]:.1f} GB/s on one thread and {roof[most]:.1f} on {most}; at M = 1 the share of the latter stands beside the "
        f"speed-up. {_PARENTHESES}",
        "",
        *_head("", one.Ms),
    ]
    for name in one.names(baseline=False):
        shown = []
        for M in one.Ms:
            a, b = one.row(name, M), many.row(name, M)
            if a is None or b is None:
                shown.append("")
                continue
            share = f", {100 * b['GBps'] / roof[most]:.0f}%" if one.Ms[0] == M else ""
            shown.append(_number(a["median_us"] / b["median_us"], a, b) + share)
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return lines


def _small(record: Record) -> list[str]:
    result = _suite(record, "small")
    lines = [
        f"Times as fast as `F.linear` in fp32, x in {result['dtype']}, weights {result['weights']} in cache. {_PARENTHESES}",
        "",
    ]
    threads = [int(roof["threads"]) for roof in result["roofline"]]
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in result["rows"]))
    head = None
    for shape in shapes:
        for count in threads:
            cells = _Cells(result, shape, count)
            head = head or _head("W | threads | scheme", cells.Ms)
            for name in cells.names(baseline=False):
                ratios = cells.ratios(name, "torch-fp32")
                head.append(f"| {shape[0]} x {shape[1]} | {count} | `{name}` | {ratios} |")
    return lines + (head or [])


def _calls(record: Record) -> list[str]:
    calls = record["calls"]
    lines = [
        "A 64 x 64 `int4-g32` layer with bias, one row, one thread, under `torch.no_grad()`: CPU time, the median of many "
        f"rounds in which everybody had a turn (torch {record['torch']}).",
        "",
        "| x | call | microseconds | x F.linear |",
        "|---|---|---|---|",
    ]
    for row in calls:
        lines.append(f"| {row['dtype']} | {row['what']} | {row['median_us']:.2f} | {row['ratio']:.2f} |")
    return lines


def newest() -> Path:
    """The result of record.py that was measured last."""
    dates = {path: json.loads(path.read_text()).get("date") for path in (ROOT / "bench" / "results").glob("*.json")}
    return max((path for path, date in dates.items() if date is not None), key=lambda path: str(dates[path]))


def pages(path: Path) -> dict[str, str]:
    """The text of every page that has such blocks, made from a result."""
    made = blocks(json.loads(path.read_text()), path.stem)
    texts = {}
    for page in PAGES:
        text = (ROOT / page).read_text()
        for name, block in made.items():
            marker = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
            text = re.sub(marker, lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text, flags=re.S)
        texts[page] = text
    return texts


def main(arguments: list[str]) -> None:
    """Rewrite the blocks."""
    path = (ROOT / arguments[0]).resolve() if arguments else newest()
    for page, text in pages(path).items():
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
