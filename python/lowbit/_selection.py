"""Which kernel serves a problem, and why not a faster one. Nothing here runs a kernel or touches a device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Final, Protocol, runtime_checkable

import torch

from lowbit import _C, _cuda, _metal

__all__ = ["Explanation", "can_implement", "explain", "full_name", "kernel_table", "set_strict", "strict"]

#: Ops that run another op's kernels.
_SAME_KERNELS: Final = {"linear": "gemm", "gemm_out": "gemm", "gemm_a8_out": "gemm_a8"}


@runtime_checkable
class _HasDesc(Protocol):
    def desc(self, layout: int = ...) -> int: ...


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The answer of `explain`: prints as a table; `rows` holds (kernel, verdict) in the order in which they were asked.

    Attributes:
        problem: the question, on one line.
        rows: each kernel of the op on that device; the verdict is "chosen", or why it was not.
        chosen: the kernel's name; None when no kernel takes the problem.
        general: whether the chosen one is the general kernel, which takes everything and is the slowest.
        config: how the chosen one cuts the problem, in words: tiles, blocks, workspace. Empty on the CPU.

    Example:
        >>> explain("gemm", M=1, N=4096, K=4096, scheme="int4-g128").chosen
        'cpu_stream_f32_avx512vnni'
    """

    problem: str
    rows: tuple[tuple[str, str], ...]
    chosen: str | None
    general: bool
    config: str = ""

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.problem}\n  no kernel of this op is built for the device"
        width = max(len(name) for name, _ in self.rows)
        marks = ["->" if name == self.chosen and verdict == "chosen" else "  " for name, verdict in self.rows]
        lines = [f"{mark} {name:<{width}}  {verdict}" for mark, (name, verdict) in zip(marks, self.rows, strict=True)]
        return "\n".join([self.problem, *lines, *([self.config] if self.config else [])])


def _as_desc(scheme: Any, device_type: str) -> int:
    if isinstance(scheme, bool) or not isinstance(scheme, int | str | _HasDesc):
        raise TypeError(f"scheme must be a Scheme, its string form or a desc, got {type(scheme).__name__}")
    if isinstance(scheme, int):
        return scheme
    if isinstance(scheme, str):
        from lowbit.scheme import Scheme  # here, so that the ops need nothing of the Python layer

        scheme = Scheme.parse(scheme)
    return scheme.desc(layout=_C.preferred_layout(device_type, scheme.desc(layout=0)))


def _dtype_name(op: str, dtype: torch.dtype | str | None) -> str:
    known = ("int8", "float8_e4m3fn") if op == "gemm_a8" else ("bfloat16", "float16", "float32")
    name = known[0] if dtype is None else str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"dtype={name} is not one of the activations of {op}: {', '.join(known)}")
    return name


@functools.cache
def _generality() -> dict[tuple[str, str], bool]:
    """(op, full name) of every kernel -> whether it is general."""
    return {(row["op"], full_name(row)): row["general"] for row in _C.kernel_table(compiled=True)}


def _kernel_op(op: str) -> str:
    known = list(dict.fromkeys(kernel_op for kernel_op, _ in _generality()))
    name = _SAME_KERNELS.get(op, op)
    if name not in known:
        raise ValueError(f"unknown op {op!r}; the kernel table has {', '.join(known)}")
    return name


def full_name(row: Mapping[str, Any]) -> str:
    """The name that `explain` uses for a row of the kernel table: backend, name and ISA."""
    return f"{row['backend']}_{row['name']}_{row['isa']}"


def explain(
    op: str = "gemm",
    *,
    M: int,
    N: int,
    K: int,
    scheme: Any,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    batch_invariant: bool = False,
) -> Explanation:
    """The kernel that serves a problem, and why each faster one refused it.

    Args:
        op: an op of the kernel table, such as "gemm", "gemm_a8" or "gemm_grad_input".
        M, N, K: x is [M, K] and W is [N, K].
        scheme: a Scheme, its string form ("int4-g128"), or a desc. The first two mean the device's preferred layout.
        device: "cpu" or "cuda"; "cpu:avx2" answers for that instruction set, whatever this machine has, and "sm_86" or
            "sm_86:84" for a GPU of that compute capability (and number of multiprocessors), whether or not there is one.
            "cuda" is the device itself once CUDA is in use, and before that sm_90:132: asking would initialise CUDA.
            "mps" is this Mac's GPU, "apple9" or "apple9:40" one of that family (and number of cores).
        dtype: of the activations; bfloat16 (float16, float32), for gemm_a8 int8 (float8_e4m3fn).
        batch_invariant: as the flag of `gemm`.

    Raises:
        ValueError: an unknown op, or a problem that cannot exist (N = 0, group_size > K, ...).

    Example:
        >>> print(explain("gemm", M=1, N=4096, K=4096, scheme="int4-g128"))
    """
    kernel_op = _kernel_op(op)
    where = _metal.device_string(_cuda.device_string(device))
    desc = _as_desc(scheme, where.partition(":")[0])
    flags = _C.enums()["flags"]["batch_invariant"] if batch_invariant else 0
    activations = _dtype_name(kernel_op, dtype)
    rows = _C.explain(kernel_op, where, M, N, K, desc, activations, flags)
    chosen = next((name for name, reason in rows if not reason), None)
    general = chosen is not None and _generality().get((kernel_op, chosen), False)
    config = _C.describe_config(kernel_op, where, M, N, K, desc, activations, flags)
    said = scheme if isinstance(scheme, str) else f"desc {desc:#x}" if isinstance(scheme, int) else str(scheme)
    return Explanation(
        problem=f"{op} M={M} N={N} K={K} {said} {activations} on {where}"
        + (" batch_invariant" if batch_invariant else ""),
        rows=tuple((name, reason or "chosen") for name, reason in rows),
        chosen=chosen,
        general=general,
        config=config,
    )


def can_implement(
    op: str = "gemm",
    *,
    M: int,
    N: int,
    K: int,
    scheme: Any,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    batch_invariant: bool = False,
    strict: bool = False,
) -> bool:
    """Whether a kernel serves the problem; with `strict`, whether one other than the general kernel does.

    Arguments are those of `explain`. A problem that cannot exist (group_size > K, ...) is answered with False.

    Raises:
        ValueError: an unknown op.

    Example:
        >>> can_implement("gemm", M=16, N=4096, K=4096, scheme="int4-g128", strict=True)
        True
    """
    _kernel_op(op)
    try:
        answer = explain(op, M=M, N=N, K=K, scheme=scheme, device=device, dtype=dtype, batch_invariant=batch_invariant)
    except ValueError:
        return False
    return answer.chosen is not None and not (strict and answer.general)


def kernel_table() -> list[dict[str, Any]]:
    """Every kernel: one dict each, with backend, op, name, isa, general and takes.

    The CPU's are those of the instruction sets that this machine has; CUDA's are all there are, with the least compute
    capability that each runs on as its isa, also where the CUDA library was not built.

    Dispatch, the tests, the benches and the support matrix in the docs read this one table.

    Example:
        >>> [row["name"] for row in kernel_table() if row["op"] == "gemm"]
    """
    return _C.kernel_table()


def set_strict(on: bool = True) -> None:
    """Make the pick of a general kernel an error in this process, as LOWBIT_STRICT=1 in the environment does.

    For tests and benches of an engine: a problem that falls off the fast kernels then fails, with the reasons that
    `explain` gives, instead of running slowly.

    Example:
        >>> set_strict()
        >>> set_strict(False)
    """
    _C.set_strict(on)


def strict() -> bool:
    """Whether `set_strict` or LOWBIT_STRICT is in force."""
    return _C.strict()
