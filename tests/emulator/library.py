"""The emulator from Python: the CUDA ops on CPU tensors, and what can be set and asked beside them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from . import build as _build

Order = Literal["forward", "reverse", "random"]
ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")

#: Small enough for a test's small problem to be cut over several blocks, as large ones are on a real device.
CAPABILITY, SMS = 90, 4


class Emulator:
    """A backend for the tests of CUDA kernels (tests/cuda): the ops, and the device they believe to be on.

    One per process: the library registers its ops when it is loaded, and its settings are global.
    """

    name = "emulator"
    device = "cpu"  # where its tensors are
    repeats = 5  # of a test that looks for differences between runs

    def __init__(self, library: Path):
        self.path = library
        self.c = ctypes.CDLL(str(library))
        self.c.lowbit_emulator_launches.restype = ctypes.c_char_p
        self.c.lowbit_emulator_set_orders.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
        self.c.lowbit_emulator_set_shared.argtypes = [ctypes.c_int64]
        self.ops: Any = torch.ops.lowbit_emulator
        self.reset()

    @classmethod
    @functools.cache
    def load(cls, library: Path | None = None) -> Emulator:
        """Builds the library if it is not given (one built by build.py)."""
        return cls(library or _build.build())

    def reset(self) -> None:
        """Everything as it was at first."""
        self.set_device(CAPABILITY, SMS)
        self.set_order("forward")
        self.set_workers(1)
        self.set_poison(0xFF)

    # ---- settings ----------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """The device as `explain` and `workspace_size` take it."""
        return f"sm_{self._device[0]}:{self._device[1]}"

    def set_device(self, capability: int, sms: int) -> bool:
        self._device = (capability, sms)
        self.c.lowbit_emulator_set_device(capability, sms)
        return True

    def set_shared(self, per_block: int) -> None:
        """Bytes of shared memory that a block may have; the next set_device undoes it."""
        self.c.lowbit_emulator_set_shared(per_block)

    def set_order(self, order: Order, seed: int = 0) -> None:
        """Of threads and of blocks. With one worker (the default) a seed gives the same order every time."""
        index = ORDERS.index(order)
        self.c.lowbit_emulator_set_orders(index, index, seed)

    def set_workers(self, count: int) -> None:
        """CPU threads that run blocks."""
        self.c.lowbit_emulator_set_workers(count)

    def set_poison(self, byte: int) -> None:
        """What shared memory holds before a kernel writes to it."""
        self.c.lowbit_emulator_set_poison(byte)

    @contextlib.contextmanager
    def settings(self) -> Iterator[Emulator]:
        """Inside, anything may be set; afterwards all is as at first."""
        try:
            yield self
        finally:
            self.reset()

    # ---- what ran ----------------------------------------------------------------------------------------------------

    def reset_launches(self) -> None:
        self.c.lowbit_emulator_reset_launches()

    def launches(self) -> dict[str, int]:
        """How often each kernel was launched since the last reset, by its instantiation: "kernel<64, true>"."""
        counts: dict[str, int] = {}
        for line in self.c.lowbit_emulator_launches().decode().splitlines():
            count, address, _ = line.split(" ", 2)
            name = self._symbols[int(address, 16)]
            counts[name] = counts.get(name, 0) + int(count)
        return counts

    def kernels(self) -> list[str]:
        """Every kernel instantiation in the library: functions whose name ends in _kernel."""
        return sorted({name for name in self._symbols.values() if re.match(r"(?:\w+::)*\w+_kernel(?:<|$)", name)})

    @functools.cached_property
    def _symbols(self) -> dict[int, str]:
        """Functions by their address in the library, without return type, parameters and our namespaces."""
        listed = subprocess.run(
            ["nm", "--defined-only", "--demangle", str(self.path)], capture_output=True, text=True, check=True
        )
        symbols = {}
        for line in listed.stdout.splitlines():
            address, kind, name = line.split(" ", 2)
            if kind in "tTwW" and " [clone" not in name:
                symbols[int(address, 16)] = _short(name)
        return symbols


def _short(name: str) -> str:
    """`void lowbit::cuda::(anonymous namespace)::k<(lowbit::Format)3>(lowbit::Params)` -> `k<3>`."""
    name = name.replace("(anonymous namespace)::", "").replace("lowbit::cuda::", "").replace("lowbit::", "")
    name = re.sub(r"\((?:\w+::)*\w+\)(?=-?\d)", "", name)  # casts of enumerators
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"^(?:void|bool|int|float|auto) (?=\w)", "", name)
