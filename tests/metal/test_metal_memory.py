"""The Metal ops without a product: pack, unpack, dequantize, quantize_activation (and test_metal_quantize.py). The CPU's bits.

Where a result is NaN, it is NaN on both; its sign and payload are the device's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cases
from cases import FP8, INT8, KINDS, SCALE_DTYPES, desc, fits, random_weight
from kernel_cases import ORDERS, any_codes, check_activation, check_sign_of_zero, moved, on, same_bits, same_but_nan
from metal_problems import BACKEND, metal_desc
from reference import Spec

GROUP_SIZES = (8, 16, 24, 32, 64, 128, 256, -1)
#: On every side of what the kernels count in: 8 codes, 16 bytes, 4 rows, 256 threads of 8 k.
SHAPES = ((1, 1), (7, 15), (5, 31), (33, 64), (10, 100), (130, 257), (3, 2056))


def specs(kind: str) -> Iterator[tuple[Spec, int, int]]:
    """Every group size; shapes, scale dtypes and perm take turns."""
    format, zero_kind, scaling = KINDS[kind]
    turn = zlib.crc32(kind.encode())
    for i, group_size in enumerate((128,) * 3 if scaling == "block128" else GROUP_SIZES):
        shapes = [s for s in SHAPES if scaling == "block128" or fits(group_size, s[1])]
        N, K = shapes[(turn + i) % len(shapes)]
        yield Spec(format, zero_kind, group_size, SCALE_DTYPES[(turn + i) % 3], scaling, i % 2 == 0), N, K


@pytest.mark.parametrize("kind", KINDS)
def test_pack_and_unpack(metal: Any, kind: str) -> None:
    for i, (spec, N, K) in enumerate(specs(kind)):
        metal.set_order(ORDERS[i % 3], seed=i)
        weight, d = any_codes(spec, N, K), metal_desc(spec)
        w = metal.ops.pack(*moved(metal, weight), N, K, d)
        assert same_bits(w, torch.ops.lowbit.pack(*weight.tensors, N, K, d)), f"{spec} {N}x{K}"
        for name, was, now in zip(
            ("packed", "scales", "zeros", "perm"), weight.tensors, metal.ops.unpack(w, N, K, d)[:4], strict=True
        ):
            assert (now.numel() == 0) if was is None else same_bits(now, was), f"{spec} {N}x{K}: {name}"


def test_pack_drops_what_is_past_K(metal: Any) -> None:
    for format in cases.INT_FORMATS:
        spec = Spec(format, "none", -1)
        weight = random_weight(spec, 5, 13)
        dirty = weight.packed.clone()
        if 13 * spec.bits % 8:
            dirty[:, -1] |= 0xFF << 13 * spec.bits % 8 & 0xFF
        w = metal.ops.pack(on(metal, dirty), *moved(metal, weight)[1:], 5, 13, metal_desc(spec))
        assert same_bits(w, torch.ops.lowbit.pack(*weight.tensors, 5, 13, metal_desc(spec))), format


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize(metal: Any, kind: str) -> None:
    for i, (spec, N, K) in enumerate(specs(kind)):
        metal.set_order(ORDERS[i % 3], seed=i)
        weight = any_codes(spec, N, K)
        for dtype in cases.DTYPES:
            W = metal.ops.dequantize(*moved(metal, weight), N, K, desc(spec), dtype)
            expected = torch.ops.lowbit.dequantize(*weight.tensors, N, K, desc(spec), dtype)
            assert same_but_nan(W, expected), f"{spec} {N}x{K} {dtype}"
        out = torch.empty(N * K + 1, dtype=dtype, device=metal.device)[1:].view(N, K)
        metal.ops.dequantize_out(*moved(metal, weight), N, K, desc(spec), out)
        assert same_but_nan(out, expected), f"{spec} {N}x{K} {dtype}: out"


def test_dequantize_keeps_the_sign_of_zero(metal: Any) -> None:
    check_sign_of_zero(metal)


# ---- activations -----------------------------------------------------------------------------------------------------


def values(style: str, M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    x = cases.random_x(M, K) * 0.3
    if style == "odd":
        x = x.flatten()
        pick = torch.randint(0, len(x), (max(1, len(x) // 9),), generator=cases.generator(M, K))
        specials = torch.tensor([0.0, -0.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
        x[pick] = specials[torch.arange(len(pick)) % len(specials)]
        x = x.view(M, K)
    elif style == "small":
        x = x * 1e-41  # subnormal in fp32, which a GPU may take for 0
    elif style == "zeros":
        x = torch.where(torch.rand(M, K, generator=cases.generator(M, K)) < 0.5, 0.0, -0.0)
    return x.to(dtype)


STYLES = ("normal", "odd", "zeros") + (("small",) if BACKEND == "emulator" else ())


@pytest.mark.parametrize("K", [1, 7, 100, 128, 512, 520, 2056])
@pytest.mark.parametrize("format", ["int8", "int8-asym", "fp8", "fp8-g24", "fp8-g128"])
def test_quantize_activation(metal: Any, format: str, K: int) -> None:
    id, symmetric = INT8 if format.startswith("int8") else FP8, format != "int8-asym"
    group = int(format[5:]) if "-g" in format else -1
    pre_scale = torch.rand(K, generator=cases.generator(K)) + 0.5
    for i, M in enumerate((0, 1, 3) if K < 1000 else (2,)):
        for j, dtype in enumerate(cases.DTYPES):
            metal.set_order(ORDERS[(i + j) % 3], seed=i)
            for style in STYLES:
                x = values(style, M, K, dtype) if M else torch.empty(0, K, dtype=dtype)
                check_activation(metal, x, id, group, None, None, pre_scale if i % 2 else None, symmetric)


def test_quantize_activation_with_a_static_scale(metal: Any) -> None:
    scale, zero = torch.tensor([0.0371]), torch.tensor([-19], dtype=torch.int32)
    for dtype in cases.DTYPES:
        x = torch.cat([values("normal", 3, 200, dtype) * 20, values("odd", 3, 200, dtype)])
        check_activation(metal, x, INT8, -1, scale, None, None, True)
        check_activation(metal, x, INT8, -1, scale, zero, None, False)
        check_activation(metal, x, FP8, -1, scale, None, None, True)


def test_quantize_activation_of_strided_rows_and_out(metal: Any) -> None:
    for dtype in cases.DTYPES:
        x = values("normal", 5, 140, dtype)
        for id, group in ((INT8, -1), (FP8, 128)):
            part = x.to(metal.device)[:, 3:132]
            found = metal.ops.quantize_activation(part, id, group, None, None, None, True)
            expected = torch.ops.lowbit.quantize_activation(x[:, 3:132], id, group, None, None, None, True)
            assert same_bits(found[0], expected[0]) and same_bits(found[1], expected[1]), (dtype, id)
    q, s, z = metal.ops.quantize_activation(part, INT8, -1, None, None, None, False)
    codes, scales, zeros = torch.empty_like(q), torch.empty_like(s), torch.empty_like(z)
    metal.ops.quantize_activation_out(part, INT8, -1, None, None, None, False, codes, scales, zeros)
    assert torch.equal(codes, q) and torch.equal(scales, s) and torch.equal(zeros, z)


def test_wrong_arguments_are_refused_with_their_values(metal: Any) -> None:
    weight = random_weight(Spec("int4"), 4, 8)
    with pytest.raises(RuntimeError, match="desc asks for layout cpu_tile16, Metal packs metal_tile4"):
        metal.ops.pack(*moved(metal, weight), 4, 8, desc(weight.spec, 1))
    with pytest.raises(RuntimeError, match=r"packed has shape \[4, 4\], expected \[4, 8\]"):
        metal.ops.dequantize(*moved(metal, weight), 4, 16, desc(weight.spec), torch.float32)
    with pytest.raises(RuntimeError, match="weight is int32, expected float32"):
        metal.ops.quantize(torch.zeros(4, 8, dtype=torch.int32, device=metal.device), desc(weight.spec), False, None)
