"""GGUF written and decoded one value at a time, as the format is described: what the readers are compared with."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

F32 = np.float32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

#: Name -> number of the type, weights in a block, bytes of a block.
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136), "I32": (26, 1, 4),
    "BF16": (30, 1, 2), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36),
}  # fmt: skip
QUANTIZED = tuple(name for name, (_, block, _) in TYPES.items() if block > 1)
#: Where fp16 numbers are in a block.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (), "NVFP4": (),
}  # fmt: skip


# -- decoding, one block of bytes to a list of fp32 ------------------------------------------------------------------------


def _half(b: bytes, at: int) -> np.float32:
    return F32(np.frombuffer(b[at : at + 2], "<f2")[0])


def _nibble(b: bytes, at: int, j: int, half: int = 16) -> int:
    """Nibble j of a run of 2 * half: low nibbles first."""
    return b[at + j % half] >> (4 * (j // half)) & 15


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _e2m1(code: int) -> np.float32:
    return F32(-E2M1[code & 7] if code & 8 else E2M1[code])


def _q4_0(b: bytes) -> list[np.float32]:
    return [_half(b, 0) * F32(_nibble(b, 2, j) - 8) for j in range(32)]


def _q4_1(b: bytes) -> list[np.float32]:
    return [_half(b, 0) * F32(_nibble(b, 4, j)) + _half(b, 2) for j in range(32)]


def _q5_0(b: bytes) -> list[np.float32]:
    high = int.from_bytes(b[2:6], "little")
    return [_half(b, 0) * F32((_nibble(b, 6, j) | (high >> j & 1) << 4) - 16) for j in range(32)]


def _q5_1(b: bytes) -> list[np.float32]:
    high = int.from_bytes(b[4:8], "little")
    return [_half(b, 0) * F32(_nibble(b, 8, j) | (high >> j & 1) << 4) + _half(b, 2) for j in range(32)]


def _q8_0(b: bytes) -> list[np.float32]:
    return [_half(b, 0) * F32(_signed(b[2 + j])) for j in range(32)]


def _two_bits(b: bytes, at: int, k: int) -> int:
    return b[at + 32 * (k // 128) + k % 32] >> (2 * (k % 128 // 32)) & 3


def _q2_k(b: bytes) -> list[np.float32]:
    d, dmin = _half(b, 80), _half(b, 82)
    return [d * F32(b[k // 16] & 15) * F32(_two_bits(b, 16, k)) - dmin * F32(b[k // 16] >> 4) for k in range(256)]


def _q3_k(b: bytes) -> list[np.float32]:
    s = b[96:108]
    made = []
    for k in range(256):
        j = k // 16
        scale = (s[j] & 15 if j < 8 else s[j - 8] >> 4) | (s[8 + j % 4] >> 2 * (j // 4) & 3) << 4
        high = b[k % 32] >> (4 * (k // 128) + k % 128 // 32) & 1
        made.append(_half(b, 108) * F32(scale - 32) * F32(_two_bits(b, 32, k) - (0 if high else 4)))
    return made


def _six_bits(s: bytes, j: int) -> tuple[int, int]:
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4


def _k_affine(b: bytes, k: int, q: int) -> np.float32:
    scale, low = _six_bits(b[4:16], k // 32)
    return _half(b, 0) * F32(scale) * F32(q) - _half(b, 2) * F32(low)


def _q4_k(b: bytes) -> list[np.float32]:
    return [_k_affine(b, k, _nibble(b, 16 + 32 * (k // 64), k % 64, 32)) for k in range(256)]


def _q5_k(b: bytes) -> list[np.float32]:
    made = []
    for k in range(256):
        high = b[16 + k % 32] >> (k // 32) & 1
        made.append(_k_affine(b, k, _nibble(b, 48 + 32 * (k // 64), k % 64, 32) | high << 4))
    return made


def _q6_k(b: bytes) -> list[np.float32]:
    made = []
    for k in range(256):
        ql, qh, quarter, low = 64 * (k // 128), 128 + 32 * (k // 128), k % 128 // 32, k % 32
        q = b[ql + low + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15 | (b[qh + low] >> 2 * quarter & 3) << 4
        made.append(_half(b, 208) * F32(_signed(b[192 + k // 16])) * F32(q - 32))
    return made


def _iq4_nl(b: bytes) -> list[np.float32]:
    return [_half(b, 0) * F32(IQ4[_nibble(b, 2, j)]) for j in range(32)]


def _iq4_xs(b: bytes) -> list[np.float32]:
    made = []
    for k in range(256):
        g = k // 32
        scale = b[4 + g // 2] >> 4 * (g % 2) & 15 | (int.from_bytes(b[2:4], "little") >> 2 * g & 3) << 4
        made.append(_half(b, 0) * F32(scale - 32) * F32(IQ4[_nibble(b, 8 + 16 * g, k % 32)]))
    return made


def _mxfp4(b: bytes) -> list[np.float32]:
    return [F32(2.0 ** (b[0] - 127) * float(_e2m1(_nibble(b, 1, j)))) for j in range(32)]


def _nvfp4(b: bytes) -> list[np.float32]:
    made = []
    for k in range(64):
        exponent, fraction = b[k // 16] >> 3, b[k // 16] & 7
        scale = fraction * 2.0**-9 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        scale = 0.0 if b[k // 16] == 0x7F else scale
        made.append(F32(scale) * _e2m1(_nibble(b, 4 + 8 * (k // 16), k % 16, 8)))
    return made


DECODE: dict[str, Callable[[bytes], list[np.float32]]] = {
    name: globals()[f"_{name.lower()}"] for name in QUANTIZED
}  # fmt: skip


def decode(name: str, data: bytes, shape: Sequence[int]) -> np.ndarray:
    """The fp32 weights of a quantized tensor."""
    _, _, nbytes = TYPES[name]
    blocks = [DECODE[name](data[at : at + nbytes]) for at in range(0, len(data), nbytes)]
    return np.array(blocks, np.float32).reshape(shape)


def random_blocks(name: str, count: int, rng: np.random.Generator) -> bytes:
    """Blocks of random bytes whose scales are finite."""
    blocks = rng.integers(0, 256, (count, TYPES[name][2]), dtype=np.uint8)
    for at in HALVES[name]:
        blocks[:, at : at + 2] = (rng.standard_normal((count, 1)) * 2.0**-6).astype("<f2").view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(0, 250, count)
    if name == "NVFP4":
        blocks[:, 0:4] &= 0x7F
    return blocks.tobytes()


# -- writing ---------------------------------------------------------------------------------------------------------------

Tensor = tuple[str, Sequence[int], bytes]
_CODES = {"u8": (0, "B"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q")}


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """A value with its type; (code, number) for a number of another type than u32, i32, f32 or bool."""
    if isinstance(item, tuple):
        number, code = _CODES[item[0]]
        return struct.pack(f"<I{code}", number, item[1])
    if isinstance(item, (str, bytes)):
        return struct.pack("<I", 8) + text(item)
    if isinstance(item, list):
        parts = [value(one) for one in item]
        return (
            struct.pack("<I", 9)
            + (parts[0][:4] if parts else bytes(4))
            + struct.pack("<Q", len(parts))
            + b"".join(part[4:] for part in parts)
        )
    kind = "bool" if isinstance(item, bool) else "f32" if isinstance(item, float) else "u32"
    return value((kind, item))


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], version: int = 3, alignment: int = 32
) -> bytes:
    """A file; every tensor is (type, shape with the outermost dimension first, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, item in metadata.items():
        head += text(key) + value(item)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        number = TYPES[kind][0] if kind in TYPES else int(kind)
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, len(data))
        data += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + data


def block_tensor(name: str, shape: Sequence[int], rng: np.random.Generator) -> Tensor:
    """A quantized tensor of random blocks."""
    return name, shape, random_blocks(name, int(np.prod(shape)) // TYPES[name][1], rng)


def float_tensor(shape: Sequence[int], rng: np.random.Generator, kind: str = "F32") -> Tensor:
    """A tensor of random numbers."""
    return kind, shape, rng.standard_normal(shape).astype({"F32": "<f4", "F16": "<f2"}[kind]).tobytes()


#: Metadata of a small Llama.
LLAMA = {"general.architecture": "llama", "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], **options: int) -> Path:
    """A file, written to `path`."""
    path.write_bytes(gguf_bytes(metadata, tensors, **options))
    return path
