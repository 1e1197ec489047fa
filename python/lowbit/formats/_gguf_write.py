"""Writing GGUF files: header, then tensors one after the other. What a file looks like is drawn in _gguf_file.py."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from lowbit import _artifact, _safetensors
from lowbit.formats._gguf_file import _NUMBERS, MAGIC, _Cursor, _parse_start

__all__ = ["PlannedBlock", "number", "raw_metadata", "text", "write_gguf"]

_ALIGNMENT: Final = 32
_BOOL, _STRING, _ARRAY = 7, 8, 9
_KINDS: Final = {"u32": 4, "i32": 5, "f32": 6, "u64": 10}


@dataclasses.dataclass(frozen=True)
class PlannedBlock:
    """A tensor to be written.

    Args:
        name: in the file.
        kind: number of its type.
        shape: outermost dimension first.
        nbytes: of its data.
        read: gives its bytes: a contiguous tensor of any dtype.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Tensor]


# -- values: bytes with the number of their type in front ------------------------------------------------------------------


def number(kind: str, value: float) -> bytes:
    """A "u32", "i32", "f32" or "u64"."""
    code = _KINDS[kind]
    return struct.pack(f"<I{_NUMBERS[code]}", code, value)


def flag(value: bool) -> bytes:
    """A bool."""
    return struct.pack("<I?", _BOOL, value)


def text(value: str) -> bytes:
    """A string."""
    return struct.pack("<I", _STRING) + _string(value)


def texts(values: Sequence[str]) -> bytes:
    """An array of strings."""
    return struct.pack("<IIQ", _ARRAY, _STRING, len(values)) + b"".join(map(_string, values))


def numbers(kind: str, values: Sequence[float]) -> bytes:
    """An array of numbers."""
    code = _KINDS[kind]
    return struct.pack(f"<IIQ{len(values)}{_NUMBERS[code]}", _ARRAY, code, len(values), *values)


def _string(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def raw_metadata(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Every key of a file with its value as it stands there, type in front: written again it is the same to the byte."""
    with _safetensors._open_regular(path) as file:
        cursor = _Cursor(file, os.fstat(file.fileno()).st_size, os.fspath(path))
        _, keys = _parse_start(cursor)
        places: dict[str, tuple[int, int]] = {}
        for _ in range(keys):
            key = cursor.name("a key")
            begin = cursor.position
            cursor.value(cursor.number("I"), key[:200])
            places[key] = (begin, cursor.position)
        found = {}
        for key, (begin, end) in places.items():
            file.seek(begin)
            found[key] = _safetensors._read_exactly(file, end - begin, os.fspath(path))
        return found


# -- the file --------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, metadata: Mapping[str, bytes], tensors: Sequence[PlannedBlock]) -> None:
    """Write a file of version 3; tensors are read one at a time, in their order.

    Raises:
        ValueError: two tensors share a name, or one gives another number of bytes than it announced.
    """
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"tensor {twice!r} is to be written twice")
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    head += [_string(key) + value for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        head.append(_info(tensor, offset))
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = b"".join(head)
    header += bytes(-len(header) % _ALIGNMENT)
    with open(path, "xb", buffering=0) as file:
        _artifact._write_at(file.fileno(), memoryview(header), 0)
        at = len(header)
        for tensor in tensors:
            made = tensor.read()  # held while its bytes are looked at
            data = _safetensors.tensor_bytes(made)
            if len(data) != tensor.nbytes:
                raise ValueError(f"{tensor.name} was announced with {tensor.nbytes} bytes, got {len(data)}")
            _artifact._write_at(file.fileno(), data, at)
            padding = bytes(-len(data) % _ALIGNMENT)
            _artifact._write_at(file.fileno(), memoryview(padding), at + len(data))
            at += len(data) + len(padding)
        os.fsync(file.fileno())


def _info(tensor: PlannedBlock, offset: int) -> bytes:
    dims = tensor.shape[::-1]
    sizes: tuple[Any, ...] = (*dims, tensor.kind, offset)
    return _string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *sizes)
