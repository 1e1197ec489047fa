"""The block types of GGUF: how the bytes of a block become codes, scales and offsets of the canonical weight.

A row of K weights is K / block blocks, one after the other. What a block says is kept exactly, and in as many bits:

    type     bytes / weights   canonical                          bits per weight
    Q4_0     d 16                int4 g32 fp16                    4.5
    Q4_1     d m 16              int4 g32 fp16 offset             5
    Q5_0     d qh 16             int5 g32 fp16                    5.5
    Q5_1     d m qh 16           int5 g32 fp16 offset             6
    Q8_0     d 32                int8 g32 fp16                    8.5
    Q2_K     sc qs d dmin        int2 g16 offset, u4 x fp16       2.625
    Q3_K     hmask qs sc d       int3 g16, i6 x fp16              3.4375
    Q4_K     d dmin sc qs        int4 g32 offset, u6 x fp16       4.5
    Q5_K     d dmin sc qh qs     int5 g32 offset, u6 x fp16       5.5
    Q6_K     ql qh sc d          int6 g16, i8 x fp16              6.5625
    IQ4_NL   d 16                iq4_nl g32 fp16                  4.5
    IQ4_XS   d sh sl qs          iq4_nl g32, i6 x fp16            4.25
    MXFP4    e 16                fp4  g32 e8m0                    4.25
    NVFP4    4 x e4m3 32         fp4  g16 e4m3                    4.5

A K-quant has a super block of 256 weights: an fp16 number that the scales of its groups, integers of 4 to 8 bits, are multiplied
by, and where there are minima a second one for those, negative here because offsets are added.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lowbit.scheme import Scheme

__all__ = ["PLAIN", "QUANTIZED", "TYPE_NAMES", "BlockType", "Decoded"]


class Decoded(NamedTuple):
    """B blocks: codes uint8 [B, block], scales and offsets [B, block / group_size], super scales and offsets [B, 1]; scales that
    are codes, and such offsets, are bytes."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    super_scales: Tensor | None = None
    super_offsets: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A quantized type.

    Args:
        name: as llama.cpp writes it: "Q4_K".
        block: weights in a block.
        nbytes: bytes of a block.
        text: the scheme of the canonical weight.
        decode: uint8 [B, nbytes] -> Decoded.
    """

    name: str
    block: int
    nbytes: int
    text: str
    decode: Callable[[Tensor], Decoded]

    @functools.cached_property
    def scheme(self) -> Scheme:
        """What the canonical tensors mean."""
        return Scheme.parse(self.text)


# -- parts of a block ------------------------------------------------------------------------------------------------------


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte: [B, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _fields(values: Tensor, bits: int, *shifts: int) -> Tensor:
    """`bits` bits of every byte [B, ..., n] at each shift: [B, ..., len(shifts), n]."""
    by = torch.tensor(shifts, dtype=torch.uint8).unsqueeze(-1)
    return (values.unsqueeze(-2) >> by) & ((1 << bits) - 1)


def _nibbles(values: Tensor) -> Tensor:
    """All low nibbles, then all high ones: [B, n] -> [B, 2n]."""
    return _fields(values, 4, 0, 4).flatten(-2)


def _bits(values: Tensor) -> Tensor:
    """Every bit of a row of bytes, least significant first: [B, n] -> [B, 8n]."""
    by = torch.arange(8, dtype=torch.uint8)
    return ((values.unsqueeze(-1) >> by) & 1).flatten(1)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits out of 12 bytes: [B, 8] each."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], 1)
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], 1)
    return scales, minima


# -- blocks of 32 ----------------------------------------------------------------------------------------------------------


def _q4_0(blocks: Tensor) -> Decoded:
    return Decoded(_nibbles(blocks[:, 2:]), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Decoded:
    return Decoded(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Decoded:
    return Decoded(_nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Decoded:
    return Decoded(_nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Decoded:
    return Decoded(blocks[:, 2:] ^ 0x80, _half(blocks, 0))  # two's complement to excess 128


def _mxfp4(blocks: Tensor) -> Decoded:
    return Decoded(_nibbles(blocks[:, 1:]), blocks[:, 0:1].contiguous().view(torch.float8_e8m0fnu))


def _nvfp4(blocks: Tensor) -> Decoded:
    scales = blocks[:, 0:4].contiguous()
    if bool((scales > 0x7F).any()):
        raise ValueError(f"an NVFP4 scale is 0x{int(scales.max()):02x}; scales are unsigned, below 0x80")
    scales[scales == 0x7F] = 0  # the NaN of E4M3 stands for 0 here
    return Decoded(_nibbles(blocks[:, 4:].reshape(-1, 4, 8)).flatten(1), scales.view(torch.float8_e4m3fn))


# -- blocks of 256 ---------------------------------------------------------------------------------------------------------


def _q2_low(values: Tensor) -> Tensor:
    """Two bits of each weight: 128 weights are 32 bytes at four shifts. [B, 64] -> [B, 2, 4, 32]."""
    return _fields(values.reshape(-1, 2, 32), 2, 0, 2, 4, 6)


def _q2_k(blocks: Tensor) -> Decoded:
    scales = blocks[:, 0:16]
    codes = _q2_low(blocks[:, 16:80]).flatten(1)
    return Decoded(codes, scales & 15, scales >> 4, _half(blocks, 80), -_half(blocks, 82))


def _q3_k(blocks: Tensor) -> Decoded:
    high = _bit_planes(blocks[:, 0:32]).reshape(-1, 2, 4, 32)
    codes = (_q2_low(blocks[:, 32:96]) | (high << 2)).flatten(1)
    packed = blocks[:, 96:108]
    low = torch.cat([packed[:, 0:8] & 15, packed[:, 0:8] >> 4], 1)
    scales = low | (_fields(packed[:, 8:12], 2, 0, 2, 4, 6).flatten(1) << 4)
    return Decoded(codes, scales, None, _half(blocks, 108))


def _bit_planes(values: Tensor) -> Tensor:
    """Bit 0 of every byte, then bit 1 of every byte, ...: [B, n] -> [B, 8, n]."""
    return _fields(values, 1, 0, 1, 2, 3, 4, 5, 6, 7)


def _k_affine(blocks: Tensor) -> tuple[Tensor, ...]:
    return *_k_scales(blocks[:, 4:16]), _half(blocks, 0), -_half(blocks, 2)


def _q4_k(blocks: Tensor) -> Decoded:
    codes = _nibbles(blocks[:, 16:144].reshape(-1, 4, 32)).flatten(1)
    return Decoded(codes, *_k_affine(blocks))


def _q5_k(blocks: Tensor) -> Decoded:
    low = _nibbles(blocks[:, 48:176].reshape(-1, 4, 32)).flatten(1)
    return Decoded(low | (_bit_planes(blocks[:, 16:48]).flatten(1) << 4), *_k_affine(blocks))


def _q6_k(blocks: Tensor) -> Decoded:
    low = _nibbles(blocks[:, 0:128].reshape(-1, 2, 64)).flatten(1)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2, 0, 2, 4, 6).flatten(1)
    scales = blocks[:, 192:208] ^ 0x80  # two's complement to excess 128
    return Decoded(low | (high << 4), scales, None, _half(blocks, 208))


def _iq4_xs(blocks: Tensor) -> Decoded:
    high = _fields(blocks[:, 2:4], 2, 0, 2, 4, 6).transpose(1, 2).flatten(1)
    low = _fields(blocks[:, 4:8], 4, 0, 4).transpose(1, 2).flatten(1)
    codes = _nibbles(blocks[:, 8:136].reshape(-1, 8, 16)).flatten(1)
    return Decoded(codes, low | (high << 4), None, _half(blocks, 0))


#: GGUF's number of a type -> the type.
QUANTIZED: Final[dict[int, BlockType]] = {
    2: BlockType("Q4_0", 32, 18, "int4-g32-fp16", _q4_0),
    3: BlockType("Q4_1", 32, 20, "int4-g32-offset-fp16", _q4_1),
    6: BlockType("Q5_0", 32, 22, "int5-g32-fp16", _q5_0),
    7: BlockType("Q5_1", 32, 24, "int5-g32-offset-fp16", _q5_1),
    8: BlockType("Q8_0", 32, 34, "int8-g32-fp16", _q8_0),
    10: BlockType("Q2_K", 256, 84, "int2-g16-offset-u4-x16fp16", _q2_k),
    11: BlockType("Q3_K", 256, 110, "int3-g16-i6-x16fp16", _q3_k),
    12: BlockType("Q4_K", 256, 144, "int4-g32-offset-u6-x8fp16", _q4_k),
    13: BlockType("Q5_K", 256, 176, "int5-g32-offset-u6-x8fp16", _q5_k),
    14: BlockType("Q6_K", 256, 210, "int6-g16-i8-x16fp16", _q6_k),
    20: BlockType("IQ4_NL", 32, 18, "iq4_nl-g32-fp16", _q4_0),
    23: BlockType("IQ4_XS", 256, 136, "iq4_nl-g32-i6-x8fp16", _iq4_xs),
    39: BlockType("MXFP4", 32, 17, "mxfp4", _mxfp4),
    40: BlockType("NVFP4", 64, 36, "fp4-g16-e4m3", _nvfp4),
}

#: Types that are not quantized.
PLAIN: Final[dict[int, torch.dtype]] = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}

#: Names of the types that exist and are not read, for messages.
TYPE_NAMES: Final[dict[int, str]] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 41: "Q1_0",
}  # fmt: skip
