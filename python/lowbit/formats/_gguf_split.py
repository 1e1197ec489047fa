"""A model over several GGUF files: model-00001-of-00003.gguf holds the metadata, and each file some of the tensors."""

from __future__ import annotations

import os
import re
from typing import Any, Final

from torch import Tensor

from lowbit.errors import ArtifactError
from lowbit.formats._gguf_file import GGUFFile, GGUFTensor

__all__ = ["GGUFFiles"]

_MAX_FILES: Final = 1000  # what a process may have open, about


class GGUFFiles:
    """One GGUF file, or all files of a split model, as one.

    Args:
        path: the file; of a split model the first one. The others have to lie beside it.

    Attributes:
        path: of the first.
        metadata: of the first.
        tensors: of all.

    Raises:
        ArtifactError: as GGUFFile; or a file of a split model is missing, is another part, or repeats a tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._files: list[GGUFFile] = []
        self._home: dict[str, GGUFFile] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self.path = os.fspath(path)
        try:
            first = self._open(self.path)
            self.metadata = first.metadata
            count = self._number(first, "split.count", 1)
            if count > 1:
                self._open_others(first, count)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str) -> GGUFFile:
        file = GGUFFile(path)
        self._files.append(file)
        for name, tensor in file.tensors.items():
            if name in self.tensors:
                raise ArtifactError(f"{file.path}: tensor {name[:200]!r} is also in {self._home[name].path}")
            self.tensors[name], self._home[name] = tensor, file
        return file

    def _open_others(self, first: GGUFFile, count: int) -> None:
        folder, name = os.path.split(self.path)
        match = re.fullmatch(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", name, re.DOTALL)
        if count > _MAX_FILES or match is None or int(match[3]) != count:
            raise ArtifactError(
                f"{self.path}: is one of {count} files of a model; their names end in -00001-of-{count:05}.gguf"
            )
        for part in range(count):
            other = f"{match[1]}-{part + 1:05}-of-{count:05}.gguf"
            if part == 0 and other != name:
                raise ArtifactError(f"{self.path}: is not the first file of its model; open {other}")
            file = first if part == 0 else self._open(os.path.join(folder, other))
            found = self._number(file, "split.no", 0), self._number(file, "split.count", 1)
            if found != (part, count):
                raise ArtifactError(
                    f"{file.path}: says that it is file {found[0]} of {found[1]}, not {part} of {count}"
                )
        total = self._number(first, "split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise ArtifactError(f"{self.path}: the {count} files have {len(self.tensors)} tensors, not {total}")

    def _number(self, file: GGUFFile, key: str, default: int) -> int:
        value: Any = file.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ArtifactError(f"{file.path}: {key} is {str(value)[:80]}")
        return value

    def read_rows(self, tensor: GGUFTensor, begin: int, count: int) -> Tensor:
        """As GGUFFile.read_rows."""
        return self._home[tensor.name].read_rows(tensor, begin, count)

    def read(self, tensor: GGUFTensor) -> Tensor:
        """As GGUFFile.read."""
        return self._home[tensor.name].read(tensor)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()
