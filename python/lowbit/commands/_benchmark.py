"""Running a comparison: shapes x threads x M, everybody in turns; the result is plain JSON values."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import lowbit
from lowbit import _C
from lowbit.commands import _peers
from lowbit.commands._cases import Shape
from lowbit.commands._contenders import Contender, check_product, make_dequantize, make_scheme
from lowbit.commands._measure import Call, Others, Roofline, Sample, cache_bytes, interleave, measure_roofline
from lowbit.commands._target import Target, find_target
from lowbit.scheme import Scheme

__all__ = ["DTYPES", "Settings", "run_benchmark"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

Say = Callable[[str], None]

_TIME_UP = "the time was up"
_PATIENCE_SECONDS = 3.0
# How a contender says that it cannot: ours, torch's, and those of the libraries of peers.
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, ImportError)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compare.

    Args:
        shapes: of the weights.
        Ms: rows of x.
        schemes: lowbit's part.
        baselines: names in `_peers.BASELINES`.
        dtype: "bf16", "fp32" or "fp16", of x.
        threads: numbers of threads.
        warm: use one copy of each weight, which may stay in cache.
        seconds: for everything; what did not fit is named in the result.
        batch_invariant: every scheme takes part a second time, with that flag.
        device: "cpu", "cuda" or "mps".
    """

    shapes: Sequence[Shape]
    Ms: Sequence[int]
    schemes: Sequence[Scheme]
    baselines: Sequence[str] = ("torch-bf16",)
    dtype: str = "bf16"
    threads: Sequence[int] = (1,)
    warm: bool = False
    seconds: float = 60.0
    batch_invariant: bool = False
    device: str = "cpu"

    @property
    def target(self) -> Target:
        return find_target(self.device)


def run_benchmark(settings: Settings, say: Say = lambda text: None) -> dict[str, Any]:
    """Measure; Ctrl-C ends it early and what was measured is returned, marked incomplete.

    Args:
        settings: what to compare.
        say: told what is being done.

    Example:
        >>> result = run_benchmark(Settings([Shape(4096, 4096)], [1], [Scheme.parse("int4-g128")]))
        >>> result["rows"][0]["median_us"]
        742.1
    """
    result: dict[str, Any] = {**_about(settings), "complete": False, "interrupted": False, "left_out": [], "rows": []}
    before = torch.get_num_threads()
    torch.manual_seed(0)
    with _nothing_recorded():
        try:
            rooflines = _rooflines(settings, say)
            _run_shapes(settings, rooflines, result, say)
            if not any(entry["why"] == _TIME_UP for entry in result["left_out"]):
                again = _rooflines(settings, say)
                rooflines = {n: roofline.merged(again[n]) for n, roofline in rooflines.items()}
            _finish(result, rooflines)
            result["complete"] = not any(entry["why"] == _TIME_UP for entry in result["left_out"])
        except KeyboardInterrupt:
            _finish(result, rooflines if result["rows"] else {})
            result["interrupted"] = True
        finally:
            torch.set_num_threads(before)
    result["load_average_after"] = _load()
    return result


@contextlib.contextmanager
def _nothing_recorded() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _about(settings: Settings) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc)
    target = settings.target
    missing = [{"name": name, "why": why} for name in settings.baselines if (why := _peers.absent(name))]
    return {
        "lowbit": lowbit.__version__,
        "torch": torch.__version__,
        "versions": {"torch": torch.__version__, **_peers.versions(settings.baselines)},
        "absent": missing,
        "device": target.what,
        "device_type": target.name,
        "cores": os.cpu_count(),
        "isa": _C.isa() if target.name == "cpu" else target.model,
        "cache_bytes": cache_bytes(target.name),
        "date": now.isoformat(timespec="seconds"),
        "dtype": settings.dtype,
        "weights": "warm" if settings.warm else "cold",
        "load_average_before": _load(),
    }


def _load() -> list[float] | None:
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _rooflines(settings: Settings, say: Say) -> dict[int, Roofline]:
    found = {}
    for count in settings.threads:
        say(f"roofline of {count} thread{'s' if count > 1 else ''}")
        torch.set_num_threads(count)
        found[count] = measure_roofline(count, target=settings.target)
    return found


def _run_shapes(settings: Settings, rooflines: dict[int, Roofline], result: dict[str, Any], say: Say) -> None:
    target = settings.target
    deadline = time.perf_counter() + settings.seconds
    cells = [(threads, M) for threads in settings.threads for M in settings.Ms]
    to_do = len(cells) * len(settings.shapes)
    for shape in settings.shapes:
        if time.perf_counter() >= deadline:
            result["left_out"].append({"shape": [shape.N, shape.K], "why": _TIME_UP})
            continue
        say(f"{shape}: preparing weights")
        began = time.perf_counter()
        torch.set_num_threads(max(settings.threads))
        weight = torch.randn(shape.N, shape.K).to(torch.bfloat16)
        contenders = _contenders(settings, shape, weight, result)
        deadline += time.perf_counter() - began  # the budget is for measuring
        slow: dict[int, dict[str, str]] = {threads: {} for threads in settings.threads}
        for threads, M in cells:
            left = deadline - time.perf_counter()
            if left <= 0:
                about = {"shape": [shape.N, shape.K], "M": M, "threads": threads}
                result["left_out"].append({**about, "why": _TIME_UP})
                continue
            torch.set_num_threads(threads)
            say(f"{shape}, M={M}, {threads} thread{'s' if threads > 1 else ''}")
            x = torch.randn(M, shape.K).to(DTYPES[settings.dtype]).to(target.device)
            began = time.perf_counter()
            checked = _checked(contenders, x, weight, slow[threads], result, target)
            deadline += time.perf_counter() - began
            others = Others()
            calls = {name: call for name, (call, _, _) in checked.items()}
            samples = interleave(
                calls,
                left / to_do,
                {name: took for name, (_, _, took) in checked.items()},
                threads > 1 and target.wait is None,
                target=target,
            )
            conditions = _conditions(others.cores(), threads)
            to_do -= 1
            for contender in contenders:
                if contender.name in checked:
                    row = _row(shape, M, threads, x, contender, samples[contender.name])
                    result["rows"].append({**row, "error": checked[contender.name][1], **conditions})


def _checked(
    contenders: Sequence[Contender],
    x: torch.Tensor,
    weight: torch.Tensor,
    slow: dict[str, str],
    result: dict[str, Any],
    target: Target,
) -> dict[str, tuple[Call, float, float]]:
    """The calls that compute the product, their errors and the seconds of a first call. Who computes something else, refuses,
    or takes very long (`slow`: and so would with more rows) is named in the result and not timed."""
    found = {}
    for contender in contenders:
        try:
            if contender.name in slow:
                raise RuntimeError(slow[contender.name])
            call = contender.bind(x)
            if target.wait is not None:
                call(0)  # compiles, and is not what is timed
                target.finish()
            began = time.perf_counter()
            returned = call(0)
            target.finish()
            took = time.perf_counter() - began
            error = check_product(contender, returned, x, weight)
            if took > _PATIENCE_SECONDS:
                slow[contender.name] = f"too slow to be timed: one call with M={len(x)} took {took:.1f} s"
                raise RuntimeError(slow[contender.name])
            found[contender.name] = call, error, took
        except _REFUSALS as refusal:
            about = {"shape": list(weight.shape), "M": len(x), "threads": torch.get_num_threads()}
            result["left_out"].append({**about, "name": contender.name, "why": _first_line(refusal)})
    return found


def _conditions(others: float | None, threads: int) -> dict[str, Any]:
    """Whether others wanted the cores that this ran on: threads that wait for one another then wait for the scheduler."""
    contended = others is not None and threads + others > (os.cpu_count() or 1) + 0.25
    return {"others_cores": others, "contended": contended}


def _contenders(settings: Settings, shape: Shape, weight: torch.Tensor, result: dict[str, Any]) -> list[Contender]:
    dtype, warm = DTYPES[settings.dtype], settings.warm
    makers: list[tuple[str, Callable[[], Contender]]] = []

    target = settings.target
    ours = functools.partial(make_scheme, target=target)
    there = weight.to(target.device)

    def add(name: str, make: Callable[..., Contender], *arguments: Any, of: torch.Tensor = weight) -> None:
        makers.append((name, lambda: make(*arguments, of, dtype, warm)))

    for scheme in settings.schemes:
        add(str(scheme), ours, scheme)
        if settings.batch_invariant:
            add(f"{scheme} batch-invariant", functools.partial(ours, batch_invariant=True), scheme)
        if "dequant" in settings.baselines and scheme.activation is None:
            add(f"dequant {scheme}", functools.partial(make_dequantize, target=target), scheme)
    for name in settings.baselines:
        if name != "dequant" and _peers.absent(name) is None:
            add(name, _peers.make_peer, name, of=there)
    found = []
    for name, make in makers:
        try:
            found.append(make())
        except _REFUSALS as error:
            result["left_out"].append({"shape": [shape.N, shape.K], "name": name, "why": _first_line(error)})
    return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _row(shape: Shape, M: int, threads: int, x: torch.Tensor, contender: Contender, sample: Sample) -> dict[str, Any]:
    N, K = shape.N, shape.K
    moved = contender.nbytes + x.nbytes + M * N * x.element_size()
    return {
        "shape": [N, K],
        "layers": shape.label,
        "M": M,
        "threads": threads,
        "name": contender.name,
        "kind": contender.kind,
        "baseline": contender.baseline,
        "kernel": contender.kernel(M),
        "int8": contender.int8,
        "bytes": moved,
        "operations": 2 * M * N * K,
        "median_us": sample.median * 1e6,
        "best_us": sample.best * 1e6,
        "spread": sample.spread,
        "rounds": len(sample.seconds),
    }


def _finish(result: dict[str, Any], rooflines: dict[int, Roofline]) -> None:
    """Add what follows from the times: rates, shares of the roofline, ratios to torch."""
    result["roofline"] = [
        {"threads": n, "read_GBps": r.read / 1e9, "TFLOPs": {name: p / 1e12 for name, p in r.peaks.items()}}
        for n, r in rooflines.items()
    ]
    torch_bf16 = {
        (*row["shape"], row["M"], row["threads"]): row["median_us"]
        for row in result["rows"]
        if row["name"] == "torch-bf16"
    }
    for row in result["rows"]:
        seconds = row["median_us"] / 1e6
        roof = rooflines[row["threads"]]
        row["GBps"] = row["bytes"] / seconds / 1e9
        row["TFLOPs"] = row["operations"] / seconds / 1e12
        row["roofline_percent"] = 100 * roof.seconds(row["bytes"], row["operations"], row["int8"]) / seconds
        reference = torch_bf16.get((*row["shape"], row["M"], row["threads"]))
        row["vs_torch_bf16"] = None if reference is None else reference / row["median_us"]
