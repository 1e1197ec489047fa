"""`lowbit convert`: a checkpoint of any kind into any format that is written."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from lowbit.commands import _arguments, _output
from lowbit.formats._writers import WRITERS

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Write a checkpoint in another format, a tensor at a time.

SRC is a lowbit artifact, a checkpoint that another library quantized (GPTQ, AWQ, compressed-tensors, FP8, GGUF, ...), or a
folder of fp32, bf16 or fp16 safetensors, which needs --scheme. A quantized source keeps its codes; what the format cannot
hold is refused by name before anything is written. With --scheme it is decoded and quantized again. DST must not exist; it
appears when all of it is there. The table gives each layer's error against the source.
"""
_EXAMPLE = """\
examples:
  lowbit convert Llama-3.1-8B-AWQ Llama-3.1-8B-ct --to compressed-tensors
  lowbit convert Llama-3.1-8B Llama-3.1-8B-Q4_0.gguf --to gguf --scheme int4-g32 --metadata-from Llama-3.1-8B-F16.gguf

formats:
"""


def add_parser(commands: Any) -> None:
    """Describe the command."""
    formats = "\n".join(f"  {row.name:<20} {row.about}" for row in WRITERS)
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in another format",
        description=_DESCRIPTION,
        epilog=_EXAMPLE + formats,
        formatter_class=_output.HelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a folder, or a GGUF file")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to make; for gguf the file")
    parser.add_argument("--to", required=True, choices=[row.name for row in WRITERS], help="format to write")
    parser.add_argument("--scheme", type=_arguments.scheme, help="how to quantize, such as int4-g128")
    _arguments.add_overrides(parser, "another scheme, or none, for layers whose name matches, as in `lowbit quantize`")
    _arguments.add_importance(parser)
    parser.add_argument(
        "--metadata-from", metavar="FILE.gguf", type=Path, help="take names and keys from a GGUF file of the same model"
    )
    _arguments.add_max_shard_bytes(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, and no report on success")
    _output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from lowbit.conversion import convert_checkpoint
    from lowbit.importance import load_importance

    begin = time.perf_counter()
    report = convert_checkpoint(
        args.source,
        args.target,
        args.to,
        scheme=args.scheme,
        overrides=args.overrides,
        importance=None if args.importance is None else load_importance(args.importance),
        metadata_from=args.metadata_from,
        max_shard_bytes=args.max_shard_bytes,
        progress=False if args.quiet or args.json else None,
    )
    seconds = time.perf_counter() - begin
    if args.json:
        _output.print_json({**report.to_dict(), "seconds": seconds})
    elif not args.quiet:
        print(_output.clean_lines(str(report)))
        print(f"{seconds:.1f} s")
    return 0
