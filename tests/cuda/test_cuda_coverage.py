"""Whether the tests of this folder run every instantiation of every kernel. Ran last (conftest.py), and looks back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from backends import BACKEND
from emulator.library import Emulator

HERE = Path(__file__).parent


@pytest.mark.skipif(BACKEND != "emulator", reason="only the emulator keeps count")
def test_every_instantiation_was_run(request: pytest.FixtureRequest) -> None:
    here = {item.originalname for item in request.session.items if isinstance(item, pytest.Function)}
    written = {
        name for file in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    if written - here:
        pytest.skip("needs all tests of this folder in one run")
    emulator = Emulator.load()
    ran, exist = emulator.launches(), emulator.kernels()
    assert len(exist) > 50, "the library's symbols are not read"
    assert set(ran) <= set(exist), f"kernels whose name does not end in _kernel: {set(ran) - set(exist)}"
    missing = [name for name in exist if name not in ran]
    assert not missing, f"{len(missing)} of {len(exist)} instantiations were never run: {missing}"
