"""The `lowbit` command: its parser, and what happens to errors, Ctrl-C and closed pipes. Each command is a file in commands/.

0 success    1 something is wrong with the input    2 wrong usage    130 Ctrl-C    141 the reader of our output left
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence

import lowbit
from lowbit.commands import bench, compare, convert, info, inspect, quantize
from lowbit.commands._output import clean

__all__ = ["main", "make_parser"]

_COMMANDS = (info, quantize, convert, inspect, compare, bench)


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; a parsed `args.run(args)` returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="lowbit",
        description="Packed low-bit weights for PyTorch.",
        epilog="Each command has an example: lowbit quantize --help. LOWBIT_DEBUG=1 shows where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"lowbit {lowbit.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Example:
        >>> main(["inspect", "model-int4", "--verify"])
        0
    """
    parser = make_parser()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 gets escapes instead of an exception
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parser.parse_args(argv)
        code = int(args.run(args))
        sys.stdout.flush()  # here, where a closed pipe can still be answered
        return code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # `lowbit inspect model | head`: what is left in the buffer must not be written when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("LOWBIT_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        else:
            _say(f"error: {_message(error)}")
        return 1


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, RuntimeError, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (LOWBIT_DEBUG=1 shows where)"


def _say(text: str) -> None:
    print(f"lowbit: {clean(text)}", file=sys.stderr)
