"""Living inside a larger process: threads, fork, memory, cost per call."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from cases import FP8, INT8, cpu_desc, desc, packed, random_x
from lowbit import ops
from lowbit.commands._calls import ways_to_call
from reference import Spec

SPEC = Spec("int4", "int", 32, "bfloat16")
N, K = 144, 384
DESC = cpu_desc(SPEC)


def _work(seed: int) -> list[torch.Tensor]:
    """Every op once, on inputs of its own."""
    w = packed(SPEC, N, K)
    x = torch.randn(1 + seed % 5, K, generator=torch.Generator().manual_seed(seed))
    stream, scales, zeros = ops.quantize(x, desc(SPEC), True)
    a = ops.quantize_activation(x, INT8)
    f = ops.quantize_activation(x, FP8, 128)
    grad = x.clone().requires_grad_()
    ops.linear(grad, w, None, N, K, DESC).sum().backward()
    assert grad.grad is not None
    return [
        ops.gemm(x, w, None, N, K, DESC),
        ops.gemm_a8(*a, w, None, N, K, DESC, 0, torch.float32),
        ops.gemm_a8(*f, w, None, N, K, DESC, 0, torch.float32),
        ops.dequantize(stream, scales, zeros, None, len(x), K, desc(SPEC)),
        ops.pack(*ops.unpack(w, N, K, DESC)[:4], N, K, DESC),
        grad.grad,
    ]


def test_sixteen_threads_at_once() -> None:
    packed(SPEC, N, K)  # the case cache is not what is tested
    expected = [_work(seed) for seed in range(16)]
    failures: list[str] = []
    start = threading.Barrier(16)

    def run(seed: int) -> None:
        try:
            start.wait(60)
            for _ in range(20):
                for got, want in zip(_work(seed), expected[seed], strict=True):
                    if not torch.equal(got, want):
                        failures.append(f"thread {seed}: a result changed")
        except Exception as error:
            failures.append(f"thread {seed}: {error!r}")

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert not failures, failures[:3]


@pytest.mark.parametrize("used_before", [False, True])
def test_fork(used_before: bool) -> None:
    """A child of os.fork computes the same; also after the parent ran ops (on one thread: OpenMP itself forbids more)."""
    code = f"""
        import os, signal, sys, torch, lowbit
        from lowbit import _C, ops
        torch.manual_seed(0)
        d = _C.make_desc(3, 32, 0, 0, 0, False, 1)
        def run():
            stream, scales, _ = ops.quantize(torch.ones(64, 256), _C.make_desc(3, 32, 0, 0, 0, False, 0))
            w = ops.pack(stream, scales, None, None, 64, 256, d)
            return ops.gemm(torch.ones(8, 256), w, None, 64, 256, d).sum().item()
        if {used_before}:
            torch.set_num_threads(1)
            before = run()
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            value = run()
            os._exit(0 if value > 0 and (not {used_before} or value == before) else 1)
        _, status = os.waitpid(pid, 0)
        assert run() > 0
        sys.exit(os.waitstatus_to_exitcode(status))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_ten_thousand_calls_in_flat_memory() -> None:
    def refused() -> None:
        with pytest.raises(RuntimeError):
            ops.gemm(random[:, 1:], w, None, N, K, DESC)

    calls = {
        "gemm": lambda: ops.gemm(random, w, bias, N, K, DESC),
        "gemm M=40": lambda: ops.gemm(many, w, bias, N, K, DESC),
        "linear with backward": lambda: ops.linear(grad, w, bias, N, K, DESC).sum().backward(),
        "a8": lambda: ops.gemm_a8(*ops.quantize_activation(random, INT8, symmetric=False), w, bias, N, K, DESC),
        "canonical": lambda: ops.quantize(random, desc(SPEC)),
        "refused": refused,
    }
    w, bias, random, many = packed(SPEC, N, K), random_x(N), random_x(2, K), random_x(40, K)
    grad = random_x(2, K).requires_grad_()
    repeats = {"gemm": 10_000, "gemm M=40": 300, "canonical": 1000}
    for name, call in calls.items():
        for _ in range(100):
            call()
        before = _resident_bytes()
        for _ in range(repeats.get(name, 2000)):
            call()
        grown = _resident_bytes() - before
        assert grown < 2 << 20, f"{name}: {grown} bytes in {repeats.get(name, 2000)} calls"


def _mappings() -> dict[range, set[str]]:
    """Addresses of this process, and the kernel's flags for them."""
    found: dict[range, set[str]] = {}
    with open("/proc/self/smaps") as file:
        for line in file:
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                last = range(int(match[1], 16), int(match[2], 16))
            elif line.startswith("VmFlags:"):
                found[last] = set(line.split()[1:])
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads /proc")
def test_large_weights_ask_for_huge_pages() -> None:
    """All whole huge pages of them (flag hg); nothing is left mapped when the weight is gone."""
    page = 2 << 20
    spec = Spec("int8", "none", -1)
    stream, scales, zeros = ops.quantize(torch.randn(2400, 1024), desc(spec))
    w = ops.pack(stream, scales, zeros, None, 2400, 1024, cpu_desc(spec))
    begin, size = w.data_ptr(), w.nbytes
    assert begin % page == 0 and size > page
    here = {span: flags for span, flags in _mappings().items() if begin in span or begin + size - 1 in span}
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage"):
        pytest.skip("a kernel without transparent huge pages")
    assert any("hg" in flags and begin in span and begin + page - 1 in span for span, flags in here.items())
    for _ in range(3):
        assert torch.equal(ops.pack(stream, scales, zeros, None, 2400, 1024, cpu_desc(spec)), w)
    assert all(
        torch.equal(a, b) for a, b in zip(ops.unpack(w, 2400, 1024, cpu_desc(spec))[:2], (stream, scales), strict=True)
    )
    before = _resident_bytes()
    for _ in range(20):
        ops.pack(stream, scales, zeros, None, 2400, 1024, cpu_desc(spec))
    assert _resident_bytes() - before < 2 * page


@pytest.mark.parametrize("N", [16, 2048], ids=["one strip", "many strips"])
def test_as_many_threads_as_torch_has(N: int, threads: None) -> None:
    """CPU time of the process beside that of the calling thread: with one thread all of it is the caller's."""
    size = Spec("int4", "none", 128, "bfloat16")
    w, x = packed(size, N, 1024), random_x(512, 1024)
    shares = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        ops.gemm(x, w, None, N, 1024, cpu_desc(size))
        process, thread = time.process_time(), time.thread_time()
        while time.process_time() < process + 0.15:
            ops.gemm(x, w, None, N, 1024, cpu_desc(size))
        shares[count] = (time.thread_time() - thread) / (time.process_time() - process)
    assert shares[1] > 0.9
    assert shares[2] < 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_call_costs_little_more_than_one_of_torch(dtype: torch.dtype, threads: None) -> None:
    """At most 1.3 times F.linear with bias, and the module's forward at most 2 microseconds more (docs/speed.md)."""
    torch.set_num_threads(1)
    calls = ways_to_call(dtype)
    found: dict[str, list[float]] = {way: [] for way in ("F.linear", "op", "forward")}
    with torch.no_grad():
        for done in range(200):
            for way, times in found.items():
                begin = time.thread_time()
                for _ in range(50):
                    calls[way]()
                times.append((time.thread_time() - begin) / 50 * 1e6)
            linear, op, forward = (min(times) for times in found.values())
            if done >= 10 and op <= 1.3 * linear and forward <= op + 2:
                return
    pytest.fail(f"microseconds: F.linear {linear:.2f}, the op {op:.2f}, forward {forward:.2f}")


def test_import_alone_is_quiet() -> None:
    """No CUDA, no compiler, no output, and torch's thread count untouched."""
    code = (
        "import torch; n = torch.get_num_threads(); import lowbit\n"
        "assert torch.get_num_threads() == n and not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr
