"""Few problems that reach every line of every kernel, for what is too slow to run on all: sanitizers and mutants.

Kernels may be compiled for few formats then (LOWBIT_EMULATOR_ONE_FORMAT): int4, int3 (two planes), int8 and fp8, bf16. Sizes are
ragged on every side, and tiles are shared among blocks. Each problem checks its own results.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import torch

from . import build
from .case_list import Case, Outputs, run_all, same_bits
from .library import Emulator

sys.path[:0] = [p for p in (str(build.ROOT / "tests"), str(build.ROOT / "tests" / "cuda")) if p not in sys.path]

import cases  # noqa: E402
import kernel_cases  # noqa: E402
import problems  # noqa: E402
import reference  # noqa: E402
import test_cuda_a8 as a8  # noqa: E402
import test_cuda_grad as grad  # noqa: E402
from reference import Spec  # noqa: E402


def emulator(library: Path | None = None) -> Emulator:
    torch.set_num_threads(1)
    return Emulator.load(library)


# ---- GEMM --------------------------------------------------------------------------------------------------------------

INT4 = Spec("int4", "int", 32, "float16")
INT3 = Spec("int3", "none", 128, "bfloat16")
#: Scales in the strip's table and not in tiles; groups that meet no cell's end.
TABLE = Spec("int4", "offset", 48, "float32")
#: More scales per step than a warp copies at once.
SMALL_GROUPS = Spec("int4", "float", 16, "float32")
BLOCKS = Spec("fp8_e4m3", "none", 128, "float32", "block128")
NF4 = Spec("nf4", "none", 32, "float16")
#: Scales that are no floats: of two levels with offsets, of groups and super groups that meet no step's end, one for a block.
TWO_LEVELS = Spec("int4", "offset", 32, "uint6", "two_level", False, 8, "float16")
LEVELS_ASTRIDE = Spec("int3", "none", 48, "int6", "two_level", False, 2, "float32")
POWERS = Spec("fp8_e4m3", "none", 128, "e8m0", "block128")
SMALL_FLOATS = Spec("int4", "int", 16, "e4m3", "two_level", False, -1)

#: (N, K, multiprocessors). Few blocks with several tiles each, many blocks on one tile, blocks that begin inside a tile; N and
#: K on no tile's end, and a last step of K that is nearly empty.
SHAPES = ((130, 456, 3), (70, 2200, 40), (300, 520, 1), (700, 712, 4), (65, 264, 4), (65, 88, 4))


def tokens_of(kernel: str) -> int:
    return int(kernel.rsplit("_m", 1)[1]) if "_m" in kernel else 8


def gemm(kernel: str, spec: Spec, M: int, N: int, K: int, sms: int) -> Case:
    bias = {0: None, 1: torch.bfloat16, 2: torch.float32}[M % 3]
    problem = problems.Problem(spec, M, N, K, torch.bfloat16, bias)

    def run(backend: Emulator) -> Outputs:
        backend.set_device(90, sms)
        with kernel_cases.forced(kernel):
            return [kernel_cases.check_gemm(backend, problem)]

    return Case(f"gemm {kernel} {_name(spec)} M={M} N={N} K={K} sms={sms}", run)


def gemm_cases(kernel: str) -> list[Case]:
    # Tiles of warpgroups are as wide as M: 40 and 72 tokens take fewer registers than there are.
    tokens = {"hopper_matrix_m64": 40, "hopper_matrix_m128": 72}.get(kernel, tokens_of(kernel))
    rows = (tokens - 1, tokens, max(1, tokens - 5), tokens + 3 if "matrix" in kernel else 1, 2, 2)
    specs = (INT4, INT3, SMALL_GROUPS, TABLE, BLOCKS, TABLE)
    cases = [gemm(kernel, spec, M, *shape) for spec, M, shape in zip(specs, rows, SHAPES, strict=True)]
    if kernel == "general":
        cases.append(gemm(kernel, NF4, 3, 70, 104, 2))
    if not kernel.startswith("hopper"):  # which refuses them
        shapes = ((130, 328, 3), (70, 712, 8), (65, 200, 2))
        cases += [
            gemm(kernel, spec, 2, *at) for spec, at in zip((TWO_LEVELS, LEVELS_ASTRIDE, POWERS), shapes, strict=True)
        ]
    if kernel.startswith("hopper_stream_m"):
        # More tiles than stages, so that stages are refilled, by blocks of a cluster and by one alone; three strips.
        cases += [
            gemm(f"{kernel}:{plan}", INT4, 3, 150, K, 4) for plan, K in (("1x1", 2200), ("2x4", 4400), ("4x2", 1300))
        ]
    if kernel.startswith("hopper_matrix_m"):
        # Blocks that share what they copy: stages refilled, tiles shared among clusters, tiles past N and past M.
        cases.append(gemm(f"{kernel}:2x2", INT4, tokens + 3, 300, 1700, 12))
        if kernel == "hopper_matrix_m64":
            cases += [gemm(f"{kernel}:2x1", TABLE, 9, 600, 712, 4), gemm(f"{kernel}:1x2", BLOCKS, 70, 130, 1300, 2)]
    return cases


def any_input(kernel: str) -> Case:
    """x as it comes: gathered by perm, at an odd stride, with K that is no multiple of 8."""

    def run(backend: Emulator) -> Outputs:
        outputs = []
        for K, has_perm in ((100, True), (130, False)):
            spec = dataclasses.replace(INT4, has_perm=has_perm)
            p = problems.Problem(spec, 5, 66, K, torch.bfloat16)
            wide = torch.full((5, 2 * K + 3), torch.nan, dtype=p.dtype)
            wide[:, 1 : K + 1] = p.x()
            for x in (wide[:, 1 : K + 1], p.x()):
                with kernel_cases.forced(kernel):
                    y = kernel_cases.gemm(backend, p, x)
                reference.assert_close(y, kernel_cases.expected(p), p)
                outputs.append(y)
        return outputs

    return Case(f"gemm {kernel}, x as it comes", run)


def gemm_a8(kernel: str, kind: str | Spec, activation: str, group: int, M: int, N: int, K: int, sms: int) -> Case:
    if isinstance(kind, Spec):
        spec = kind
    else:
        format, zero_kind, scaling = cases.KINDS[kind]
        spec = Spec(format, zero_kind, group, "float32", scaling)

    def run(backend: Emulator) -> Outputs:
        backend.set_device(90, sms)
        weight = cases.random_weight(spec, N, K)
        a, x_group = a8.quantized(activation, M, K)
        bias = cases.random_x(N)
        with kernel_cases.forced(kernel):
            y = a8.gemm_a8(backend, a, weight, bias, torch.bfloat16)
        reference.assert_close(y, a8.expected(weight, a, x_group, bias, torch.bfloat16), (kernel, spec))
        return [y]

    return Case(f"gemm_a8 {kernel} {_name(spec)} {activation} M={M} N={N} K={K} sms={sms}", run)


def gemm_a8_cases(kernel: str) -> list[Case]:
    tokens = tokens_of(kernel)
    if kernel.startswith("hopper_a8_int"):
        kinds = [("int4-int", "int8", 96), ("int3", "int8-g128", 32), ("int4", "int8", -1)]
    elif kernel.startswith("hopper_a8_fp8"):
        kinds = [("fp8_e4m3", "fp8", 32), ("fp8_e4m3-block128", "fp8-g128", 128), ("int4", "fp8-g128", 96)]
    elif kernel.startswith("a8_fp8"):
        kinds = [("fp8_e4m3", "fp8", 32), ("fp8_e4m3-block128", "fp8-g128", 128), ("fp8_e4m3", "fp8-g128", 48)]
    elif kernel.startswith("a8_int"):
        kinds = [("int4-int", "int8-asym", 48), ("int3", "int8-g128", 32), ("int4", "int8", -1)]
    else:
        kinds = [("int4", "fp8", 32), ("int3", "int8-asym", 48), ("int4-int", "fp8-g128", 16)]
    rows = (tokens - 1, tokens + 2, 3)
    cases = [gemm_a8(kernel, *kind, M, *shape) for kind, M, shape in zip(kinds, rows, SHAPES, strict=False)]
    if kernel.startswith(
        "hopper"
    ):  # refuses scales that are no floats; more steps than stages, so that these are refilled
        cases.append(gemm_a8(kernel, *kinds[0], 2, 70, 1300, 1))
        cases.append(gemm_a8(f"{kernel}:2x2", *kinds[0], 66, 300, 1300, 8))
    else:
        other = POWERS if kernel.startswith("a8_fp8") else LEVELS_ASTRIDE
        cases.append(gemm_a8(kernel, other, "fp8" if other is POWERS else "int8", 0, 2, 70, 264, 2))
    if kernel == "general":
        cases += [gemm_a8(kernel, "nf4", "fp8", 32, 3, 70, 104, 2), gemm_a8(kernel, "int4", "int8", 40, 5, 66, 333, 2)]
    return cases


def grad_case(kernel: str, spec: Spec, M: int, N: int, K: int, sms: int) -> Case:
    def run(backend: Emulator) -> Outputs:
        backend.set_device(90, sms)
        dy = cases.random_x(M, N, dtype=torch.bfloat16)
        with kernel_cases.forced(kernel):
            dx = grad.grad(backend, dy, spec, N, K)
        reference.assert_close(dx, grad.expected(dy, spec, N, K), (kernel, spec))
        return [dx]

    return Case(f"gemm_grad_input {kernel} {_name(spec)} M={M} N={N} K={K} sms={sms}", run)


# ---- weights and activations -------------------------------------------------------------------------------------------


def pack_case(spec: Spec, N: int, K: int) -> Case:
    """The CPU's bytes, padding and all; back as it was; and dequantized to the CPU's bits."""

    def run(backend: Emulator) -> Outputs:
        weight = cases.random_weight(spec, N, K)
        w = problems.pack(backend, weight)
        same = torch.ops.lowbit.pack(*weight.tensors, N, K, problems.cuda_desc(spec), *weight.supers)
        assert torch.equal(w, same), "pack"
        back = backend.ops.unpack(w, N, K, problems.cuda_desc(spec))
        assert all(
            got.numel() == 0 if given is None else same_bits([got], [given])
            for got, given in zip(back, (*weight.tensors, *weight.supers), strict=True)
        )
        # What stands behind the last code of a row, in the same byte, means nothing.
        padding = -K * spec.bits % 8
        noisy = weight.packed.clone()
        noisy[:, -1] |= 256 - 2 ** (8 - padding)
        assert torch.equal(problems.pack(backend, dataclasses.replace(weight, packed=noisy)), w), "padding was packed"
        canonical = cases.desc(spec)
        dense = [
            backend.ops.dequantize(*weight.tensors, N, K, canonical, dtype, *weight.supers) for dtype in cases.DTYPES
        ]
        for got in dense:
            assert torch.equal(got, weight.dense().to(got.dtype)), "dequantize"
        return [w, *back, *dense]

    return Case(f"pack and dequantize {_name(spec)} N={N} K={K}", run)


def quantize_case(spec: Spec, N: int, K: int, search: bool) -> Case:
    def run(backend: Emulator) -> Outputs:
        weight = cases.random_x(N, K, dtype=torch.bfloat16)
        importance = torch.linspace(0.5, 2, K) if search else None
        arguments = (weight, cases.desc(spec), search, importance)
        outputs = list(backend.ops.quantize(*arguments))
        assert same_bits(outputs, list(torch.ops.lowbit.quantize(*arguments))), "not what the CPU makes of it"
        return outputs

    return Case(f"quantize {_name(spec)} N={N} K={K}{' search' if search else ''}", run)


def quantize_activation_case(activation: str, M: int, K: int, is_view: bool) -> Case:
    format, group, symmetric = a8.ACTIVATIONS[activation]

    def run(backend: Emulator) -> Outputs:
        x = cases.random_x(M, K, dtype=torch.bfloat16) + 0.25
        if is_view:
            wide = torch.full((M, 2 * K + 1), torch.nan, dtype=x.dtype)
            wide[:, 1 : K + 1] = x
            x = wide[:, 1 : K + 1]
        arguments = (x, format, group, None, None, torch.linspace(0.5, 2, K), symmetric)
        outputs = list(backend.ops.quantize_activation(*arguments))
        assert same_bits(outputs, list(torch.ops.lowbit.quantize_activation(*arguments))), (
            "not what the CPU makes of it"
        )
        return outputs

    return Case(f"quantize_activation {activation} M={M} K={K}{', a view' if is_view else ''}", run)


def _name(spec: Spec) -> str:
    kind = spec.scaling if spec.scaling != "group" else spec.zero_kind
    return f"{spec.format}-{kind}-g{spec.group_size}-{spec.scale_dtype}{'-perm' if spec.has_perm else ''}"


@functools.cache
def all_cases() -> tuple[Case, ...]:
    with_perm = dataclasses.replace(INT4, has_perm=True)
    listed = [case for kernel in problems.A16 for case in gemm_cases(kernel)]
    listed += [any_input(kernel) for kernel in problems.A16]
    listed += [case for kernel in problems.A8 for case in gemm_a8_cases(kernel)]
    for kernel in problems.GRAD:
        specs = (with_perm, INT3, TABLE, SMALL_GROUPS, TWO_LEVELS, LEVELS_ASTRIDE, POWERS)
        shapes = ((20, 130, 200, 4), (66, 65, 136, 4), (3, 2100, 136, 40), (60, 300, 328, 1))
        shapes += ((3, 130, 200, 2), (3, 70, 264, 2), (3, 130, 136, 2))
        listed += [grad_case(kernel, spec, *shape) for spec, shape in zip(specs, shapes, strict=True)]
    listed.append(grad_case("general", Spec("int4", "none", 24), 5, 64, 72, 4))
    for spec, N, K in (
        (with_perm, 70, 300),
        (INT4, 65, 301),
        (INT4, 66, 672),
        (INT3, 65, 136),
        (INT3, 3, 132),  # fp32 rows on 16-byte boundaries, the last unit cut short
        (BLOCKS, 130, 264),
        (TABLE, 66, 104),
        (NF4, 64, 128),
        (POWERS, 130, 264),
        (SMALL_FLOATS, 150, 136),
    ):
        listed.append(pack_case(spec, N, K))
    whole = Spec("int4", "int", -1, "float16")
    for spec, N, K, search in (
        (INT4, 33, 100, False),
        (whole, 3, 700, False),
        (TABLE, 9, 100, False),
        (BLOCKS, 130, 200, False),
        (INT3, 17, 264, True),
        (whole, 2, 2100, True),
        (BLOCKS, 130, 200, True),
    ):
        listed.append(quantize_case(spec, N, K, search))
    for activation in a8.ACTIVATIONS:
        if activation != "int8-g128":  # ours never makes it
            listed.append(quantize_activation_case(activation, 5, 300, is_view=True))
            listed.append(quantize_activation_case(activation, 3, 296, is_view=False))
            listed.append(quantize_activation_case(activation, 2, 4100, is_view=False))
    return tuple(listed)


CASES = all_cases()


if __name__ == "__main__":
    sys.exit(run_all(__doc__.splitlines()[0], CASES, emulator))
