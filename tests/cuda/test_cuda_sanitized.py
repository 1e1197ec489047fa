"""Every kernel under AddressSanitizer and UndefinedBehaviorSanitizer, threads and blocks in random order."""

from __future__ import annotations

import sys

import pytest

from backends import BACKEND
from emulator.case_list import run_sanitized

pytestmark = [
    pytest.mark.skipif(BACKEND != "emulator", reason="the emulator's own"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulator is tried on Linux only"),
]


def test_nothing_reads_or_writes_where_it_should_not() -> None:
    wrong = run_sanitized("lowbit_emulator", "emulator.short_list")
    assert not wrong, wrong
