"""Reading and writing safetensors, with every length and offset checked before it is used.

Why not the safetensors package: its writer orders metadata by a random hash, so that equal tensors give unequal files;
its reader maps the file, and a file cut short while it is mapped kills the process. Here a file is read once, hashed on
the way, and never mapped. The files are ordinary safetensors files in both directions.

    u64 little endian: H | H bytes of JSON, padded with spaces | tensors, end to end, in any order, nothing between
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from lowbit.errors import ArtifactError, FormatError

__all__ = ["SafetensorsFile", "TensorInfo", "parse_json", "plan_file", "read_verified", "tensor_bytes"]

# The bound of the reference reader: a longer header is an attack or a mistake.
_MAX_HEADER: Final = 100_000_000
# Kept far from 2^63, so that no product of a hostile shape and an item size can overflow inside torch.
_MAX_DIM: Final = 1 << 40
_CHUNK: Final = 1 << 24

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: dtype, shape, and where its bytes are, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype ("BF16"); ValueError when it has none."""
    if dtype not in _NAMES:
        raise ValueError(f"{dtype} cannot be stored in a safetensors file")
    return _NAMES[dtype]


# -- JSON ----------------------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:80]!r} appears twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from hostile bytes: UTF-8 only, no repeated keys, no NaN; FormatError names `where`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise FormatError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


# -- header --------------------------------------------------------------------------------------------------------------


def _is_count(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _parse_tensor(name: str, entry: Any, data_size: int, where: str) -> TensorInfo:
    label = f"{where}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{label} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(f"{label} has unknown dtype {str(dtype)[:80]!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(_is_count(d, _MAX_DIM) for d in shape):
        raise FormatError(f"{label} has an invalid shape {str(shape)[:200]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(o, data_size) for o in offsets):
        raise FormatError(f"{label} has offsets {str(offsets)[:200]} outside the {data_size} bytes of data")
    info = TensorInfo(_DTYPES[dtype], tuple(shape), offsets[0], offsets[1])
    if info.begin + info.nbytes != info.end:
        raise FormatError(
            f"{label}: {dtype} {shape} takes {info.nbytes} bytes, the offsets {offsets} span another number"
        )
    return info


def _parse_header(raw: bytes, data_size: int, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    header = parse_json(raw, f"{where}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{where}: __metadata__ must map strings to strings")
    tensors = {name: _parse_tensor(name, entry, data_size, where) for name, entry in header.items()}
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise FormatError(
                f"{where}: tensor {name[:200]!r} begins at {info.begin}, the one before it ends at {position}"
            )
        position = info.end
    if position != data_size:
        raise FormatError(f"{where}: tensors take {position} bytes, the file holds {data_size}: truncated or padded")
    return tensors, metadata


def _open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise FormatError(f"{os.fspath(path)}: not a regular file")
        return open(path, "rb", buffering=0)  # the caller closes it
    except FileNotFoundError:
        raise ArtifactError(f"{os.fspath(path)}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, FormatError):
            raise
        raise ArtifactError(f"{os.fspath(path)}: cannot be read: {error}") from None


def _read_exactly(file: BinaryIO, size: int, where: str) -> bytes:
    parts = []
    while size:
        part = file.read(min(size, _CHUNK))
        if not part:
            raise FormatError(f"{where}: truncated, {size} bytes are missing")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _read_header(file: BinaryIO, where: str) -> tuple[dict[str, TensorInfo], dict[str, str], bytes]:
    """Tensors, metadata, and the bytes up to the data (for hashing)."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise FormatError(f"{where}: {size} bytes is too short for a safetensors file")
    prefix = _read_exactly(file, 8, where)
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, _MAX_HEADER):
        raise FormatError(f"{where}: the header claims {length} bytes, the file has {size - 8} after its length")
    raw = _read_exactly(file, length, where)
    tensors, metadata = _parse_header(raw, size - 8 - length, where)
    return tensors, metadata, prefix + raw


# -- bytes <-> tensors -----------------------------------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied. Keep the tensor alive while the view is used."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"need a contiguous CPU tensor, got {tensor.device} with strides {tensor.stride()}")
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    # Through ctypes, because Tensor.numpy() knows neither bfloat16 nor fp8 and needs numpy installed.
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


def _read_tensor(file: BinaryIO, info: TensorInfo, where: str, digest: Any = None) -> Tensor:
    tensor = torch.empty(info.shape, dtype=info.dtype)
    view = tensor_bytes(tensor)
    done = 0
    while done < len(view):
        part = view[done : done + _CHUNK]
        count = file.readinto(part)  # type: ignore[attr-defined]
        if not count:
            raise FormatError(f"{where}: truncated, {len(view) - done} bytes are missing")
        if digest is not None:
            digest.update(part[:count])
        done += count
    if info.dtype == torch.bool and len(view) and int(tensor.view(torch.uint8).max()) > 1:
        raise FormatError(f"{where}: a boolean tensor holds a byte that is neither 0 nor 1")
    return tensor


class SafetensorsFile:
    """A safetensors file opened for reading one tensor at a time. Its header has been checked.

    Args:
        path: the file.

    Raises:
        ArtifactError: the file is missing or cannot be read.
        FormatError: it is not a well-formed safetensors file.

    Example:
        >>> with SafetensorsFile("model.safetensors") as file:
        ...     for name, info in file.tensors.items():
        ...         print(name, info.shape, file.read(name).dtype)
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = _open_regular(path)
        try:
            self.tensors, self.metadata, head = _read_header(self._file, self.path)
        except BaseException:
            self._file.close()
            raise
        self._data = len(head)

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, in memory of its own; KeyError when there is none."""
        info = self.tensors[name]
        self._file.seek(self._data + info.begin)
        return _read_tensor(self._file, info, f"{self.path}: tensor {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_verified(
    path: str | os.PathLike[str], expected: Mapping[str, tuple[str, tuple[int, ...]]], sha256: str
) -> dict[str, Tensor]:
    """Every tensor of a file whose contents are known beforehand: names, dtype names, shapes and SHA-256.

    The file is read once and what was hashed is what is returned. Nothing is allocated for tensors before the header
    has been found to hold exactly `expected`.

    Raises:
        ArtifactError: the file is missing, its hash differs, or a tensor is missing, extra or of another shape.
        FormatError: it is not a well-formed safetensors file.
    """
    where = os.fspath(path)
    with _open_regular(path) as file:
        tensors, _, head = _read_header(file, where)
        for name in sorted(tensors.keys() ^ expected.keys()):
            what = "is not in the manifest" if name in tensors else "is missing"
            raise ArtifactError(f"{where}: tensor {name[:200]!r} {what}")
        for name, info in tensors.items():
            dtype, shape = expected[name]
            if (info.dtype_name, info.shape) != (dtype, shape):
                raise ArtifactError(
                    f"{where}: tensor {name[:200]!r} is {info.dtype_name} {list(info.shape)}, "
                    f"the manifest says {dtype} {list(shape)}"
                )
        digest = hashlib.sha256(head)
        found = {}
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            found[name] = _read_tensor(file, info, f"{where}: tensor {name[:200]!r}", digest)
        if file.read(1):
            raise FormatError(f"{where}: the file grew while it was read")
    if digest.hexdigest() != sha256:
        raise ArtifactError(f"{where}: corrupted: sha256 is {digest.hexdigest()}, the manifest says {sha256}")
    return found


# -- writing ---------------------------------------------------------------------------------------------------------------


def plan_file(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The head of a file (length and header) and where each tensor goes, counted from the end of that head.

    Wide dtypes come first, then names in order: the head is padded to 8 bytes, so every tensor is aligned to its item
    size, which readers that map files rely on.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    placed: dict[str, TensorInfo] = {}
    position = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        if name == "__metadata__":
            raise ValueError("a tensor cannot be called '__metadata__' in a safetensors file")
        end = position + math.prod(shape) * dtype.itemsize
        placed[name] = TensorInfo(dtype, tuple(shape), position, end)
        header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, placed
