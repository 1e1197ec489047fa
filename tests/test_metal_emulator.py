"""The Metal part of the emulator itself: mistakes are planted, and must be found."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cases
from emulator.build import BuildError
from emulator.library import ORDERS
from emulator.metal.library import MetalEmulator
from lowbit import _C
from reference import Spec

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulator is tried on Linux only")


@pytest.fixture(scope="module")
def _emulator() -> MetalEmulator:
    try:
        return MetalEmulator.load()
    except BuildError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def emulator(_emulator: MetalEmulator) -> Iterator[MetalEmulator]:
    _emulator.reset()
    yield _emulator
    _emulator.reset()


def planted(emulator: MetalEmulator, name: str, order: str = "forward", threads: int = 64) -> torch.Tensor:
    emulator.set_order(order, seed=5)  # type: ignore[arg-type]
    x, y = torch.arange(1.0, 65.0), torch.zeros(64)
    tensors = [y] if name in ("planted_unwritten", "planted_large") else [x, y]
    emulator.run(name, [], tensors, (1, 1), threads)
    return y


def pairs(dtype: type[np.floating[Any]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of every kind, and such whose sums cancel, whose products are subnormal, whose quotients are ties."""
    r = np.random.default_rng(count)
    bits, mantissa = (32, 23) if dtype is np.float32 else (64, 52)
    integers = np.dtype(f"u{bits // 8}")

    def numbers() -> np.ndarray:
        exponents = r.integers(0, 2 ** (bits - 1 - mantissa), count)
        middle = 2 ** (bits - 2 - mantissa) - 1 + r.integers(-mantissa, mantissa, count)
        low = r.integers(0, 3, count)
        exponent = np.choose(r.integers(0, 3, count), [exponents, middle, low]).astype(integers)
        fraction = r.integers(0, 2**mantissa, count, dtype=integers)
        few = fraction >> r.integers(0, mantissa, count, dtype=integers) << integers.type(3)
        fraction = np.choose(r.integers(0, 4, count), [fraction, few % 2**mantissa, 0 * few, 0 * few + 2**mantissa - 1])
        sign = r.integers(0, 2, count, dtype=integers) << integers.type(bits - 1)
        return (sign | exponent << integers.type(mantissa) | fraction.astype(integers)).view(dtype)

    a, b = numbers(), numbers()
    near = r.integers(0, 8, count) == 0
    return a, np.where(near, (a.view(integers) ^ integers.type(1)).view(dtype), b)


def same_numbers(found: np.ndarray, expected: np.ndarray) -> bool:
    integers = f"u{expected.itemsize}"
    nan = np.isnan(expected)
    return bool(
        np.array_equal(np.isnan(found), nan)
        and np.array_equal(found.view(integers)[~nan], expected.view(integers)[~nan])
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arithmetic_in_integers_is_ieee(emulator: MetalEmulator, dtype: Any) -> None:
    """csrc/metal/shaders/ieee.h, which quantize on Metal is made of."""
    count = 50_000
    a, b = pairs(dtype, count)
    to = np.zeros((5, count), dtype)
    groups = -(-count // 256), 1
    tensors = [torch.from_numpy(t) for t in (a, b, to)]
    emulator.run(f"planted_ieee_{to.itemsize * 8}", [count], tensors, groups, 256)
    with np.errstate(all="ignore"):
        for found, expected in zip(to, (a + b, a - b, a * b, a / b), strict=False):
            assert same_numbers(found, expected)
        assert np.array_equal(to[4].view(f"u{to.itemsize}"), (a < b) + 2 * (a == b))
        other = np.float64 if dtype is np.float32 else np.float32
        converted = np.zeros(count, other)
        name = "planted_widened" if dtype is np.float32 else "planted_narrowed"
        emulator.run(name, [count], [torch.from_numpy(a), torch.from_numpy(converted)], groups, 256)
        assert same_numbers(converted, a.astype(other))


def test_what_is_right_is_right_in_every_order(emulator: MetalEmulator) -> None:
    for order in ORDERS:
        assert torch.equal(planted(emulator, "planted_right", order), torch.arange(1.0, 65.0).roll(32))


def test_a_missing_barrier_is_poison(emulator: MetalEmulator) -> None:
    assert all(planted(emulator, "planted_no_barrier", order).isnan().any() for order in ORDERS)


def test_a_matrix_loaded_too_early_is_poison(emulator: MetalEmulator) -> None:
    """In some order: where its other half runs first, all is there by luck."""
    assert any(planted(emulator, "planted_matrix", order).isnan().any() for order in ORDERS)


def test_threadgroup_memory_is_poison_at_first(emulator: MetalEmulator) -> None:
    assert planted(emulator, "planted_unwritten").isnan().all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("planted_weak_barrier", "a threadgroup_barrier that orders no memory"),
        ("planted_divergent_barrier", "divergent barrier"),
        ("planted_divergent_sum", "divergent collective"),
        ("planted_out_of_shared", "something wrote past the 256 bytes of shared memory"),
        ("planted_misaligned", "not aligned to 16 bytes"),
        ("planted_large", "32800 bytes of threadgroup memory, Metal has 32768"),
    ],
)
def test_mistakes_are_errors(emulator: MetalEmulator, name: str, words: str) -> None:
    for order in ORDERS:
        with pytest.raises(RuntimeError, match=words):
            planted(emulator, name, order)


def test_launches_are_checked(emulator: MetalEmulator) -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    for words, tensors, threads, message in (
        ([], [x, y], 2048, "2048 threads in a threadgroup, Metal takes 1 to 1024"),
        ([], [x, y], 40, "40 threads in a threadgroup are no whole SIMD-groups"),
        ([], [x], 64, "argument 1 is not set"),
        ([1], [x], 64, "argument 0 is an integer, the kernel takes a tensor"),
        ([], [x, y, x, y, x, y, x], 64, "argument 6 is set, the kernel has fewer"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulator.run("planted_right", words, tensors, (1, 1), threads)
    with pytest.raises(RuntimeError, match="no kernel is called nothing"):
        emulator.run("nothing", [], [], (1, 1), 32)


def gemm_words(N: int, K: int, split: int) -> list[int]:
    """metal/params.h's Gemm for int4 without groups and fp32 everywhere."""
    chunks, strips = -(-K // 8), -(-N // 4)
    scales = chunks * 16
    strip = (scales + 16 + 63) // 64 * 64
    kinds = cases.ENUMS["format"]["int4"] << 20 | 1 << 28
    fields = [1, N, K, chunks, K, -1, strip, 0, scales, scales + 16, K, N, kinds, 1, strips, split, 0, 0, 0, 0, 31, 0]
    return list(struct.unpack("<11q", struct.pack("<22i", *fields)))


@pytest.mark.parametrize("kernel", ["stream_m1", "matrix_m32"])
def test_a_barrier_left_out_of_a_real_shader_is_found(emulator: MetalEmulator, kernel: str) -> None:
    """The words are right: with its barriers the shader gives the product. Without them, at K = 512, it does not."""
    N, K = 8, 512
    weight = cases.random_weight(Spec("int4"), N, K)
    desc = cases.desc(weight.spec, cases.ENUMS["layout"]["metal_tile4"])
    w, x = torch.ops.lowbit.pack(*weight.tensors, N, K, desc), cases.random_x(1, K)
    assert w.numel() == _C.packed_size(N, K, desc)
    expected = x.double() @ weight.dense().double().t()
    split = 2 if kernel == "stream_m1" else 1

    def run(name: str, order: str) -> torch.Tensor:
        emulator.set_order(order, seed=1)  # type: ignore[arg-type]
        y = torch.zeros(1, N)
        emulator.run(f"{kernel}_int4_{name}", gemm_words(N, K, split), [w, x, y, w, w], (1, 1), 128)
        return y

    for order in ORDERS:
        torch.testing.assert_close(run("f32", order).double(), expected, rtol=1e-4, atol=1e-3)
    wrong = [not torch.allclose(run("planted", order).double(), expected, rtol=1e-4, atol=1e-3) for order in ORDERS]
    assert any(wrong)
