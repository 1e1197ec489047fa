"""What the short lists of problems (short_list.py, metal/short_list.py) are made of."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import build
from .library import ORDERS

SANITIZERS = "address,undefined"

Outputs = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Any], Outputs]  # on an emulator; raises where the results are wrong


def same_bits(some: Outputs, others: Outputs) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(some, others, strict=True)
    )


def run_all(description: str, cases: Sequence[Case], load: Callable[[Path], Any]) -> int:
    """The command of a list: one line per case, "ok" or what went wrong."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("library", type=Path, help="one that build.py has built")
    parser.add_argument("--order", default="forward", choices=ORDERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this text")
    given = parser.parse_args()
    backend = load(given.library)
    failures = 0
    for case in cases:
        if given.only not in case.name:
            continue
        backend.reset()
        backend.set_order(given.order, given.seed)
        try:
            case.run(backend)
            answer = "ok"
        except Exception as error:
            failures += 1
            answer = f"{type(error).__name__}: {error}"
        print(f"{case.name}: {answer}", flush=True)
    return 1 if failures else 0


def run_sanitized(target: str, module: str) -> str:
    """A list (`module`) on a library (`target`) under the sanitizers, in random order; what was wrong, or nothing.

    One process for all: torch takes seconds to load under a sanitizer, and the first report ends it.
    """
    library = build.build(target, sanitize=SANITIZERS, one_format=True)
    done = subprocess.run(
        [sys.executable, "-m", module, str(library), "--order", "random", "--seed", "7"],
        capture_output=True,
        text=True,
        env={**os.environ, **build.sanitizer_environment(), "PYTHONPATH": str(build.ROOT / "tests")},
    )
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if not line.endswith(": ok")]
    return "\n".join([*wrong, *lines[-1:], done.stderr[-6000:]]) if done.returncode != 0 or wrong else ""
