"""Where the tests of CUDA kernels run: on the emulator, or, with LOWBIT_TEST_BACKEND=device, on the GPU that is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

import problems
from backends import BACKEND, Device
from emulator.build import BuildError
from emulator.library import Emulator


@pytest.fixture(scope="session")
def _backend() -> Emulator | Device:
    if BACKEND == "device":
        return Device()
    assert BACKEND == "emulator", f"LOWBIT_TEST_BACKEND={BACKEND} is neither emulator nor device"
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulator is tried on Linux only")
    try:
        return Emulator.load()
    except BuildError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def backend(request: pytest.FixtureRequest, _backend: Emulator | Device) -> Iterator[Emulator | Device]:
    """Ops, and the device they run on; whatever a test sets is undone."""
    _backend.reset()
    callspec = getattr(request.node, "callspec", None)
    kernel = callspec.params.get("kernel", "") if callspec else ""
    if not problems.runs_on(kernel, _backend.model):
        pytest.skip(f"{kernel} is not for {_backend.model}")
    yield _backend
    _backend.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks back on all other tests comes last."""
    items.sort(key=lambda item: item.path.name == "test_cuda_coverage.py")
