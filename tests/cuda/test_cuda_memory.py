"""The CUDA ops without a product: pack, unpack, dequantize, quantize, quantize_activation. The CPU's bits, every one.

Where a result is NaN, it is NaN on both; only the NaN of a dequantized weight or of an activation's scale may differ in
sign and payload, which IEEE 754 leaves to the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cases
import reference
from cases import FP8, INT8, KINDS, SCALE_DTYPES, desc, fits, random_weight
from kernel_cases import ORDERS, any_codes, check_activation, check_sign_of_zero, moved, on, same_bits, same_but_nan
from problems import cuda_desc
from reference import Spec

GROUP_SIZES = (8, 16, 24, 32, 64, 128, 256, -1)
#: On every side of what the kernels count in: 8 codes, 16 bytes, 64 rows, 128 k, 1024 units per block.
SHAPES = ((1, 1), (7, 15), (17, 31), (33, 64), (63, 100), (65, 130), (100, 136), (130, 257), (70, 520), (3, 2050))


def specs(kind: str) -> Iterator[tuple[Spec, int, int]]:
    """Every group size twice; shapes, scale dtypes and perm take turns."""
    format, zero_kind, scaling = KINDS[kind]
    turn = zlib.crc32(kind.encode())
    for i, group_size in enumerate((128,) * 4 if scaling == "block128" else GROUP_SIZES):
        shapes = [s for s in SHAPES if scaling == "block128" or fits(group_size, s[1])]
        for j in range(2):
            N, K = shapes[(turn + i + 5 * j) % len(shapes)]
            yield Spec(format, zero_kind, group_size, SCALE_DTYPES[(turn + i + j) % 3], scaling, (i + j) % 2 == 0), N, K


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pack_and_unpack(backend: Any, kind: str) -> None:
    for i, (spec, N, K) in enumerate(specs(kind)):
        backend.set_order(ORDERS[i % 3], seed=i)
        weight, d = any_codes(spec, N, K), cuda_desc(spec)
        w = backend.ops.pack(*moved(backend, weight), N, K, d)
        assert same_bits(w, torch.ops.lowbit.pack(*weight.tensors, N, K, d)), f"{spec} {N}x{K}"
        for name, was, now in zip(
            ("packed", "scales", "zeros", "perm"), weight.tensors, backend.ops.unpack(w, N, K, d)[:4], strict=True
        ):
            assert (now.numel() == 0) if was is None else same_bits(now, was), f"{spec} {N}x{K}: {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize(backend: Any, kind: str) -> None:
    for i, (spec, N, K) in enumerate(specs(kind)):
        backend.set_order(ORDERS[i % 3], seed=i)
        weight = any_codes(spec, N, K)
        for dtype in cases.DTYPES:
            W = backend.ops.dequantize(*moved(backend, weight), N, K, desc(spec), dtype)
            expected = torch.ops.lowbit.dequantize(*weight.tensors, N, K, desc(spec), dtype)
            assert same_but_nan(W, expected), f"{spec} {N}x{K} {dtype}"
            out = torch.empty(N, K, dtype=dtype, device=backend.device)
            backend.ops.dequantize_out(*moved(backend, weight), N, K, desc(spec), out)
            assert torch.equal(out.view(torch.uint8), W.view(torch.uint8))


def test_dequantize_a_row_beyond_shared_memory(backend: Any) -> None:
    """With perm a row is put together in shared memory; one that does not fit is scattered into place."""
    for N, K, dtype in ((2, 12288, torch.float32), (1, 24600, torch.bfloat16)):
        spec = Spec("int4", "none", 128, "float16", has_perm=True)
        weight = random_weight(spec, N, K)
        W = backend.ops.dequantize(*moved(backend, weight), N, K, desc(spec), dtype)
        assert same_bits(W, torch.ops.lowbit.dequantize(*weight.tensors, N, K, desc(spec), dtype))


def test_dequantize_keeps_the_sign_of_zero(backend: Any) -> None:
    check_sign_of_zero(backend)


def test_weights_at_any_address(backend: Any) -> None:
    """As slices of a buffer are: kernels may not take 16-byte loads there."""
    for format in ("int2", "int3", "int4", "int6", "int8"):
        spec = Spec(format, "int", 32, "float16")
        N, K = 65, 160
        weight = random_weight(spec, N, K)
        for offset in (1, 2, 4):
            buffer = torch.zeros(weight.packed.numel() + offset, dtype=torch.uint8, device=backend.device)
            packed = buffer[offset:].view(weight.packed.shape)
            packed.copy_(weight.packed)
            rest = moved(backend, weight)[1:]
            w = backend.ops.pack(packed, *rest, N, K, cuda_desc(spec))
            assert same_bits(w, torch.ops.lowbit.pack(*weight.tensors, N, K, cuda_desc(spec))), (format, offset)
            out = torch.empty(N * K + offset, dtype=torch.bfloat16, device=backend.device)[offset:].view(N, K)
            backend.ops.dequantize_out(packed, *rest, N, K, desc(spec), out)
            assert same_bits(out, weight.dense().bfloat16()), (format, offset)


# ---- the quantizer ---------------------------------------------------------------------------------------------------


def values(style: str, N: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    x = cases.random_x(N, K) * 0.3
    g = cases.generator(style, N, K)
    if style == "odd":
        x = x.flatten()
        pick = torch.randint(0, len(x), (max(1, len(x) // 9),), generator=g)
        specials = torch.tensor([0.0, -0.0, 1e-40, -1e-42, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
        x[pick] = specials[torch.arange(len(pick)) % len(specials)]
        x = x.view(N, K)
    elif style == "small":
        x = x * 1e-41  # subnormal in fp32, 0 in 16 bits
    elif style == "zeros":
        x = torch.where(torch.rand(N, K, generator=g) < 0.5, 0.0, -0.0)
    elif style == "grid":
        x = torch.randint(-7, 8, (N, K), generator=g) * 0.37  # ties between candidates of the search
    return x.to(dtype)


QUANTIZED = ((3, 15), (5, 40), (2, 130), (9, 256), (1, 1300), (2, 2050), (130, 136))


def check_quantize(
    backend: Any, weight: torch.Tensor, spec: Spec, search: bool, importance: torch.Tensor | None
) -> None:
    found = backend.ops.quantize(on(backend, weight), desc(spec), search, on(backend, importance))
    expected = torch.ops.lowbit.quantize(weight, desc(spec), search, importance)
    for name, a, b in zip(("packed", "scales", "zeros"), found, expected, strict=True):
        assert a.shape == b.shape and same_bits(a, b), f"{spec} {tuple(weight.shape)} search={search}: {name}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", [False, True])
def test_quantize(backend: Any, kind: str, search: bool) -> None:
    format, zero_kind, scaling = KINDS[kind]
    turn = zlib.crc32(kind.encode())
    sizes = (128,) * 4 if scaling == "block128" else GROUP_SIZES
    for i, group_size in enumerate(sizes):
        shapes = [s for s in QUANTIZED if scaling == "block128" or fits(group_size, s[1])]
        if search:
            shapes = [s for s in shapes if s[0] * s[1] < 3000]
        N, K = shapes[(turn + i) % len(shapes)]
        style = ("normal", "odd", "normal", "grid", "small", "zeros")[(turn // 7 + i) % 6]
        dtype = cases.DTYPES[(turn + i) % 3]
        importance = torch.rand(K, generator=cases.generator(K)) if i % 2 else None
        backend.set_order(ORDERS[i % 3], seed=i)
        spec = Spec(format, zero_kind, group_size, SCALE_DTYPES[(turn + i) % 3], scaling)
        check_quantize(backend, values(style, N, K, dtype), spec, search, importance)


@pytest.mark.parametrize("kind", ["int4", "int4-offset", "nf4", "fp8_e4m3-block128"])
def test_quantize_shares_long_groups(backend: Any, kind: str) -> None:
    """From 1024 elements on, a block's teams share a group: candidates, refits and codes."""
    format, zero_kind, scaling = KINDS[kind]
    for (N, K), size in (((2, 1300), -1), ((2, 1023), -1), ((1, 2100), 1032), ((130, 136), 128)):
        if (scaling == "block128") != (size == 128):
            continue
        spec = Spec(format, zero_kind, size, "bfloat16", scaling)
        for order in ORDERS:
            backend.set_order(order, seed=1)
            check_quantize(backend, values("normal", N, K, torch.bfloat16), spec, True, None)


# ---- activations -----------------------------------------------------------------------------------------------------


def halves(format: int, M: int, K: int) -> torch.Tensor:
    """Quotients that are halfway between two codes, or one or two fp32 steps beside it."""
    r = cases.rng(format, M, K)
    if format == INT8:
        top, level = np.float32(127), (r.integers(-127, 127, (M, K)) + 0.5).astype(np.float32)
    else:
        code = r.integers(0, 126, (M, K))
        table = reference.CODES["fp8_e4m3"]
        top, level = (
            np.float32(448),
            (table[code] + table[code + 1]) / 2 * r.choice(np.array([-1, 1], np.float32), (M, K)),
        )
    unit = r.uniform(0.01, 1, (M, 1)).astype(np.float32)
    x = level * unit
    for _ in range(2):
        x = np.nextafter(x, x * r.choice(np.array([0, 1, 1, 4], np.float32), (M, K)))
    x[:, 0] = top * unit[:, 0]
    return torch.from_numpy(x)


@pytest.mark.parametrize("K", [1, 7, 8, 100, 128, 136, 1000, 2056, 4100, 9000])
@pytest.mark.parametrize("format", ["int8", "int8-asym", "fp8", "fp8-g24", "fp8-g128"])
def test_quantize_activation(backend: Any, format: str, K: int) -> None:
    id, symmetric = INT8 if format.startswith("int8") else FP8, format != "int8-asym"
    group = int(format[5:]) if "-g" in format else -1
    pre_scale = torch.rand(K, generator=cases.generator(K)) + 0.5
    for i, M in enumerate((0, 1, 2, 5) if K < 1000 else (2,)):
        for j, dtype in enumerate(cases.DTYPES):
            backend.set_order(ORDERS[(i + j) % 3], seed=i)
            for style in ("normal", "odd", "small", "zeros"):
                x = values(style, M, K, dtype) if M else torch.empty(0, K, dtype=dtype)
                check_activation(backend, x, id, group, None, None, pre_scale if i % 2 else None, symmetric)
    check_activation(backend, halves(id, 3, K), id, group, None, None, None, symmetric)


def test_quantize_activation_with_a_static_scale(backend: Any) -> None:
    scale, zero = torch.tensor([0.0371]), torch.tensor([-19], dtype=torch.int32)
    for dtype in cases.DTYPES:
        x = torch.cat([values("normal", 3, 200, dtype) * 20, values("odd", 3, 200, dtype)])
        check_activation(backend, x, INT8, -1, scale, None, None, True)
        check_activation(backend, x, INT8, -1, scale, zero, None, False)
        check_activation(backend, x, FP8, -1, scale, None, None, True)


def test_quantize_activation_of_rows_that_are_not_aligned(backend: Any) -> None:
    for dtype in cases.DTYPES:
        for offset, width in ((0, 137), (1, 136), (8, 144), (3, 200)):
            x = values("normal", 5, width + offset, dtype)
            for id, group in ((INT8, -1), (FP8, 128)):
                part = x.to(backend.device)[:, offset : offset + 129]  # a view: moved first, then cut
                found = backend.ops.quantize_activation(part, id, group, None, None, None, True)
                expected = torch.ops.lowbit.quantize_activation(
                    x[:, offset : offset + 129], id, group, None, None, None, True
                )
                assert same_bits(found[0], expected[0]) and same_bits(found[1], expected[1]), (dtype, offset, width, id)


def test_quantize_activation_of_a_large_scale(backend: Any) -> None:
    """Where 1 / scale is no normal number, every code is divided for."""
    for factor in (2.0**-120, 2.0**-100, 2.0**100, 2.0**120):
        x = cases.random_x(2, 300) * factor
        for id in (INT8, FP8):
            check_activation(backend, x, id, -1, None, None, None, True)


def test_quantize_activation_out(backend: Any) -> None:
    x = values("normal", 4, 264, torch.bfloat16).to(backend.device)
    q, s, z = backend.ops.quantize_activation(x, INT8, -1, None, None, None, False)
    codes, scales, zeros = torch.empty_like(q), torch.empty_like(s), torch.empty_like(z)
    backend.ops.quantize_activation_out(x, INT8, -1, None, None, None, False, codes, scales, zeros)
    assert torch.equal(codes, q) and torch.equal(scales, s) and torch.equal(zeros, z)
