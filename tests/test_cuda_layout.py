"""The layout cuda_tile64, against a model in numpy that is written from the drawing at the head of cuda_tile64.h.

The CPU packs and unpacks it, so that a machine without a GPU can prepare weights; kernels are tested in tests/cuda.
"""

from __future__ import annotations

import numpy as np
import torch

from cases import ENUMS, random_weight
from layouts import PLANES, LayoutTests, bits_of, padded, rows_from
from reference import Spec, Weight

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


class TestCudaTile64(LayoutTests):
    layout, rows, shapes, turn = ENUMS["layout"]["cuda_tile64"], 64, SHAPES, 4

    def strip(self, w: Weight, s: int) -> bytes:
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

    def test_four_bits_are_registers_after_one_mask(self) -> None:
        """What the kernels count on: (word >> 4 * r) & 0x000f000f is register r of mma's A fragment, as two 16-bit integers."""
        spec = Spec("int4")
        weight = random_weight(spec, 64, 128)
        words = torch.frombuffer(bytearray(self.pack(weight).numpy().tobytes()), dtype=torch.int32)[
            : 64 * 128 // 8
        ].numpy()
        for cell, lane, fragment, register in [(0, 0, 0, 0), (3, 13, 2, 1), (5, 30, 1, 2), (7, 31, 3, 3)]:
            g, t = lane // 4, lane % 4
            row, k = 16 * fragment + g + register % 2 * 8, 16 * cell + 2 * t + register // 2 * 8
            word = int(words[(cell * 32 + lane) * 4 + fragment]) >> 4 * register & 0x000F000F
            assert (word & 0xFFFF, word >> 16) == (weight.codes[row, k], weight.codes[row, k + 1])
