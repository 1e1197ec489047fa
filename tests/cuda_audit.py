"""What nvcc left behind: the device code in a library, and what its assembler said of each kernel.

Each audit returns the violations it finds, as text. No CUDA tool is needed to run them.

    python tests/cuda_audit.py BUILD/lowbit_cuda      registers, stack and spills of the kernels in a build folder
"""

from __future__ import annotations

import re
import struct
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

# A fat binary is a header and one entry per device code, each with a header of its own, which says the architecture even
# where the code behind it is compressed. NVIDIA does not document it; cuobjdump prints the same of the same file.
FATBIN_MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2
# Bits of an entry's flags: for that architecture alone (90a), for its family (120f).
ARCH_ONLY, FAMILY = 1 << 20, 1 << 21

# Kernels whose time is their point. In these a spill, or an array that ended up in local memory, is a defect.
HOT = re.compile(r"\d(stream|matrix|a8|grad)(?:_\w+)?_kernel")


def device_code(path: Path) -> Counter[str]:
    """How many entries there are per architecture, written as in LOWBIT_CUDA_ARCHS: 80, 90a, 120f, 90-ptx."""
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".nv_fatbin")
        return _entries(section.data()) if section else Counter()


def _entries(data: bytes) -> Counter[str]:
    found: Counter[str] = Counter()
    start = data.find(struct.pack("<I", FATBIN_MAGIC))
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, start)
        entry, end = start + header, start + header + size
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            (flags,) = struct.unpack_from("<Q", data, entry + 40)
            variant = "f" if flags & FAMILY else "a" if flags & ARCH_ONLY else ""
            if kind in (PTX, MACHINE_CODE):
                found[f"{arch}{variant}{'-ptx' if kind == PTX else ''}"] += 1
            entry += entry_header + entry_size
        start = data.find(struct.pack("<I", FATBIN_MAGIC), end)
    return found


def missing_code(path: Path, archs: Iterable[str]) -> list[str]:
    """Architectures for which a library, or some file in it, has no code, or which nobody asked for.

    Files that have nothing to do with the features of 90a hold code for plain 90 instead, which runs on the same devices, and
    PTX for the oldest architecture only (cmake/cuda.cmake): what is asked for must be in some file, what runs in its place in
    all.
    """
    found, archs = device_code(path), list(archs)
    plain: Counter[str] = Counter()
    for arch, count in found.items():
        plain[re.sub("[af]", "", arch)] += count
    files = max(plain.values(), default=0)
    later_ptx = sorted((arch for arch in archs if arch.endswith("-ptx")), key=lambda arch: int(arch[:-4]))[1:]
    wrong = []
    for arch in archs:
        count = plain[re.sub("[af]", "", arch)]
        if not found[arch]:
            wrong.append(f"{arch}: no file has code for it")
        elif count != files and arch not in later_ptx:
            wrong.append(f"{arch}: {count} files of {files} have code for it")
    asked = {*archs, *(re.sub("[af]", "", arch) for arch in archs)}
    return wrong + [f"{arch}: not asked for" for arch in found if arch not in asked]


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture. Bytes are per thread."""

    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


COMPILING = re.compile(r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\w+)'")
FRAME = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
REGISTERS = re.compile(r"Used (?P<count>\d+) registers")


def resources(log: str) -> list[Resources]:
    """Reads what `ptxas -v` said. Lines of a kernel follow its "Compiling"; device functions that were not inlined have
    frames of their own, which are added to the kernel before them: it is the one that pays."""
    found: list[Resources] = []
    for line in log.splitlines():
        if match := COMPILING.search(line):
            found.append(Resources(match["kernel"], match["arch"], 0, 0, 0, 0))
            continue
        if not found:
            continue
        last = found[-1]
        if match := FRAME.search(line):
            stack, stores, loads = (int(match[name]) for name in ("stack", "stores", "loads"))
            stack, stores, loads = stack + last.stack, stores + last.spill_stores, loads + last.spill_loads
            found[-1] = Resources(last.kernel, last.arch, last.registers, stack, stores, loads)
        elif match := REGISTERS.search(line):
            frame = last.stack, last.spill_stores, last.spill_loads
            found[-1] = Resources(last.kernel, last.arch, int(match["count"]), *frame)
    return found


def spills(kernels: Iterable[Resources], hot: re.Pattern[str] = HOT) -> list[str]:
    """Hot kernels that use local memory."""
    return [
        f"{k.kernel} on sm_{k.arch}: {k.registers} registers, {k.stack} bytes of stack, "
        f"{k.spill_stores} stored and {k.spill_loads} loaded by spilling"
        for k in kernels
        if hot.search(k.kernel) and (k.stack or k.spill_stores or k.spill_loads)
    ]


def main(folder: Path) -> int:
    kernels = [kernel for log in sorted(folder.glob("*.o.log")) for kernel in resources(log.read_text())]
    for k in sorted(kernels, key=lambda k: (k.kernel, k.arch)):
        print(f"{k.registers:4} {k.stack:6} {k.spill_stores:6} {k.spill_loads:6}  sm_{k.arch:5} {k.kernel}")
    found = spills(kernels)
    print(f"{len(kernels)} kernels (registers, stack, spill stores, spill loads); {len(found)} hot ones spill")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
