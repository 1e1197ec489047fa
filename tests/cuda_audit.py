"""What nvcc left behind: the device code in a library, and what its assembler said of each kernel.

Each audit returns the violations it finds, as text. No CUDA tool is needed to run them.

    python tests/cuda_audit.py BUILD/lowbit_cuda      registers, stack and spills of the kernels in a build folder
"""

from __future__ import annotations

import io
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
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
HOT = re.compile(r"\d(stream|matrix|a8|grad|hopper)(?:_\w+)?_kernel")


@dataclass(frozen=True)
class Entry:
    """Device code of one file for one architecture, which is written as in LOWBIT_CUDA_ARCHS: 80, 90a, 120f, 90-ptx."""

    arch: str
    data: bytes  # as it is stored


def files(path: Path) -> list[list[Entry]]:
    """What a library holds, one list per compiled file."""
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".nv_fatbin")
        return list(_files(section.data())) if section else []


def _files(data: bytes) -> Iterator[list[Entry]]:
    start = data.find(struct.pack("<I", FATBIN_MAGIC))
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, start)
        entry, end = start + header, start + header + size
        found = []
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            (flags,) = struct.unpack_from("<Q", data, entry + 40)
            variant = "f" if flags & FAMILY else "a" if flags & ARCH_ONLY else ""
            code = data[entry + entry_header : entry + entry_header + entry_size]
            if kind in (PTX, MACHINE_CODE):
                found.append(Entry(f"{arch}{variant}{'-ptx' if kind == PTX else ''}", code))
            entry += entry_header + entry_size
        yield found
        start = data.find(struct.pack("<I", FATBIN_MAGIC), end)


def device_code(path: Path) -> Counter[str]:
    """How many entries there are per architecture."""
    return Counter(entry.arch for file in files(path) for entry in file)


def missing_code(path: Path, archs: Iterable[str]) -> list[str]:
    """Architectures for which a library, or some file in it, has no code, or which nobody asked for.

    Files that have nothing to do with the features of 90a hold code for plain 90 instead, which runs on the same devices, and
    PTX for the oldest architecture only (cmake/cuda.cmake): what is asked for must be in some file, what runs in its place in
    all. Files for 90a alone are what Hopper has beside that.
    """
    found, archs = device_code(path), list(archs)
    general = [file for file in files(path) if [entry.arch for entry in file] != ["90a"]]
    plain = Counter(re.sub("[af]", "", entry.arch) for file in general for entry in file)
    count_of_files = max(plain.values(), default=0)
    later_ptx = sorted((arch for arch in archs if arch.endswith("-ptx")), key=lambda arch: int(arch[:-4]))[1:]
    wrong = []
    for arch in archs:
        count = plain[re.sub("[af]", "", arch)]
        if not found[arch]:
            wrong.append(f"{arch}: no file has code for it")
        elif count != count_of_files and arch not in later_ptx and archs != ["90a"]:
            wrong.append(f"{arch}: {count} files of {count_of_files} have code for it")
    asked = {*archs, *(re.sub("[af]", "", arch) for arch in archs)}
    return wrong + [f"{arch}: not asked for" for arch in found if arch not in asked]


# ---- the instructions of kernels for Hopper ----------------------------------------------------------------------------

#: An instruction of sm_90 is 16 bytes, and its lowest 12 bits say which one. NVIDIA does not document them; `nvdisasm -hex`
#: prints them beside the names. Where operands are of several kinds, an instruction has several numbers.
OPCODES = {
    "HMMA": {0x23C},  # mma.sync
    "HGMMA": {0x9F0, 0xDF0},  # wgmma of 16-bit numbers, A in shared memory or in registers
    "QGMMA": {0x9F3, 0xDF3},  # of fp8
    "IGMMA": {0x9F1, 0xDF1},  # of int8
    "LDSM": {0x83B},  # ldmatrix
    "UBLKCP": {0x3BA},  # cp.async.bulk
    "UTMALDG": {0x5B4},  # cp.async.bulk.tensor
    "UTMACCTL": {0x9B9},  # prefetch.tensormap
    "SYNCS": {0x5A7, 0x5B2, 0x9A7},  # mbarrier: arrivals, initialisation, waiting
    "ARRIVES": {0x9B0},  # cp.async.mbarrier.arrive
    "UCGABAR": {0x9C7, 0xDC7},  # barrier.cluster
    "ACQBULK": {0x82E},  # griddepcontrol.wait
    "PREEXIT": {0x82D},  # griddepcontrol.launch_dependents
    "USETMAXREG": {0x9C8},  # setmaxnreg
    "LDL": {0x983},  # local memory: registers that were spilled, arrays that are indexed at run time
    "STL": {0x387},
}


#: Five bits of wgmma say how many columns it has: in eights, from zero; of integers, which of those there are, in threes.
COLUMNS_AT = 53
COLUMNS = {"HGMMA": range(8, 257, 8), "QGMMA": range(8, 257, 8), "IGMMA": (8, 16, 24, *range(32, 257, 16))}


@dataclass(frozen=True)
class Design:
    """What must, and must not, be in the kernels whose names match; and the registers that let as many blocks run as meant.
    The columns of a kernel's wgmma are all of one of the sets, and no others."""

    kernels: str
    has: frozenset[str]
    lacks: frozenset[str]
    most_registers: int
    columns: tuple[frozenset[int], ...] = (frozenset(),)


LOCAL = frozenset({"LDL", "STL"})
WARPGROUPS = frozenset(
    {"UTMALDG", "UTMACCTL", "UBLKCP", "SYNCS", "USETMAXREG", "UCGABAR", "ACQBULK", "PREEXIT"},
)
#: csrc/cuda/wgmma_widths.h: every number that wgmma takes, up to 64, up to 128, and 256.
NARROW, WIDE = frozenset(range(8, 65, 8)), frozenset(range(72, 129, 8))
OF_INTEGERS = (frozenset({8, 16, 24, 32, 48, 64}), frozenset(range(80, 129, 16)))
HOPPER = (
    Design(
        r"hopper_stream_kernel",
        frozenset({"HMMA", "LDSM", "UBLKCP", "SYNCS", "ARRIVES", "UCGABAR", "ACQBULK", "PREEXIT"}),
        LOCAL,
        128,
    ),
    # 384 threads: 168 registers are all there are for each, until setmaxnreg deals them out anew.
    Design(r"hopper_matrix_kernel", frozenset({"HGMMA", *WARPGROUPS}), LOCAL, 168, (NARROW, WIDE, frozenset({256}))),
    Design(r"hopper_a8_kernel\w*HopperIntMath", frozenset({"IGMMA", *WARPGROUPS}), LOCAL, 168, OF_INTEGERS),
    Design(r"hopper_a8_kernel\w*HopperFp8Math", frozenset({"QGMMA", *WARPGROUPS}), LOCAL, 168, (NARROW, WIDE)),
)


@dataclass(frozen=True)
class Code:
    """A kernel's machine code for 90a."""

    kernel: str
    registers: int
    instructions: Counter[str]  # of OPCODES
    columns: frozenset[int] = frozenset()  # of wgmma


def hopper_code(path: Path) -> list[Code]:
    """The kernels in a library's files for 90a alone, whose machine code is not compressed."""
    found = []
    for entry in (file[0] for file in files(path) if [entry.arch for entry in file] == ["90a"]):
        if not entry.data.startswith(b"\x7fELF"):
            raise ValueError("a file for 90a is compressed: cmake/cuda.cmake compiles it with --no-compress")
        found += _kernels(ELFFile(io.BytesIO(entry.data)))
    return found


def _kernels(elf: ELFFile) -> Iterator[Code]:
    names = {number: name for name, numbers in OPCODES.items() for number in numbers}
    registers = _registers(elf)
    for section in elf.iter_sections():
        if not section.name.startswith(".text."):
            continue
        words = struct.unpack(f"<{section.data_size // 8}Q", section.data())
        known = [(names[word & 0xFFF], word) for word in words[::2] if word & 0xFFF in names]
        columns = frozenset(_columns(name, word >> COLUMNS_AT & 31) for name, word in known if name in COLUMNS)
        kernel = section.name.removeprefix(".text.")
        yield Code(kernel, registers[kernel], Counter(name for name, _ in known), columns)


def _columns(name: str, field: int) -> int:
    return COLUMNS[name][field // (3 if name == "IGMMA" else 1)]


def _registers(elf: ELFFile) -> dict[str, int]:
    """Of a thread, by kernel: attributes of number 0x2f in .nv.info are a symbol and a count. (cuobjdump -elf)"""
    symbols = elf.get_section_by_name(".symtab")
    data, at, found = elf.get_section_by_name(".nv.info").data(), 0, {}
    while at < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form != 4:  # the value stands where the size of others does
            continue
        if attribute == 0x2F:
            symbol, count = struct.unpack_from("<II", data, at)
            found[symbols.get_symbol(symbol).name] = count
        at += size
    return found


def departures(kernels: Iterable[Code], designs: Iterable[Design] = HOPPER) -> list[str]:
    """Where kernels are not as designed, and designs that no kernel follows."""
    kernels = list(kernels)
    wrong = []
    for design in designs:
        matching = [kernel for kernel in kernels if re.search(design.kernels, kernel.kernel)]
        if not matching:
            wrong.append(f"{design.kernels}: there is no such kernel")
        for kernel in matching:
            wrong += [f"{kernel.kernel}: no {name}" for name in sorted(design.has) if not kernel.instructions[name]]
            wrong += [f"{kernel.kernel}: {name}" for name in sorted(design.lacks) if kernel.instructions[name]]
            if kernel.registers > design.most_registers:
                wrong.append(f"{kernel.kernel}: {kernel.registers} registers, designed for {design.most_registers}")
            if kernel.columns not in design.columns:
                wrong.append(f"{kernel.kernel}: wgmma of {sorted(kernel.columns)} columns")
    known = [kernel for kernel in kernels if any(re.search(design.kernels, kernel.kernel) for design in designs)]
    return wrong + [f"{kernel.kernel}: no design says what it is" for kernel in kernels if kernel not in known]


# ---- registers and spills, of all architectures ------------------------------------------------------------------------


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


#: (kernel, architecture, bytes of stack): where the assembler keeps the end of a block's share, asked for once per tile of
#: the output, and an address, once per step, in local memory. None of ten forms of schedule.cuh that were tried has fewer.
KNOWN_SPILLS = (
    (re.compile(r"9a8_kernelINS0_7Fp8MathELNS_6FormatE[78]ELi18E"), "90a", 16),
    (re.compile(r"13stream_kernelILNS_6FormatE6ENS0_8BFloat16ELi3E"), "80", 8),
)


def is_known(kernel: Resources) -> bool:
    """Whether it stands in KNOWN_SPILLS, with no more bytes."""
    return any(
        name.search(kernel.kernel) and arch == kernel.arch and kernel.stack <= most for name, arch, most in KNOWN_SPILLS
    )


def spills(kernels: Iterable[Resources], hot: re.Pattern[str] = HOT) -> list[str]:
    """Hot kernels that use local memory, but for the known ones."""
    return [
        f"{k.kernel} on sm_{k.arch}: {k.registers} registers, {k.stack} bytes of stack, "
        f"{k.spill_stores} stored and {k.spill_loads} loaded by spilling"
        for k in kernels
        if hot.search(k.kernel) and (k.stack or k.spill_stores or k.spill_loads) and not is_known(k)
    ]


def serialized(log: str) -> list[str]:
    """What the assembler gave up: wgmma that waits for each one (C7510 and its neighbours), setmaxnreg without effect (C7508)."""
    return [line.strip() for line in log.splitlines() if re.search(r"\(C75\d\d\)", line)]


def main(folder: Path) -> int:
    kernels = [kernel for log in sorted(folder.glob("*.o.log")) for kernel in resources(log.read_text())]
    for k in sorted(kernels, key=lambda k: (k.kernel, k.arch)):
        print(f"{k.registers:4} {k.stack:6} {k.spill_stores:6} {k.spill_loads:6}  sm_{k.arch:5} {k.kernel}")
    found = spills(kernels)
    print(f"{len(kernels)} kernels (registers, stack, spill stores, spill loads); {len(found)} hot ones spill")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
