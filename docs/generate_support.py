"""Writes docs/support.md: which kernel serves which problem, asked of the library itself.

    python docs/generate_support.py            # rewrite the file
    python docs/generate_support.py --check    # exit 1 if it is not what the library says

The answers are those of `explain`, a pure function of the problem and an instruction set or a GPU's model, so that every
x86-64 machine writes the same file, with and without a GPU. (On other architectures only "portable" is compiled in, and
there is nothing to compare.)
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from pathlib import Path

import torch  # noqa: F401 - loads what the compiled part links

from lowbit import _C

TARGET = Path(__file__).with_name("support.md")
GROUPS = (8, 16, 24, 32, 40, 64, 96, 128, 256, -1)
ZEROS = ("none", "int", "float", "offset")
# Op, and its activations with the words for them.
INPUTS = (
    ("gemm", {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}),
    ("gemm_a8", {"int8": "int8, per token", "float8_e4m3fn": "fp8, per token or per 128"}),
    ("gemm_grad_input", {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}),
)
# Few rows one by one, because kernels change there, then one of each kind.
ROWS = (*range(1, 18), 32, 64, 129, 1000)
N, K = 4096, 7680  # K is a multiple of every group size

ENUMS = _C.enums()
BATCH_INVARIANT = ENUMS["flags"]["batch_invariant"]
Kind = tuple[str, str, str]  # format, zero kind, scaling


def compiled() -> list[str]:
    """Instruction sets in this build, whatever the machine has."""
    found = []
    levels = ("amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "neoni8mm", "neondotprod", "neon", "portable")
    for isa in levels:
        with contextlib.suppress(ValueError):
            _C.explain("gemm", f"cpu:{isa}", 1, 1, 1, _C.make_desc(3, -1, 0, 0, 0, False, 1), "float32", 0)
            found.append(isa)
    return found


ISAS = compiled()
#: What explain is asked about on each backend, and what tables call it.
CPU = {isa: f"cpu:{isa}" for isa in ISAS}
CUDA = {name: name for name in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")}
METAL = {name: name for name in ("apple7", "apple9", "apple10")}


#: Kernels that sum integers, exactly.
EXACT = {"dot_i8", "tiles_i8", "general_i8"}


def kinds() -> list[Kind]:
    found = []
    for row in _C.format_table():
        zeros = ZEROS if row["kind"] == "int" else ("none",)
        found += [(row["name"], zero, "group") for zero in zeros]
        if row["name"].startswith("fp8"):
            found.append((row["name"], "none", "block128"))
    return found


def desc(kind: Kind, group_size: int, device: str) -> int:
    format, zero, scaling = kind
    fields = ENUMS["format"][format], group_size, ENUMS["zero_kind"][zero], 0, ENUMS["scaling"][scaling], False
    return _C.make_desc(*fields, _C.preferred_layout(device.partition(":")[0], _C.make_desc(*fields, 0)))


#: What `explain` calls a kernel -> its name in the table.
NAMES = {f"{row['backend']}_{row['name']}_{row['isa']}": row["name"] for row in _C.kernel_table(compiled=True)}


def chosen(op: str, device: str, M: int, kind: Kind, group_size: int, dtype: str, flags: int = 0) -> str:
    rows = _C.explain(op, device, M, N, K, desc(kind, group_size, device), dtype, flags)
    return NAMES[next(name for name, reason in rows if not reason)]


def serves(op: str, device: str, kind: Kind, group_size: int, dtype: str, flags: int = 0) -> str:
    """The kernels of one problem over M: "stream_f32 (M <= 16), panel_f32"."""
    names = [chosen(op, device, M, kind, group_size, dtype, flags) for M in ROWS]
    parts = []
    for i, name in enumerate(names):
        if i + 1 == len(names) or names[i + 1] != name:
            parts.append(f"`{name}`" + (f" (M <= {ROWS[i]})" if i + 1 < len(names) else ""))
    return ", ".join(parts)


def group_name(group_size: int) -> str:
    return "all of K" if group_size == -1 else str(group_size)


def kind_names(names: list[Kind]) -> str:
    """A set of kinds in words, shorter where it is everything of its sort."""
    if names == [kind for kind in kinds() if kind[2] == "group"]:
        return "every format"
    integers = [f"`{row['name']}`" for row in _C.format_table() if row["kind"] == "int"]
    by_format: dict[str, list[str]] = {}
    for format, zero, scaling in names:
        by_format.setdefault(f"`{format}`", []).append("128 x 128 blocks" if scaling == "block128" else zero)
    by_zeros: dict[str, list[str]] = {}
    for format, zeros in by_format.items():
        text = "" if len(zeros) == len(ZEROS) or (zeros == ["none"] and format not in integers) else ", ".join(zeros)
        by_zeros.setdefault(text, []).append(format)
    parts = []
    for zeros, formats in by_zeros.items():
        if formats[: len(integers)] == integers:
            formats[: len(integers)] = ["integers"]
        if formats == ["integers"] and not zeros:
            zeros = "every zero kind"
        parts.append(", ".join(formats) + (f" ({zeros})" if zeros else ""))
    return "; ".join(parts)


def invariant_kernels(op: str, dtype: str) -> set[str]:
    """The CUDA kernels that serve an op under `batch_invariant`."""
    cells = itertools.product(CUDA.values(), ROWS, kinds(), (16, 128, -1))
    return {
        chosen(op, device, M, kind, 128 if kind[2] == "block128" else group, dtype, BATCH_INVARIANT)
        for device, M, kind, group in cells
    }


def matrix_of(op: str, dtype: str, devices: dict[str, str]) -> dict[tuple[str, tuple[str, ...]], list[Kind]]:
    """(Group sizes, kernel per device) -> kinds of weights."""
    rows: dict[tuple[str, tuple[str, ...]], list[Kind]] = {}
    for kind in kinds():
        groups: dict[tuple[str, ...], list[str]] = {}
        for group_size in (128,) if kind[2] == "block128" else GROUPS:
            answer = tuple(serves(op, device, kind, group_size, dtype) for device in devices.values())
            if devices is CPU:
                invariant = {serves(op, isa, kind, group_size, dtype, BATCH_INVARIANT) for isa in devices.values()}
                # Exact integer sums have the same bits whichever kernel makes them: there the flag changes nothing.
                unchanged = invariant <= set(answer) and all(EXACT & set(cell.split("`")) for cell in answer)
                last = {cell.rpartition(", ")[2] for cell in answer}
                assert unchanged or invariant <= last, (op, dtype, kind, group_size)
            groups.setdefault(answer, []).append(group_name(group_size))
        for answer, sizes in groups.items():
            rows.setdefault((", ".join(sizes), answer), []).append(kind)
    return rows


def merged_rows(devices: dict[str, str]) -> list[tuple[str, str, list[Kind], str, tuple[str, ...]]]:
    """Op, x, weights, group sizes, kernel per device. Activations with equal answers share rows, as formats and sizes do."""
    found = []
    for op, dtypes in INPUTS:
        merged: list[tuple[list[str], dict[tuple[str, tuple[str, ...]], list[Kind]]]] = []
        for dtype, words in dtypes.items():
            rows = matrix_of(op, dtype, devices)
            same = next((names for names, other in merged if other == rows), None)
            if same is None:
                merged.append(([words], rows))
            else:
                same.append(words)
        for names, rows in merged:
            found += [(op, ", ".join(names), kind, sizes, answer) for (sizes, answer), kind in rows.items()]
    return found


def matrix() -> list[str]:
    """The CPU: a column per instruction set."""
    lines = [f"| op | x | weight | group size | {' | '.join(CPU)} |", f"|---|---|---|---|{'---|' * len(CPU)}"]
    for op, x, kind, sizes, answer in merged_rows(CPU):
        lines.append(f"| `{op}` | {x} | {kind_names(kind)} | {sizes} | {' | '.join(answer)} |")
    return lines


def gpu_matrix(devices: dict[str, str]) -> list[str]:
    """A row per set of devices that answer alike, for most answers are those of all."""
    lines = ["| op | x | weight | group size | device | kernel |", "|---|---|---|---|---|---|"]
    for op, x, kind, sizes, answer in merged_rows(devices):
        for kernel in dict.fromkeys(answer):
            names = [name for name, other in zip(devices, answer, strict=True) if other == kernel]
            where = "all" if len(names) == len(devices) else ", ".join(names)
            lines.append(f"| `{op}` | {x} | {kind_names(kind)} | {sizes} | {where} | {kernel} |")
    return lines


def kernels() -> list[str]:
    """One row per kernel."""
    lines = ["| kernel | op | takes | general |", "|---|---|---|---|"]
    seen: set[tuple[str, str]] = set()
    for op, _ in INPUTS:
        for row in _C.kernel_table(compiled=True):
            if row["backend"] == "cpu" and row["op"] == op and (op, row["name"]) not in seen:
                seen.add((op, row["name"]))
                lines.append(f"| `{row['name']}` | `{op}` | {row['takes']} | {'yes' if row['general'] else ''} |")
    return lines


def gpu_kernels(backend: str) -> list[str]:
    lines = ["| kernel | op | takes | from | general |", "|---|---|---|---|---|"]
    for op, _ in INPUTS:
        for row in _C.kernel_table():
            if row["backend"] == backend and row["op"] == op:
                general = "yes" if row["general"] else ""
                lines.append(f"| `{row['name']}` | `{op}` | {row['takes']} | `{row['isa']}` | {general} |")
    return lines


def cuda_invariant() -> str:
    """Which kernels `batch_invariant` leaves, in words."""
    parts = []
    for op, dtypes in INPUTS:
        names = sorted(set().union(*(invariant_kernels(op, dtype) for dtype in dtypes)))
        parts.append(f"`{op}` runs {', '.join(f'`{name}`' for name in names)}")
    return "; ".join(parts)


def formats() -> list[str]:
    lines = [
        "| format | bits | kind | zeros | group sizes | blocks | scales | perm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _C.format_table():
        integer = row["kind"] == "int"
        zeros = "none, int, float, offset" if integer else "none"
        blocks = "128 x 128" if row["name"].startswith("fp8") else ""
        lines.append(
            f"| `{row['name']}` | {row['bits']} | {'integer' if integer else 'coded'} | {zeros} | all | {blocks} "
            "| all | yes |"
        )
    return lines


def page() -> str:
    lines = [
        "# What is supported, and by which kernel",
        "",
        "<!-- Written by docs/generate_support.py from the library's own tables. Do not edit: run it. -->",
        "",
        "Every format works with every group size, zero kind, scale dtype, input dtype and shape; the tables say",
        "which kernel does it.",
        "A *general* kernel takes everything and is slow: `LOWBIT_STRICT=1` turns picking one into an error, and",
        "[`lowbit.explain`](python.md#explain) says for one problem why no faster one took it.",
        "",
        "| backend | state |",
        "|---|---|",
        "| CPU, x86-64: AVX2, AVX-512, with VNNI and VBMI, and with bf16 (AMD) | works; chosen at run time |",
        "| CPU, x86-64 with AMX | works on a software model of the tile instructions; not yet measured on hardware "
        "([amx.md](amx.md)) |",
        "| CPU, AArch64: NEON, with dot products, and with 8-bit matrix products | chosen at run time; run under qemu "
        "in the tests, not yet timed on such a CPU. `planes_i8` as under `avx512vnni` (with dot products up to six bits, "
        "with NEON alone not); all else as under `avx2` |",
        "| CPU, any other (portable C++) | works; what this page says of `portable` holds |",
        "| CUDA, compute capability 8.0 (Ampere) to 12.x (RTX Blackwell) | every op; run in the emulator of the tests, "
        "not yet on a GPU |",
        "| Metal (MPS), Apple silicon | every op; run in the emulator of the tests, not yet on a Mac ([metal.md](metal.md)) |",
        "",
        "## Weight formats",
        "",
        *formats(),
        "",
        '"All" group sizes: -1 (all of K) and every multiple of 8 up to K rounded up to a multiple of 8; '
        "the last group may be shorter.",
        "",
        '"All" scales: fp32, fp16, bf16 and, where zeros are not fractions, e8m0 and e4m3; e4m3 under one scale for the',
        "weight; the two-level scales of K-quants and bitsandbytes, and groups that run across rows ([how a weight is",
        "stored](format.md#scales)). The kernels of every backend take all of them alike. Weights with the last two are packed,",
        "unpacked and dequantized by the CPU where the GPU is CUDA's.",
        "",
        "## Kernels of the CPU",
        "",
        *kernels(),
        "",
        "## Which kernel serves which problem",
        "",
        "One column per instruction set. `M` is the number of rows of x; where M is named, the next kernel takes over beyond it.",
        "The group sizes are examples: a multiple of 16 behaves as 16 does, any other multiple of 8 as 8 does.",
        "",
        *matrix(),
        "",
        "`linear` runs the kernels of `gemm`. With `batch_invariant` the kernel named last in a cell serves every M;",
        "`dot_i8` and `tiles_i8`, which give the same bits, stay where they are.",
        "",
        "## Kernels of CUDA",
        "",
        "A row is a kernel in one tile shape. The number after `m` is how many rows of x a tile has; a kernel takes any M,",
        "but beyond that number the next one is preferred. `from` is the least compute capability.",
        "",
        *gpu_kernels("cuda"),
        "",
        "## Which CUDA kernel serves which problem",
        "",
        f"Asked of {', '.join(f'`{name}`' for name in CUDA)}, and with fp32 scales, which take most shared memory. The group",
        "sizes are examples: a multiple of 16 behaves as 16 does, any other multiple of 8 as 8 does.",
        "",
        *gpu_matrix(CUDA),
        "",
        f"With `batch_invariant`, {cuda_invariant()}, and no tile is summed by several blocks.",
        "",
        "## Kernels of Metal",
        "",
        "The number after `m` is how many rows of x a SIMD-group or threadgroup takes at once. `from` is the first GPU family.",
        "",
        *gpu_kernels("metal"),
        "",
        "## Which Metal kernel serves which problem",
        "",
        f"Asked of {', '.join(f'`{name}`' for name in METAL)}. The group sizes are examples, as above. With `batch_invariant`,",
        "`gemm` and `gemm_a8` run the `stream` kernels at every M.",
        "",
        *gpu_matrix(METAL),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    wanted = page()
    if parser.parse_args().check:
        if TARGET.read_text() != wanted:
            print(f"{TARGET.name} is not what the library says: run python docs/generate_support.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
