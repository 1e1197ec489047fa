"""What may be in the built libraries. Each audit returns the violations it finds, as text; none is good.

ELF only: the Mach-O equivalents (otool -L, nm -u) need a Mac to be tried on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from elftools.elf.elffile import ELFFile

# A name inside one of libtorch's C++ namespaces, anywhere in a mangled symbol: N[qualifiers]<length><namespace>.
TORCH_CPP = re.compile(r"N[rVKRO]*(?:2at|3c10|5torch|6caffe2)\d")
PYTHON = re.compile(r"_?Py[A-Z_]")
# The C interface that the stable ABI consists of.
STABLE_C = re.compile(r"(?:aoti_)?torch_\w+")
LOWBIT_CPP = re.compile(r"_ZT?[ISV]?NK?6lowbit")
# Names that every shared library refers to weakly, whether or not something defines them.
TOOLCHAIN = {
    "__cxa_finalize",
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
}
SYSTEM_LIBRARIES = re.compile(r"(?:libc|libm|libdl|libpthread|libgcc_s|libstdc\+\+|ld-linux-[\w-]+)\.so\.\d+")
SOURCE_PATH = re.compile(rb"(?<![\w.@-])/(?:[\w.+@-]+/)+[\w.+@-]+\.(?:cpp|cc|cxx|h|hpp|cuh?)\b")


class Library:
    """The dynamic section and symbols of one shared library."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.needed: list[str] = []
        self.runpath: list[str] = []
        self.undefined: dict[str, str] = {}  # name -> symbol version, "" for none
        self.exported: list[str] = []
        with self.path.open("rb") as file:
            elf = ELFFile(file)
            for tag in elf.get_section_by_name(".dynamic").iter_tags():
                if tag.entry.d_tag == "DT_NEEDED":
                    self.needed.append(tag.needed)
                elif tag.entry.d_tag == "DT_RUNPATH":
                    self.runpath += tag.runpath.split(":")
                elif tag.entry.d_tag == "DT_RPATH":
                    self.runpath += [f"DT_RPATH:{tag.rpath}"]
            self._read_symbols(elf)

    def _read_symbols(self, elf: ELFFile) -> None:
        versions = elf.get_section_by_name(".gnu.version")
        needs = elf.get_section_by_name(".gnu.version_r")
        symbols = elf.get_section_by_name(".dynsym")
        for index, symbol in enumerate(symbols.iter_symbols()):
            if not symbol.name or symbol.entry.st_info.bind == "STB_LOCAL":
                continue
            if symbol.entry.st_shndx != "SHN_UNDEF":
                self.exported.append(symbol.name)
                continue
            number = versions.get_symbol(index).entry["ndx"] if versions else 0
            found = needs.get_version(number) if needs and isinstance(number, int) else None
            self.undefined[symbol.name] = found[1].name if found else ""


def python_symbols(library: Library) -> list[str]:
    """Symbols of the Python C API: the ops library has to serve every Python version."""
    names = [*library.undefined, *library.exported]
    return [f"{name}: Python's" for name in names if PYTHON.match(name)]


def torch_cpp_symbols(library: Library) -> list[str]:
    """C++ symbols of libtorch, which change from release to release. The stable ABI is C."""
    names = [*library.undefined, *library.exported]
    return [f"{name}: libtorch's C++" for name in names if TORCH_CPP.search(name)]


def foreign_symbols(library: Library, allowed: Iterable[re.Pattern[str]]) -> list[str]:
    """Undefined symbols that neither the system's libraries (versioned) nor `allowed` account for."""
    return [
        f"{name}: nobody known provides it"
        for name, version in library.undefined.items()
        if not re.match(r"GLIBC|CXXABI|GCC_", version)
        and name not in TOOLCHAIN
        and not any(pattern.match(name) for pattern in allowed)
    ]


def needed_libraries(library: Library, required: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """Libraries it must load and does not, or loads and must not."""
    required = list(required)
    missing = [f"does not load {name}" for name in required if name not in library.needed]
    return missing + [
        f"loads {name}"
        for name in library.needed
        if name not in [*required, *allowed] and not SYSTEM_LIBRARIES.fullmatch(name)
    ]


def exported_symbols(library: Library, allowed: re.Pattern[str]) -> list[str]:
    """Exports other than its own: another library in the process could bind to them."""
    return [f"{name}: exported" for name in library.exported if not allowed.match(name)]


def runpath(library: Library) -> list[str]:
    """A RUNPATH other than the library's own folder."""
    return [] if library.runpath == ["$ORIGIN"] else [f"RUNPATH is {library.runpath or 'absent'}"]


def build_paths(path: Path, folders: Iterable[Path] = ()) -> list[str]:
    """Absolute source paths, and any of `folders`: they name the machine that built it."""
    data = path.read_bytes()
    found = {match.group().decode() for match in SOURCE_PATH.finditer(data)}
    found |= {str(folder) for folder in folders if str(folder).encode() + b"/" in data}
    return [f"{text}: a path of the build machine" for text in sorted(found)]


def weak_symbols(path: Path) -> list[str]:
    """Weak function definitions of one object file: of those the linker keeps one copy for the whole library."""
    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        return [
            symbol.name
            for symbol in table.iter_symbols()
            if symbol.entry.st_info.bind == "STB_WEAK"
            and symbol.entry.st_info.type == "STT_FUNC"
            and symbol.entry.st_shndx != "SHN_UNDEF"
        ]


def shared_across_isas(objects: Iterable[tuple[str, Path]]) -> list[str]:
    """Inline functions compiled for several instruction sets, given (isa, object file) pairs.

    The linker keeps whichever copy comes first. If that one was compiled for AVX-512, every other caller
    crashes on a machine without it.
    """
    isas: dict[str, set[str]] = defaultdict(set)
    for isa, path in objects:
        for name in weak_symbols(path):
            isas[name].add(isa)
    return [
        f"{name}: compiled for {', '.join(sorted(where))}" for name, where in sorted(isas.items()) if len(where) > 1
    ]
