"""Every shader under AddressSanitizer and UndefinedBehaviorSanitizer, threads and threadgroups in random order."""

from __future__ import annotations

import sys

import pytest

from emulator.case_list import run_sanitized
from metal_problems import BACKEND

pytestmark = [
    pytest.mark.skipif(BACKEND != "emulator", reason="the emulator's own"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulator is tried on Linux only"),
]


@pytest.mark.slow  # half a minute of compiling
def test_nothing_reads_or_writes_where_it_should_not() -> None:
    wrong = run_sanitized("lowbit_emulator_metal", "emulator.metal.short_list")
    assert not wrong, wrong
