"""Scales of one byte, scales of two levels, blocks that run across rows: every op, on every ISA."""

from __future__ import annotations

from itertools import count

import pytest
import torch

import reference
from cases import (
    BATCH_INVARIANT,
    DTYPES,
    ENUMS,
    INT8,
    SCALED,
    cpu_desc,
    desc,
    pack,
    random_weight,
    random_x,
    scaled,
)
from lowbit import _C, ops
from reference import UNIT, Spec

LAYOUTS = [value for name, value in ENUMS["layout"].items() if name != "canonical"]
NAMES = ("packed", "scales", "zeros", "perm", "super_scales", "super_zeros")


def _bytes(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout: int) -> None:
    for name, spec, N, K in scaled():
        w = random_weight(spec, N, K)
        packed = ops.pack(*w.tensors, N, K, desc(spec, layout), *w.supers)
        assert packed.numel() == _C.packed_size(N, K, desc(spec, layout))
        for part, before, after in zip(
            NAMES, (*w.tensors, *w.supers), ops.unpack(packed, N, K, desc(spec, layout)), strict=True
        ):
            assert (before is None) == (after is None), f"{name}: {part}"
            if before is not None:
                assert after.dtype == before.dtype and torch.equal(_bytes(after), _bytes(before)), f"{name}: {part}"


@pytest.mark.parametrize("name", SCALED)
def test_dequantize_to_the_bit(name: str, isa: str) -> None:
    for _, spec, N, K in [case for case in scaled() if case[0] == name]:
        w = random_weight(spec, N, K)
        W = ops.dequantize(*w.tensors, N, K, desc(spec), torch.float32, *w.supers)
        assert torch.equal(W, w.dense()), f"{spec} {N}x{K}"
        for dtype in DTYPES[1:]:
            out = torch.empty(N, K, dtype=dtype)
            ops.dequantize_out(*w.tensors, N, K, desc(spec), out, *w.supers)
            assert torch.equal(out, w.dense().to(dtype)), f"{spec} {N}x{K} {dtype}"


@pytest.mark.parametrize("name", SCALED)
def test_products(name: str, isa: str) -> None:
    """gemm with few and many rows, batch-invariant or not, its gradient, and int8 activations."""
    turn = count()
    for _, spec, N, K in [case for case in scaled() if case[0] == name]:
        weight = random_weight(spec, N, K)
        W, w, d = weight.dense(), pack(weight), cpu_desc(spec)
        for M in (1, 2, 5, 33, 130):
            for dtype in DTYPES:
                flags = BATCH_INVARIANT if next(turn) % 3 == 0 else 0
                x, unit = random_x(M, K, dtype=dtype), 0.0 if dtype == torch.float32 else UNIT[dtype]
                y = ops.gemm(x, w, None, N, K, d, flags)
                reference.assert_close(y, reference.product(x, W, None, unit, dtype), (spec, N, K, M, dtype))
            dy = random_x(M, N)
            dx = ops.gemm_grad_input(dy, w, N, K, d)
            reference.assert_close(dx, reference.product(dy, W.T, None, 0.0, torch.float32), (spec, N, K, M))
            xq, x_scales, _ = reference.quantize_activation(random_x(M, K), "int8")
            y = ops.gemm_a8(xq, x_scales, None, w, None, N, K, d, 0, torch.float32)
            x8 = reference.dequantize_activation(xq, x_scales, None)
            expected = reference.product(x8, W, None, UNIT[torch.float32], torch.float32)
            reference.assert_close(y, expected, (spec, N, K, M, "a8"))


def test_fast_kernels_take_groups_of_16() -> None:
    for name, spec, N, K in scaled():
        rows = _C.explain("gemm", "cpu", 4, N, K, cpu_desc(spec), "float32", 0)
        fast = "general" not in next(kernel for kernel, reason in rows if not reason)
        size = spec.group_size if spec.scaling != "flat" else torch.gcd(torch.tensor(K), torch.tensor(64)).item()
        assert fast == (size % 16 == 0), f"{name} {N}x{K}"


def test_one_level_more_is_a_factor() -> None:
    """A super scale of 2 doubles every weight, without a rounding."""
    spec, N, K = scaled()[0][1], 17, 96
    nv = SCALED["nvfp4"][0]
    w = random_weight(nv, N, K)
    twice = [torch.full_like(w.super_scales, v) for v in (1.0, 2.0)]
    one, two = (ops.dequantize(*w.tensors, N, K, desc(nv), torch.float32, factor) for factor in twice)
    assert torch.equal(two, 2 * one) and spec != nv


def test_bytes_of_the_canonical_tensors() -> None:
    """Bits per weight of the files that these come from: the canonical tensors take no more."""
    wanted = {"mxfp4": 4.25, "mxfp8": 8.25, "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
    for name, bits in wanted.items():
        shapes = _C.canonical_shapes(256, 4096, desc(SCALED[name][0]))
        spec = SCALED[name][0]
        sizes = {"packed": 1, "scales": 1, "zeros": 1, "super_scales": 2, "super_zeros": 2, "perm": 0}
        total = sum(
            shape[0] * shape[1] * sizes[part] for part, shape in shapes.items() if shape is not None and len(shape) == 2
        )
        assert total * 8 / (256 * 4096) == bits, spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_dtype": "uint4"}, "scale_dtype=uint4 is a code without a size of its own"),
        ({"scale_dtype": "e8m0", "super_groups": 8, "scaling": "two_level"}, "scale_dtype=e8m0 takes no super scales"),
        ({"scale_dtype": "float32", "super_groups": 8, "scaling": "two_level"}, "scale_dtype=float32 takes no super scales"),
        ({"scale_dtype": "e4m3", "super_groups": 8}, "scaling=group with super_groups=8"),
        ({"scale_dtype": "e4m3", "scaling": "two_level"}, "scaling=two_level with super_groups=0"),
        ({"scale_dtype": "e4m3", "scaling": "two_level", "super_groups": 12}, "neither -1 nor a power of two"),
        ({"scale_dtype": "e4m3", "zero_kind": "offset"}, "zero_kind=offset has zeros in the dtype of the scales, which e4m3"),
        ({"scale_dtype": "e8m0", "zero_kind": "float"}, "zero_kind=float has zeros in the dtype of the scales, which e8m0"),
        ({"scaling": "flat", "zero_kind": "int"}, "scaling=flat has neither zeros nor perm"),
        ({"scaling": "flat", "group_size": 48}, "group_size=48, which is not a power of two"),
        ({"scaling": "flat", "scale_dtype": "uint6", "super_groups": 8}, "scaling=flat has scales of whole bytes"),
        ({"super_dtype": "float16"}, "super_dtype=float16 without super scales"),
    ],
)  # fmt: skip
def test_combinations_without_a_meaning(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        desc(Spec(**{"format": "int4", "group_size": 32, **fields}))


def test_ops_say_which_tensor_is_missing() -> None:
    spec, N, K = SCALED["q4_k"][0], 17, 512
    w = random_weight(spec, N, K)
    for op in (torch.ops.lowbit.pack, lambda *a: torch.ops.lowbit.dequantize(*a[:7], torch.float32, *a[7:])):
        d = cpu_desc(spec) if op is torch.ops.lowbit.pack else desc(spec)
        with pytest.raises(
            RuntimeError, match="super_scales are absent, but desc says scaling=two_level super_groups=8"
        ):
            op(*w.tensors, N, K, d)
        with pytest.raises(RuntimeError, match="super_zeros are absent"):
            op(*w.tensors, N, K, d, w.super_scales)
        with pytest.raises(RuntimeError, match=r"super_scales has shape \[17, 1\], expected \[17, 2\]"):
            op(*w.tensors, N, K, d, w.super_scales[:, :1].contiguous(), w.super_zeros)
    plain = random_weight(Spec("int4", group_size=32), N, K)
    with pytest.raises(RuntimeError, match="super_scales are given, but desc says scaling=group"):
        torch.ops.lowbit.pack(*plain.tensors, N, K, cpu_desc(plain.spec), w.super_scales)


def test_int8_activations_stay_exact_integers(isa: str) -> None:
    """A scale of one byte is applied to exact int32 sums: with scales of 1 the result is exact."""
    spec, N, K = Spec("int4", "int", 16, "e4m3"), 20, 48
    w = random_weight(spec, N, K)
    ones = torch.full((N, 3), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed = ops.pack(w.packed, ones, w.zeros, None, N, K, cpu_desc(spec))
    xq = torch.randint(-127, 128, (5, K), dtype=torch.int8)
    y = ops.gemm_a8(xq, torch.ones(5, 1), None, packed, None, N, K, cpu_desc(spec), 0, torch.float32)
    zeros = w.zeros.repeat_interleave(16, 1).double()
    expected = xq.double() @ (torch.from_numpy(w.codes).double() - zeros).T
    assert torch.equal(y.double(), expected)
    assert INT8 == 6
