"""Tunes selection for the GPU that is here: times every kernel that takes a problem, over the shapes of models, and writes the
table that selection reads.

    python bench/sweep.py                        eight minutes; csrc/cuda/measured.inc and build/sweep/device_check.json
    python bench/sweep.py --budget 1500          longer; run again, it goes on where it stopped
    python bench/sweep.py --dry-run              what would be measured, and by whom; needs no GPU

The table takes effect when lowbit is built again, or at once with LOWBIT_TUNING=FILE (--table FILE writes one).
Exit status: 0 all was measured, 1 a kernel was wrong or failed, 75 something is left for want of time, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds for all of it (480)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring per problem (1)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sweep", help="folder for the results")
    parser.add_argument(
        "--table", type=Path, default=ROOT / "csrc" / "cuda" / "measured.inc", help="the table to change"
    )
    parser.add_argument("--only", default="", help="only problems whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="list problems and candidates, and nothing else")
    parser.add_argument("--model", default="sm_90:132", help="the device that --dry-run is about (sm_90:132)")
    parser.add_argument("--build", action="store_true", help="build lowbit first, as bench/device_check.sh does")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.dry_run:
        return _list(args)
    reason = _no_gpu()
    if reason:
        print(
            f"sweep: there is no GPU to measure ({reason}), and the table stays as it is; --dry-run lists what would be measured"
        )
        return 2
    from device.__main__ import main as device_check

    words = [*(["build"] if args.build else []), "sweep", "--out", str(args.out), "--budget", str(args.budget)]
    words += ["--seconds", str(args.seconds), *(["--only", args.only] if args.only else [])]
    status = device_check(words if args.build else [*words, "--installed"])
    write(args.out / "device_check.json", args.table)
    return status


def write(results: Path, table: Path) -> None:
    """Turns results into the table."""
    from device.sweep import merge_table, rows_of

    held = json.loads(results.read_text())["stages"].get("sweep", {})
    lines = rows_of(result for result in held.values() if result.get("rows"))
    table.write_text(merge_table(table.read_text() if table.exists() else "", lines))
    print(f"{len(lines)} rows of this device: {table}")


def _no_gpu() -> str:
    try:
        import torch

        torch.cuda.init()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def _list(args: argparse.Namespace) -> int:
    from device.cells import sweep_cells
    from device.sweep import candidates

    for cell in sweep_cells():
        if args.only in cell.key:
            print(f"{cell.key}: {' '.join(candidates(cell.spec, args.model))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
