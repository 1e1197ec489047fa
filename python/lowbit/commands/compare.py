"""`lowbit compare`: how far two forms of a model are apart."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lowbit.commands import _output
from lowbit.errors import FormatError

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Compare two forms of a model, layer by layer: error of B's weights against A's, their sizes, and tensors that differ.

A and B are lowbit artifacts, checkpoints that other libraries quantized, or dense safetensors, in any combination. With
--prompts or --tokens both models are run too (this needs transformers): for a language model the share of positions with the
same most likely next token, and the Kullback-Leibler divergence of B from A; for an encoder the cosine similarity.
"""
_EXAMPLE = """\
examples:
  lowbit compare Llama-3.1-8B Llama-3.1-8B-int4
  lowbit compare Llama-3.1-8B Llama-3.1-8B-AWQ --prompts prompts.txt
  lowbit compare model model-int4 --tokens ids.json --json
"""
_MAX_FILE = 64 << 20


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "compare",
        help="how far two forms of a model are apart",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=_output.HelpFormatter,
    )
    parser.add_argument("a", metavar="A", type=Path, help="what errors are measured against")
    parser.add_argument("b", metavar="B", type=Path)
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="text, a prompt on each line; the tokenizer is that of the config's folder",
    )
    inputs.add_argument(
        "--tokens",
        metavar="FILE",
        type=Path,
        help="token ids: a JSON list of lists, or a sequence of numbers on each line",
    )
    parser.add_argument(
        "--config-from",
        metavar="DIR",
        type=Path,
        help="folder of config.json and tokenizer, where neither A nor B has them",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from lowbit.comparison import _config_root, compare_checkpoints

    tokens = None if args.tokens is None else read_tokens(args.tokens)
    if args.prompts is not None:
        tokens = _tokenize(_config_root(args.config_from, args.a, args.b), args.prompts)
    found = compare_checkpoints(
        args.a,
        args.b,
        tokens=tokens,
        config_from=args.config_from,
        progress=False if args.quiet or args.json else None,
    )
    if args.json:
        _output.print_json(found.to_dict())
    else:
        print(_output.clean_lines(str(found)))
    return 0


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_FILE:
        raise FormatError(f"{path}: {path.stat().st_size} bytes is too long")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text: {error}") from None


def read_tokens(path: Path) -> list[list[int]]:
    """Sequences of token ids from a file.

    Raises:
        FormatError: it holds something else than numbers >= 0, or nothing.
    """
    text = _text(path)
    try:
        found: Any = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None
    if found and isinstance(found, list) and all(type(one) is int for one in found):
        found = [found]
    good = isinstance(found, list) and all(
        isinstance(s, list) and s and all(type(t) is int and t >= 0 for t in s) for s in found
    )
    if not found or not good:
        raise FormatError(f"{path}: not token ids: a JSON list of lists of numbers, or numbers on each line")
    return list(found)


def _lines(text: str) -> list[list[int]]:
    return [[int(part) for part in line.replace(",", " ").split()] for line in text.splitlines() if line.strip()]


def _tokenize(root: Path, path: Path) -> list[list[int]]:
    lines = [line for line in _text(path).splitlines() if line.strip()]
    if not lines:
        raise FormatError(f"{path}: holds no prompt")
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        message = "--prompts needs transformers: pip install transformers; --tokens takes ids"
        raise ModuleNotFoundError(message, name=error.name) from None
    tokenizer = AutoTokenizer.from_pretrained(root)
    return [list(tokenizer(line)["input_ids"]) for line in lines]
