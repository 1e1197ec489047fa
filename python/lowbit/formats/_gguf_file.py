"""Reading GGUF files, with every length and offset checked before it is used.

Why not a memory map: a file cut short while it is mapped kills the process. Rows of a tensor are read when they are asked
for, so that no more of a file is in memory than what is being worked on.

    "GGUF" | u32 version | u64 tensors | u64 keys | keys and values | name, shape, type, offset of each tensor |
    padding | tensors, each padded to `general.alignment` bytes

All numbers are little endian. Dimensions stand in the order of memory: K first.
"""

from __future__ import annotations

import array
import dataclasses
import math
import os
import struct
import sys
import weakref
from collections.abc import Mapping
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from lowbit import _safetensors
from lowbit.errors import FormatError
from lowbit.formats._gguf_blocks import PLAIN, QUANTIZED, TYPE_NAMES, BlockType

__all__ = ["MAGIC", "GGUFFile", "GGUFTensor"]

MAGIC: Final = b"GGUF"
# Several times the largest vocabulary that models have: a longer header is an attack or a mistake.
_MAX_HEADER: Final = 128 << 20
_MAX_DIM: Final = 1 << 40  # kept far from 2^63, as in _safetensors
_MAX_NAME: Final = 1024
_MAX_ALIGNMENT: Final = 1 << 20
_CHUNK: Final = 1 << 20

_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9
# Type of a value -> its code in struct and in array.
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file: what it is, and where its bytes are.

    Args:
        name: in the file.
        type: a BlockType, or the dtype of a tensor that is not quantized.
        shape: outermost dimension first, as everywhere in torch.
        begin: of its bytes, from the start of the file.
    """

    name: str
    type: BlockType | torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def rows(self) -> int:
        """Rows of K weights, over all leading dimensions."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        if isinstance(self.type, BlockType):
            return self.shape[-1] // self.type.block * self.type.nbytes
        return self.shape[-1] * self.type.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return self.rows * self.row_bytes

    @property
    def type_name(self) -> str:
        """ "Q4_K", or "float32"."""
        return self.type.name if isinstance(self.type, BlockType) else str(self.type).removeprefix("torch.")


class _Cursor:
    """Reads the header front to back, never past what the file has."""

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self._file = file
        self._unread = min(size, _MAX_HEADER)
        self._limited = size > _MAX_HEADER
        self._buffer = b""
        self._at = 0
        self.position = 0
        self.where = where

    @property
    def left(self) -> int:
        """Bytes that can still be taken."""
        return len(self._buffer) - self._at + self._unread

    def take(self, count: int) -> bytes:
        """The next bytes."""
        end = self._at + count
        if end > len(self._buffer):
            self._fill(count)
            end = count
        part = self._buffer[self._at : end]
        self._at = end
        self.position += count
        return part

    def _fill(self, count: int) -> None:
        if count > self.left:
            what = f"more than {_MAX_HEADER} bytes" if self._limited else f"{count} bytes where {self.left} are left"
            raise FormatError(f"{self.where}: the header takes {what}")
        rest = self._buffer[self._at :]
        more = min(self._unread, max(_CHUNK, count - len(rest)))
        self._buffer = rest + _safetensors._read_exactly(self._file, more, self.where)
        self._unread -= more
        self._at = 0

    def number(self, code: str) -> Any:
        """A number, by its code in struct."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, least: int, what: str) -> int:
        """A u64 that counts things of at least `least` bytes each, which have to fit in what is left."""
        value = int(self.number("Q"))
        if value > self.left // least:
            raise FormatError(f"{self.where}: {value} {what} do not fit in the {self.left} bytes that are left")
        return value

    def name(self, what: str) -> str:
        """A string that has to be short and UTF-8."""
        raw = self.take(self.count(1, f"bytes of {what}"))
        if not raw or len(raw) > _MAX_NAME:
            raise FormatError(f"{self.where}: {what} has {len(raw)} bytes; it must have 1..{_MAX_NAME}")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.where}: {what} {raw[:80]!r} is not UTF-8") from None

    def text(self) -> str:
        """A string of metadata: tokens are not always UTF-8, and what is not is shown as \\xff."""
        return self.take(self.count(1, "bytes of a string")).decode("utf-8", "backslashreplace")

    def value(self, kind: int, key: str) -> Any:
        """A value of metadata; arrays of numbers come as array.array, others as lists."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _BOOL:
            return self._bools(1, key)[0]
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(key)
        raise FormatError(f"{self.where}: {key!r} has a value of unknown type {kind}")

    def _array(self, key: str) -> Any:
        kind = self.number("I")
        if kind in _NUMBERS:
            code = _NUMBERS[kind]
            numbers = array.array(code)
            numbers.frombytes(self.take(self.count(numbers.itemsize, f"numbers of {key!r}") * numbers.itemsize))
            if sys.byteorder == "big":
                numbers.byteswap()
            return numbers
        if kind == _BOOL:
            return self._bools(self.count(1, f"booleans of {key!r}"), key)
        if kind == _STRING:
            return self._texts(self.count(8, f"strings of {key!r}"))
        what = "arrays" if kind == _ARRAY else f"unknown type {kind}"
        raise FormatError(f"{self.where}: {key!r} is an array of {what}")

    def _texts(self, count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            found.append(self.text())  # may read on
            # A vocabulary is hundreds of thousands of strings: those that are in the buffer are taken without a call.
            buffer, start = self._buffer, self._at
            at = start
            while len(found) < count and at + 8 <= len(buffer):
                end = at + 8 + int.from_bytes(buffer[at : at + 8], "little")
                if end > len(buffer):
                    break
                found.append(buffer[at + 8 : end].decode("utf-8", "backslashreplace"))
                at = end
            self._at = at
            self.position += at - start
        return found

    def _bools(self, count: int, key: str) -> list[bool]:
        raw = self.take(count)
        if raw.strip(b"\0\1"):
            raise FormatError(f"{self.where}: {key!r} holds a boolean that is neither 0 nor 1")
        return [byte == 1 for byte in raw]


def _parse_start(cursor: _Cursor) -> tuple[int, int]:
    """Counts of tensors and of keys."""
    magic, version = cursor.take(4), cursor.number("I")
    if magic != MAGIC:
        raise FormatError(f"{cursor.where}: begins with {magic!r}, a GGUF file begins with {MAGIC!r}")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
        what = "big endian" if swapped in (2, 3) else f"GGUF version {version}"
        raise FormatError(f"{cursor.where}: {what}; versions 2 and 3, little endian, are read")
    tensors = cursor.count(1 + 8 + 4 + 8 + 4 + 8, "tensors")
    return tensors, cursor.count(1 + 8 + 4 + 1, "keys")


def _parse_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], int]:
    """Every key with its value, and the alignment."""
    found: dict[str, Any] = {}
    alignment = 32
    for _ in range(count):
        key = cursor.name("a key")
        kind = cursor.number("I")
        if key in found:
            raise FormatError(f"{cursor.where}: key {key[:200]!r} appears twice")
        found[key] = cursor.value(kind, key[:200])
        if key == "general.alignment":
            alignment = found[key]
            if kind != 4 or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
                raise FormatError(
                    f"{cursor.where}: general.alignment is {str(alignment)[:80]}, it must be a power of two"
                )
    return found, alignment


def _parse_tensor(cursor: _Cursor) -> GGUFTensor:
    """A tensor whose `begin` counts from the start of the data."""
    name = cursor.name("a tensor's name")
    label = f"{cursor.where}: tensor {name[:200]!r}"
    dims = cursor.number("I")
    if not 1 <= dims <= 4:
        raise FormatError(f"{label} has {dims} dimensions; it must have 1..4")
    shape = tuple(int(cursor.number("Q")) for _ in range(dims))[::-1]
    if not all(0 < size <= _MAX_DIM for size in shape):
        raise FormatError(f"{label} has shape {list(shape)}")
    kind, offset = cursor.number("I"), cursor.number("Q")
    found: BlockType | torch.dtype | None = QUANTIZED.get(kind) or PLAIN.get(kind)
    if found is None:
        readable = ", ".join(block.name for block in QUANTIZED.values())
        name_of = TYPE_NAMES.get(kind, "unknown")
        raise FormatError(f"{label} has type {kind} ({name_of}), which is not read; types that are: {readable}")
    if isinstance(found, BlockType) and shape[-1] % found.block:
        raise FormatError(f"{label}: K={shape[-1]} is not a multiple of {found.block}, the block of {found.name}")
    return GGUFTensor(name, found, shape, offset)


def _place(tensors: list[GGUFTensor], header: int, alignment: int, size: int, where: str) -> dict[str, GGUFTensor]:
    """The tensors with `begin` counted from the start of the file; they must follow each other without a gap."""
    data = -(-header // alignment) * alignment
    placed: dict[str, GGUFTensor] = {}
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
        label = f"{where}: tensor {tensor.name[:200]!r}"
        if tensor.name in placed:
            raise FormatError(f"{label} appears twice")
        if tensor.begin != position:
            raise FormatError(f"{label} is at {tensor.begin}, the tensor before it ends at {position}")
        end = position + tensor.nbytes
        if data + end > size:
            raise FormatError(f"{label} ends at {data + end}, the file has {size} bytes: truncated")
        placed[tensor.name] = dataclasses.replace(tensor, begin=data + position)
        position = -(-end // alignment) * alignment
    if tensors and size > data + position:
        raise FormatError(f"{where}: {size - data - position} bytes follow the last tensor")
    return placed


class GGUFFile:
    """A GGUF file opened for reading rows of tensors. Its header has been checked.

    Args:
        path: the file.

    Attributes:
        metadata: every key with its value: numbers, bools, strings, array.array of numbers, lists of bools and strings.
        tensors: name -> tensor, in the order of the file.

    Raises:
        ArtifactError: the file is missing or cannot be read.
        FormatError: it is not a well-formed GGUF file, or has a tensor of a type that is not read.

    Example:
        >>> file = GGUFFile("model.gguf")
        >>> file.metadata["general.architecture"], file.tensors["output.weight"].type_name
        ('llama', 'Q6_K')
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = _safetensors._open_regular(path)
        # Whoever drops the object without closing it does not leave the file open.
        self.close = weakref.finalize(self, self._file.close)
        try:
            size = os.fstat(self._file.fileno()).st_size
            cursor = _Cursor(self._file, size, self.path)
            tensors, keys = _parse_start(cursor)
            self.metadata: Mapping[str, Any]
            self.metadata, alignment = _parse_metadata(cursor, keys)
            infos = [_parse_tensor(cursor) for _ in range(tensors)]
            self.tensors: Mapping[str, GGUFTensor] = _place(infos, cursor.position, alignment, size, self.path)
        except BaseException:
            self.close()
            raise

    def read_rows(self, tensor: GGUFTensor, begin: int, count: int) -> Tensor:
        """The bytes of some rows: uint8 [count, row_bytes], in memory of their own."""
        size = tensor.row_bytes
        made = torch.empty(count, size, dtype=torch.uint8)
        view = _safetensors.tensor_bytes(made)
        self._file.seek(tensor.begin + begin * size)
        done = 0
        while done < len(view):
            read = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not read:
                raise FormatError(
                    f"{self.path}: tensor {tensor.name[:200]!r}: truncated, {len(view) - done} bytes are missing"
                )
            done += read
        return made

    def read(self, tensor: GGUFTensor) -> Tensor:
        """A tensor that is not quantized, in memory of its own."""
        if isinstance(tensor.type, BlockType):
            raise ValueError(f"{tensor.name} is {tensor.type_name}, not a plain tensor")
        return self.read_rows(tensor, 0, tensor.rows).reshape(-1).view(tensor.type).reshape(tensor.shape)
