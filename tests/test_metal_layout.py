"""The layout metal_tile4, against a model in numpy that is written from the drawing at the head of metal_tile4.h.

The CPU packs and unpacks it, so that a machine without an Apple GPU can prepare weights; shaders are tested in tests/metal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import reference
from cases import ENUMS, KINDS, SCALE_DTYPES, desc, fits, random_weight, rng
from lowbit import _C, ops
from reference import Spec, Weight

LAYOUT = ENUMS["layout"]["metal_tile4"]
GROUP_SIZES = (8, 16, 24, 32, 40, 64, 128, 256, -1)
#: On every side of a chunk (8 k), of a strip (4 rows) and of a block (128).
SHAPES = ((1, 1), (3, 8), (4, 9), (5, 31), (7, 64), (33, 100), (64, 128), (130, 257), (132, 384), (70, 520))
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def specs(kind: str) -> Iterator[tuple[Spec, int, int]]:
    """Every group size with every scale dtype and with and without perm, on shapes that take turns."""
    format, zero_kind, scaling = KINDS[kind]
    turn = 0
    for group_size in (128,) if scaling == "block128" else GROUP_SIZES:
        shapes = [s for s in SHAPES if scaling == "block128" or fits(group_size, s[1])]
        for dtype in SCALE_DTYPES:
            for has_perm in (False, True):
                turn += 1
                yield Spec(format, zero_kind, group_size, dtype, scaling, has_perm), *shapes[turn * 3 % len(shapes)]


def pack(w: Weight) -> torch.Tensor:
    return ops.pack(*w.tensors, w.N, w.K, desc(w.spec, LAYOUT))


# ---- the model -------------------------------------------------------------------------------------------------------


def plane(codes: np.ndarray, position: int, bits: int) -> bytes:
    """`bits` bits of the codes [4, 8 * chunks] of a strip, from `position` on."""
    part = (codes >> position & (1 << bits) - 1).astype(np.uint32)
    fields = 16 // bits
    halves = part.reshape(4, -1, 4, 2).transpose(1, 3, 0, 2).reshape(-1, 2, bits, fields)  # [chunk][even, odd k][word]
    words = (halves << np.arange(fields, dtype=np.uint32) * np.uint32(bits)).sum(-1, dtype=np.uint32)
    return (words[:, 0] | words[:, 1] << np.uint32(16)).astype("<u4").tobytes()


def padded(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)


def bits_of(tensor: torch.Tensor | None) -> np.ndarray | None:
    """As integers that numpy has."""
    if tensor is None:
        return None
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def four_rows(table: np.ndarray, first: int) -> np.ndarray:
    """Zeros where there are none."""
    some = table[first : first + 4]
    return np.concatenate([some, np.zeros((4 - len(some), *table.shape[1:]), table.dtype)])


def strip(w: Weight, s: int) -> bytes:
    codes = np.pad(four_rows(w.codes, 4 * s), ((0, 0), (0, -w.K % 8)))
    position, data = 0, b""
    for bits in PLANES[w.spec.bits]:
        data += padded(plane(codes, position, bits), 16)
        position += bits
    scales, zeros = bits_of(w.scales), bits_of(w.zeros)
    assert scales is not None
    data += scales[s // 32].tobytes() if w.spec.scaling == "block128" else four_rows(scales, 4 * s).T.tobytes()
    if zeros is not None:
        data += four_rows(zeros, 4 * s).T.tobytes()
    return padded(data, 64)


def model(w: Weight) -> np.ndarray:
    data = b"".join(strip(w, s) for s in range(-(-w.N // 4)))
    if w.perm is not None:
        data += w.perm.numpy().astype("<i4").tobytes()
    return np.frombuffer(data, np.uint8)


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_the_drawn_ones(kind: str) -> None:
    """Padding among them: the model fills it with zeros."""
    for spec, N, K in specs(kind):
        weight = random_weight(spec, N, K)
        packed, expected = pack(weight).numpy(), model(weight)
        assert packed.shape == expected.shape, f"{spec} {N}x{K}"
        different = np.flatnonzero(packed != expected)
        assert not len(different), f"{spec} {N}x{K}: {len(different)} bytes differ, the first at {different[0]}"


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str) -> None:
    for spec, N, K in specs(kind):
        weight = random_weight(spec, N, K)
        w = pack(weight)
        assert w.shape == (_C.packed_size(N, K, desc(spec, LAYOUT)),)
        after = ops.unpack(w, N, K, desc(spec, LAYOUT))[:4]
        for name, was, now in zip(("packed", "scales", "zeros", "perm"), weight.tensors, after, strict=True):
            assert (was is None) == (now is None), f"{spec} {N}x{K}: {name}"
            if was is not None:
                assert now is not None and now.dtype == was.dtype, f"{spec} {N}x{K}: {name}"
                assert torch.equal(now, was), f"{spec} {N}x{K}: {name} changed"


@pytest.mark.parametrize("kind", KINDS)
def test_any_code_survives(kind: str) -> None:
    """Also codes that no quantizer makes; and bits past K of the canonical stream are no part of the weight."""
    r = rng("bytes", kind)
    format, zero_kind, scaling = KINDS[kind]
    spec = Spec(format, zero_kind, 128 if scaling == "block128" else 40, "float16", scaling)
    for N, K in ((65, 130), (70, 521)):
        weight = random_weight(spec, N, K)
        codes = r.integers(0, 2**spec.bits, (N, K))
        stream = torch.from_numpy(reference.pack_stream(codes, spec.bits))
        dirty = stream.clone()
        if K * spec.bits % 8:
            dirty[:, -1] |= 0xFF << K * spec.bits % 8 & 0xFF
        w = ops.pack(dirty, *weight.tensors[1:], N, K, desc(spec, LAYOUT))
        assert torch.equal(w, ops.pack(stream, *weight.tensors[1:], N, K, desc(spec, LAYOUT))), f"{spec} {N}x{K}"
        assert torch.equal(ops.unpack(w, N, K, desc(spec, LAYOUT))[0], stream), f"{spec} {N}x{K}"


@pytest.mark.parametrize("kind", ["int3-int", "int4", "fp8_e4m3-block128"])
def test_same_bytes_whatever_the_threads(kind: str, threads: None) -> None:
    N, K = 1030, 520
    format, zero_kind, scaling = KINDS[kind]
    weight = random_weight(
        Spec(format, zero_kind, 128 if scaling == "block128" else 40, "float16", scaling, True), N, K
    )
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(pack(weight))
        after = ops.unpack(results[-1], N, K, desc(weight.spec, LAYOUT))[:4]
        for was, now in zip(weight.tensors, after, strict=True):
            assert (was is None) == (now is None)
            assert was is None or now is None or torch.equal(was, now)
    assert all(torch.equal(w, results[0]) for w in results)


def test_four_bits_are_pairs_after_one_mask() -> None:
    """What the shaders count on: (word >> 4 * i) & 0x000f000f are the codes of k = 2i and 2i + 1, as two 16-bit integers."""
    weight = random_weight(Spec("int4"), 8, 64)
    size = _C.packed_size(8, 64, desc(weight.spec, LAYOUT)) // 2
    words = pack(weight).view(2, size)[:, : 64 * 4 // 2].contiguous().view(torch.int32).numpy().reshape(2, 8, 4)
    for s, chunk, row, pair in [(0, 0, 0, 0), (0, 3, 1, 2), (1, 5, 2, 3), (1, 7, 3, 1)]:
        word = int(words[s, chunk, row]) >> 4 * pair & 0x000F000F
        k = 8 * chunk + 2 * pair
        assert (word & 0xFFFF, word >> 16) == tuple(weight.codes[4 * s + row, k : k + 2])


def test_sizes_are_known_without_data() -> None:
    for kind in KINDS:
        for spec, N, K in specs(kind):
            shapes = _C.canonical_shapes(N, K, desc(spec))
            dtypes = {"packed": torch.uint8, "scales": reference.DTYPES[spec.scale_dtype], "perm": torch.int32}
            dtypes["zeros"] = torch.uint8 if spec.zero_kind == "int" else dtypes["scales"]
            packed, scales, zeros, perm = (
                None if (shape := shapes[name]) is None else torch.empty(shape, dtype=dtypes[name], device="meta")
                for name in ("packed", "scales", "zeros", "perm")
            )
            assert packed is not None and scales is not None
            w = ops.pack(packed, scales, zeros, perm, N, K, desc(spec, LAYOUT))
            assert w.shape == (_C.packed_size(N, K, desc(spec, LAYOUT)),)


def test_cost_beyond_the_canonical_tensors() -> None:
    """At real sizes under 2%: only strips' ends are padded, and a block's scale is held by each of its strips."""
    for kind in KINDS:
        format, zero_kind, scaling = KINDS[kind]
        for group_size in (128,) if scaling == "block128" else (32, 128, -1):
            spec = Spec(format, zero_kind, group_size, "bfloat16", scaling)
            shapes = _C.canonical_shapes(4096, 4096, desc(spec))
            zero_bytes = {"none": 0, "int": 1}.get(zero_kind, 2)
            canonical = int(np.prod(shapes["packed"])) + int(np.prod(shapes["scales"])) * (2 + zero_bytes)
            assert canonical <= _C.packed_size(4096, 4096, desc(spec, LAYOUT)) <= 1.02 * canonical, (kind, group_size)
