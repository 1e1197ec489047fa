"""Where the tests of CUDA kernels run: on the emulator, or, with LOWBIT_TEST_BACKEND=device, on the GPU that is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from emulator.build import BuildError
from emulator.library import Emulator
from lowbit import _cuda

BACKEND = os.environ.get("LOWBIT_TEST_BACKEND", "emulator")


class Device:
    """The present GPU, as a backend: it is what it is, and runs threads in what order it likes."""

    name = "device"
    device = "cuda"
    repeats = 100

    def __init__(self) -> None:
        self.ops: Any = torch.ops.lowbit
        self.model = _cuda.device_string(torch.device("cuda"))

    def reset(self) -> None:
        pass

    def set_device(self, capability: int, sms: int) -> bool:
        return False

    def set_order(self, order: str, seed: int = 0) -> None:
        pass


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
def backend(_backend: Emulator | Device) -> Iterator[Emulator | Device]:
    """Ops, and the device they run on; whatever a test sets is undone."""
    _backend.reset()
    yield _backend
    _backend.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks back on all other tests comes last."""
    items.sort(key=lambda item: "looks_back" in item.keywords)
