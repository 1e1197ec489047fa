"""Measuring: interleaved rounds, medians, and the roofline of this machine.

What is compared runs in turns, in another order each round, so that a clock that drifts or a neighbour that wakes up
hits everybody alike. Weights are used in rotation, so that each one has left the caches when its turn comes again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch

from lowbit.commands._target import Target, find_target, gpu_cache_bytes

__all__ = ["Call", "Others", "Roofline", "Sample", "cache_bytes", "copies_for", "interleave", "measure_roofline"]

#: Runs the contender on its i-th copy of the weight.
Call = Callable[[int], object]

# Shorter calls are repeated until a sample lasts this long, so that the clock's own noise vanishes.
_SAMPLE_SECONDS: Final = 1e-3
# On a GPU also so that waiting for it, some ten microseconds, vanishes.
_GPU_SAMPLE_SECONDS: Final = 20e-3
_MAX_REPEATS: Final = 1024
_MIN_ROUNDS: Final = 5
_FEW_ROUNDS: Final = 3
_REST_SECONDS: Final = 2e-3
_LONG_SECONDS: Final = 20e-3
_MAX_ROUNDS: Final = 200
_UNKNOWN_CACHE: Final = 64 << 20


def cache_bytes(device_type: str = "cpu") -> int:
    """Size of the last-level cache; 64 MiB where the system does not say."""
    if device_type != "cpu":
        return gpu_cache_bytes(device_type)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()):
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    if sys.platform == "darwin":
        for key in ("hw.perflevel0.l2cachesize", "hw.l2cachesize"):
            done = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, check=False)
            sizes += [int(done.stdout)] if done.stdout.strip().isdigit() else []
    return max(sizes, default=_UNKNOWN_CACHE)


def copies_for(nbytes: int, warm: bool, device_type: str = "cpu") -> int:
    """How many copies of a weight to use in rotation: none is in cache again, unless `warm` asks for just that.

    Example:
        >>> copies_for(8 << 20, warm=False)  # with a cache of 32 MiB
        9
    """
    if warm:
        return 1
    room = 2 * cache_bytes(device_type)
    return 1 if nbytes >= room else -(-room // nbytes) + 1


class Others:
    """How many cores other processes (or, in a virtual machine, other guests) keep busy; Linux only.

    Example:
        >>> others = Others()
        >>> others.cores()  # since then; None where the system does not say
        0.02
    """

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Seconds by the clock, and seconds of CPU time that were not ours."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(value) for value in fields[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - time.process_time()

    def cores(self) -> float | None:
        """Cores that others kept busy since this was made."""
        end = self._now()
        if self._begin is None or end is None or end[0] <= self._begin[0]:
            return None
        return max(0.0, (end[1] - self._begin[1]) / (end[0] - self._begin[0]))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds per call: one value per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a fraction of the median."""
        if len(self.seconds) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def interleave(
    calls: Mapping[str, Call],
    seconds: float,
    first: Mapping[str, float] | None = None,
    rest: bool = False,
    seed: int = 0,
    target: Target | None = None,
) -> dict[str, Sample]:
    """Time every call in turns for about `seconds`, and at least five rounds (three, where those take as long as that).

    Args:
        calls: name -> function of the number of the call, which picks the copy of the weight.
        seconds: for all of them together.
        first: seconds that a first call has taken, of those that were called already. Long calls are not warmed up again.
        rest: wait a little before each turn, because a library's idle threads spin for a while on the cores of the next.
        seed: of the order within rounds.
        target: a GPU, which is waited for before the clock is read; the CPU by default.
    """
    clock = time.perf_counter
    target = target or find_target("cpu")
    sample = _SAMPLE_SECONDS if target.wait is None else _GPU_SAMPLE_SECONDS
    begin = clock()
    used = dict.fromkeys(calls, 0)
    repeats = {}
    for name, call in calls.items():
        took = (first or {}).get(name, 0.0)
        if took < _LONG_SECONDS:
            call(0)  # makes caches and threads
            target.finish()
            started = clock()
            call(1)
            target.finish()
            took = clock() - started
        repeats[name] = min(_MAX_REPEATS, max(1, round(sample / max(took, 1e-9))))
        used[name] = 2
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(seed)
    names = list(calls)
    for done in range(_MAX_ROUNDS):
        spent = clock() - begin
        if spent >= seconds and done >= (_MIN_ROUNDS if spent < 2 * seconds else _FEW_ROUNDS):
            break
        order.shuffle(names)
        for name in names:
            call, index = calls[name], used[name]
            if rest:
                time.sleep(_REST_SECONDS)
                if repeats[name] > 1:
                    call(index)  # the rest has put its own threads to sleep too
                    index += 1
            last = used[name] = index + repeats[name]
            started = clock()
            for i in range(index, last):
                call(i)
            target.finish()
            found[name].append((clock() - started) / repeats[name])
    return {name: Sample(tuple(values)) for name, values in found.items()}


# -- the roofline ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What this machine can do with a number of threads: bytes read and operations done per second, as measured.

    Args:
        read: bytes per second of a streaming read of a buffer four times the last-level cache (the best of four ways).
        peaks: operations per second of the largest matmul of each input dtype (multiply and add count as two).
    """

    threads: int
    read: float
    peaks: Mapping[str, float]

    def seconds(self, nbytes: int, operations: int, int8: bool) -> float:
        """The least time in which this machine can read the bytes and do the operations.

        Args:
            nbytes: weight, input and output, each counted once.
            operations: 2 * M * N * K.
            int8: whether 8-bit matmul is allowed, because inputs are quantized too.
        """
        return max(nbytes / self.read, operations / self.peak(int8))

    def peak(self, int8: bool) -> float:
        """Operations per second that count as possible."""
        return max(value for name, value in self.peaks.items() if int8 or name != "int8")

    def merged(self, other: Roofline) -> Roofline:
        """The better of two measurements of each number."""
        peaks = {name: max(value, other.peaks[name]) for name, value in self.peaks.items()}
        return Roofline(self.threads, max(self.read, other.read), peaks)


def measure_roofline(threads: int, size: int | None = None, target: Target | None = None) -> Roofline:
    """Measure; takes a second or two.

    Args:
        threads: torch must have been told to use that many.
        size: bytes to read; by default four times the last-level cache, between 128 MiB and 1 GiB.
        target: a GPU; the CPU by default.
    """
    target = target or find_target("cpu")
    if size is None:
        size = min(max(4 * cache_bytes(target.name), 128 << 20), 1 << 30)
    on_cpu = target.device.type == "cpu"
    x = (
        _huge_pages(size // 4 * 4).view(torch.float32).normal_()
        if on_cpu
        else torch.randn(size // 4, device=target.device)
    )
    half = x.numel() // 2
    reads: list[Callable[[], object]] = [
        lambda: torch.dot(x[:half], x[half : 2 * half]),
        lambda: x.max(),
        lambda: torch.linalg.vector_norm(x),
        lambda: x.sum(),
    ]
    read = max(x.nbytes / _best(way, 4, target) for way in reads)
    return Roofline(threads, read, {name: _matmul_peak(name, target) for name in ("float32", "bfloat16", "int8")})


def _huge_pages(size: int) -> torch.Tensor:
    """uint8 [size], in huge pages where the system has them: packed weights are (csrc/cpu/weight_memory.h)."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _best(call: Callable[[], object], times: int, target: Target) -> float:
    """Seconds of the fastest call. A GPU is given ten at a time: waiting for one would be part of it."""
    several = 1 if target.wait is None else 10
    call()
    target.finish()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        for _ in range(several):
            call()
        target.finish()
        found.append((time.perf_counter() - begin) / several)
    return min(found)


def _matmul_peak(name: str, target: Target) -> float:
    """Operations per second of a square matmul on random data; 0 where torch has none for the dtype."""
    dtype, size = getattr(torch, name), 1536 if target.wait is None else 4096
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (size, size), dtype=dtype).to(target.device) for _ in range(2))
    else:
        a, b = (torch.randn(size, size).to(dtype).to(target.device) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    try:
        begin = time.perf_counter()
        multiply(a, b)
        target.finish()
        if time.perf_counter() - begin > 1.0:  # without instructions for the dtype; another one sets the peak
            return 2 * size**3 / (time.perf_counter() - begin)
        return 2 * size**3 / _best(lambda: multiply(a, b), 4, target)
    except RuntimeError:
        return 0.0
