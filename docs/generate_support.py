"""Writes docs/support.md: which kernel serves which problem, asked of the library itself.

    python docs/generate_support.py            # rewrite the file
    python docs/generate_support.py --check    # exit 1 if it is not what the library says

The answers are those of `explain`, a pure function of the problem and an instruction set, so that every x86-64 machine
writes the same file. (On other architectures only "portable" is compiled in, and there is nothing to compare.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch  # noqa: F401 - loads what the compiled part links

from lowbit import _C

TARGET = Path(__file__).with_name("support.md")
ISAS = ("avx512vnni", "avx512", "avx2", "portable")
GROUPS = (8, 16, 24, 32, 40, 64, 96, 128, 256, -1)
ZEROS = ("none", "int", "float", "offset")
# Op, activation, and how the column is called.
INPUTS = (
    ("gemm", "bfloat16", "`gemm`, `linear`: x in fp32, bf16, fp16"),
    ("gemm_a8", "int8", "`gemm_a8`: x in int8, per token"),
    ("gemm_a8", "float8_e4m3fn", "`gemm_a8`: x in fp8, per token or per 128"),
    ("gemm_grad_input", "bfloat16", "`gemm_grad_input`"),
)
# Few rows one by one, because kernels change there, then one of each kind.
ROWS = (*range(1, 18), 32, 64, 129, 1000)
N, K = 4096, 7680  # K is a multiple of every group size

ENUMS = _C.enums()
Kind = tuple[str, str, str]  # format, zero kind, scaling


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
    every = kinds()
    integers = {row["name"] for row in _C.format_table() if row["kind"] == "int"}
    sorts = {
        "every format": [kind for kind in every if kind[2] == "group"],
        "integer formats, every zero kind": [kind for kind in every if kind[0] in integers],
        "coded formats": [kind for kind in every if kind[0] not in integers and kind[2] == "group"],
        "fp8 formats, 128 x 128 blocks": [kind for kind in every if kind[2] == "block128"],
    }
    for text, members in sorts.items():
        if names == members:
            return text
    return ", ".join(
        f"`{format}` ({zero if scaling == 'group' else '128 x 128 blocks'})" for format, zero, scaling in names
    )


def matrix() -> list[str]:
    """Op and input, formats and group sizes -> kernel; formats and group sizes with equal answers share a row."""
    lines = [f"| op and input | weight | group size | {' | '.join(ISAS)} |", f"|---|---|---|{'---|' * len(ISAS)}"]
    for op, dtype, title in INPUTS:
        rows: dict[tuple[str, tuple[str, ...]], list[Kind]] = {}  # (group sizes, kernel per ISA) -> kinds
        for kind in kinds():
            groups: dict[tuple[str, ...], list[str]] = {}
            for group_size in (128,) if kind[2] == "block128" else GROUPS:
                answer = tuple(serves(op, isa, kind, group_size, dtype) for isa in ISAS)
                groups.setdefault(answer, []).append(group_name(group_size))
            for answer, sizes in groups.items():
                rows.setdefault((", ".join(sizes), answer), []).append(kind)
        lines += [f"| {title} | {kind_names(k)} | {sizes} | {' | '.join(a)} |" for (sizes, a), k in rows.items()]
    return lines


def kernels() -> list[str]:
    lines = ["| kernel | op | takes | general |", "|---|---|---|---|"]
    seen: set[tuple[str, str]] = set()
    for op, _, _ in INPUTS:
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
        "| CPU, x86-64: AVX-512 with VNNI and VBMI, AVX-512, AVX2 | works; chosen at run time |",
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
    ]
    stream = {isa: serves("gemm", isa, ("int4", "none", "group"), 128, "bfloat16", 1) for isa in ISAS}
    assert len(set(stream.values())) == 1, stream
    lines += [
        "## With `batch_invariant`",
        "",
        f"`stream_f32` is refused, so that {stream[ISAS[0]]} takes its place for few rows. "
        "The other rows of the tables stay as they are.",
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
