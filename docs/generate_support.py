"""Writes docs/support.md: which kernel serves which problem, asked of the library itself.

    python docs/generate_support.py            # rewrite the file
    python docs/generate_support.py --check    # exit 1 if it is not what the library says

The answers are those of `explain`, a pure function of the problem and an instruction set, so that every x86-64 machine
writes the same file. (On other architectures only "portable" is compiled in, and there is nothing to compare. Run it
where all instruction sets are when a kernel was added: the table of kernels is that of the machine.)
"""

from __future__ import annotations

import argparse
import contextlib
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
    for isa in ("avx512bf16", "avx512vnni", "avx512", "avx2", "portable"):
        with contextlib.suppress(ValueError):
            _C.explain("gemm", f"cpu:{isa}", 1, 1, 1, _C.make_desc(3, -1, 0, 0, 0, False, 1), "float32", 0)
            found.append(isa)
    return found


ISAS = compiled()


def kinds() -> list[Kind]:
    found = []
    for row in _C.format_table():
        zeros = ZEROS if row["kind"] == "int" else ("none",)
        found += [(row["name"], zero, "group") for zero in zeros]
        if row["name"].startswith("fp8"):
            found.append((row["name"], "none", "block128"))
    return found


def desc(kind: Kind, group_size: int) -> int:
    format, zero, scaling = kind
    fields = ENUMS["format"][format], group_size, ENUMS["zero_kind"][zero], 0, ENUMS["scaling"][scaling], False
    return _C.make_desc(*fields, _C.preferred_layout("cpu", _C.make_desc(*fields, 0)))


def chosen(op: str, isa: str, M: int, kind: Kind, group_size: int, dtype: str, flags: int = 0) -> str:
    rows = _C.explain(op, f"cpu:{isa}", M, N, K, desc(kind, group_size), dtype, flags)
    name = next(name for name, reason in rows if not reason)
    return name.removeprefix("cpu_").rpartition("_")[0]


def serves(op: str, isa: str, kind: Kind, group_size: int, dtype: str, flags: int = 0) -> str:
    """The kernels of one problem over M: "stream_f32 (M <= 16), panel_f32"."""
    names = [chosen(op, isa, M, kind, group_size, dtype, flags) for M in ROWS]
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


def matrix_of(op: str, dtype: str) -> dict[tuple[str, tuple[str, ...]], list[Kind]]:
    """(Group sizes, kernel per instruction set) -> kinds of weights."""
    rows: dict[tuple[str, tuple[str, ...]], list[Kind]] = {}
    for kind in kinds():
        groups: dict[tuple[str, ...], list[str]] = {}
        for group_size in (128,) if kind[2] == "block128" else GROUPS:
            answer = tuple(serves(op, isa, kind, group_size, dtype) for isa in ISAS)
            invariant = {serves(op, isa, kind, group_size, dtype, BATCH_INVARIANT) for isa in ISAS}
            assert invariant <= {cell.rpartition(", ")[2] for cell in answer}, (op, dtype, kind, group_size)
            groups.setdefault(answer, []).append(group_name(group_size))
        for answer, sizes in groups.items():
            rows.setdefault((", ".join(sizes), answer), []).append(kind)
    return rows


def matrix() -> list[str]:
    """Activations with equal answers share rows, as do formats and group sizes."""
    lines = [f"| op | x | weight | group size | {' | '.join(ISAS)} |", f"|---|---|---|---|{'---|' * len(ISAS)}"]
    for op, dtypes in INPUTS:
        merged: list[tuple[list[str], dict[tuple[str, tuple[str, ...]], list[Kind]]]] = []
        for dtype, words in dtypes.items():
            rows = matrix_of(op, dtype)
            same = next((names for names, other in merged if other == rows), None)
            if same is None:
                merged.append(([words], rows))
            else:
                same.append(words)
        for names, rows in merged:
            x = ", ".join(names)
            lines += [
                f"| `{op}` | {x} | {kind_names(k)} | {sizes} | {' | '.join(a)} |" for (sizes, a), k in rows.items()
            ]
    return lines


def kernels() -> list[str]:
    """One row per kernel. The table names those that this machine can run: where it lacks some, the page's rows stay."""
    if set(_C.isa_levels()) != set(ISAS) and TARGET.exists():
        section = TARGET.read_text().partition("## Kernels of the CPU\n")[2].partition("\n## ")[0]
        return section.strip().splitlines()
    lines = ["| kernel | op | takes | general |", "|---|---|---|---|"]
    seen: set[tuple[str, str]] = set()
    for op, _ in INPUTS:
        for row in _C.kernel_table():
            if row["op"] == op and (op, row["name"]) not in seen:
                seen.add((op, row["name"]))
                lines.append(f"| `{row['name']}` | `{op}` | {row['takes']} | {'yes' if row['general'] else ''} |")
    return lines


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
            "| fp32, fp16, bf16 | yes |"
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
        "| CPU, any other (portable C++) | works; what this page says of `portable` holds |",
        "| CUDA | no kernels in this version |",
        "| Metal (MPS) | no kernels in this version |",
        "",
        "## Weight formats",
        "",
        *formats(),
        "",
        '"All" group sizes: -1 (all of K) and every multiple of 8 up to K rounded up to a multiple of 8; '
        "the last group may be shorter.",
        "",
        "## Kernels of the CPU",
        "",
        *kernels(),
        "",
        "## Which kernel serves which problem",
        "",
        "One column per instruction set. `M` is the number of rows of x; where M is named, the next kernel takes over beyond it.",
        "The group sizes are examples: a multiple of 32 behaves as 32 does, any other multiple of 8 as 8 does.",
        "",
        *matrix(),
        "",
        "`linear` runs the kernels of `gemm`. With `batch_invariant` the kernel named last in a cell serves every M.",
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
