"""What only a real GPU can show: streams, graphs, the allocator, sizes that the emulator would take hours for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cases
import layers
import reference
from kernel_cases import forced
from lowbit import _C, _cuda, ops
from problems import A8, A16, GRAD, HALVES
from reference import UNIT, Spec

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _cuda.loaded()),
    reason=f"needs a GPU and the CUDA library: {_cuda.absent_reason() or 'PyTorch finds no GPU'}",
)

LARGE = ((4096, 4096), (1030, 5120), (14336, 1032))
RUNS = 100


def packed(text: str, N: int, K: int, seed: int = 0) -> tuple[torch.Tensor, int, torch.Tensor]:
    """A random weight in the layout of the kernels, its desc, and what it means, in fp64; all on the GPU."""
    spec = cases.KINDS[text]
    canonical = cases.desc(Spec(spec[0], spec[1], 128, "bfloat16", spec[2]))
    generator = torch.Generator("cuda").manual_seed(seed)
    codes, scales, zeros = torch.ops.lowbit.quantize(
        torch.randn(N, K, device="cuda", generator=generator), canonical, False, None
    )
    third = zeros if zeros.numel() else None
    desc = cases.desc(Spec(spec[0], spec[1], 128, "bfloat16", spec[2]), _C.preferred_layout("cuda", canonical))
    W = torch.ops.lowbit.dequantize(codes, scales, third, None, N, K, canonical, torch.float32)
    return torch.ops.lowbit.pack(codes, scales, third, None, N, K, desc), desc, W.double()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


# ---- sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int4", "int8", "int3-int", "int5-offset", "fp8_e4m3", "fp8_e4m3-block128", "nf4"])
@pytest.mark.parametrize(("N", "K"), LARGE)
def test_large_products(text: str, N: int, K: int) -> None:
    w, desc, W = packed(text, N, K)
    for i, M in enumerate((*range(1, 18), 31, 64, 100, 129, 300, 1025)):
        dtype = HALVES[i % 2]
        x = random(M, K, dtype=dtype, seed=M)
        y = torch.ops.lowbit.gemm(x, w, None, N, K, desc, 0)
        expected, bound = reference.product(x, W, None, UNIT[dtype], dtype)
        if dtype == torch.float16:
            bound = bound + 2.0**-25 * x.double().abs().sum(-1, keepdim=True)
        reference.assert_close(y, (expected, bound), (text, M, N, K))


@pytest.mark.parametrize("text", ["int4", "int8-int", "fp8_e4m3", "nf4"])
@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_large_products_of_8_bit_activations(text: str, format: str) -> None:
    N, K = 1030, 5120
    w, desc, W = packed(text, N, K)
    for M in (1, 5, 17, 64, 130, 1025):
        xq, scales, _ = torch.ops.lowbit.quantize_activation(
            random(M, K), cases.ENUMS["format"][format], -1, None, None, None, True
        )
        y = torch.ops.lowbit.gemm_a8(xq, scales, None, w, None, N, K, desc, 0, torch.float32)
        reference.assert_close(
            y, reference.product(xq.double() * scales.double(), W, None, 0.0, torch.float32), (text, M)
        )


@pytest.mark.parametrize("text", ["int4", "int6-int", "fp8_e5m2", "fp4_e2m1", "nf4"])
def test_weights_have_the_bits_that_the_cpu_gives_them(text: str) -> None:
    format, zero_kind, scaling = cases.KINDS[text]
    desc = cases.desc(Spec(format, zero_kind, 64, "float16", scaling))
    dense = torch.randn(1030, 2056)
    for search in (False, True):
        here = torch.ops.lowbit.quantize(dense.cuda(), desc, search, None)
        there = torch.ops.lowbit.quantize(dense, desc, search, None)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(here, there, strict=True))
    codes, scales, zeros = there
    for dtype in cases.DTYPES:
        args = [None if t is None or t.numel() == 0 else t for t in (codes, scales, zeros)]
        on_gpu = [None if t is None else t.cuda() for t in args]
        a = torch.ops.lowbit.dequantize(*on_gpu, None, 1030, 2056, desc, dtype)
        assert torch.equal(a.cpu(), torch.ops.lowbit.dequantize(*args, None, 1030, 2056, desc, dtype))


# ---- the same bits, every time --------------------------------------------------------------------------------------------


@pytest.fixture
def noise() -> Iterator[Callable[[], None]]:
    """Keeps part of the GPU busy on another stream, so that blocks finish in another order each time."""
    stream = torch.cuda.Stream()
    a = torch.randn(2048, 2048, device="cuda")

    def begin() -> None:
        with torch.cuda.stream(stream):
            for _ in range(int(torch.randint(1, 6, ()))):
                a @ a

    yield begin
    stream.synchronize()


def a16_calls(kernel: str) -> Iterator[Callable[[], torch.Tensor]]:
    rows = (3, 16) if kernel.startswith("stream") else (33, 130)
    for M, (N, K) in zip(rows, ((1030, 5120), (4096, 4096)), strict=True):
        w, desc, _ = packed("int4", N, K)
        x = random(M, K)
        yield lambda x=x, w=w, N=N, K=K, desc=desc: torch.ops.lowbit.gemm(x, w, None, N, K, desc, 0)


def a8_calls(kernel: str) -> Iterator[Callable[[], torch.Tensor]]:
    N, K = 1030, 5120
    text, format = ("fp8_e4m3", "fp8_e4m3") if "fp8" in kernel else ("int4", "int8")
    w, desc, _ = packed(text, N, K)
    for M in (9, 130):
        xq, scales, _ = torch.ops.lowbit.quantize_activation(
            random(M, K), cases.ENUMS["format"][format], -1, None, None, None, True
        )
        args = (xq, scales, None, w, None, N, K, desc, 0, torch.bfloat16)
        yield lambda args=args: torch.ops.lowbit.gemm_a8(*args)


def grad_calls(kernel: str) -> Iterator[Callable[[], torch.Tensor]]:
    N, K = 1030, 4096
    w, desc, _ = packed("int4", N, K)
    yield lambda: torch.ops.lowbit.gemm_grad_input(random(100, N), w, N, K, desc, 0)


@pytest.mark.parametrize(
    ("kernel", "calls"),
    [(k, a16_calls) for k in A16] + [(k, a8_calls) for k in A8] + [(k, grad_calls) for k in GRAD],
    ids=lambda value: value if isinstance(value, str) else value.__name__.partition("_")[0],
)
def test_a_hundred_runs_give_the_same_bits(kernel: str, calls: Any, noise: Callable[[], None]) -> None:
    with forced(kernel):
        for call in calls(kernel):
            try:
                first = call()
            except RuntimeError as error:
                if "forced" not in str(error):
                    raise
                pytest.skip(f"{kernel} does not take it here: {error}")
            for _ in range(RUNS):
                noise()
                assert torch.equal(call(), first)


# ---- memory --------------------------------------------------------------------------------------------------------------


def poison(*sizes: int) -> None:
    """What the allocator hands out next has NaN in it."""
    held = [torch.full((size,), torch.nan, device="cuda") for size in sizes for _ in range(3)]
    torch.cuda.synchronize()
    del held


def test_every_element_of_an_output_is_written() -> None:
    N, K = 1030, 1032
    w, desc, _ = packed("int4", N, K)
    for M in (1, 7, 16, 40, 200):
        x, dy = random(M, K), random(M, N)
        poison(M * N, M * K, M * N // 2, M * K // 2, 1 << 20)
        assert torch.isfinite(torch.ops.lowbit.gemm(x, w, None, N, K, desc, 0)).all()
        assert torch.isfinite(torch.ops.lowbit.gemm_grad_input(dy, w, N, K, desc, 0)).all()
        xq, scales, _ = torch.ops.lowbit.quantize_activation(x, cases.INT8, -1, None, None, None, True)
        assert torch.equal((xq.float().abs() == 127).any(1), torch.ones(M, dtype=torch.bool, device="cuda"))
        assert torch.isfinite(scales).all()
        out = torch.full((M, N), torch.nan, device="cuda", dtype=torch.bfloat16)
        torch.ops.lowbit.gemm_out(x, w, None, N, K, desc, 0, out, None)
        assert torch.isfinite(out).all()


def test_with_a_workspace_nothing_is_allocated() -> None:
    N, K, M = 1030, 4096, 9
    w, desc, _ = packed("int4", N, K)
    x, out = random(M, K), torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
    size = _C.workspace_size("gemm_out", M, N, K, desc, _cuda.device_string("cuda"))
    workspace = torch.zeros(size, device="cuda", dtype=torch.uint8)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.ops.lowbit.gemm_out(x, w, None, N, K, desc, 0, out, workspace)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.equal(out, torch.ops.lowbit.gemm(x, w, None, N, K, desc, 0))


# ---- streams and graphs ----------------------------------------------------------------------------------------------------


def test_two_streams_do_not_disturb_each_other() -> None:
    N, K = 1030, 4096
    weights = [packed("int4", N, K, seed) for seed in range(2)]
    xs = [random(M, K, seed=M) for M in (5, 40)]
    jobs = [(x, w, desc) for x in xs for w, desc, _ in weights]
    expected = [torch.ops.lowbit.gemm(x, w, None, N, K, desc, 0) for x, w, desc in jobs]
    streams = [torch.cuda.Stream() for _ in jobs]
    torch.cuda.synchronize()
    for _ in range(RUNS):
        results = []
        for stream, (x, w, desc) in zip(streams, jobs, strict=True):
            with torch.cuda.stream(stream):
                results.append(torch.ops.lowbit.gemm(x, w, None, N, K, desc, 0))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_work_is_put_on_the_current_stream() -> None:
    """Input that a slow kernel on the same stream is still making is waited for."""
    N, K = 512, 4096
    w, desc, _ = packed("int4", N, K)
    target = random(4, K)
    expected = torch.ops.lowbit.gemm(target, w, None, N, K, desc, 0)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        x = torch.zeros_like(target)
        torch.cuda._sleep(20_000_000)
        x.copy_(target)
        y = torch.ops.lowbit.gemm(x, w, None, N, K, desc, 0)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("M", [1, 8, 16, 40, 200])
def test_graph_capture(M: int) -> None:
    """Capture fails where an op waits for the device or allocates behind torch's back. Replays read what x holds then."""
    N, K = 1030, 1032
    w, desc, _ = packed("int4", N, K)
    x, dy = random(M, K), random(M, N)

    def work() -> list[torch.Tensor]:
        xq, scales, _ = torch.ops.lowbit.quantize_activation(x, cases.INT8, -1, None, None, None, True)
        fq, f_scales, _ = torch.ops.lowbit.quantize_activation(x, cases.FP8, -1, None, None, None, True)
        return [
            torch.ops.lowbit.gemm(x, w, None, N, K, desc, 0),
            torch.ops.lowbit.gemm(x[:, 1:-7], packed_narrow, None, N, K - 8, desc, 0),
            torch.ops.lowbit.gemm_grad_input(dy, w, N, K, desc, 0),
            torch.ops.lowbit.gemm_a8(xq, scales, None, w, None, N, K, desc, 0, torch.bfloat16),
            torch.ops.lowbit.gemm_a8(fq, f_scales, None, w, None, N, K, desc, 0, torch.bfloat16),
        ]

    packed_narrow, _, _ = packed("int4", N, K - 8)
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        work()
    warm.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for seed in range(5):
        x.copy_(random(M, K, seed=seed))
        dy.copy_(random(M, N, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, work(), strict=True))


def test_weights_are_made_inside_a_graph_too() -> None:
    spec = Spec("int4", "int", 32, "float16")
    canonical = cases.desc(spec)
    desc = cases.desc(spec, _C.preferred_layout("cuda", canonical))
    dense = torch.randn(130, 264, device="cuda")

    def work() -> torch.Tensor:
        codes, scales, zeros = torch.ops.lowbit.quantize(dense, canonical, False, None)
        w = torch.ops.lowbit.pack(codes, scales, zeros, None, 130, 264, desc)
        parts = torch.ops.lowbit.unpack(w, 130, 264, desc)[:3]
        return torch.ops.lowbit.dequantize(*parts, None, 130, 264, canonical, torch.bfloat16)

    expected = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


# ---- torch around it -------------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    N, K = 66, 136
    w, desc, _ = packed("int4", N, K)
    canonical = cases.desc(Spec("int4", "none", 128, "bfloat16"))
    x, dy = random(2, 3, K), random(2, 3, N)
    codes, scales, _ = torch.ops.lowbit.quantize(torch.randn(N, K, device="cuda"), canonical, False, None)
    xq, x_scales, _ = torch.ops.lowbit.quantize_activation(x, cases.INT8, -1, None, None, None, True)
    out = torch.empty(2, 3, N, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, tuple[Any, ...]] = {
        "quantize": (torch.randn(N, K, device="cuda"), canonical, False, None),
        "dequantize": (codes, scales, None, None, N, K, canonical, torch.float16),
        "pack": (codes, scales, None, None, N, K, desc),
        "unpack": (w, N, K, desc),
        "gemm": (x, w, random(N), N, K, desc, 0),
        "gemm_out": (x, w, None, N, K, desc, 0, out, None),
        "linear": (x.clone().requires_grad_(), w, random(N), N, K, desc, 0),
        "gemm_grad_input": (dy, w, N, K, desc, 0),
        "quantize_activation": (x, cases.INT8, -1, None, None, None, True),
        "gemm_a8": (xq, x_scales, None, w, None, N, K, desc, 0, torch.bfloat16),
    }
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.lowbit, name).default, args)


@pytest.mark.parametrize("text", layers.SCHEMES)
def test_a_layer_moves_to_the_gpu_and_back(text: str) -> None:
    module = layers.layer(text)
    saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = layers.inputs(5, 128)
    expected = module(x)
    moved = copy.deepcopy(module).to("cuda")
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    for there in (moved, copy.deepcopy(moved).to("cpu"), copy.deepcopy(moved).to("cpu").to("cuda")):
        state = there.state_dict()
        assert state.keys() == saved.keys()
        assert all(torch.equal(tensor.cpu(), saved[name]) for name, tensor in state.items())


def test_gradients_flow() -> None:
    module = layers.layer("int4-g32").to("cuda")
    x = layers.inputs(7, 128).cuda().requires_grad_()
    module(x).square().sum().backward()
    there = copy.deepcopy(module).to("cpu")
    x_there = x.detach().cpu().requires_grad_()
    there(x_there).square().sum().backward()
    torch.testing.assert_close(x.grad.cpu(), x_there.grad, rtol=1e-3, atol=1e-3)


def test_tensors_on_different_devices_are_refused() -> None:
    w, desc, _ = packed("int4", 64, 128)
    x = torch.randn(3, 128)
    for args in ((x, w), (x.cuda(), w.cpu())):
        with pytest.raises(RuntimeError, match=r"cpu.*cuda|cuda.*cpu"):
            torch.ops.lowbit.gemm(*args, None, 64, 128, desc, 0)
        with pytest.raises(RuntimeError, match=r"cpu.*cuda|cuda.*cpu"):
            ops.gemm(*args, None, 64, 128, desc)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one() -> None:
    w, desc, _ = packed("int4", 66, 136)
    x = random(5, 136)
    expected = torch.ops.lowbit.gemm(x, w, None, 66, 136, desc, 0)
    with torch.cuda.device(0):
        y = torch.ops.lowbit.gemm(x.to("cuda:1"), w.to("cuda:1"), None, 66, 136, desc, 0)
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.cpu(), expected.cpu())
