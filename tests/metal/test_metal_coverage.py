"""Whether the tests of this folder run every kernel of every shader. Ran last (conftest.py), and looks back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from emulator.metal.library import MetalEmulator
from metal_problems import BACKEND

HERE = Path(__file__).parent


@pytest.mark.skipif(BACKEND != "emulator", reason="only the emulator keeps count")
def test_every_kernel_was_run(request: pytest.FixtureRequest) -> None:
    here = {item.originalname for item in request.session.items if isinstance(item, pytest.Function)}
    files = [file for file in HERE.glob("test_*.py") if file.name != "test_metal_sanitized.py"]  # in another process
    written = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    if written - here:
        pytest.skip("needs all tests of this folder in one run")
    everything = MetalEmulator.load().kernels()
    kernels = {name: found for name, found in everything.items() if "planted" not in name}
    assert len(kernels) > 250, "kernels are not registered"
    missing = [name for name, (launches, _) in kernels.items() if not launches]
    assert not missing, f"{len(missing)} of {len(kernels)} kernels were never run: {missing}"
    assert all(shared <= 32768 for _, shared in kernels.values())
