"""Where the tests of Metal shaders run: on the emulator, or, with LOWBIT_TEST_BACKEND=device, on the Mac that is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from emulator.build import BuildError
from emulator.metal.library import MetalEmulator
from metal_problems import BACKEND, MetalDevice


@pytest.fixture(scope="session")
def _metal() -> Any:
    if BACKEND == "device":
        return MetalDevice()
    assert BACKEND == "emulator", f"LOWBIT_TEST_BACKEND={BACKEND} is neither emulator nor device"
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulator is tried on Linux only")
    try:
        return MetalEmulator.load()
    except BuildError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def metal(_metal: Any) -> Iterator[Any]:
    """Ops, and the device they run on; whatever a test sets is undone."""
    _metal.reset()
    yield _metal
    _metal.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks back on all other tests comes last."""
    items.sort(key=lambda item: item.path.name == "test_metal_coverage.py")
