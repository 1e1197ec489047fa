"""Arguments that several commands take, and their types."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowbit import _artifact
from lowbit.commands._plan import Override
from lowbit.scheme import Scheme

__all__ = ["add_importance", "add_max_shard_bytes", "add_overrides", "override", "positive", "scheme"]


def add_overrides(parser: argparse.ArgumentParser, about: str) -> None:
    """--override PATTERN=SCHEME, any number of times, into `overrides`."""
    parser.add_argument(
        "--override", dest="overrides", metavar="PATTERN=SCHEME", type=override, action="append", default=[], help=about
    )


def add_importance(parser: argparse.ArgumentParser) -> None:
    """--importance FILE."""
    parser.add_argument(
        "--importance", metavar="FILE", type=Path, help="weights of columns, as lowbit.save_importance writes them"
    )


def add_max_shard_bytes(parser: argparse.ArgumentParser) -> None:
    """--max-shard-bytes BYTES."""
    parser.add_argument(
        "--max-shard-bytes", metavar="BYTES", type=positive, default=_artifact.MAX_SHARD_BYTES, help="size of a file"
    )


def scheme(text: str) -> Scheme:
    """A scheme's string."""
    try:
        return Scheme.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def override(text: str) -> Override:
    """PATTERN=SCHEME, or PATTERN=none."""
    pattern, equals, wanted = text.rpartition("=")  # the last one: a regular expression may hold others
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=SCHEME, such as '*.down_proj=int6-g64'")
    return pattern, None if wanted.strip().lower() == "none" else scheme(wanted)


def positive(text: str) -> int:
    """A number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
