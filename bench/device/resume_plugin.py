"""A pytest plugin: every test records itself, tests that passed before are left out, and a deadline is kept.

LOWBIT_CHECK_RECORD    a file with one JSON line per test; grows
LOWBIT_CHECK_SOURCES   what the record is about; one about something else is begun anew
LOWBIT_CHECK_DEADLINE  time.time() after which no further test begins
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

__all__ = ["read_record"]


def read_record(path: Path, sources: str) -> dict[str, dict[str, object]]:
    """Node id -> the last that was recorded of it; {} where the record is about other sources."""
    if not path.exists():
        return {}
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the line that was being written when somebody pulled the plug
            continue
    if not lines or lines[0].get("sources") != sources:
        return {}
    return {line["id"]: line for line in lines[1:]}


class Recorder:
    def __init__(self, path: Path, sources: str, deadline: float):
        self.path, self.deadline = path, deadline
        self.before = read_record(path, sources)
        self.outcome: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        if not self.before:
            path.write_text(json.dumps({"sources": sources}) + "\n")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if self.before.get(item.nodeid, {}).get("outcome") in ("passed", "skipped")]
        config.hook.pytest_deselected(items=done)
        kept = set(items) - set(done)
        items[:] = [item for item in items if item in kept]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        worst = {"failed": 2, "skipped": 1, "passed": 0}
        known = self.outcome.get(report.nodeid, "passed")
        self.outcome[report.nodeid] = max(known, report.outcome, key=worst.__getitem__)
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        line = {"id": nodeid, "outcome": self.outcome[nodeid], "seconds": round(self.seconds[nodeid], 4)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None):
        result = yield
        if time.time() > self.deadline:
            item.session.shouldstop = "the time is up"
        return result


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("LOWBIT_CHECK_RECORD")
    if path:
        deadline = float(os.environ["LOWBIT_CHECK_DEADLINE"])
        config.pluginmanager.register(Recorder(Path(path), os.environ["LOWBIT_CHECK_SOURCES"], deadline))
