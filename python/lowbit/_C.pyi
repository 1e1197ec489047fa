"""The compiled module: importing it registers `torch.ops.lowbit.*`; beyond that, introspection.

tests/test_stubs.py compares these names and signatures with the module itself.
"""

from typing import Any, Literal, TypedDict, type_check_only

@type_check_only
class _FormatRow(TypedDict):
    id: int
    name: str
    bits: int
    kind: Literal["int", "code"]
    max: float
    code: list[float]

@type_check_only
class _DescFields(TypedDict):
    format: int
    group_size: int
    zero_kind: int
    scale_dtype: int
    scaling: int
    has_perm: bool
    layout: int
    super_dtype: int
    super_groups: int

@type_check_only
class _ScaleRow(TypedDict):
    id: int
    name: str
    bits: int
    needs_super: bool
    code: list[float]

@type_check_only
class _Shapes(TypedDict):
    packed: tuple[int, ...]
    scales: tuple[int, ...]
    zeros: tuple[int, ...] | None
    perm: tuple[int, ...] | None
    super_scales: tuple[int, ...] | None
    super_zeros: tuple[int, ...] | None

def build_info() -> dict[str, str]:
    """Version, compiler, flags, ABI target."""

def canonical_shapes(N: int, K: int, desc: int) -> _Shapes:
    """Shapes of the canonical tensors, None where there is none; ValueError, with the values, when there are none."""

def cpu_features() -> dict[str, bool]:
    """What this CPU offers."""

def describe_config(op: str, device: str, M: int, N: int, K: int, desc: int, dtype: str, flags: int) -> str:
    """How the chosen kernel cuts the problem into tiles, steps and blocks; "" on the CPU, which has nothing to choose."""

def enums() -> dict[str, dict[str, int]]:
    """The enumerations in desc and flags, by name."""

def explain(op: str, device: str, M: int, N: int, K: int, desc: int, dtype: str, flags: int) -> list[tuple[str, str]]:
    """Kernels in order of preference, each with why it was refused; "" for the one that runs."""

def force_kernel(name: str) -> None:
    """Run this CUDA or Metal kernel in every op that has it, or raise where it cannot; "" ends it. For tests and sweeps."""

def forced_kernel() -> str:
    """What `force_kernel` or LOWBIT_KERNEL said; "" when nothing is forced."""

def load_tuning(text: str) -> None:
    """Take this table of bench/sweep.py instead of the one that is built in; "" ends it. Not while ops run."""

def format_table() -> list[_FormatRow]:
    """Every weight format."""

def isa() -> str:
    """The instruction set that the CPU kernels use."""

def isa_levels() -> list[str]:
    """Instruction sets this machine can run, best first."""

def isa_refusals() -> dict[str, str]:
    """Instruction sets that this build has and this machine cannot run, with the reason where it is not plain."""

def kernel_table(compiled: bool = False) -> list[dict[str, Any]]:
    """One row per CPU kernel and instruction set of this machine (or of this build), and per CUDA and Metal kernel.

    Keys: backend, op, name, isa, general, takes.
    """

def make_desc(
    format: int,
    group_size: int,
    zero_kind: int,
    scale_dtype: int,
    scaling: int,
    has_perm: bool,
    layout: int,
    super_dtype: int = 0,
    super_groups: int = 0,
) -> int:
    """The int that tells an op what a weight is; ValueError where no such weight exists."""

def has_metal_interface() -> bool:
    """Whether this torch has the C interface that the Metal kernels are started through."""

def metal_model(chip: str = "") -> str:
    """This machine's Apple GPU, or that of a chip such as "Apple M3 Max", as `explain` takes it: "apple9:40"."""

def packed_size(N: int, K: int, desc: int) -> int:
    """Bytes of a weight in desc's kernel layout."""

def parse_desc(desc: int) -> _DescFields:
    """The fields of a desc."""

def preferred_layout(device_type: str, desc: int) -> int:
    """The kernel layout of a kind of device; ValueError when there are no kernels for it, in any build."""

def set_metal_launcher(compile: int, launch: int) -> None:
    """Start Metal kernels by these C functions (csrc/metal/launcher.h) in the process; two zeros: by torch's."""

def set_extra_isa(name: str, tile_kernels: int) -> None:
    """For tests: add a level that runs only when named, with the AmxKernels at this address; 0 removes it."""

def scale_table() -> list[_ScaleRow]:
    """Every dtype of scales; code is empty for float32, float16 and bfloat16."""

def set_isa(name: str) -> None:
    """Use another instruction set from now on, in every thread."""

def set_strict(on: bool) -> None:
    """Set what LOWBIT_STRICT sets."""

def strict() -> bool:
    """Whether picking a general kernel is an error."""

def workspace_size(op: str, M: int, N: int, K: int, desc: int, device: str = "") -> int:
    """Bytes of workspace for an out variant; on CUDA for that device ("sm_90:132"), or enough for every known one."""
