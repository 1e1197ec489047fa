"""pack and unpack: a bijection between canonical tensors and the kernel layout, on every ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reference
from cases import KINDS, LARGE, cpu_desc, desc, pack, packed, random_weight, rng, specs
from lowbit import _C, ops
from reference import Spec


def _unpacked(w: torch.Tensor, spec: Spec, N: int, K: int) -> tuple[torch.Tensor | None, ...]:
    *tensors, super_scales, super_zeros = ops.unpack(w, N, K, cpu_desc(spec))
    assert super_scales is super_zeros is None
    return tuple(tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, isa: str) -> None:
    for spec, N, K in specs(kind):
        weight = random_weight(spec, N, K)
        w = pack(weight)
        assert w.dtype == torch.uint8
        assert w.shape == (_C.packed_size(N, K, cpu_desc(spec)),)
        for name, before, after in zip(
            ("packed", "scales", "zeros", "perm"), weight.tensors, _unpacked(w, spec, N, K), strict=True
        ):
            if before is None:
                assert after is None, f"{spec} {N}x{K}: {name} appeared"
            else:
                assert after is not None and after.dtype == before.dtype, f"{spec} {N}x{K}: {name}"
                assert torch.equal(after, before), f"{spec} {N}x{K}: {name} changed"


@pytest.mark.parametrize("kind", ["int3-int", "int4", "fp8_e4m3-block128"])
def test_same_bytes_whatever_the_threads(kind: str, threads: None) -> None:
    N, K = LARGE
    format, zero_kind, scaling = KINDS[kind]
    weight = random_weight(
        Spec(format, zero_kind, 128 if scaling == "block128" else 40, "float16", scaling, True), N, K
    )
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        w = pack(weight)
        results.append(w)
        for before, after in zip(weight.tensors, _unpacked(w, weight.spec, N, K), strict=True):
            assert before is after is None or torch.equal(before, after)
    assert all(torch.equal(w, results[0]) for w in results)


def test_same_bytes_on_every_isa() -> None:
    before = _C.isa()
    try:
        for kind in KINDS:
            for spec, N, K in specs(kind):
                results = []
                for level in _C.isa_levels():
                    _C.set_isa(level)
                    results.append(pack(random_weight(spec, N, K)))
                assert all(torch.equal(result, results[0]) for result in results), f"{spec} {N}x{K}"
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("bits", sorted(set(reference.BITS.values())))
def test_bit_stream_is_the_documented_one(bits: int) -> None:
    """One weight away from zero at a time: W decodes it at its place, so bits k*b .. k*b+b-1 are element k."""
    format = f"int{bits}"
    K = 37
    spec = Spec(format)
    codes = np.full((K, K), 2 ** (bits - 1)) + np.eye(K, dtype=np.int64) * (2 ** (bits - 1) - 1)
    stream = np.zeros((K, -(-K * bits // 8)), np.uint8)
    for n in range(K):
        for k in range(K):
            for bit in range(bits):
                if codes[n, k] >> bit & 1:
                    stream[n, (k * bits + bit) // 8] |= 1 << (k * bits + bit) % 8
    W = ops.dequantize(torch.from_numpy(stream), torch.ones(K, 1), None, None, K, K, desc(spec))
    assert torch.equal(W, torch.eye(K) * (2 ** (bits - 1) - 1))
    np.testing.assert_array_equal(reference.pack_stream(codes, bits), stream)
    np.testing.assert_array_equal(reference.unpack_stream(stream, K, bits), codes)


def test_four_bits_have_the_even_k_in_the_low_nibble() -> None:
    spec = Spec("int4")
    W = ops.dequantize(torch.tensor([[0x9F]], dtype=torch.uint8), torch.ones(1, 1), None, None, 1, 2, desc(spec))
    assert W.tolist() == [[7.0, 1.0]]


def test_tensors_at_any_address() -> None:
    """As slices of a file mapped into memory are."""
    spec = Spec("int4", "int", 32, "float16")
    N, K = 33, 64
    weight = random_weight(spec, N, K)
    for offset in (1, 2, 7):
        buffer = torch.zeros(weight.packed.numel() + offset, dtype=torch.uint8)
        shifted = buffer[offset:].view(weight.packed.shape)
        shifted.copy_(weight.packed)
        assert torch.equal(ops.pack(shifted, *weight.tensors[1:], N, K, cpu_desc(spec)), packed(spec, N, K))
        assert torch.equal(ops.dequantize(shifted, *weight.tensors[1:], N, K, desc(spec)), weight.dense())


def test_packed_size_is_pure_and_close_to_the_stream() -> None:
    """The layout pads to its tile, and no more: at real sizes it costs under 2% beyond the canonical tensors."""
    for kind in KINDS:
        format, zero_kind, scaling = KINDS[kind]
        spec = Spec(format, zero_kind, 128, "bfloat16", scaling)
        shapes = _C.canonical_shapes(4096, 4096, desc(spec))
        scales = int(np.prod(shapes["scales"]))
        zero_bytes = {"none": 0, "int": 1}.get(zero_kind, 2)
        canonical = int(np.prod(shapes["packed"])) + scales * (2 + zero_bytes)
        assert canonical <= _C.packed_size(4096, 4096, cpu_desc(spec)) <= 1.02 * canonical, kind


def test_random_bytes_survive(isa: str) -> None:
    """Also codes that no quantizer makes (NaN codes, bits past K are not part of the weight)."""
    r = rng("bytes")
    for kind in KINDS:
        for spec, N, K in specs(kind):
            weight = random_weight(spec, N, K)
            codes = r.integers(0, 2**spec.bits, (N, K))
            stream = torch.from_numpy(reference.pack_stream(codes, spec.bits))
            w = ops.pack(stream, *weight.tensors[1:], N, K, cpu_desc(spec))
            assert torch.equal(ops.unpack(w, N, K, cpu_desc(spec))[0], stream), f"{spec} {N}x{K}"
