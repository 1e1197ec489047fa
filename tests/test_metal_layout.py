"""The layout metal_tile4, against a model in numpy that is written from the drawing at the head of metal_tile4.h.

The CPU packs and unpacks it, so that a machine without an Apple GPU can prepare weights; shaders are tested in tests/metal.
"""

from __future__ import annotations

import numpy as np
import torch

from cases import ENUMS, desc, random_weight
from layouts import PLANES, LayoutTests, bits_of, padded, rows_from
from lowbit import _C
from reference import Spec, Weight

#: On every side of a chunk (8 k), of a strip (4 rows) and of a block (128).
SHAPES = ((1, 1), (3, 8), (4, 9), (5, 31), (7, 64), (33, 100), (64, 128), (130, 257), (132, 384), (70, 520))


def plane(codes: np.ndarray, position: int, bits: int) -> bytes:
    """`bits` bits of the codes [4, 8 * chunks] of a strip, from `position` on."""
    part = (codes >> position & (1 << bits) - 1).astype(np.uint32)
    fields = 16 // bits
    halves = part.reshape(4, -1, 4, 2).transpose(1, 3, 0, 2).reshape(-1, 2, bits, fields)  # [chunk][even, odd k][word]
    words = (halves << np.arange(fields, dtype=np.uint32) * np.uint32(bits)).sum(-1, dtype=np.uint32)
    return (words[:, 0] | words[:, 1] << np.uint32(16)).astype("<u4").tobytes()


class TestMetalTile4(LayoutTests):
    layout, rows, shapes, turn = ENUMS["layout"]["metal_tile4"], 4, SHAPES, 3

    def strip(self, w: Weight, s: int) -> bytes:
        codes = np.pad(rows_from(w.codes, 4 * s, 4), ((0, 0), (0, -w.K % 8)))
        position, data = 0, b""
        for bits in PLANES[w.spec.bits]:
            data += padded(plane(codes, position, bits), 16)
            position += bits
        scales, zeros = bits_of(w.scales), bits_of(w.zeros)
        assert scales is not None
        data += scales[s // 32].tobytes() if w.spec.scaling == "block128" else rows_from(scales, 4 * s, 4).T.tobytes()
        if zeros is not None:
            data += rows_from(zeros, 4 * s, 4).T.tobytes()
        return padded(data, 64)

    def test_four_bits_are_pairs_after_one_mask(self) -> None:
        """What the shaders count on: (word >> 4 * i) & 0x000f000f are the codes of k = 2i and 2i + 1, as two 16-bit integers."""
        weight = random_weight(Spec("int4"), 8, 64)
        size = _C.packed_size(8, 64, desc(weight.spec, self.layout)) // 2
        words = (
            self.pack(weight).view(2, size)[:, : 64 * 4 // 2].contiguous().view(torch.int32).numpy().reshape(2, 8, 4)
        )
        for s, chunk, row, pair in [(0, 0, 0, 0), (0, 3, 1, 2), (1, 5, 2, 3), (1, 7, 3, 1)]:
            word = int(words[s, chunk, row]) >> 4 * pair & 0x000F000F
            k = 8 * chunk + 2 * pair
            assert (word & 0xFFFF, word >> 16) == tuple(weight.codes[4 * s + row, k : k + 2])
