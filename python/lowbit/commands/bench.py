"""`lowbit bench`: how fast the kernels are on this machine, beside torch and beside what the machine could do."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lowbit.commands import _output
from lowbit.commands._benchmark import DTYPES, Settings, run_benchmark
from lowbit.commands._cases import MODELS, STANDARD_SHAPES, Shape, model_shapes
from lowbit.commands._peers import BASELINES, PEERS, expand
from lowbit.commands._target import TARGETS, find_target
from lowbit.scheme import Scheme

__all__ = ["HEAD", "add_parser", "cells", "make_settings", "notes", "run", "show"]

_DESCRIPTION = """\
Time y = x @ W.T with packed weights. Everybody runs in turns, medians count, data is random, and weights are cold in cache
(--warm: one copy, used again and again).

"roofline" is the share of what this machine can do, as measured in the same run: the time to read the bytes once at the
speed of a streaming read, or to do the operations at the speed of its fastest large matmul, whichever is longer.
"""
_EXAMPLE = """\
examples:
  lowbit bench --model llama-3.1-8b --M 1,16
  lowbit bench --shape 4096x4096 --scheme int4-g128,int8,nf4-g64 --baseline torch-bf16,dequant --threads 1,2

"""
_T = TypeVar("_T")


def add_parser(commands: Any) -> None:
    """Describe the command."""
    models = "models: " + ", ".join(MODELS)
    baselines = "baselines (peers: all but dequant; torch, onnxruntime, ...: all of one package):\n" + "\n".join(
        f"  {name:<28} {what}" for name, what in BASELINES.items()
    )
    parser = commands.add_parser(
        "bench",
        help="time the kernels beside torch and the roofline",
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLE}{models}\n\n{baselines}",
        formatter_class=_output.HelpFormatter,
    )
    add = parser.add_argument
    add("--shape", dest="shapes", metavar="NxK", type=_list(_shape), action="extend", help="shapes of W")
    add("--model", dest="models", metavar="NAME", type=_list(_model), action="extend", help="the shapes of a model")
    add("--M", dest="Ms", metavar="M", type=_list(_count), default=[1, 4, 16], help="rows of x (default: 1,4,16)")
    add("--scheme", dest="schemes", metavar="SCHEME", type=_list(_scheme), action="extend", help="default: int4-g128")
    add("--baseline", dest="baselines", metavar="NAME", type=_list(_baseline), default=["torch-bf16"],
        help="what to compare with, or none (default: torch-bf16)")  # fmt: skip
    add("--dtype", choices=DTYPES, default="bf16", help="of x")
    add("--device", choices=TARGETS, default="cpu", help="where to multiply (default: cpu)")
    add("--threads", type=_list(_count), default=[os.cpu_count() or 1], help="numbers of threads (default: all cores)")
    add("--batch-invariant", action="store_true", help="time every scheme with that flag too")
    add("--warm", action="store_true", help="one copy of each weight, which may stay in cache")
    add("--time-budget", metavar="SECONDS", type=_seconds, default=60.0, help="for all measurements")
    add("--plot", metavar="FILE.png", type=Path, help="draw the roofline with every case on it (needs matplotlib)")
    add("--quiet", action="store_true", help="do not say what is being done")
    _output.add_json(parser)
    parser.set_defaults(run=run)


def _list(parse: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    def read(text: str) -> list[_T]:
        return [parse(part.strip()) for part in text.split(",") if part.strip()]

    return read


def _shape(text: str) -> Shape:
    match = re.fullmatch(r"([1-9][0-9]{0,6})[xX]([1-9][0-9]{0,6})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not NxK, such as 4096x14336")
    return Shape(int(match[1]), int(match[2]))


def _one_of(text: str, known: Sequence[str], what: str) -> str:
    if text not in known:
        raise argparse.ArgumentTypeError(f"unknown {what} {text!r}; known are {', '.join(known)}")
    return text


def _model(text: str) -> str:
    return _one_of(text.lower(), list(MODELS), "model")


def _baseline(text: str) -> str:
    packages = dict.fromkeys(peer.package for peer in PEERS.values())
    return _one_of(text, [*BASELINES, "peers", *packages, "none"], "baseline")


def _scheme(text: str) -> Scheme:
    try:
        return Scheme.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if args.plot:
        from lowbit.commands import _plot  # first, so that a missing matplotlib is known before a minute of measuring

        _plot.require_matplotlib()
    find_target(args.device)  # raises, with the reason, where there are no kernels for it
    watched = sys.stderr.isatty() and not args.quiet
    result = run_benchmark(make_settings(args), _say if watched else lambda text: None)
    if watched:
        print("\r\033[K", end="", file=sys.stderr)
    if args.json:
        _output.print_json(result)
    else:
        show(result)
    if args.plot and result["rows"]:
        _plot.draw(result, args.plot)
    if result["interrupted"]:
        raise KeyboardInterrupt
    return 0 if result["rows"] else 1


def make_settings(args: argparse.Namespace) -> Settings:
    """What to measure, from parsed arguments."""
    shapes = [*(args.shapes or []), *(s for name in args.models or [] for s in model_shapes(name))]
    return Settings(
        shapes=shapes or STANDARD_SHAPES,
        Ms=args.Ms,
        schemes=args.schemes or [Scheme.parse("int4-g128")],
        baselines=expand(name for name in args.baselines if name != "none"),
        dtype=args.dtype,
        threads=args.threads if args.device == "cpu" else [torch.get_num_threads()],
        warm=args.warm,
        seconds=args.time_budget,
        batch_invariant=args.batch_invariant,
        device=args.device,
    )


def _say(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# -- for people --------------------------------------------------------------------------------------------------------------

HEAD = (
    "N x K",
    "M",
    "threads",
    "what",
    "kernel",
    "median us",
    "±%",
    "GB/s",
    "TFLOP/s",
    "roofline",
    "x torch-bf16",
    "error",
)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the result as text, under `HEAD`."""
    ratio, mark = row["vs_torch_bf16"], "*" if row.get("contended") else ""
    return (
        f"{row['shape'][0]} x {row['shape'][1]}", str(row["M"]), str(row["threads"]), row["name"], row["kernel"],
        f"{row['median_us']:.1f}{mark}", f"{100 * row['spread']:.0f}", f"{row['GBps']:.1f}", f"{row['TFLOPs']:.3f}",
        f"{row['roofline_percent']:.0f}%", "" if ratio is None else f"{ratio:.2f}",
        "" if row["error"] is None else f"{row['error']:.2g}",
    )  # fmt: skip


def notes(result: Mapping[str, Any]) -> list[str]:
    """What one has to know to read the table."""
    load = result["load_average_before"]
    cores = f", {result['cores']} cores" if result.get("device_type", "cpu") == "cpu" else ""
    lines = [
        f"{result['device']}{cores}, {result['isa']}; lowbit {result['lowbit']}, "
        f"torch {result['torch']}; x in {result['dtype']}, weights {result['weights']} in cache"
        + (f"; load average at the start {load[0]}" if load else "")
    ]
    for roof in result["roofline"]:
        peaks = ", ".join(f"{name} {value:.3f}" for name, value in roof["TFLOPs"].items() if value)
        threads = f"{roof['threads']} thread{'s' * (roof['threads'] > 1)}"
        lines.append(f"roofline, {threads}: read {roof['read_GBps']:.1f} GB/s; TFLOP/s: {peaks}")
    lines += [f"absent: {entry['name']}: {entry['why']}" for entry in result["absent"]]
    for left in result["left_out"]:
        where = "x".join(map(str, left["shape"]))
        cell = " ".join(f"{key}={left[key]}" for key in ("M", "threads") if key in left)
        what = " ".join(part for part in (cell, left.get("name")) if part)
        lines.append(f"left out: {where}{' ' if what else ''}{what}: {left['why']}")
    if contended := sum(bool(row.get("contended")) for row in result["rows"]):
        lines.append(
            f"*: {contended} of {len(result['rows'])} rows were measured while other processes wanted the same cores; "
            "they say nothing about this machine"
        )
    if result["interrupted"]:
        lines.append("interrupted: the rest was not measured")
    return lines


def show(result: Mapping[str, Any]) -> None:
    """Print a result as a table and notes."""
    if result["rows"]:
        _output.print_table(HEAD, [cells(row) for row in result["rows"]], left=5)
    print("\n".join(_output.clean(line) for line in notes(result)))
