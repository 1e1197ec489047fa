"""Where a checkpoint's tensors come from: a folder of safetensors files, or one of them, read one tensor at a time.

Nothing is unpickled, and nothing outside the folder is opened, whatever an index says.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from lowbit import _safetensors
from lowbit._safetensors import SafetensorsFile, TensorInfo
from lowbit.errors import ArtifactError, FormatError

__all__ = ["Source", "is_weight_file", "natural", "open_source", "read_json"]

_INDEX: Final = ".safetensors.index.json"
# Weights in formats that are not read here, and what must not be mistaken for a side file.
_WEIGHT_SUFFIXES: Final = (
    ".safetensors", _INDEX, ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".npz", ".pkl", ".tflite",
)  # fmt: skip
_HUB: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
_MAX_JSON: Final = 256 << 20


def is_weight_file(name: str) -> bool:
    """Whether a file holds weights, or says where they are."""
    return name.lower().endswith(_WEIGHT_SUFFIXES)


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key in which layers.2 comes before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]{1,18})", name)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be hostile; {} where there is no such file."""
    if not path.exists():
        return {}
    with _safetensors._open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_JSON:
            raise FormatError(f"{path}: {size} bytes is too long")
        return _safetensors.parse_json(_safetensors._read_exactly(file, size, str(path)), str(path))


class Source:
    """Every tensor of a checkpoint: its dtype and shape, and its value when asked for.

    Attributes:
        path: what was opened: a folder, or one safetensors file.
        root: the folder that side files (config.json) are in.
        tensors: name -> dtype and shape, in natural order. The headers they come from have been checked: shapes and
            bytes agree, so that a shape is never larger than the file, unless a dimension is 0.
        metadata: the safetensors metadata of all files; of two values for one key the first file's.

    Example:
        >>> with open_source("model") as source:
        ...     source.config.get("model_type"), source.read("lm_head.weight").dtype
        ('llama', torch.bfloat16)
    """

    def __init__(self, path: Path, root: Path, files: list[SafetensorsFile]) -> None:
        self.path = path
        self.root = root
        self._home: dict[str, SafetensorsFile] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            self.metadata = {**file.metadata, **self.metadata}
            for name in file:
                if name in self._home:
                    raise ArtifactError(f"{file.path}: tensor {name[:200]!r} is also in {self._home[name].path}")
                self._home[name] = file
        self.tensors: Mapping[str, TensorInfo] = {
            name: self._home[name].tensors[name] for name in sorted(self._home, key=natural)
        }

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json; {} when there is none."""
        return self.json("config.json")

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint's folder; {} when there is none."""
        return read_json(self.root / name)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self._home[name].read(name)

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return os.path.basename(self._home[name].path)


@contextlib.contextmanager
def open_source(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Open a folder of safetensors files, or one such file.

    An index (model.safetensors.index.json) says which files of a folder hold the model; without one it is
    model.safetensors, or else every *.safetensors file. All headers are checked before anything else is done.

    Raises:
        ArtifactError: no such folder or file, no safetensors in it, a file that the index names is missing, a tensor is
            not where the index says or is in two files.
        FormatError: a file is not a well-formed safetensors file, or the index is not one.
    """
    path = Path(path)
    single = path.is_file() and path.suffix == ".safetensors"
    root, names, index = (path.parent, [path.name], {}) if single else (path, *_weight_files(path))
    with contextlib.ExitStack() as stack:
        source = Source(path, root, [stack.enter_context(SafetensorsFile(root / name)) for name in names])
        for tensor, file in index.items():
            if tensor not in source.tensors or source.file_of(tensor) != file:
                raise ArtifactError(f"{root / file}: has no tensor {tensor[:200]!r}, which the index puts there")
        yield source


def _weight_files(root: Path) -> tuple[list[str], dict[str, str]]:
    if not root.is_dir():
        hub = not root.exists() and _HUB.fullmatch(str(root))
        hint = f"; a model of the Hugging Face Hub is downloaded first: hf download {root}" if hub else ""
        raise ArtifactError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}{hint}")
    entries = sorted(entry.name for entry in os.scandir(root))
    indexes = [name for name in entries if name.endswith(_INDEX)]
    if len(indexes) > 1:
        raise ArtifactError(f"{root}: several indexes ({', '.join(indexes)}): it is not clear which model is meant")
    if indexes:
        index = _read_index(root / indexes[0])
        return sorted(set(index.values())), index
    if "model.safetensors" in entries:
        return ["model.safetensors"], {}
    files = [name for name in entries if name.endswith(".safetensors")]
    if not files:
        others = [name for name in entries if is_weight_file(name)][:3]
        found = f"; {', '.join(others)} cannot be read: convert to safetensors first" if others else ""
        raise ArtifactError(f"{root}: no *.safetensors files{found}")
    return files, {}


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: has no weight_map")
    for tensor, file in weight_map.items():
        # Only files of this folder: an index must not be able to name others.
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise FormatError(f"{path}: tensor {tensor[:200]!r} is in {str(file)[:200]!r}, which is not a file name")
    return weight_map
