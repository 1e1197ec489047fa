"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["HelpFormatter", "add_json", "clean", "clean_lines", "print_json", "print_table"]

# Wider than any table: where nobody watches, a line is never cut or folded.
_UNLIMITED = 100_000


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples in a description as they were written, and shows defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, False, [], argparse.SUPPRESS) or "%(default)" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json, which every command has."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def clean(text: str) -> str:
    """Text from a file, made safe to print: control characters and lone surrogates become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def clean_lines(text: str) -> str:
    """`clean`, line by line."""
    return "\n".join(clean(line) for line in text.split("\n"))


def print_json(value: Any) -> None:
    """One JSON object on stdout; numbers that JSON does not have become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1, title: str = "") -> None:
    """Print a table on stdout; the first `left` columns are text, the others numbers, to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=any(head))
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(str(cell))) for cell in row))  # Text: square brackets in a name are not markup
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    page = io.StringIO()
    Console(file=page, width=width, highlight=False, color_system=None).print(table)
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    print("\n".join([*([title] if title else []), *lines, ""]))
