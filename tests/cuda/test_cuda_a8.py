"""gemm_a8 on CUDA: every kernel and format, exact where the sums are integers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import cases
import reference
from kernel_cases import ACTIVATIONS, Quantized, forced, on, quantized
from kernel_cases import expected_a8 as expected
from problems import A8, cuda_desc, group_sizes, pack
from reference import Spec, Weight, exact16

SHAPES = ((130, 320), (63, 136), (65, 100), (1, 16), (64, 128), (200, 24))


def gemm_a8(
    backend: Any, a: Quantized, weight: Weight, bias: torch.Tensor | None, out: torch.dtype, flags: int = 0
) -> torch.Tensor:
    moved = [on(backend, t) for t in a]
    w = pack(backend, weight)
    y = backend.ops.gemm_a8(*moved, w, on(backend, bias), weight.N, weight.K, cuda_desc(weight.spec), flags, out)
    assert y.dtype == out
    return y.cpu()


def takes(kernel: str, kind: str, activation: str) -> bool:
    """What each kernel is for; selection has the same rules, in C++."""
    format, zero_kind, _ = cases.KINDS[kind]
    is_int = format in cases.INT_FORMATS
    if kernel == "general":
        return True
    if kernel.startswith("hopper_a8_int"):
        fits = zero_kind == "none" or (zero_kind == "int" and format != "int8")
        return is_int and fits and activation in ("int8", "int8-g128")
    if kernel.startswith("hopper_a8_fp8"):
        exact = format in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "int4")
        return exact and zero_kind == "none" and activation.startswith("fp8")
    if kernel.startswith("a8_int"):
        return is_int and zero_kind in ("none", "int") and activation.startswith("int8")
    if kernel.startswith("a8_fp8"):
        return format.startswith("fp8") and activation.startswith("fp8")
    return zero_kind in ("none", "int") and exact16(format)


def own_kind(kernel: str) -> tuple[str, str]:
    """A weight and an activation for tests that take one of each: those that ask most of the kernel."""
    if kernel.startswith("hopper_a8_int"):
        return "int4-int", "int8"
    return ("fp8_e4m3", "fp8-g128") if "fp8" in kernel else ("int4-int", "int8-asym")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("kernel", A8)
def test_every_instantiation(backend: Any, kernel: str, kind: str, activation: str) -> None:
    if not takes(kernel, kind, activation):
        pytest.skip("another kernel's cell")
    format, zero_kind, scaling = cases.KINDS[kind]
    turn = int(cases.rng(kernel, kind, activation).integers(0, 1000))
    multiple = 32 if kernel.startswith("hopper") else 16  # that groups have to be
    sizes = [g for g in group_sizes(scaling) if g == -1 or g % multiple == 0]
    with forced(kernel):
        for i in range(2):
            N, K = SHAPES[(turn + i) % len(SHAPES)]
            fitting = [g for g in sizes if cases.fits(g, K)] or [-1]
            group = 128 if scaling == "block128" else fitting[(turn // 7 + i) % len(fitting)]
            spec = Spec(format, zero_kind, group, cases.SCALE_DTYPES[(turn + i) % 3], scaling)
            M = (1, 5, 17, 66)[(turn + i) % 4]
            a, x_group = quantized(activation, M, K)
            out = cases.DTYPES[(turn + i) % 3]
            bias = (None, cases.random_x(N))[i]
            weight = cases.random_weight(spec, N, K)
            y = gemm_a8(backend, a, weight, bias, out)
            reference.assert_close(y, expected(weight, a, x_group, bias, out), (kernel, spec, M, N, K, activation))


@pytest.mark.parametrize("zero_kind", ["none", "int"])
@pytest.mark.parametrize("format", cases.INT_FORMATS)
@pytest.mark.parametrize("kernel", [k for k in A8 if "a8_int" in k or k == "general"])
def test_int8_times_integers_is_exact(backend: Any, kernel: str, format: str, zero_kind: str) -> None:
    """Scales that are powers of two and one group: y is the integer sum, rounded once. The largest codes are among them."""
    is_hopper = kernel.startswith("hopper")
    if is_hopper and format == "int8" and zero_kind == "int":
        pytest.skip("differences of 8 bits do not fit int8")
    for M, N, K in ((3, 70, 264), (18, 64, 392)):
        weight = cases.random_weight(Spec(format, zero_kind, -1), N, K)
        weight = dataclasses.replace(weight, scales=torch.full_like(weight.scales, 0.5))
        xq = torch.randint(-128, 128, (M, K), generator=cases.generator(M, K)).to(torch.int8)
        xq[0] = -128
        scales = 2.0 ** torch.randint(-3, 3, (M, 1), generator=cases.generator(M))
        random = torch.randint(-128, 128, (M, 1), generator=cases.generator(K), dtype=torch.int32)
        for zeros in (None,) if is_hopper else (None, random):
            with forced(kernel):
                y = gemm_a8(backend, (xq, scales, zeros), weight, None, torch.float32)
            exact = reference.dequantize_activation(xq, scales, zeros) @ weight.dense().double().t()
            assert torch.equal(y, exact.float()), (M, N, K, zeros is None)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_every_device_has_a_kernel(backend: Any, capability: int) -> None:
    """fp8 x fp8 needs sm_89; below, both sides are decoded."""
    if not backend.set_device(capability, 4):
        pytest.skip("a real device is what it is")
    for kind in ("int4", "int8", "fp8_e4m3", "fp8_e4m3-block128", "nf4"):
        format, zero_kind, scaling = cases.KINDS[kind]
        weight = cases.random_weight(Spec(format, zero_kind, 128, "float32", scaling), 130, 264)
        for activation in ("int8", "fp8", "fp8-g128"):
            for M in (2, 70):
                a, x_group = quantized(activation, M, 264)
                y = gemm_a8(backend, a, weight, None, torch.bfloat16)
                want = expected(weight, a, x_group, None, torch.bfloat16)
                reference.assert_close(y, want, (kind, activation, M))


@pytest.mark.parametrize("kernel", A8)
def test_thread_order_and_sharing(backend: Any, kernel: str) -> None:
    """The same bits in every order of threads, with tiles shared among blocks; and within the bound for each count."""
    kind, activation = own_kind(kernel)
    format, zero_kind, _ = cases.KINDS[kind]
    weight = cases.random_weight(Spec(format, zero_kind, 64, "float16"), 140, 1100)
    a, x_group = quantized(activation, 9, 1100)
    want = expected(weight, a, x_group, None, torch.float16)
    for sms in (1, 3, 40):
        backend.set_device(90, sms)
        results = []
        for order in ("forward", "reverse", "random"):
            backend.set_order(order)
            with forced(kernel):
                results.append(gemm_a8(backend, a, weight, None, torch.float16))
        reference.assert_close(results[0], want, (kernel, sms))
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kernel", [k for k in A8 if k.startswith("hopper_a8_fp8")])
def test_fp8_times_small_numbers_is_exact(backend: Any, kernel: str) -> None:
    """Every code of int4 and fp4 in every place of a cell, against x that says which column it was."""
    for format in ("int4", "fp4_e2m1"):
        N, K = 64, 128
        weight = cases.random_weight(Spec(format, "none", -1, "float32"), N, K)
        weight = dataclasses.replace(weight, scales=torch.full_like(weight.scales, 0.5))
        q = torch.zeros(K, K)
        q[torch.arange(K), torch.arange(K)] = 2.0
        with forced(kernel):
            y = gemm_a8(backend, (q.to(torch.float8_e4m3fn), torch.ones(K, 1), None), weight, None, torch.float32)
        assert torch.equal(y, 2.0 * weight.dense().float().t()), format


def test_perm_strides_and_empty(backend: Any) -> None:
    for kind, activation in (("int4-int", "int8-asym"), ("fp8_e4m3", "fp8")):
        format, zero_kind, _ = cases.KINDS[kind]
        spec = Spec(format, zero_kind, 32, "bfloat16", has_perm=True)
        weight = cases.random_weight(spec, 66, 100)
        (q, s, z), group = quantized(activation, 20, 100)
        want = expected(weight, (q, s, z), group, None, torch.bfloat16)
        wide = torch.zeros(20, 203, dtype=torch.int8).view(q.dtype)
        wide[:, 1:101] = q
        for form in (q, wide[:, 1:101]):
            reference.assert_close(gemm_a8(backend, (form, s, z), weight, None, torch.bfloat16), want, kind)
        assert gemm_a8(backend, (q[:0], s[:0], None if z is None else z[:0]), weight, None, torch.float32).shape == (
            0,
            66,
        )


def test_nan_stays_in_its_row(backend: Any) -> None:
    for kernel in A8:
        kind = "fp8_e4m3" if "fp8" in kernel else "int4"
        weight = cases.random_weight(Spec(cases.KINDS[kind][0], "none", 32), 66, 100)
        (q, s, z), _ = quantized("fp8" if kind.startswith("fp8") else "int8", 5, 100)
        s[2] = torch.nan
        with forced(kernel):
            y = gemm_a8(backend, (q, s, z), weight, None, torch.float32)
        assert torch.equal(y.isnan().all(1), torch.arange(5) == 2)
        assert torch.equal(y.isnan().any(1), torch.arange(5) == 2)
