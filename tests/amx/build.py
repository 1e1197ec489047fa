"""AMX's kernels on a software model of the tile instructions (model.h): builds them, and registers them with lowbit.

    cd tests && python -m amx.build            # prints the library's path

The sources are those of the product: csrc/cpu/kernels/isa_amx.cpp, with other intrinsics. A CPU with AVX-512 runs them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch  # noqa: F401 - loads what lowbit._C links

from emulator.build import BuildError, compiler, locked, run
from lowbit import _C

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "amx-model"
NAME = "amx-emulated"
SOURCES = (HERE / "model.cpp", ROOT / "csrc" / "cpu" / "kernels" / "isa_amx.cpp")

#: What kernels need, and what they use where the CPU has it. -mamx-* are not among them: the model takes their place.
NEEDED = {"avx512f": "-mavx512f", "avx512bw": "-mavx512bw", "avx512dq": "-mavx512dq", "avx512vl": "-mavx512vl"}
OPTIONAL = {"avx512vnni": "-mavx512vnni", "avx512vbmi": "-mavx512vbmi", "avx512bf16": "-mavx512bf16"}
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-mavx2", "-mfma", "-mf16c"]
# gcc 12 warns about its own intrinsics.
FLAGS += ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def refusal() -> str:
    """Why the model cannot be used here, or nothing."""
    features = _C.cpu_features()
    missing = [name for name in NEEDED if not features.get(name)]
    if missing:
        return f"AMX's kernels also use AVX-512, and this CPU lacks {', '.join(missing)}"
    try:
        compiler()
    except BuildError:
        return "no C++ compiler: install g++ or set CXX"
    return ""


def build() -> Path:
    """The library, compiled where sources, flags or the compiler have changed."""
    cxx = compiler()
    features = _C.cpu_features()
    flags = [*FLAGS, *NEEDED.values(), *(flag for name, flag in OPTIONAL.items() if features.get(name))]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{HERE.parent}"]
    headers = [ROOT / "csrc" / "common" / "enums.h", *sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.h"))]
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(repr((cxx, version, flags)).encode())
    for path in (*SOURCES, HERE / "model.h", *headers):
        key.update(path.read_bytes())
    folder = CACHE / key.hexdigest()[:12]
    library = folder / "libamx_model.so"
    with locked(folder):
        if not library.exists():
            objects = [folder / f"{source.stem}.o" for source in SOURCES]
            # -O3 for the model's loops, which are to be vectors; kernels are slower to compile, and hardly faster.
            commands = [
                [cxx, *flags, *extra, "-c", str(source), "-o", str(to)]
                for source, to, extra in zip(SOURCES, objects, (["-O3"], ["-include", "amx/model.h"]), strict=True)
            ]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(run, commands))
            part = folder / "part.so"
            run([cxx, "-shared", *map(str, objects), "-o", str(part), "-lpthread", "-Wl,--no-undefined"])
            part.rename(library)
    return library


class Model:
    """The loaded library. While it is registered, `_C.set_isa("amx-emulated")` and LOWBIT_ISA take its name."""

    COUNTS = ("configurations", "loads", "stores", "multiplications")

    def __init__(self, path: Path):
        self.c = ctypes.CDLL(str(path))
        self.c.amx_model_kernels.restype = ctypes.c_void_p
        self.c.amx_model_error.restype = ctypes.c_char_p
        self.c.amx_model_count.restype = ctypes.c_int64
        self.c.amx_model_count.argtypes = [ctypes.c_int]
        self.c.amx_model_mistake.argtypes = [ctypes.c_char_p]
        self.c.amx_model_multiply.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    @classmethod
    @functools.cache
    def load(cls) -> Model:
        return cls(build())

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        _C.set_extra_isa(NAME, self.c.amx_model_kernels())
        try:
            yield
        finally:
            _C.set_extra_isa(NAME, 0)

    def reset(self) -> None:
        self.c.amx_model_reset()

    @property
    def error(self) -> str:
        """The first mistake since the last reset."""
        return self.c.amx_model_error().decode()

    def counts(self) -> dict[str, int]:
        """Tile instructions since the last reset."""
        return {name: self.c.amx_model_count(i) for i, name in enumerate(self.COUNTS)}


if __name__ == "__main__":
    print(build())
