"""The Marlin serialisation of 4-bit weights: a layout made for one family of kernels, found on disk all the same.

W[K, N] (in, out) is cut into tiles of 16 x 16, and 1024 consecutive codes (four tiles beside each other) are stored in the
order in which 32 threads of a tensor-core instruction want them. Thread t holds, for each tile, column t//4 and 8 + t//4 at
rows 2(t%4), +1, +8, +9. Eight codes make a 32-bit word, nibble i of it being the i-th; before that, the eight are reordered
by (0, 2, 4, 6, 1, 3, 5, 7), so that masks take out two 16-bit lanes at once.

    B int32 [K/16, 2N]      word w of row r: codes 8w .. 8w+7 of the 16 rows of W that r stands for
    s       [G, N]          64 columns (32 with one group) stored in an order of their own
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowbit.formats._bits import byte_rows, pack_codes, unpack_codes

__all__ = ["marlin_codes", "marlin_scales"]

_TILE = 16


@functools.cache
def _order() -> Tensor:
    """Place in the stored block of 1024 -> place in four tiles of 16 x 16, row-major, one after the other."""
    order = []
    for thread in range(32):
        column, row = thread // 4, 2 * (thread % 4)
        for tile in range(4):
            fragment = [_TILE * _TILE * tile + _TILE * (row + r) + column + c for c in (0, 8) for r in (0, 1, 8, 9)]
            order += [fragment[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return torch.tensor(order)


@functools.cache
def _scale_order(single: bool) -> Tensor:
    """Place in the stored block of scales -> column."""
    if single:
        return torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
    return torch.tensor([i + 8 * j for i in range(8) for j in range(8)])


def marlin_codes(words: Tensor) -> Tensor:
    """packed uint8 [N, K/2] from int32 [K/16, 2N]; N a multiple of 64."""
    tiles, N = words.shape[0], words.shape[1] // 2
    codes = unpack_codes(byte_rows(words), 4, _TILE * N).view(-1, 1024)
    plain = torch.empty_like(codes)
    plain[:, _order()] = codes
    # [K tile, N tile, row, column] -> [N, K]
    by_row = plain.view(tiles, N // _TILE, _TILE, _TILE).permute(1, 3, 0, 2)
    return pack_codes(by_row.reshape(N, tiles * _TILE), 4)


def marlin_scales(scales: Tensor) -> Tensor:
    """[N, G] from [G, N]; N a multiple of 64."""
    order = _scale_order(scales.shape[0] == 1)
    stored = scales.reshape(-1, order.numel())
    plain = torch.empty_like(stored)
    plain[:, order] = stored
    return plain.view(scales.shape).t().contiguous()
