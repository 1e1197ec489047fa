"""Scales of one byte and of two levels, and blocks that run across rows, on CUDA: the CPU's bits where nothing is summed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import reference
from cases import FP8, INT8, SCALED, random_weight, random_x, scaled
from kernel_cases import forced, on
from lowbit import _C
from problems import HALVES, cuda_desc, pack
from reference import UNIT, Spec, Weight

#: What CUDA packs, unpacks and dequantizes; the CPU does the rest.
PACKED = ("mxfp4", "mxfp8", "ue8m0", "e4m3", "int4-e4m3-zeros", "nvfp4")


def _fast(spec: Spec, K: int) -> bool:
    """Whether tensor cores take it: cells of 16 k lie in one group."""
    size = math.gcd(K, spec.group_size) if spec.scaling == "flat" else spec.group_size
    return size % 16 == 0 or size >= K


def _moved(backend: Any, w: Weight) -> tuple[torch.Tensor | None, ...]:
    return tuple(on(backend, t) for t in w.tensors)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", PACKED)
def test_memory(backend: Any, name: str) -> None:
    """pack, unpack and dequantize."""
    for _, spec, N, K in [case for case in scaled() if case[0] == name]:
        w = random_weight(spec, N, K)
        d, supers = cuda_desc(spec), [on(backend, t) for t in w.supers]
        packed = backend.ops.pack(*_moved(backend, w), N, K, d, *supers)
        assert torch.equal(packed.cpu(), torch.ops.lowbit.pack(*w.tensors, N, K, d, *w.supers)), (spec, N, K)
        for was, now in zip((*w.tensors, *w.supers), backend.ops.unpack(packed, N, K, d), strict=True):
            assert now.numel() == 0 if was is None else torch.equal(_bytes(now), _bytes(was)), (spec, N, K)
        canonical = d & ~(0xFF << 24)
        for dtype in (torch.float32, *HALVES):
            W = backend.ops.dequantize(*_moved(backend, w), N, K, canonical, dtype, *supers)
            assert torch.equal(W.cpu(), w.dense().to(dtype)), (spec, N, K, dtype)


@pytest.mark.parametrize("name", SCALED)
def test_gemm(backend: Any, name: str) -> None:
    """On the kernels that take it, and on the general one."""
    for i, (_, spec, N, K) in enumerate(case for case in scaled() if case[0] == name):
        w = random_weight(spec, N, K)
        for kernel, M, dtype in (
            ("stream_m8", 3, HALVES[i % 2]),
            ("matrix_m32", 20, HALVES[1 - i % 2]),
            ("general", 5, torch.float32),
        ):
            if kernel != "general" and not _fast(spec, K):
                continue
            x = random_x(M, K, dtype=dtype)
            with forced(kernel):
                y = backend.ops.gemm(on(backend, x), pack(backend, w), None, N, K, cuda_desc(spec), 0).cpu()
            unit = 0.0 if dtype == torch.float32 else UNIT[dtype]
            ref, bound = reference.product(x, w.dense(), None, unit, dtype)
            if dtype == torch.float16:
                bound = bound + 2.0**-25 * x.double().abs().sum(-1, keepdim=True)
            reference.assert_close(y, (ref, bound), (kernel, spec, N, K))


@pytest.mark.parametrize("name", SCALED)
def test_grad(backend: Any, name: str) -> None:
    spec, shapes = SCALED[name]
    for N, K in shapes:
        w = random_weight(spec, N, K)
        for kernel, dtype in (("grad_m64", torch.bfloat16), ("general", torch.float32)):
            if kernel != "general" and not _fast(spec, K):
                continue
            dy = random_x(5, N, dtype=dtype)
            with forced(kernel):
                dx = backend.ops.gemm_grad_input(on(backend, dy), pack(backend, w), N, K, cuda_desc(spec), 0).cpu()
            unit = 0.0 if dtype == torch.float32 else UNIT[dtype]
            reference.assert_close(dx, reference.product(dy, w.dense().T, None, unit, dtype), (kernel, spec, N, K))


def test_8_bit_activations(backend: Any) -> None:
    for name, format, kernel in (
        ("int4-e4m3-zeros", "int8", "a8_int_m16"), ("mxfp8", "fp8_e4m3", "a8_fp8_m16"), ("nvfp4", "fp8_e4m3", "a8_decode_m64"),
        ("q6_k", "int8", "a8_int_m16"), ("q3_k", "fp8_e4m3", "a8_decode_m64"), ("q4_k", "int8", "general"),
    ):  # fmt: skip
        spec, shapes = SCALED[name]
        N, K = shapes[0]
        w = random_weight(spec, N, K)
        xq, x_scales, _ = reference.quantize_activation(random_x(4, K), format)
        args = (
            on(backend, xq),
            on(backend, x_scales),
            None,
            pack(backend, w),
            None,
            N,
            K,
            cuda_desc(spec),
            0,
            torch.float32,
        )
        with forced(kernel):
            y = backend.ops.gemm_a8(*args).cpu()
        x = reference.dequantize_activation(xq, x_scales, None)
        reference.assert_close(
            y, reference.product(x, w.dense(), None, UNIT[torch.bfloat16], torch.float32), (name, kernel)
        )
    assert INT8 != FP8
    odd = random_weight(Spec("int8", group_size=16, scaling="flat"), 9, 35)
    xq, x_scales, _ = reference.quantize_activation(random_x(4, 35), "int8")
    y = backend.ops.gemm_a8(
        on(backend, xq), on(backend, x_scales), None, pack(backend, odd), None, 9, 35, cuda_desc(odd.spec), 0, torch.float32
    ).cpu()  # fmt: skip
    x = reference.dequantize_activation(xq, x_scales, None)
    reference.assert_close(y, reference.product(x, odd.dense(), None, UNIT[torch.bfloat16], torch.float32), odd.spec)


def test_what_fast_kernels_refuse() -> None:
    def reason(name: str, shape: int = 0, kernel: str = "stream_m8") -> str:
        spec, shapes = SCALED[name]
        rows = _C.explain("gemm", "sm_90", 1, *shapes[shape], cuda_desc(spec), "bfloat16", 0)
        return next(why for row, why in rows if row.startswith(f"cuda_{kernel}_"))

    for name in ("nvfp4", "mxfp4", "q4_k", "q6_k", "nested", "flat"):
        assert reason(name) == "", name
    assert reason("flat", 1) == ""
    assert "blocks of 64 across rows of K=200 have no more than 8 k in common" in reason("flat", 2)
    assert "group_size=8 is not a multiple of 16" in reason("short")
    for name in ("nvfp4", "q4_k"):
        assert "are no floats, which is what its stages hold" in reason(name, kernel="hopper_stream_m8")


def test_what_the_cpu_does(backend: Any) -> None:
    w = random_weight(SCALED["q4_k"][0], 17, 512)
    with pytest.raises(RuntimeError, match="is not read here on CUDA: do it on the CPU"):
        backend.ops.pack(*_moved(backend, w), 17, 512, cuda_desc(w.spec), *(on(backend, t) for t in w.supers))
    nv = cuda_desc(SCALED["nvfp4"][0])
    with pytest.raises(RuntimeError, match="is not quantized on CUDA: do it on the CPU"):
        backend.ops.quantize(on(backend, random_x(4, 32)), nv, False, None, on(backend, torch.ones(1)))


@pytest.mark.parametrize("text", ["fp4-g32-e8m0", "int4-g16-asym-e4m3", "fp8-b128-e8m0"])
def test_quantize(backend: Any, text: str) -> None:
    from lowbit import Scheme

    desc, weight = Scheme.parse(text).desc(), random_x(130, 96)
    for search in (False, True):
        got = backend.ops.quantize(on(backend, weight), desc, search, None)
        for g, want in zip(got, torch.ops.lowbit.quantize(weight, desc, search, None), strict=True):
            assert torch.equal(_bytes(g), _bytes(want)), (text, search)
