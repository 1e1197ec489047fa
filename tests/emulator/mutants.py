"""`make mutants`: would the tests notice if a barrier, a wait, a fence or a bounds check were missing?

Every call of sync_block, sync_some, sync_warp, cp_async_wait, cp_async_commit, fence_device, and of what ptx_hopper.cuh and
ptx_wgmma.cuh have of the kind (memory barriers, barriers of clusters, grid_wait; fences, commits and waits of wgmma), is
left out, one at a time, and every inside(...) taken for true; in Metal's shaders every barrier and every inside(...). The
short list of problems (short_list.py, metal/short_list.py) must then fail: by an error, by other numbers than the reference,
by other bits in another order of threads, or under AddressSanitizer. A mutant that passes it must stand in survivors.toml with
a reason; one that does not, or an entry that is no longer needed, is a failure.

Mutants are not compiled one by one. All of them are in one library, each behind a switch (mutant.h), and each is run in a
forked process by those problems alone that reach it. Predicates run under the sanitizers, the rest without, in several orders.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import build
from .case_list import SANITIZERS, same_bits

SOURCES = build.ROOT / "csrc"
COPY = build.CACHE / "mutants" / "csrc"
SURVIVORS = build.HERE / "survivors.toml"
#: Not kernels, but what they are written in.
LANGUAGE = {"device.cuh", "ptx.cuh", "ptx_hopper.cuh", "ptx_wgmma.cuh", "launch.cuh", "language.h"}
#: What build.py builds, and the problems that run on it.
BACKENDS = {
    "cuda": ("lowbit_emulator", "emulator.short_list"),
    "metal": ("lowbit_emulator_metal", "emulator.metal.short_list"),
}
ORDERS = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2), ("random", 3))

CALL = re.compile(
    r"ptx::(?:(sync_block|sync_warp|cp_async_commit|fence_device|fence_mbarrier_init|fence_proxy_async|"
    r"sync_cluster|cluster_arrive|cluster_arrive_relaxed|cluster_wait|grid_wait|wgmma_fence|wgmma_commit)\(\)|"
    r"(cp_async_wait|wgmma_wait|sync_some)<[^;]*?>\(\))"
)
#: Calls with arguments.
BARRIER_CALL = re.compile(r"ptx::(mbarrier_(?:arrive|arrive_remote|expect_tx|wait)|cp_async_mbarrier_arrive)\(")
METAL_CALL = re.compile(r"\b(threadgroup_barrier|simdgroup_barrier)\(")
PREDICATE = re.compile(r"(?<!bool )\binside\(")


@dataclasses.dataclass(frozen=True)
class Mutant:
    place: int
    file: str  # from csrc
    line: int
    code: str  # the line, without indentation
    nth: int  # among equal lines of the file, and among the mutants of one line
    kind: str  # the function that is called

    @property
    def backend(self) -> str:
        return Path(self.file).parts[0]

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.file, self.code, self.nth)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}{f' (number {self.nth})' if self.nth else ''}: {self.code}"


# ---- the mutated copy of the sources -----------------------------------------------------------------------------------


def closing(text: str, opening: int) -> int:
    """The index behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError("parentheses do not match")


def places(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and name of everything in a source file that is to be mutated, outer calls before those inside."""
    found = [(m.start(), m.end(), m.group(1) or m.group(2)) for m in CALL.finditer(text)]
    for call in (BARRIER_CALL, METAL_CALL):
        found += [(m.start(), closing(text, m.end() - 1), m.group(1)) for m in call.finditer(text)]
    found += [(m.start(), closing(text, m.end() - 1), "inside") for m in PREDICATE.finditer(text)]
    for start, end, name in sorted(found):
        line = text[text.rfind("\n", 0, start) + 1 : start]
        if "//" not in line:
            yield start, end, name


def instrumented(text: str, file: str, first: int) -> tuple[str, list[Mutant]]:
    """The text with a switch at every place, and the mutants, counted from `first`."""
    mutants: list[Mutant] = []
    seen: dict[str, int] = {}
    inserts: list[tuple[int, str]] = []
    for start, end, name in places(text):
        begin, stop = text.rfind("\n", 0, start) + 1, text.find("\n", start)
        code = text[begin:stop].strip()
        place = first + len(mutants)
        mutants.append(Mutant(place, file, text.count("\n", 0, start) + 1, code, seen.get(code, 0), name))
        seen[code] = seen.get(code, 0) + 1
        switch = f"(::lowbit::emulator::mutant({place}) "
        inserts += [(start, switch + ("|| " if name == "inside" else "? (void)0 : ")), (end, ")")]
    for at, what in sorted(inserts, key=lambda insert: insert[0], reverse=True):
        text = text[:at] + what + text[at:]
    return text, mutants


def write_copy() -> list[Mutant]:
    """csrc with switches, in the build folder. Files that stay the same are not touched, so that ninja has less to do."""
    mutants: list[Mutant] = []
    kept = set()
    for source in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
        relative = source.relative_to(SOURCES)
        text = source.read_text()
        is_kernel = relative.parts[0] == "cuda" and (source.suffix == ".cuh" or "kernels" in relative.parts)
        is_kernel = is_kernel or relative.parts[:2] == ("metal", "shaders")
        if is_kernel and source.name not in LANGUAGE:
            text, more = instrumented(text, str(relative), len(mutants))
            mutants += more
        target = COPY / relative
        kept.add(target)
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    for old in [p for p in COPY.rglob("*") if p.is_file() and p not in kept]:
        old.unlink()
    return mutants


# ---- one process that runs mutants -------------------------------------------------------------------------------------


def limit(seconds: float) -> None:
    """Ends this process when it takes longer: a mutant may never end. Time on the processor, which says so on a busy machine
    too; the alarm is for one that sleeps."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
    signal.alarm(int(20 * seconds))


def run_cases(short_list: Any, emulator: Any, cases: dict[str, float], is_sanitized: bool) -> str:
    """What went wrong, or nothing. The cases come with the seconds that they took without a mutant."""
    for case in short_list.CASES:
        if case.name not in cases:
            continue
        limit(5 + 5 * cases[case.name])
        first = None
        for order, seed in ORDERS[:1] if is_sanitized else ORDERS:
            emulator.reset()
            emulator.set_order(order, seed)
            try:
                outputs = case.run(emulator)
            except Exception as error:
                return f"{case.name}, {order}: {type(error).__name__}: {str(error)[:300]}"
            first = outputs if first is None else first
            if not same_bits(first, outputs):
                return f"{case.name}: other bits in {order} order"
    return ""


def in_child(work: Callable[[], str]) -> str:
    """What work() returns in a forked process, or how that ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.write(writing, work().encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return answer if os.WEXITSTATUS(status) == 0 else f"exit status {os.WEXITSTATUS(status)}"


def serve(backend: str, library: str, is_sanitized: bool, mutants: list[int], cover: list[int]) -> None:
    """Prints a JSON line per case (what it reaches) or per mutant (what became of it).

    cover: [k, n] for every n-th case from the k-th on, and what they reach of `mutants`; empty for the mutants' verdicts.
    """
    short_list = importlib.import_module(BACKENDS[backend][1])  # needs torch, and LD_PRELOAD where sanitized
    emulator = short_list.emulator(Path(library))
    library_c = emulator.c

    def coverage(name: str) -> str:
        library_c.lowbit_emulator_set_mutant(-1)
        error = run_cases(short_list, emulator, {name: 60.0}, is_sanitized)
        reached = [m for m in mutants if library_c.lowbit_emulator_reached(m)]
        return json.dumps({"case": name, "error": error, "reached": reached})

    if cover:
        for case in short_list.CASES[cover[0] :: cover[1]]:
            start = time.monotonic()
            answer = in_child(functools.partial(coverage, case.name))
            result = (
                json.loads(answer) if answer.startswith("{") else {"case": case.name, "error": answer, "reached": []}
            )
            print(json.dumps({**result, "seconds": time.monotonic() - start}), flush=True)
        return

    def verdict(mutant: int, cases: dict[str, float]) -> str:
        library_c.lowbit_emulator_set_mutant(mutant)
        return run_cases(short_list, emulator, cases, is_sanitized)

    reaches = json.loads(sys.stdin.read())
    for mutant in mutants:
        answer = in_child(functools.partial(verdict, mutant, reaches[str(mutant)]))
        print(json.dumps({"mutant": mutant, "verdict": answer}), flush=True)


def worker(is_sanitized: bool, request: dict, stdin: str = "") -> list[dict]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(build.ROOT / "tests"),
        # What is allocated holds no old results: an output that is not written shows.
        "MALLOC_PERTURB_": "1",
    }
    if is_sanitized:
        environment.update(build.sanitizer_environment())
    command = [sys.executable, "-m", "emulator.mutants", "--serve", json.dumps(request)]
    done = subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- all of it ---------------------------------------------------------------------------------------------------------


def find_survivors(backend: str, mutants: list[Mutant], is_sanitized: bool, jobs: int) -> dict[Mutant, str]:
    """The mutants that nothing notices, all of one backend, and whether anything reaches them."""
    if not mutants:
        return {}
    target = BACKENDS[backend][0]
    library = build.build(target, sanitize=SANITIZERS if is_sanitized else "", one_format=True, mutants=COPY)
    base = {"backend": backend, "library": str(library), "is_sanitized": is_sanitized}
    ids = [m.place for m in mutants]
    with ThreadPoolExecutor(jobs) as pool:
        shares = [{**base, "mutants": ids, "cover": [k, jobs]} for k in range(jobs)]
        covered = [case for answer in pool.map(functools.partial(worker, is_sanitized), shares) for case in answer]
    for case in covered:
        if case["error"]:
            raise RuntimeError(f"the short list fails without any mutant: {case['error']}")
    covered.sort(key=lambda case: case["seconds"])
    reaches = {i: {case["case"]: case["seconds"] for case in covered if i in case["reached"]} for i in ids}
    reached = [i for i in ids if reaches[i]]
    shares = [{**base, "mutants": reached[k::jobs], "cover": []} for k in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        answers = pool.map(lambda share: worker(is_sanitized, share, json.dumps(reaches)), shares)
        verdicts = {a["mutant"]: a["verdict"] for answer in answers for a in answer}
    survivors = {}
    for m in mutants:
        if m.place not in verdicts:
            survivors[m] = "no problem of the short list reaches it"
        elif not verdicts[m.place]:
            survivors[m] = "survives " + ", ".join(reaches[m.place])
        how = "survived" if m in survivors else f"found, {verdicts[m.place].splitlines()[0][:120]}"
        print(f"{m}\n    {how}", flush=True)
    return survivors


def accepted() -> dict[tuple[str, str, int], str]:
    try:
        import tomllib
    except ModuleNotFoundError:
        sys.exit("make mutants needs Python 3.11 or later, which reads TOML")

    rows = tomllib.loads(SURVIVORS.read_text()).get("survivor", [])
    return {(row["file"], row["code"], row.get("nth", 0)): row["reason"] for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants only, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose file or line holds this text")
    parser.add_argument("--backend", choices=sorted(BACKENDS), help="of this one only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--list", action="store_true", help="what would be mutated, and nothing else")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(**json.loads(given.serve))
        return 0

    mutants = write_copy()
    reasons = accepted()
    stale = set(reasons) - {m.key for m in mutants}
    chosen = [m for m in mutants if given.only in f"{m.file} {m.code}" and given.backend in (None, m.backend)]
    is_part = bool(given.only or given.backend)
    if given.sample is not None and given.sample < len(chosen):
        chosen = random.Random(given.seed).sample(chosen, given.sample)
        is_part = True
    if given.list:
        print(*chosen, sep="\n")
        return 0
    start = time.monotonic()
    survivors: dict[Mutant, str] = {}
    for backend, is_sanitized in itertools.product(BACKENDS, (False, True)):
        part = [m for m in chosen if m.backend == backend and (m.kind == "inside") == is_sanitized]
        survivors.update(find_survivors(backend, part, is_sanitized, given.jobs))
    unknown = [m for m in survivors if m.key not in reasons]
    if not is_part:
        stale |= set(reasons) - {m.key for m in survivors}
    print(f"\n{len(chosen)} mutants of {len(mutants)}, {len(survivors)} survive, {time.monotonic() - start:.0f} s")
    for m in survivors:
        print(f"  {m}\n      {reasons.get(m.key, 'NOT EXPECTED: ' + survivors[m])}")
    for file, code, nth in sorted(stale):
        print(f"survivors.toml lists what does not survive, or is no longer there: {file}: {code} ({nth})")
    return 1 if unknown or stale else 0


if __name__ == "__main__":
    sys.exit(main())
