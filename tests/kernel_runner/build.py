"""Builds the runner (CMakeLists.txt) and says where it can run:  cd tests && python -m kernel_runner.build [--cross]"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
from pathlib import Path

import torch

from emulator.build import BuildError, compiler, locked, ops_library, run, tool

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / "build" / "kernel_runner"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def cannot_cross() -> str:
    """Why the AArch64 kernels cannot be tested here, or nothing."""
    missing = [name for name in (CROSS_COMPILER, EMULATOR) if shutil.which(name) is None]
    if not missing:
        return ""
    return f"no {' and no '.join(missing)}: the NEON kernels are tested with g++-aarch64-linux-gnu and qemu-user"


def build(cross: bool) -> Path:
    """Compiles what has changed since the last time. Natively: this library's kernels; cross: all of AArch64's."""
    cmake = tool("cmake")
    if cmake is None:
        raise BuildError("the runner is built with CMake: pip install cmake ninja")
    options = {"CMAKE_BUILD_TYPE": "None", "CMAKE_CXX_COMPILER": CROSS_COMPILER if cross else compiler()}
    if cross:
        options |= {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64"}
    else:
        options["LOWBIT_OPS_LIBRARY"] = str(ops_library())
        options["LOWBIT_TORCH_LIB"] = str(Path(torch.__file__).parent / "lib")
    key = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:12]
    folder = CACHE / f"{'aarch64' if cross else platform.machine()}-{key}"
    with locked(folder):
        if not (folder / "CMakeCache.txt").exists():
            ninja = tool("ninja")
            generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
            run([cmake, "-S", str(HERE), "-B", str(folder), *generator, *(f"-D{k}={v}" for k, v in options.items())])
        run([cmake, "--build", str(folder), "--parallel", str(len(os.sched_getaffinity(0)))])
    return folder / "runner"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cross", action="store_true", help="for AArch64, on a machine that is not")
    print(build(parser.parse_args().cross))


if __name__ == "__main__":
    main()
