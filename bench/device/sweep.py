"""Which kernel is the fastest: every one that takes a problem is timed beside the others, and a table written for selection.

A row of the table (csrc/cuda/measured.inc, choice.h) is a shape, a range of M, the kernel that won there and the runner-up.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from torch import Tensor

from device.cells import Case
from device.contenders import Inputs, lowbit_contenders
from device.timing import Call, Timer
from lowbit import _C, Scheme
from lowbit.commands._measure import Sample

__all__ = ["HEAD", "candidates", "measure_candidates", "merge_table", "rows_of"]

#: What x is called in a table, and the op that multiplies it.
_X: Final = {"bf16": ("half", "gemm", "bfloat16"), "int8": ("int8", "gemm_a8", "int8")}
_FP8: Final = ("float8_e4m3fn", "gemm_a8", "float8_e4m3fn")
#: Ways to cut a problem, for kernels that take one behind their name.
_PLANS: Final = {
    "hopper_stream_": tuple(f"{strips}x{cluster}" for strips in (1, 2, 4) for cluster in (1, 2, 4, 8)),
    "hopper_matrix_": ("1x1", "2x1", "1x2", "2x2"),
    "hopper_a8_": ("1x1", "2x1", "1x2", "2x2"),
}
_MOST_ROWS: Final = 2**30 - 1
#: A kernel for Hopper must win by more than what two runs of the same kernel differ by.
_NOISE: Final = 0.02

HEAD: Final = """\
// What bench/sweep.py has found fastest, one row per shape and range of M; it writes this file.
//
//   op  x  weights  device  NxK  M..M  kernel  us  runner-up  us
R"table(
"""
_TAIL: Final = ')table"\n'


def kind_of(inputs: str) -> tuple[str, str, str]:
    """(what the table calls x, op, dtype)"""
    return _X.get(inputs, _FP8)


def candidates(case: Case, model: str) -> list[str]:
    """Kernels, and plans, that take the problem on a device ("sm_90:132") and are not hopeless: a tile for many tokens has not
    many fewer of them, and one for few is not run through more than four times where there are wider ones. Plans that come to
    the same are one."""
    _, op, dtype = kind_of(case.inputs)
    desc = _cuda_desc(case)
    found: dict[str, str] = {}
    try:
        names = _names(op)
        widest = max(_tokens(name) for name in names)
        for name in names:
            if not min(case.M / 4, widest / 2) <= _tokens(name) <= max(64, 4 * case.M):
                continue
            _C.force_kernel(name)
            try:
                text = _C.describe_config(op, model, case.M, case.N, case.K, desc, dtype, 0)
            except ValueError:
                continue  # refused
            found.setdefault(text, name)
    finally:
        _C.force_kernel("")
    return list(found.values())


def _tokens(name: str) -> int:
    return int(re.sub(r".*_m", "", name.split(":")[0]))


def _names(op: str) -> list[str]:
    rows = [row for row in _C.kernel_table() if row["backend"] == "cuda" and row["op"] == op and not row["general"]]
    names = []
    for row in rows:
        names.append(row["name"])
        for family, plans in _PLANS.items():
            if row["name"].startswith(family):
                names += [f"{row['name']}:{plan}" for plan in plans]
    return names


def _cuda_desc(case: Case) -> int:
    scheme = Scheme.parse(case.scheme)
    return scheme.desc(layout=_C.preferred_layout("cuda", scheme.desc()))


# ---- measuring -------------------------------------------------------------------------------------------------------------


def measure_candidates(
    case: Case, inputs: Inputs, expected: Tensor, right: float, timer: Timer, seconds: float
) -> dict[str, Any]:
    """Times those candidates whose result is right, in turns; who is wrong, or fails, stands in the result with the reason."""
    names = case.peers or (candidates(case, inputs.target.model) if inputs.device == "cuda" else [""])
    contender = lowbit_contenders(dataclasses.replace(inputs, case=dataclasses.replace(case, op="gemm")))[0]
    calls: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for name in names:
        call = _forced(name, contender.call)
        try:
            y = call(0)
            assert isinstance(y, Tensor)
            error = float((y.float() - expected).norm() / expected.norm())
        except Exception as reason:
            refused[name] = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"[:200]
            continue
        if error < right:
            calls[name] = call
        else:
            refused[name] = f"wrong result: relative error {error:.3g}"
    measured = timer.measure(calls, dict.fromkeys(calls, contender.copies), seconds)
    rows = []
    for name, sample in measured.items():
        if isinstance(sample, Sample):
            rows.append(
                {"name": name, "us": sample.median * 1e6, "spread": sample.spread, "rounds": len(sample.seconds)}
            )
        else:
            refused[name] = sample
    rows.sort(key=lambda row: float(row["us"]))  # type: ignore[arg-type]
    wrong = [name for name, reason in refused.items() if reason.startswith("wrong result")]
    return {
        "ok": bool(rows) and not wrong,
        "case": dataclasses.asdict(case),
        "model": inputs.target.model,
        "rows": rows,
        "refused": refused,
        "summary": ", ".join(f"{row['name']} {row['us']:.1f} us" for row in rows[:2]) or "nobody ran",
        **({"error": f"wrong: {', '.join(wrong)}"} if wrong else {}),
    }


def _forced(name: str, call: Call) -> Call:
    def run(i: int) -> object:
        _C.force_kernel(name)
        try:
            return call(i)
        finally:
            _C.force_kernel("")

    return run


# ---- the table -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Win:
    kernel: str
    us: float
    runner_up: str
    runner_up_us: float


def _winner(rows: Iterable[Mapping[str, Any]]) -> _Win | None:
    """The fastest, and the next of another kernel. Within the noise, the one that has been longest in use."""
    ordered = sorted(((str(row["name"]), float(row["us"])) for row in rows), key=lambda row: row[1])
    if not ordered:
        return None
    name, us = ordered[0]
    for other, slower in ordered[1:]:
        if name.startswith("hopper") and not other.startswith("hopper") and slower <= us * (1 + _NOISE):
            name, us = other, slower
            break
    rest = [row for row in ordered if row[0].split(":")[0] != name.split(":")[0]] or [(name, us)]
    return _Win(name, us, *rest[0])


def rows_of(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of a table: each measured M stands for the M up to it that are above the one before, and the last for all above.
    Neighbours with the same kernel are one line, with the numbers of its largest M."""
    groups: dict[tuple[str, str, str, str, int, int], dict[int, _Win]] = {}
    for result in results:
        case = result["case"]
        win = _winner(result.get("rows", ()))
        if win is None:
            continue
        x, op, _ = kind_of(case["inputs"])
        key = (op, x, Scheme.parse(case["scheme"]).format, result["model"], case["N"], case["K"])
        groups.setdefault(key, {})[case["M"]] = win
    lines = []
    for (op, x, weights, model, N, K), wins in groups.items():
        ranges: list[tuple[int, int, _Win]] = []
        for M in sorted(wins):
            first = ranges[-1][1] + 1 if ranges else 1
            if ranges and ranges[-1][2].kernel == wins[M].kernel:
                first = ranges.pop()[0]
            ranges.append((first, M, wins[M]))
        for i, (first, last, win) in enumerate(ranges):
            end = last if i + 1 < len(ranges) else _MOST_ROWS
            lines.append(
                f"{op} {x} {weights} {model} {N}x{K} {first}..{end} "
                f"{win.kernel} {win.us:.2f} {win.runner_up} {win.runner_up_us:.2f}"
            )
    return lines


def merge_table(text: str, lines: Iterable[str]) -> str:
    """measured.inc with these lines in place of those of the same devices. Selection has read the result: what it does not
    understand raises ValueError here."""
    new = list(lines)
    devices = {line.split()[3] for line in new}
    body = text.partition('R"table(\n')[2].partition(')table"')[0]
    kept = [line for line in body.splitlines() if line.strip() and line.split()[3] not in devices]
    table = "".join(f"{line}\n" for line in sorted([*kept, *new]))
    _C.load_tuning(table or "\n")
    _C.load_tuning("")
    return HEAD + table + _TAIL
