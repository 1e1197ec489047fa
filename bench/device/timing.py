"""Timing: contenders in turns, weights cold, medians over rounds.

On a GPU each contender becomes a CUDA graph of some twenty launches, which go through copies of the weight that together
are several times the L2 cache; a round replays every contender's graph once, between events. So neither Python nor the
launch path is in the numbers, and a clock that drifts hits everybody alike.

Metal has no such graphs in PyTorch: there calls are given to the GPU for 20 ms on end and waited for, as `lowbit bench` does it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import torch

from lowbit.commands._measure import Sample, cache_bytes, interleave
from lowbit.commands._target import Target, find_target

__all__ = ["Call", "CudaTimer", "HostTimer", "Measured", "Timer", "copies_for", "make_timer"]

#: Runs a contender on its i-th copy of the weight.
Call = Callable[[int], object]
#: By name, seconds per call; or the reason why there are none.
Measured = dict[str, Sample | str]

#: Copies of a weight are this many times the L2 cache together: 60 MB on an H200, whose halves each cache for their own
#: multiprocessors, so that twice would not be enough to be sure.
_COLD: Final = 4
_LAUNCHES: Final = 20
_MIN_ROUNDS: Final = 7
_MAX_ROUNDS: Final = 200


def copies_for(nbytes: int, device: str, memory: int = 16 << 30) -> int:
    """Copies of a weight of `nbytes`, so that none is in cache when its turn comes again; at most `memory` bytes."""
    times = _COLD if device == "cuda" else 2
    count = -(-times * cache_bytes(device) // max(nbytes, 1)) + 1
    return max(2, min(count, memory // max(nbytes, 1)))


class Timer(Protocol):
    def measure(self, calls: Mapping[str, Call], copies: Mapping[str, int], seconds: float) -> Measured:
        """Time every call for about `seconds` together.

        Args:
            copies: how many copies of its weight each contender has.
        """


class HostTimer:
    """As `lowbit bench` measures: by the host's clock."""

    def __init__(self, target: Target | None = None):
        self.target = target

    def measure(self, calls: Mapping[str, Call], copies: Mapping[str, int], seconds: float) -> Measured:
        works: dict[str, Call] = {}
        result: Measured = {}
        for name, call in calls.items():
            try:
                call(0)
            except Exception as error:
                result[name] = _reason(error)
            else:
                works[name] = call
        result.update(interleave(works, seconds, target=self.target))
        return result


class CudaTimer:
    """Graphs and events."""

    def measure(self, calls: Mapping[str, Call], copies: Mapping[str, int], seconds: float) -> Measured:
        result: Measured = {}
        replays: dict[str, Callable[[], None]] = {}
        launches: dict[str, int] = {}
        for name, call in calls.items():
            launches[name] = max(_LAUNCHES, copies[name])
            try:
                replays[name] = self._capture(call, launches[name])
            except Exception as error:
                result[name] = _reason(error)
        found: dict[str, list[float]] = {name: [] for name in replays}
        order = list(replays)
        shuffled = random.Random(0)
        deadline = time.monotonic() + seconds
        for done in range(_MAX_ROUNDS):
            if done >= _MIN_ROUNDS and time.monotonic() >= deadline:
                break
            shuffled.shuffle(order)
            for name, milliseconds in self._round(replays, order).items():
                found[name].append(milliseconds * 1e-3 / launches[name])
        # The first round finds cold instruction caches and clocks that have not risen.
        result.update({name: Sample(tuple(values[1:])) for name, values in found.items()})
        return result

    @staticmethod
    def _capture(call: Call, count: int) -> Callable[[], None]:
        """A function that runs the first `count` calls; kernels that are compiled or tuned at first use are by then."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(3):
                call(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                call(i)
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    @staticmethod
    def _round(replays: Mapping[str, Callable[[], None]], order: list[str]) -> dict[str, float]:
        events = {}
        for name in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replays[name]()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) for name, (begin, end) in events.items()}


def make_timer(device: str) -> Timer:
    """For "cuda", "mps" or "cpu"."""
    return CudaTimer() if device == "cuda" else HostTimer(find_target(device))


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:200]
