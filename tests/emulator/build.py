"""Builds the emulator (CMakeLists.txt) for tests, `make mutants` and by hand:  python tests/emulator/build.py --help"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "emulator"

#: No leaks: fibers that an error stops keep what they hold, and Python never frees everything either. What is allocated
#: holds NaN: an output that is not written shows.
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class BuildError(RuntimeError):
    """The compiler's words."""


def tool(name: str) -> str | None:
    """A program of this Python's environment, or of the system."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not found:
        raise BuildError("the emulator needs a C++ compiler: install g++ or set CXX")
    return found


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout[-8000:]}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two test runs may want the same build."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ops_library() -> Path:
    """The liblowbit_ops of the lowbit that is installed."""
    from lowbit import _C

    return Path(_C.__file__).parent / "liblowbit_ops.so"


def build(
    target: str = "lowbit_emulator",
    sanitize: str = "",
    one_format: bool = False,
    ucontext: bool = False,
    mutants: Path | None = None,
    jobs: int = 0,
) -> Path:
    """Compiles what has changed since the last time and returns the library, or the executable `self_test`.

    A folder per set of options, compiler and libraries; within it, ninja knows what is up to date. `mutants` is a copy of
    csrc that mutants.py has instrumented.
    """
    cmake = tool("cmake")
    if cmake is None:
        raise BuildError("the emulator is built with CMake: pip install cmake ninja")
    options = {
        "CMAKE_CXX_COMPILER": compiler(),
        "CMAKE_BUILD_TYPE": "None",
        "SANITIZE": sanitize,
        "ONE_FORMAT": "ON" if one_format else "OFF",
        "UCONTEXT": "ON" if ucontext else "OFF",
        "MUTANTS": "ON" if mutants else "OFF",
        "LOWBIT_CSRC": str(mutants or ROOT / "csrc"),
        "Python_EXECUTABLE": sys.executable,
        "LOWBIT_OPS_LIBRARY": "" if target == "self_test" else str(ops_library()),
    }
    key = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:12]
    folder = CACHE / f"{'-'.join(['san' if sanitize else 'plain', *(['one'] if one_format else [])])}-{key}"
    with locked(folder):
        if not (folder / "CMakeCache.txt").exists():
            ninja = tool("ninja")
            generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
            run([cmake, "-S", str(HERE), "-B", str(folder), *generator, *(f"-D{k}={v}" for k, v in options.items())])
        count = jobs or len(os.sched_getaffinity(0))
        run([cmake, "--build", str(folder), "--target", target, "--parallel", str(count)])
    return folder / (target if target == "self_test" else f"lib{target}.so")


def sanitizer_environment() -> dict[str, str]:
    """For a Python that loads a sanitized library."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")  # libstdc++, so that a throw is intercepted from the start
    found = [subprocess.run([compiler(), f"-print-file-name={n}"], capture_output=True, text=True) for n in names]
    paths = [str(Path(f.stdout.strip()).resolve()) for f in found]
    return {**SANITIZER_OPTIONS, "LD_PRELOAD": ":".join(paths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "target",
        nargs="?",
        default="lowbit_emulator",
        choices=["lowbit_emulator", "lowbit_emulator_metal", "self_test"],
    )
    parser.add_argument("--sanitize", default="", metavar="LIST", help="for example address,undefined")
    parser.add_argument("--one-format", action="store_true", help="few instantiations of each kernel")
    given = parser.parse_args()
    print(build(given.target, given.sanitize, given.one_format))


if __name__ == "__main__":
    main()
