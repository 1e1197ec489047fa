"""The layout cuda_tile64, against a model in numpy that is written from the drawing at the head of cuda_tile64.h.

The CPU packs and unpacks it, so that a machine without a GPU can prepare weights; kernels are tested in tests/cuda.
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

LAYOUT = ENUMS["layout"]["cuda_tile64"]
GROUP_SIZES = (8, 16, 24, 32, 40, 64, 128, 256, -1)
#: On every side of a fragment (16), a strip (64) and a block (128) of rows, and of a cell (16) and a tile (128) of k.
SHAPES = (
    (1, 1),
    (7, 15),
    (15, 16),
    (17, 31),
    (63, 100),
    (64, 128),
    (65, 130),
    (100, 129),
    (130, 257),
    (144, 384),
    (70, 520),
)
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
                yield Spec(format, zero_kind, group_size, dtype, scaling, has_perm), *shapes[turn * 4 % len(shapes)]


def pack(w: Weight) -> torch.Tensor:
    return ops.pack(*w.tensors, w.N, w.K, desc(w.spec, LAYOUT))


# ---- the model -------------------------------------------------------------------------------------------------------


def _fragments() -> tuple[np.ndarray, np.ndarray]:
    """Row and first k in a tile of each register: [cell 0's registers 0..3, cell 1's, ...][lane][fragment]."""
    lane, fragment = np.arange(32)[:, None], np.arange(4)[None, :]
    g, t = lane // 4, lane % 4
    rows, ks = [], []
    for cell in range(8):
        for row, k in ((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)):
            rows.append(16 * fragment + row)
            ks.append(16 * cell + k + 0 * fragment)
    return np.stack(rows), np.stack(ks)


ROWS, KS = _fragments()


def plane(codes: np.ndarray, position: int, bits: int) -> bytes:
    """`bits` bits of the codes [64, 128] of a tile, from `position` on."""
    part = (codes >> position & (1 << bits) - 1).astype(np.uint32)
    registers = part[ROWS, KS] | part[ROWS, KS + 1] << np.uint32(16)  # elements 0 and 1 in the halves
    fields = 16 // bits
    words = np.zeros((len(registers) // fields, 32, 4), np.uint32)
    for field in range(fields):
        words |= registers[field::fields] << np.uint32(field * bits)
    return words.astype("<u4").tobytes()


def scale_row(column: np.ndarray) -> bytes:
    """64 scales (or zeros, or offsets) in their order."""
    row = np.zeros_like(column)
    for n in range(64):
        row[n % 8 * 8 + n // 8] = column[n]
    return row.tobytes()


def padded(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)


def bits_of(tensor: torch.Tensor | None) -> np.ndarray | None:
    """As integers that numpy has."""
    if tensor is None:
        return None
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def rows_from(table: np.ndarray, first: int, count: int) -> np.ndarray:
    """`count` rows, zeros where there are none."""
    some = table[first : first + count]
    return np.concatenate([some, np.zeros((count - len(some), *table.shape[1:]), table.dtype)])


def strip(w: Weight, s: int) -> bytes:
    scales, zeros = bits_of(w.scales), bits_of(w.zeros)
    assert scales is not None
    tables = []
    if w.spec.scaling == "group":
        tables = [rows_from(t, 64 * s, 64) for t in (scales, zeros) if t is not None]
    in_tiles = w.spec.scaling == "block128" or (w.spec.group_size != -1 and 128 % w.spec.group_size == 0)
    codes = rows_from(w.codes, 64 * s, 64)
    data = b""
    for k in range(0, w.K, 128):
        part = rows_from(codes[:, k : k + 128].T, 0, 128).T
        position, tile = 0, b""
        for bits in PLANES[w.spec.bits]:
            tile += plane(part, position, bits)
            position += bits
        if w.spec.scaling == "block128":
            tile += padded(scales[s // 2, k // 128].tobytes(), 16)
        elif in_tiles:
            per_tile = 128 // w.spec.group_size
            for table in tables:
                tile += b"".join(map(scale_row, rows_from(table.T, k // 128 * per_tile, per_tile)))
        data += padded(tile, 32)
    if not in_tiles:
        data += b"".join(scale_row(row) for table in tables for row in table.T)
    return padded(data, 128)


def model(w: Weight) -> np.ndarray:
    data = b"".join(strip(w, s) for s in range(-(-w.N // 64)))
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


def test_four_bits_are_registers_after_one_mask() -> None:
    """What the kernels count on: (word >> 4 * r) & 0x000f000f is register r of mma's A fragment, as two 16-bit integers."""
    spec = Spec("int4")
    weight = random_weight(spec, 64, 128)
    words = torch.frombuffer(bytearray(pack(weight).numpy().tobytes()), dtype=torch.int32)[: 64 * 128 // 8].numpy()
    for cell, lane, fragment, register in [(0, 0, 0, 0), (3, 13, 2, 1), (5, 30, 1, 2), (7, 31, 3, 3)]:
        g, t = lane // 4, lane % 4
        row, k = 16 * fragment + g + register % 2 * 8, 16 * cell + 2 * t + register // 2 * 8
        word = int(words[(cell * 32 + lane) * 4 + fragment]) >> 4 * register & 0x000F000F
        assert (word & 0xFFFF, word >> 16) == (weight.codes[row, k], weight.codes[row, k + 1])


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
    """At real sizes under 2%: only tiles' and strips' ends are padded."""
    for kind in KINDS:
        format, zero_kind, scaling = KINDS[kind]
        for group_size in (128,) if scaling == "block128" else (32, 128, -1):
            spec = Spec(format, zero_kind, group_size, "bfloat16", scaling)
            shapes = _C.canonical_shapes(4096, 4096, desc(spec))
            zero_bytes = {"none": 0, "int": 1}.get(zero_kind, 2)
            canonical = int(np.prod(shapes["packed"])) + int(np.prod(shapes["scales"])) * (2 + zero_bytes)
            assert canonical <= _C.packed_size(4096, 4096, desc(spec, LAYOUT)) <= 1.02 * canonical, (kind, group_size)
