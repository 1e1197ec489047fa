"""Where the installed parts are, for builds and for processes that load the ops without the rest of the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import torch

from lowbit import _C

__all__ = ["cmake_dir", "library_paths"]

# Next to `_C`, and not next to this file: an editable install leaves the Python files where they are written.
_FOLDER: Final = Path(_C.__file__).parent
_SUFFIX: Final = ".dylib" if sys.platform == "darwin" else ".so"


def library_paths() -> list[Path]:
    """The shared libraries that hold the ops, in the order in which to load or link them.

    Loading one registers its ops with PyTorch. `import lowbit` does it, and so does a C++ program that links them. They
    contain no Python, and work with every PyTorch from 2.11 on.

    Returns:
        liblowbit_ops (schemas and CPU kernels); behind it liblowbit_cuda, where it is installed and this PyTorch is a
        CUDA build: no other can load it.

    Example:
        >>> for path in lowbit.library_paths():
        ...     torch.ops.load_library(path)
    """
    names = ["ops", "cuda"] if torch.version.cuda else ["ops"]
    paths = [_FOLDER / f"liblowbit_{name}{_SUFFIX}" for name in names]
    return [path for path in paths if path.exists()]


def cmake_dir() -> Path:
    """The folder of lowbitConfig.cmake: what `lowbit_DIR` or `CMAKE_PREFIX_PATH` has to be for `find_package(lowbit)`.

    It defines the target `lowbit::ops`, and `lowbit::cuda` where that library is installed. PyTorch it leaves to the
    caller.

    Raises:
        FileNotFoundError: the package was installed without it.

    Example:
        >>> subprocess.run(["cmake", "-S", ".", "-B", "build", f"-Dlowbit_DIR={lowbit.cmake_dir()}"], check=True)
    """
    folder = _FOLDER / "cmake"
    if not (folder / "lowbitConfig.cmake").exists():
        raise FileNotFoundError(f"there is no lowbitConfig.cmake in {folder}: install lowbit again")
    return folder
