"""Does cells until they are done or the time is up."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from device.cells import Cell
from device.store import Store

__all__ = ["Outcome", "Work", "run_cells"]

#: Does a cell in at most so many seconds; returns its result: "ok", or else it has to be done again;
#: "unfinished" where the time ran out inside; "fatal" where the rest of the stage could not do
#: better; "failures", "error" and "summary" for people.
Work = Callable[[Cell, float], dict[str, Any]]


@dataclasses.dataclass
class Outcome:
    """Keys of cells, as `stage: key`."""

    passed: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)  # for want of time
    before: list[str] = dataclasses.field(default_factory=list)  # done by an earlier run

    @property
    def status(self) -> int:
        """0: all is done and well; 1: something failed; 75 (try again): some is left to do."""
        return 1 if self.failed else 75 if self.left else 0


def run_cells(
    cells: Sequence[Cell],
    work: Mapping[str, Work],
    store: Store,
    budget: float,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Each cell once, in order, but those done before. One that would not fit in what is left of the budget is left out,
    and smaller ones behind it may still fit. Everything needs the build: if that fails, all the rest is left."""
    outcome = Outcome()
    begin = clock()
    broken: set[str] = set()  # stages
    for cell in cells:
        name = f"{cell.stage}: {cell.key}"
        if cell.stage != "build" and store.done(cell):
            outcome.before.append(name)
            continue
        remaining = budget - (clock() - begin)
        if {"build", cell.stage} & broken or remaining < cell.seconds:
            outcome.left.append(name)
            continue
        started = clock()
        try:
            result = work[cell.stage](cell, remaining)
        except Exception as error:  # a cell that breaks costs its own result, not the others'
            result = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-6)}
        result["seconds"] = round(clock() - started, 3)
        store.put(cell, result)
        if result.get("unfinished"):
            outcome.left.append(name)
        if result.get("ok"):
            outcome.passed.append(name)
        elif not result.get("unfinished") or result.get("failures"):
            outcome.failed.append(name)
        if result.get("fatal") or (cell.stage == "build" and not result.get("ok")):
            broken.add(cell.stage)
        say(f"{name}: {_summary(result)}")
    return outcome


def _summary(result: Mapping[str, Any]) -> str:
    text = result.get("summary") or ("ok" if result.get("ok") else result.get("error", "failed"))
    return f"{str(text).splitlines()[0]}  [{result['seconds']:.1f} s]"
