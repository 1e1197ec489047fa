"""python -m device: the command behind bench/device_check.sh."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from device import cells, runner, stages
from device.markdown import markdown
from device.store import ROOT, Store, sources_hash
from device.worker import Worker

DESCRIPTION = """\
Builds lowbit for the GPU that is here, tests it, checks it with compute-sanitizer (on a Mac with Metal's validation),
measures it, and lets its kernels race (bench/sweep.py turns that into the table that selection reads).

  bench/device_check.sh                        all five stages, as far as eight minutes go
  bench/device_check.sh bench --budget 240     one stage
  bench/device_check.sh --resume FOLDER        goes on from the results in another folder
  bench/device_check.sh --dry-run              what there is to do, and nothing else

Results go to --out: device_check.json, device_check.md and logs. Run again with the same folder, it goes on where it
stopped; what failed is tried again, and results about other sources or another device are dropped.
Exit status: 0 all done and well, 1 something failed, 75 something is left for want of time.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "device_check.sh", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(cells.STAGES)}; all by default")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all of it (480)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "device_check", help="folder for the results")
    parser.add_argument("--resume", type=Path, help="folder with the results of an earlier run")
    parser.add_argument("--dry-run", action="store_true", help="list what is left to do, in order")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--archs", default="native", help="LOWBIT_CUDA_ARCHS (native)")
    parser.add_argument(
        "--installed", action="store_true", help="use the lowbit that Python finds instead of building one"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring per bench cell (2)")
    parser.add_argument(
        "--device",
        choices=("cuda", "mps", "cpu"),
        default="mps" if sys.platform == "darwin" else "cuda",
        help="mps on a Mac, otherwise cuda, where not given; cpu tries the harness out, on tiny problems",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    unknown = set(args.stages) - set(cells.STAGES)
    if unknown:
        parser.error(f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(cells.STAGES)}")
    args.shares = len(set(args.stages or cells.STAGES) - {"build", "correct"}) > 0
    begin = time.monotonic()
    out = args.out.resolve()
    _copy_results(args.resume, out)
    sources = sources_hash()
    store = Store(out / "device_check.json", sources, _device_name(args.device, args.dry_run))
    if store.dropped:
        print(f"starting anew: {store.dropped}")
    todo = [
        cell
        for cell in cells.plan(args.stages or cells.STAGES, args.device == "cpu", args.device)
        if args.only in f"{cell.stage}: {cell.key}"
    ]
    if args.dry_run:
        for cell in todo:
            print(f"{'done' if store.done(cell) else 'to do':6} {cell.seconds:4.0f} s  {cell.stage}: {cell.key}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    site = None if args.installed else stages.SITE
    if site is not None:
        sys.path.insert(0, str(site))  # for the worker, which inherits it
    setting = stages.Setting(out, sources, args.device, args.archs, site)
    store.data["machine"] = _facts(args.device, store.data["machine"])
    with Worker(args.device) as worker:
        work: dict[str, runner.Work] = {
            "build": lambda cell, limit: stages.build(setting, cell, limit),
            # Where other stages were asked for too, tests leave them half of the time.
            "correct": lambda cell, limit: stages.correct(
                setting, cell, min(limit, args.budget / 2) if args.shares else limit
            ),
            "sanitize": lambda cell, limit: stages.sanitize(setting, cell, limit),
            "bench": lambda cell, limit: worker.measure(cell.spec, args.seconds, min(limit, 120)),
            "sweep": lambda cell, limit: sweep(worker, cell, args.seconds, limit),
        }
        left = args.budget - (time.monotonic() - begin)
        outcome = runner.run_cells(todo, work, store, left, lambda text: print(text, flush=True))
    _finish(store, args.device)
    return _report(outcome, store, out)


def sweep(worker: Worker, cell: cells.Cell, seconds: float, limit: float) -> dict[str, Any]:
    """All candidates at once. Where one hangs or crashes, the kernels that have no memory barriers to hang on, without the
    others."""
    result = worker.measure(cell.spec, seconds, min(limit, 40))
    if "rows" in result or result.get("fatal"):
        return result
    from device.sweep import candidates
    from lowbit.commands._target import find_target

    model = find_target(worker.device).model
    safe = tuple(name for name in candidates(cell.spec, model) if not name.startswith("hopper"))
    again = worker.measure(dataclasses.replace(cell.spec, peers=safe), seconds, min(limit, 40))
    return {**again, "ok": False, "error": f"with all kernels: {result['error']}"}


def _copy_results(source: Path | None, out: Path) -> None:
    if source is not None and source.resolve() != out:
        out.mkdir(parents=True, exist_ok=True)
        for pattern in ("device_check.json", "correct-*.jsonl"):
            for file in source.glob(pattern):
                shutil.copy(file, out / file.name)


def _device_name(device: str, dry_run: bool) -> str:
    from device.machine import device_name

    try:
        return device_name(device)
    except (RuntimeError, AssertionError) as error:
        if dry_run:
            return "no GPU here"
        raise SystemExit(
            f"device_check: PyTorch finds no GPU here ({error}); --dry-run lists what would be done"
        ) from None


def _facts(device: str, before: dict[str, object]) -> dict[str, object]:
    """The clocks stay those from before the first run."""
    from device.machine import facts

    found = facts(device)
    if "clocks_before" in before:
        found["clocks_before"] = before["clocks_before"]
    return found


def _finish(store: Store, device: str) -> None:
    from device.machine import clocks

    if device == "cuda":
        store.data["machine"]["clocks_after"] = clocks()
    store.save()
    store.path.with_suffix(".md").write_text(markdown(store.data))


def _report(outcome: runner.Outcome, store: Store, out: Path) -> int:
    counts = {"passed": outcome.passed, "failed": outcome.failed, "left": outcome.left, "done before": outcome.before}
    print(", ".join(f"{len(names)} {what}" for what, names in counts.items()))
    for name in outcome.failed:
        stage, _, key = name.partition(": ")
        cell = store.cells(stage)[key]
        print(f"FAILED {name}: {cell.get('error') or cell.get('summary')}")
        for failure in cell.get("failures", [])[:20]:
            print(f"  {failure}")
    print(out / "device_check.md")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
