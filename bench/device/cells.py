"""What there is to do: one cell per thing that is done, recorded and not repeated. In order of value within a stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

__all__ = ["STAGES", "Case", "Cell", "bench_cases", "bench_cells", "plan", "sanitize_cells", "sweep_cells"]

STAGES: Final = ("build", "correct", "sanitize", "bench", "sweep")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One thing to do.

    Args:
        key: its name in the JSON; no two cells of a stage share one.
        seconds: about how long it takes; a cell is not begun with less than that left.
        spec: what to do, for the stage's runner.
    """

    stage: str
    key: str
    seconds: float
    spec: Any = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: y[M, N] = x[M, K] @ W[N, K].T in one scheme, by everybody who can.

    Args:
        section: the table that it goes to.
        scheme: of the weight.
        inputs: what x is when it arrives at the kernel: bf16, int8 or fp8 (one scale per token), fp8-128 (one per token and
            128 of K).
        op: gemm; grad (dx = dy @ W); or dequantize, quantize_activation, roofline, which have no peers; or sweep, whose
            peers are lowbit's own kernels (all that take the problem, if none are named).
    """

    section: str
    scheme: str
    M: int
    N: int
    K: int
    inputs: str = "bf16"
    op: str = "gemm"
    peers: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.section} M={self.M} {self.N}x{self.K}"


@dataclasses.dataclass(frozen=True)
class _Section:
    name: str
    scheme: str
    tiers: tuple[tuple[int, ...], ...]  # M, the most telling first; each tier after everybody's one before
    shapes: tuple[tuple[int, int], ...]
    inputs: str = "bf16"
    op: str = "gemm"
    peers: tuple[str, ...] = ()

    def cases(self, tier: int) -> list[Case]:
        Ms = self.tiers[tier] if tier < len(self.tiers) else ()
        rest = (self.scheme, self.inputs, self.op, self.peers)
        return [Case(self.name, rest[0], M, N, K, *rest[1:]) for M in Ms for N, K in self.shapes]


BIG: Final = ((8192, 8192),)
#: Llama-3.1-8B's q_proj, gate_proj and down_proj, and Llama-3.1-70B's gate_proj.
OTHERS: Final = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
_A16: Final = ("torch-bf16", "torch-int4pack", "humming", "gemlite")
_FP8: Final = ("torch-bf16", "torch-scaled-mm", "humming")
_INT8: Final = ("torch-bf16", "torch-int-mm", "torch-int-mm-scaled")

SECTIONS: Final = (
    _Section("roofline", "", ((0,),), BIG, op="roofline"),
    _Section("W4A16", "int4-g128", ((1, 16, 64, 256, 4096), (4, 8, 32, 128, 1024)), BIG, peers=_A16),
    _Section("FP8 W8A8", "fp8", ((256, 4096), (1, 16, 64, 1024)), BIG, "fp8", peers=_FP8),
    _Section("INT8 W8A8", "int8", ((256, 4096), (32, 64, 1024)), BIG, "int8", peers=_INT8),
    _Section("W4A8-fp8", "int4-g128", ((256, 4096), (1, 16, 64, 1024)), BIG, "fp8", peers=("torch-bf16", "humming")),
    _Section("W4A8-int8", "int4-g128", ((256, 4096), (1, 16, 64, 1024)), BIG, "int8", peers=("torch-bf16", "humming")),
    _Section(
        "W8A16 int8",
        "int8",
        ((1, 16), (4, 8, 64, 256)),
        BIG,
        peers=("torch-bf16", "torch-int8pack", "humming", "gemlite"),
    ),
    _Section("W8A16 fp8", "fp8", ((1, 16), (4, 8, 64, 256)), BIG, peers=("torch-bf16", "humming")),
    _Section(
        "FP8 blocks",
        "fp8-b128",
        ((256, 4096), (1, 64, 1024)),
        BIG,
        "fp8-128",
        peers=("torch-bf16", "torch-scaled-mm-blocks"),
    ),
    _Section("dequantize", "int4-g128", ((0,),), ((16384, 16384),), op="dequantize"),
    _Section("dequantize fp8", "fp8", ((0,),), ((16384, 16384),), op="dequantize"),
    _Section("quantize_activation int8", "int8", ((16384,),), ((0, 16384),), "int8", "quantize_activation"),
    _Section("quantize_activation fp8", "fp8", ((16384,),), ((0, 16384),), "fp8", "quantize_activation"),
    _Section("quantize_activation fp8-128", "fp8", ((), (16384,)), ((0, 16384),), "fp8-128", "quantize_activation"),
    _Section("W4A16 shapes", "int4-g128", ((), (1, 16), (256,)), OTHERS, peers=_A16),
    _Section("W4A16 asym", "int4-g32-asym", ((), (1, 16), (256,)), BIG, peers=("torch-bf16",)),
    _Section("NF4", "nf4-g64", ((), (1, 16), (256,)), BIG, peers=("torch-bf16",)),
    _Section("FP4", "fp4-g32", ((), (1,), (16, 256)), BIG, peers=("torch-bf16",)),
    _Section("W3A16", "int3-g64-offset", ((), (1,), (16, 256)), BIG, peers=("torch-bf16",)),
    _Section("W2A16", "int2-g32-offset", ((), (1,), (16, 256)), BIG, peers=("torch-bf16",)),
    _Section("W5A16", "int5-g64", ((), (1,), (16, 256)), BIG, peers=("torch-bf16",)),
    _Section("W6A16", "int6-g64", ((), (1,), (16, 256)), BIG, peers=("torch-bf16",)),
    _Section("gradient", "int4-g128", ((), (256,), (4096,)), BIG, op="grad", peers=("torch-bf16",)),
)


def bench_cases(tiny: bool = False) -> list[Case]:
    """Every comparison. `tiny` shrinks each to what a CPU does in no time, for trying out that they run."""
    cases = [case for tier in range(3) for section in SECTIONS for case in section.cases(tier)]
    if not tiny:
        return cases
    small = {case.key: case for case in (_shrink(case) for case in cases)}
    return list(small.values())


def _shrink(case: Case) -> Case:
    def size(value: int, limit: int) -> int:
        return min(value, limit)

    return dataclasses.replace(case, M=size(case.M, 32), N=size(case.N, 256), K=size(case.K, 384))


def bench_cells(tiny: bool = False, seconds: float = 2.0) -> list[Cell]:
    """Time of a cell: making weights and graphs, and measuring for `seconds`."""
    return [Cell("bench", case.key, 3 * seconds, case) for case in bench_cases(tiny)]


#: What sweeps measure (sweep.py): (scheme, inputs, shapes), each at these M, what is telling most first.
SWEPT: Final = (
    ("int4-g128", "bf16", (*BIG, *OTHERS, (1024, 8192), (6144, 4096), (8192, 28672))),
    ("int8", "bf16", (*BIG, *OTHERS)),
    ("fp8", "fp8", (*BIG, *OTHERS)),
    ("int8", "int8", (*BIG, *OTHERS)),
    ("int4-g128", "fp8", BIG),
    ("int4-g128", "int8", BIG),
    ("nf4-g64", "bf16", BIG),
    ("int3-g64-offset", "bf16", BIG),
)
SWEPT_ROWS: Final = ((1, 16, 64, 256), (8, 32, 128, 4096), (2, 4, 12, 48, 512))


def sweep_cells(seconds: float = 1.0) -> list[Cell]:
    cases = [
        Case(f"sweep {scheme} {inputs}", scheme, M, N, K, inputs, "sweep")
        for rows in SWEPT_ROWS
        for scheme, inputs, shapes in SWEPT
        for N, K in shapes
        for M in rows
    ]
    return [Cell("sweep", case.key, 3 * seconds, case) for case in cases]


#: Groups of kernels (sanitize_cases.py).
GROUPS: Final = ("gemm", "gemm_a8", "gemm_grad_input", "weights", "activations")
#: Tools by what they find, what is worth most first: memcheck looks at every address, racecheck at shared memory, where pipelines
#: live. On a Mac, Metal's own validation of what shaders access and the host encodes.
TOOLS: Final = {"cuda": ("memcheck", "racecheck", "synccheck", "initcheck"), "mps": ("validation",)}
#: What tests the kernels of a device.
KERNEL_TESTS: Final = {"cuda": "tests/cuda", "mps": "tests/metal"}


def sanitize_cells(device: str = "cuda") -> list[Cell]:
    tools = TOOLS.get(device, TOOLS["cuda"])
    return [Cell("sanitize", f"{tool} {group}", 60, (tool, group)) for tool in tools for group in GROUPS]


def plan(stages: Sequence[str], tiny: bool = False, device: str = "cuda") -> list[Cell]:
    """All cells of the stages, the most valuable first: whether kernels are right, then the numbers that have targets, then
    races and stray accesses, then the rest of each."""
    bench, sanitize = bench_cells(tiny), sanitize_cells(device)
    sweep = sweep_cells() if device == "cuda" else []  # selection on a Mac goes by no table
    first = sum(len(section.cases(0)) for section in SECTIONS)
    groups = 2 * len(GROUPS)  # of two tools
    # Tests record themselves one by one (resume_plugin.py), so one cell for each way of running them is enough.
    folder = KERNEL_TESTS.get(device, KERNEL_TESTS["cuda"])
    kernels, library = Cell("correct", "kernels", 30, (folder,)), Cell("correct", "library", 30, ("tests",))
    order = [
        Cell("build", "build", 30),
        kernels,
        *bench[:first],
        *sanitize[:groups],
        library,
        *bench[first:],
        *sanitize[groups:],
        *sweep,
    ]
    return [cell for cell in order if cell.stage in stages]
