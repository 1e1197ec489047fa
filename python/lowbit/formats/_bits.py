"""Codes of b bits as bytes and back: stream(b), a dense little-endian bit stream along the last dimension.

    element i occupies bits [i*b, i*b + b) of its row, least significant bit first

Most formats keep exactly this in words of 16 or 32 bits, whose bytes in a file are those of the stream: nothing has to be
unpacked to read them, only transposed. The functions here are for what is left: interleaved nibbles, permuted columns,
zeros packed the other way.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["byte_rows", "clear_tail", "pack_codes", "permute_codes", "row_bytes", "unpack_codes"]

# Codes worked on at a time: enough for torch to be fast, little beside a weight.
_CHUNK: Final = 1 << 24


def byte_rows(words: Tensor) -> Tensor:
    """Rows of words [R, C] as the bytes they are in a file: uint8 [R, C * itemsize]."""
    # A transposed tensor with a dimension of 1 calls itself contiguous and still cannot be viewed as bytes.
    if not words.is_contiguous() or words.stride(-1) != 1:
        words = words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8)


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return -(-count * bits // 8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row.

    Args:
        packed: uint8 [R, B], B >= ceil(count * bits / 8); bits 1..8.

    Returns:
        uint8 [R, count].

    Example:
        >>> unpack_codes(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4, 4)
        tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    """
    rows = packed.shape[0]
    packed = packed[:, : row_bytes(count, bits)]
    if bits == 8:
        return packed.contiguous()
    if 8 % bits == 0:
        per = 8 // bits
        parts = [(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(per)]
        return torch.stack(parts, -1).reshape(rows, -1)[:, :count].contiguous()
    # Eight codes fill `bits` bytes: one 64-bit word each.
    groups = -(-count // 8)
    padded = packed.new_zeros(rows, groups * bits)
    padded[:, : packed.shape[1]] = packed
    bytes_of = padded.view(rows, groups, bits)
    words = torch.zeros(rows, groups, dtype=torch.int64, device=packed.device)
    for i in range(bits):
        words |= bytes_of[:, :, i].long() << (8 * i)
    parts = [((words >> (bits * i)) & ((1 << bits) - 1)).to(torch.uint8) for i in range(8)]
    return torch.stack(parts, -1).reshape(rows, -1)[:, :count].contiguous()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_codes`; bits past the last code are 0.

    Args:
        codes: uint8 [R, C], every value below 2^bits.

    Returns:
        uint8 [R, ceil(C * bits / 8)].

    Example:
        >>> pack_codes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
        tensor([[33,  3]], dtype=torch.uint8)
    """
    rows, count = codes.shape
    size = row_bytes(count, bits)
    if bits == 8:
        return codes.contiguous()
    per = 8 // bits if 8 % bits == 0 else 8
    groups = -(-count // per)
    if groups * per != count:
        padded = codes.new_zeros(rows, groups * per)
        padded[:, :count] = codes
        codes = padded
    grouped = codes.view(rows, groups, per)
    if 8 % bits == 0:
        packed = torch.zeros(rows, groups, dtype=torch.uint8, device=codes.device)
        for i in range(per):
            packed |= grouped[:, :, i] << (bits * i)
        return packed
    words = torch.zeros(rows, groups, dtype=torch.int64, device=codes.device)
    for i in range(per):
        words |= grouped[:, :, i].long() << (bits * i)
    parts = [(words >> (8 * i)).to(torch.uint8) for i in range(bits)]
    return torch.stack(parts, -1).reshape(rows, -1)[:, :size].contiguous()


def clear_tail(packed: Tensor, bits: int, count: int) -> Tensor:
    """Set the bits past the last code of every row to 0, in place: equal weights are to have equal bytes."""
    if rest := count * bits % 8:
        packed[:, -1] &= (1 << rest) - 1
    return packed


def permute_codes(packed: Tensor, bits: int, perm: Tensor) -> Tensor:
    """Packed rows with column perm[j] at place j: uint8 [N, ceil(K*bits/8)] for perm [K]."""
    count = perm.numel()
    step = max(1, _CHUNK // count)
    made = torch.empty_like(packed)
    for begin in range(0, packed.shape[0], step):
        codes = unpack_codes(packed[begin : begin + step], bits, count)
        made[begin : begin + step] = pack_codes(codes[:, perm], bits)
    return made
