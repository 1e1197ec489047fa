"""The GPU that is there, as a backend beside emulator.library.Emulator; and which of the two the tests run on."""

from __future__ import annotations

import os
from typing import Any

import torch

from lowbit import _cuda

BACKEND = os.environ.get("LOWBIT_TEST_BACKEND", "emulator")


class Device:
    """The present GPU, as a backend: it is what it is, and runs threads in what order it likes."""

    name = "device"
    device = "cuda"
    repeats = 100

    def __init__(self) -> None:
        self.ops: Any = torch.ops.lowbit
        torch.cuda.init()  # or the string would be that of any GPU
        self.model = _cuda.device_string(torch.device("cuda"))

    def reset(self) -> None:
        pass

    def set_device(self, capability: int, sms: int) -> bool:
        return False

    def set_order(self, order: str, seed: int = 0) -> None:
        pass
