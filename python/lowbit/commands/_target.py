"""Where a comparison runs: this CPU, or a GPU, which is given work and waited for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import torch

from lowbit import _C, _cuda, _metal
from lowbit.commands.info import cpu_name

__all__ = ["TARGETS", "Target", "find_target", "gpu_cache_bytes"]

TARGETS: Final = ("cpu", "cuda", "mps")

#: The largest system level cache of an Apple chip (M1 Ultra and M2 Ultra): which one is there, nothing says.
_APPLE_CACHE: Final = 96 << 20


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, and what is done with it.

    Args:
        name: of `TARGETS`.
        device: where tensors are.
        what: the chip's name.
        model: the device as `_C.explain` takes it; "cpu", "sm_90:132", "apple9:40".
        wait: returns when all that the device was given is done; None where calls return no sooner.
        ops: lowbit's ops.
    """

    name: str
    device: torch.device
    what: str
    model: str
    wait: Callable[[], object] | None = None
    ops: Any = dataclasses.field(default_factory=lambda: torch.ops.lowbit)

    def finish(self) -> None:
        """Wait, where there is something to wait for."""
        if self.wait is not None:
            self.wait()


@functools.cache
def find_target(name: str) -> Target:
    """The target of that name on this machine; RuntimeError, with the reason, where there is none.

    Example:
        >>> find_target("cpu").model
        'cpu'
    """
    if name == "cuda":
        if (reason := _cuda.absent_reason()) is not None:
            raise RuntimeError(f"no kernels for device 'cuda': {reason}")
        if not torch.cuda.is_available():
            raise RuntimeError("no kernels for device 'cuda': PyTorch finds no GPU here")
        torch.cuda.init()
        what = torch.cuda.get_device_name(0)
        return Target(name, torch.device("cuda"), what, _cuda.device_string("cuda"), torch.cuda.synchronize)
    if name == "mps":
        if (reason := _metal.absent_reason()) is not None:
            raise RuntimeError(f"no kernels for device 'mps': {reason}")
        if not torch.backends.mps.is_available():
            raise RuntimeError("no kernels for device 'mps': PyTorch finds no GPU that it can use")
        return Target(name, torch.device("mps"), f"{cpu_name()} GPU", _C.metal_model(), torch.mps.synchronize)
    return Target("cpu", torch.device("cpu"), cpu_name(), "cpu")


def gpu_cache_bytes(device_type: str) -> int:
    """What has to be read between two uses of a weight, for it to come from memory again."""
    return _APPLE_CACHE if device_type == "mps" else int(torch.cuda.get_device_properties(0).L2_cache_size)
