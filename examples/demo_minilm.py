"""A real text encoder in 8 and 4 bits, and the speed of the kernels: what `make demo` runs.

    python examples/demo_minilm.py
    python examples/demo_minilm.py --quick --json demo.json

Quantizes all-MiniLM-L6-v2, saves it, loads it, runs it on 120 sentences and compares with fp32; then times gemm on the
layers of Llama 3.1 8B. Exits with 1 if the embeddings are not as near to fp32 as they have to be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import minilm
import model_quality
import torch
from model_quality import REQUIRED, Latency, Quality, Variant
from rich import box
from rich.console import Console
from rich.table import Table

import lowbit
from lowbit import _C, Scheme
from lowbit.commands._benchmark import Settings, run_benchmark
from lowbit.commands._cases import Shape
from lowbit.commands.info import cpu_name

# More than the tables need: where a terminal is narrower, its lines wrap and nothing is cut off.
WIDTH = 200
LLAMA = (
    Shape(4096, 4096, "q or o"),
    Shape(6144, 4096, "q, k, v"),
    Shape(14336, 4096, "gate or up"),
    Shape(4096, 14336, "down"),
)
SCHEMES = ("int4-g128", "int8", "fp8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status: 0, 1 where accuracy is not as required, 2 where the model is not there."""
    args = _parse(argv)
    console = Console(width=WIDTH, highlight=False)
    begin = time.perf_counter()
    try:
        result = _run(args, console)
    except minilm.ModelNotFound as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    result["seconds"] = time.perf_counter() - begin
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    for row in (row for row in result["model"] if row["required_mean"]):
        good = row["cosine_mean"] >= row["required_mean"]
        verdict = "[green]ok[/]" if good else "[bold red]not enough[/]"
        console.print(
            f"{row['name']:9}mean cosine {row['cosine_mean']:.5f}, required {row['required_mean']}: {verdict}"
        )
    for failure in result["failures"]:
        console.print(f"[bold red]FAILED[/]   {failure}")
    console.print(f"[dim]{result['seconds']:.0f} seconds[/]")
    return 1 if result["failures"] else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, one layer of Llama, M of 1 and 16")
    parser.add_argument("--no-gemm", action="store_true", help="the encoder only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to this file, too")
    args = parser.parse_args(argv)
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    return args


def _run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "lowbit": lowbit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    _print_machine(console, machine)
    folder = minilm.model_folder()
    tokenizer, sentences = minilm.load_tokenizer(folder), minilm.read_sentences()
    variants = []
    with console.status("reading the model") as status:
        for variant in model_quality.make_variants(
            lambda: minilm.load_encoder(folder), tokenizer, sentences, list(REQUIRED)
        ):
            status.update(f"{variant.name} done; quantizing, saving, loading, encoding {len(sentences)} sentences")
            variants.append(variant)
        qualities = {v.name: model_quality.compare(v.embeddings, variants[0].embeddings) for v in variants}
        status.update("timing the encoder")
        latencies = model_quality.latencies(variants, tokenizer, sentences, 1.0 if args.quick else 5.0)
    _print_model(console, variants, qualities, latencies, len(sentences))
    gemm = None
    if not args.no_gemm:
        gemm = _measure_gemm(args.quick, console)
        _print_gemm(console, gemm)
    return {
        "machine": machine,
        "sentences": len(sentences),
        "model": [_model_row(v, qualities[v.name], latencies) for v in variants],
        "others_cores": {str(found.batch): found.others for found in latencies},
        "gemm": gemm,
        "failures": model_quality.failures(variants, qualities),
    }


def _model_row(variant: Variant, quality: Quality, latencies: Sequence[Latency]) -> dict[str, Any]:
    return {
        "name": variant.name,
        "disk_bytes": variant.disk_bytes,
        "linear_bytes": variant.linear_bytes,
        "seconds": {str(found.batch): found.seconds[variant.name] for found in latencies},
        "cosine_mean": quality.mean,
        "cosine_min": quality.least,
        "same_neighbour": quality.neighbours,
        "required_mean": REQUIRED.get(variant.name),
        "reloaded_equal": variant.reloaded,
    }


def _measure_gemm(quick: bool, console: Console) -> dict[str, Any]:
    """`lowbit bench`, with the threads that torch would use."""
    settings = Settings(
        shapes=LLAMA[:1] if quick else LLAMA,
        Ms=(1, 16) if quick else (1, 4, 16, 64),
        schemes=[Scheme.parse(name) for name in SCHEMES],
        baselines=("torch-fp32", "torch-bf16"),
        threads=(torch.get_num_threads(),),
        seconds=5.0 if quick else 45.0,
    )
    with console.status("timing gemm") as status:
        result = run_benchmark(settings, lambda text: status.update(f"timing gemm: {text}"))
    if result["interrupted"]:
        raise KeyboardInterrupt
    return result


# -- tables ------------------------------------------------------------------------------------------------------------


def _print_machine(console: Console, machine: Mapping[str, Any]) -> None:
    at = f"{machine['cores']} cores, {machine['threads']} threads in use, {machine['isa']}"
    console.print(f"[bold]{machine['cpu']}[/], {at}")
    console.print(
        f"lowbit {machine['lowbit']}, torch {machine['torch']}, Python {machine['python']}, {machine['system']}\n"
    )


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    return table


def _explain(console: Console, lines: Sequence[tuple[str, str]], contended: bool) -> None:
    for name, meaning in lines:
        console.print(f"  [dim]{name:<11}{meaning}[/]", soft_wrap=True)
    if contended:
        note = "other programs wanted the same cores meanwhile: do not trust these times"
        console.print(f"  [yellow]{'*':<11}{note}[/]", soft_wrap=True)
    console.print()


def _print_model(
    console: Console,
    variants: Sequence[Variant],
    qualities: Mapping[str, Quality],
    latencies: Sequence[Latency],
    count: int,
) -> None:
    heads = ["weights", "file\nMB", "linear\nMB"]
    contended = []
    for found in latencies:
        contended.append(_is_contended(found.others))
        heads += [f"batch {found.batch}\nms{'*' if contended[-1] else ''}", "vs\nfp32"]
    table = _table(
        "all-MiniLM-L6-v2: 22.6 million weights, 10.6 million of them in 36 linear layers",
        [*heads, "cosine\nmean", "cosine\nleast", "same\nnearest"],
    )
    for v in variants:
        cells = [v.name, f"{v.disk_bytes / 1e6:.1f}", f"{v.linear_bytes / 1e6:.1f}"]
        for found in latencies:
            seconds, fp32 = found.seconds[v.name], found.seconds[model_quality.BASELINE]
            cells += [f"{seconds * 1e3:.2f}", f"{fp32 / seconds:.2f}x"]
        quality = qualities[v.name]
        table.add_row(*cells, f"{quality.mean:.5f}", f"{quality.least:.5f}", f"{quality.neighbours:.1%}")
    console.print(table)
    words = variants[0].model.words.weight.nbytes / 1e6
    _explain(
        console,
        (
            ("file", f"all of the model on disk; {words:.0f} MB of it are word embeddings, which are not quantized"),
            ("linear", "the weights of the linear layers: what is quantized, scales included"),
            ("ms", "one forward of 1 or of 32 sentences, tokens given; median, all rows taking turns"),
            ("vs fp32", "how many times as fast as torch in fp32, in the same run"),
            (
                "cosine",
                f"similarity of a sentence's embedding to the fp32 model's; mean and least of {count} sentences",
            ),
            ("nearest", "sentences whose most similar other sentence is the same as with fp32"),
        ),
        any(contended),
    )


def _is_contended(others: float | None) -> bool:
    return others is not None and torch.get_num_threads() + others > (os.cpu_count() or 1) + 0.25


def _print_gemm(console: Console, result: Mapping[str, Any]) -> None:
    rows = {(*row["shape"], row["name"], row["M"]): row for row in result["rows"]}
    Ms = sorted({row["M"] for row in result["rows"]})
    names = sorted({row["name"] for row in result["rows"]}, key=["torch-fp32", "torch-bf16", *SCHEMES].index)
    heads = ["weights"]
    for M in Ms:
        heads += [f"M={M}\nms", "\nGB/s", "vs\nbf16"]
    table = _table("y = x @ W.T on the layers of Llama 3.1 8B, x in bf16", heads)
    for N, K, label in dict.fromkeys((*row["shape"], row["layers"]) for row in result["rows"]):
        table.add_row(f"[bold]{N} x {K}[/]")
        table.add_row(f"[dim]{label}[/]")
        for name in names:
            cells = [name.replace("-", " ") if name.startswith("torch") else name]
            for M in Ms:
                cells += _gemm_cells(rows.get((N, K, name, M)))
            table.add_row(*cells, end_section=name == names[-1])
    console.print(table)
    (roofline,) = result["roofline"]
    _explain(
        console,
        (
            ("M", "rows of x: tokens that are computed at once"),
            ("ms", "one call; median, all rows of a layer taking turns, weights not in cache"),
            ("GB/s", f"of weight, x and y; this machine reads memory at {roofline['read_GBps']:.1f} GB/s"),
            ("vs bf16", "how many times as fast as torch's F.linear in bf16, in the same run"),
        ),
        any(row["contended"] for row in result["rows"]),
    )
    if result["left_out"]:
        console.print("  [yellow]-          not measured: the time was up[/]\n")


def _gemm_cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["-"] * 3
    ratio = row["vs_torch_bf16"]
    color = "dim" if row["baseline"] else "green" if ratio >= 1 else "yellow"
    mark = "*" if row["contended"] else ""
    return [f"{row['median_us'] / 1e3:.2f}{mark}", f"{row['GBps']:.1f}", f"[{color}]{ratio:.2f}x[/]"]


if __name__ == "__main__":
    sys.exit(main())
