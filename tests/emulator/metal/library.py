"""The Metal part of the emulator from Python: the ops on CPU tensors, as torch.ops.lowbit_emulator_metal."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from .. import build as _build
from ..library import ORDERS, Order


class MetalEmulator:
    """A backend for tests/metal: the ops, and the order in which threads and threadgroups run.

    One per process: the library registers its ops when it is loaded, and its settings are global.
    """

    name = "emulator"
    device = "cpu"  # where its tensors are
    model = "apple7:8"  # what it plays: the default, as explain() has it
    repeats = 3  # of a test that looks for differences between runs

    def __init__(self, library: Path):
        self.path = library
        self.c = ctypes.CDLL(str(library))
        self.c.lowbit_metal_kernels.restype = ctypes.c_char_p
        self.c.lowbit_metal_last_error.restype = ctypes.c_char_p
        self.c.lowbit_emulator_set_orders.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
        self.ops: Any = torch.ops.lowbit_emulator_metal
        self.reset()

    @classmethod
    @functools.cache
    def load(cls, library: Path | None = None) -> MetalEmulator:
        """Builds the library if it is not given (one built by build.py)."""
        return cls(library or _build.build("lowbit_emulator_metal"))

    def reset(self) -> None:
        """Everything as it was at first."""
        self.set_order("forward")
        self.set_poison(0xFF)

    def set_order(self, order: Order, seed: int = 0) -> None:
        """Of threads and of threadgroups. A seed gives the same order every time."""
        index = ORDERS.index(order)
        self.c.lowbit_emulator_set_orders(index, index, seed)

    def set_poison(self, byte: int) -> None:
        """What threadgroup memory holds before a kernel writes to it."""
        self.c.lowbit_emulator_set_poison(byte)

    def last_error(self) -> str:
        """The words of the last failure, which torch would have written to stderr."""
        return self.c.lowbit_metal_last_error().decode()

    def kernels(self) -> dict[str, tuple[int, int]]:
        """Name -> launches since the last reset, bytes of threadgroup memory."""
        rows = (line.split(" ", 2) for line in self.c.lowbit_metal_kernels().decode().splitlines())
        return {name: (int(launches), int(shared)) for launches, shared, name in rows}

    def run(
        self, name: str, words: list[int], tensors: list[torch.Tensor], groups: tuple[int, int], threads: int
    ) -> None:
        """Launch a kernel as it is, without the ops' host code; RuntimeError with the emulator's words."""
        pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        values = (ctypes.c_int64 * len(words))(*words)
        if self.c.lowbit_metal_run(name.encode(), values, len(words), pointers, len(tensors), *groups, threads):
            raise RuntimeError(self.last_error())

    def reset_launches(self) -> None:
        self.c.lowbit_metal_reset_launches()
