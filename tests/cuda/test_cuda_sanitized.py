"""Every kernel under AddressSanitizer and UndefinedBehaviorSanitizer, threads and blocks in random order."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from backends import BACKEND
from emulator import build

pytestmark = [
    pytest.mark.skipif(BACKEND != "emulator", reason="the emulator's own"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulator is tried on Linux only"),
]

SANITIZERS = "address,undefined"


def test_nothing_reads_or_writes_where_it_should_not() -> None:
    """One process for all: torch takes seconds to load under a sanitizer, and the first report ends it."""
    library = build.build(sanitize=SANITIZERS, one_format=True)
    done = subprocess.run(
        [sys.executable, "-m", "emulator.short_list", str(library), "--order", "random", "--seed", "7"],
        capture_output=True,
        text=True,
        env={**os.environ, **build.sanitizer_environment(), "PYTHONPATH": str(build.ROOT / "tests")},
    )
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if not line.endswith(": ok")]
    assert done.returncode == 0 and not wrong, "\n".join([*wrong, *lines[-1:], done.stderr[-6000:]])
