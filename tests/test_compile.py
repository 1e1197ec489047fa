"""torch.compile(fullgraph=True, dynamic=True), torch.export and autocast. Inductor is slow: few tests, many ops each."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cases import FP8, INT8, cpu_desc, desc, packed, random_weight, random_x
from lowbit import ops
from reference import Spec

SPEC = Spec("int4", "int", 32, "bfloat16")
BLOCK = Spec("fp8_e4m3", group_size=128, scaling="block128")
N, K = 48, 100
W, DESC = packed(SPEC, N, K), cpu_desc(SPEC)
CANONICAL_DESC, BLOCK_DESC, OFFSET_DESC = desc(SPEC), cpu_desc(BLOCK), desc(Spec("int8", "offset"))  # _C is not traced


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def _train(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(ops.linear(x, W, bias, N, K, DESC)).square().mean(-1)


def _infer(x: torch.Tensor, w: torch.Tensor, block: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = ops.gemm(x * 2, w, bias, N, K, DESC)
    int8 = ops.gemm_a8(*ops.quantize_activation(x, INT8, symmetric=False), w, bias, N, K, DESC, 0, torch.float32)
    fp8 = ops.gemm_a8(*ops.quantize_activation(x, FP8, 128), block, None, N, K, BLOCK_DESC, 0, torch.float32)
    out = torch.empty_like(y)
    ops.gemm_out(x, w, None, N, K, DESC, 0, out)
    return y.relu(), int8, fp8, out + 1


def test_compile_inference_with_dynamic_rows() -> None:
    block = packed(BLOCK, N, K)
    compiled = torch.compile(_infer, fullgraph=True, dynamic=True)
    bias = random_x(N)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for M in (5, 9, 32):
            for got, want in zip(
                compiled(random_x(2, M, K), W, block, bias), _infer(random_x(2, M, K), W, block, bias), strict=True
            ):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_compile_training_with_dynamic_rows() -> None:
    compiled = torch.compile(_train, fullgraph=True, dynamic=True)
    for M in (5, 9):
        grads = []
        for function in (compiled, _train):
            x, bias = random_x(M, K).requires_grad_(), random_x(N).requires_grad_()
            y = function(x, bias)
            y.sum().backward()
            grads.append((y.detach(), x.grad, bias.grad))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


_THREADS = """
import collections, os, sys, time, torch
import lowbit
from lowbit import ops
N, K, d = 2048, 1024, lowbit._C.make_desc(3, 32, 0, 0, 0, False, 1)
plain = lowbit._C.make_desc(3, 32, 0, 0, 0, False, 0)
w = ops.pack(*ops.quantize(torch.randn(N, K), plain)[:2], None, None, N, K, d)

def run(x):
    return ops.gemm(torch.sin(x) * 2, w, None, N, K, d).exp() + 1

def used(function, x):
    "How many threads of this process worked for more than a tenth of the time."
    def ticks():
        found = collections.Counter()
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
            found[task] = int(fields[11]) + int(fields[12])
        return found
    function(x)
    before, begin = ticks(), time.process_time()
    while time.process_time() < begin + 0.4:
        function(x)
    spent = ticks() - before
    return sum(time > 0.1 * sum(spent.values()) / torch.get_num_threads() for time in spent.values())

compiled = torch.compile(run, fullgraph=True)
x = torch.randn(256, K)
torch.set_num_threads(3)
assert torch.allclose(compiled(x), run(x), rtol=1e-4, atol=1e-4)
for count in (3, 1, 2):
    torch.set_num_threads(count)
    print(count, used(run, x), used(compiled, x))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
def test_a_compiled_graph_has_one_pool_of_threads() -> None:
    """Loops of inductor and ops of lowbit together use as many threads as torch is told to, whenever it is told."""
    # A pool of compiling processes would take longer to start than to use.
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _THREADS], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [3, 1, 2]
    for count, eager, compiled in rows:
        assert eager == compiled == count, done.stdout


class _Model(torch.nn.Module):
    """Packs in forward, so that every op is in the graph."""

    def __init__(self) -> None:
        super().__init__()
        weight = random_weight(SPEC, N, K)
        self.packed, self.scales, self.zeros = (torch.nn.Buffer(t) for t in weight.tensors[:3])
        self.w = torch.nn.Buffer(W)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = ops.gemm(x, self.w, None, N, K, DESC)
        dense = ops.dequantize(self.packed, self.scales, self.zeros, None, N, K, CANONICAL_DESC, x.dtype)
        w = ops.pack(*ops.unpack(self.w, N, K, DESC)[:4], N, K, DESC)
        stream, scales, zeros = ops.quantize(x.flatten(0, -2), OFFSET_DESC)
        back = ops.dequantize(stream, scales, zeros, None, 6, K, OFFSET_DESC)
        return y, x @ dense.t(), ops.linear(x, w, None, N, K, DESC), back


def test_export() -> None:
    """Static and dynamic, and it survives being written and read."""
    import io

    model, x = _Model(), random_x(2, 3, K)
    program = torch.export.export(model, (x,))
    for got, want in zip(program.module()(x), model(x), strict=True):
        assert torch.equal(got, want)

    class Linear(_Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return ops.linear(x, self.w, None, N, K, DESC)

    rows = torch.export.Dim("rows")
    dynamic = torch.export.export(Linear(), (x,), dynamic_shapes=({1: rows},))
    buffer = io.BytesIO()
    torch.export.save(dynamic, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for M in (1, 3, 40):
        assert torch.equal(loaded(random_x(2, M, K)), Linear()(random_x(2, M, K)))


def test_wrong_shapes_fail_while_tracing() -> None:
    """Fake kernels check as the real ones do, so that a graph that cannot run is not built."""
    compiled = torch.compile(lambda x: ops.gemm(x, W, None, N, K, DESC), fullgraph=True, backend="eager")
    with pytest.raises(
        Exception, match=r"lowbit::gemm: x of shape \[2, 99\] has K=99 in its last dimension, the weight has K=100"
    ):
        compiled(random_x(2, 99))


@pytest.mark.parametrize("op", [ops.gemm, ops.linear, torch.ops.lowbit.gemm, torch.ops.lowbit.linear])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_and_bias_only(op, dtype: torch.dtype) -> None:
    spec = Spec("int4", "int", 32, "float32")
    w, d = packed(spec, N, K), cpu_desc(spec)
    x, bias = random_x(3, K), random_x(N)
    with torch.autocast("cpu", dtype):
        y = op(x, w, bias, N, K, d, 0)
        assert torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):
            assert op(x, w, bias, N, K, d, 0).dtype == torch.float32
    assert y.dtype == dtype
    assert torch.equal(y, op(x.to(dtype), w, bias.to(dtype), N, K, d, 0))
    with torch.autocast("cpu", dtype), pytest.raises(RuntimeError, match="x is float64"):
        op(x.double(), w, bias, N, K, d, 0)


def test_autocast_has_gradients_in_the_dtype_of_x() -> None:
    x = random_x(3, K).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, W, None, N, K, DESC)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    want = ops.gemm_grad_input(2 * y.detach(), W, N, K, DESC)
    assert torch.equal(x.grad, want.float())


def test_autocast_leaves_the_other_ops_alone() -> None:
    x = random_x(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        a = ops.quantize_activation(x, INT8)
        y = ops.gemm_a8(*a, W, None, N, K, DESC, 0, torch.float32)
        assert ops.gemm_grad_input(random_x(3, N), W, N, K, DESC).dtype == torch.float32
    assert y.dtype == torch.float32
    for got, want in zip(a, ops.quantize_activation(x, INT8), strict=True):
        assert got is want is None or torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compile_under_autocast(dtype: torch.dtype) -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def run(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            return ops.linear(x, W, bias, N, K, DESC)

    x, bias = random_x(4, K).requires_grad_(), random_x(N)
    y = run(x, bias)
    assert y.dtype == dtype
    assert torch.equal(y, ops.linear(x.to(dtype), W, bias.to(dtype), N, K, DESC))
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="seen in torch 2.11: its cache of compiled graphs forgets autocast's dtype"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_compiled(dtype: torch.dtype) -> None:
    x, bias = random_x(4, K).requires_grad_(), random_x(N)
    y = ops.linear(x.to(dtype), W, bias.to(dtype), N, K, DESC)
    outside = torch.compile(lambda x: ops.linear(x, W, bias, N, K, DESC), fullgraph=True, dynamic=True)
    with torch.autocast("cpu", dtype):
        assert torch.equal(outside(x), y)
    assert outside(x).dtype == torch.float32


def test_compile_every_op() -> None:
    model = torch.compile(_Model(), fullgraph=True, dynamic=False)
    x = random_x(2, 3, K)
    for got, want in zip(model(x), _Model()(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
