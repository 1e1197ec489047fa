"""Few problems that reach every line of every Metal shader, for what is too slow to run on all: sanitizers and mutants.

As ../short_list.py, which is about CUDA: int4, int3 (two planes), int8 and fp8 only, sizes ragged on every side, and each problem
checks its own results.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

from .. import build
from ..case_list import Case, Outputs, run_all
from .library import MetalEmulator

sys.path[:0] = [p for p in (str(build.ROOT / "tests"), str(build.ROOT / "tests" / "metal")) if p not in sys.path]

import cases  # noqa: E402
import kernel_cases  # noqa: E402
import metal_problems as problems  # noqa: E402
import reference  # noqa: E402
import test_metal_a8 as a8  # noqa: E402
import test_metal_grad as grad  # noqa: E402
import test_metal_memory as memory  # noqa: E402
from metal_problems import Problem, metal_desc  # noqa: E402
from reference import Spec  # noqa: E402


def emulator(library: Path | None = None) -> MetalEmulator:
    torch.set_num_threads(1)
    return MetalEmulator.load(library)


INT4 = Spec("int4", "int", 32, "float16")
INT3 = Spec("int3", "none", 128, "bfloat16")
AFFINE = Spec("int4", "offset", 48, "float32")
BLOCKS = Spec("fp8_e4m3", "none", 128, "float32", "block128")
PERM = Spec("int4", "int", 32, "float16", has_perm=True)
#: Scales that are no floats; and blocks of which an odd row has a column each, with no byte between scales and the strip's end.
TWO_LEVELS = Spec("int4", "offset", 32, "uint6", "two_level", False, 8, "float16")
COLUMNS = Spec("int4", "none", 64, "float32", "flat")

#: (N, K): neither on a tile's end; K so long that two and four SIMD-groups share a strip; the second with an end that is no
#: whole chunk.
SHAPES = ((10, 456), (7, 1036), (18, 2056), (130, 264))
BF16 = torch.bfloat16


def tokens_of(kernel: str) -> int:
    return int(kernel.rsplit("_m", 1)[1]) if "_m" in kernel else 3


def gemm(kernel: str, spec: Spec, M: int, N: int, K: int, dtype: torch.dtype) -> Case:
    problem = Problem(spec, M, N, K, dtype, BF16 if M % 2 else None)

    def run(backend: MetalEmulator) -> Outputs:
        with kernel_cases.forced(kernel):
            return [kernel_cases.check_gemm(backend, problem)]

    return Case(f"gemm {kernel} {spec.format} {spec.zero_kind} M={M} N={N} K={K}", run)


def any_input(kernel: str) -> Case:
    """x as it comes: gathered by perm, at an odd stride among NaN, with K that is no multiple of 8."""

    def run(backend: MetalEmulator) -> Outputs:
        outputs = []
        for spec in (PERM, INT4):
            p = Problem(spec, 3, 6, 101, BF16)
            wide = torch.full((3, 205), torch.nan, dtype=p.dtype)
            wide[:, 1:102] = p.x()
            for x in (wide[:, 1:102], p.x()):
                with kernel_cases.forced(kernel):
                    y = kernel_cases.gemm(backend, p, x)
                reference.assert_close(y, kernel_cases.expected(p), p)
                outputs.append(y)
        return outputs

    return Case(f"gemm {kernel}, x as it comes", run)


def gemm_a8(kernel: str, spec: Spec, activation: str, M: int, N: int, K: int) -> Case:
    def run(backend: MetalEmulator) -> Outputs:
        weight, (a, group) = cases.random_weight(spec, N, K), a8.quantized(activation, M, K)
        with kernel_cases.forced(kernel):
            y = a8.gemm_a8(backend, a, weight, cases.random_x(N), BF16)
        reference.assert_close(y, a8.expected(weight, a, group, cases.random_x(N), BF16), (kernel, spec))
        return [y]

    return Case(f"gemm_a8 {kernel} {spec.format} {activation} M={M} N={N} K={K}", run)


def gradient(kernel: str, spec: Spec, M: int, N: int, K: int, dtype: torch.dtype) -> Case:
    def run(backend: MetalEmulator) -> Outputs:
        dy = cases.random_x(M, N, dtype=dtype)
        with kernel_cases.forced(kernel):
            dx = grad.grad(backend, dy, spec, N, K)
        reference.assert_close(dx, grad.expected(dy, spec, N, K), (kernel, spec))
        return [dx]

    return Case(f"gemm_grad_input {kernel} {spec.format} M={M} N={N} K={K}", run)


def canonical(spec: Spec, N: int, K: int) -> Case:
    """Packed as the CPU packs, unpacked as it was, dequantized to the CPU's bits."""

    def run(backend: MetalEmulator) -> Outputs:
        small = spec.scale_dtype not in cases.SCALE_DTYPES or spec.scaling == "flat"
        weight, d = (cases.random_weight if small else memory.any_codes)(spec, N, K), metal_desc(spec)
        dirty = weight.packed.clone()
        if K * spec.bits % 8:  # what stands behind the last code of a row means nothing
            dirty[:, -1] |= 0xFF << K * spec.bits % 8 & 0xFF
        w = backend.ops.pack(dirty, *weight.tensors[1:], N, K, d, *weight.supers)
        assert torch.equal(w, torch.ops.lowbit.pack(*weight.tensors, N, K, d, *weight.supers)), "pack"
        back = backend.ops.unpack(w, N, K, d)
        for now, was in zip(back, (*weight.tensors, *weight.supers), strict=True):
            assert now.numel() == 0 if was is None else memory.same_bits(now, was), "unpack"
        outputs = [w, *back]
        for dtype in cases.DTYPES:
            rest = (N, K, cases.desc(spec), dtype, *weight.supers)
            found = backend.ops.dequantize(*weight.tensors, *rest)
            expected = torch.ops.lowbit.dequantize(*weight.tensors, *rest)
            assert memory.same_but_nan(found, expected), "dequantize"
            outputs.append(torch.nan_to_num(found))
        return outputs

    return Case(
        f"pack and dequantize {spec.format} {spec.zero_kind} N={N} K={K}{' perm' if spec.has_perm else ''}", run
    )


def activations(activation: str, M: int, K: int) -> Case:
    format, group, symmetric = a8.ACTIVATIONS[activation]

    def run(backend: MetalEmulator) -> Outputs:
        wide = torch.full((M, K + 3), torch.nan, dtype=BF16)
        wide[:, 1 : K + 1] = cases.random_x(M, K) + 0.25
        arguments = (wide[:, 1 : K + 1], format, group, None, None, torch.linspace(0.5, 2, K), symmetric)
        found = backend.ops.quantize_activation(*arguments)
        for now, expected in zip(found, torch.ops.lowbit.quantize_activation(*arguments), strict=True):
            assert memory.same_bits(now, expected)
        return list(found)

    return Case(f"quantize_activation {activation} M={M} K={K}", run)


def quantized(spec: Spec, N: int, K: int, search: bool, dtype: torch.dtype, weighted: bool = False) -> Case:
    def run(backend: MetalEmulator) -> Outputs:
        wide = torch.full((N, K + 3), torch.nan, dtype=dtype)
        wide[:, 1 : K + 1] = cases.random_x(N, K)
        arguments = (wide[:, 1 : K + 1], cases.desc(spec), search, torch.linspace(0, 2, K) if weighted else None)
        found = backend.ops.quantize(*arguments)
        for now, expected in zip(found, torch.ops.lowbit.quantize(*arguments), strict=True):
            assert kernel_cases.same_bits(now, expected)
        return list(found)

    how = "search" if search else "nearest"
    return Case(f"quantize {how} {spec.format} {spec.zero_kind} {spec.group_size} N={N} K={K}", run)


@functools.cache
def all_cases() -> tuple[Case, ...]:
    listed = []
    for kernel in problems.GEMM:
        tokens = tokens_of(kernel)
        rows = (tokens, max(1, tokens - 1), 1 + tokens // 2, 1)
        specs, dtypes = (INT4, INT3, AFFINE, BLOCKS), (BF16, torch.float32, torch.float16, BF16)
        listed += [gemm(kernel, *case[:2], *case[2], case[3]) for case in zip(specs, rows, SHAPES, dtypes, strict=True)]
        listed.append(any_input(kernel))
        listed.append(gemm(kernel, TWO_LEVELS, 1, 10, 264, BF16))
    listed.append(gemm("general", cases.SCALED["nested"][0], 3, 11, 51, BF16))  # blocks that run across rows
    for kernel in problems.A8:
        tokens = tokens_of(kernel)
        listed.append(gemm_a8(kernel, INT4, "int8-asym", max(1, tokens - 1), 10, 1100))
        listed.append(gemm_a8(kernel, INT3, "fp8-g128", tokens + 2 if tokens > 8 else tokens, 70, 264))
    for kernel in problems.GRAD:
        listed.append(gradient(kernel, PERM, 5, 10, 200, BF16))
        listed.append(gradient(kernel, INT3, 3, 135, 136, torch.float32))
        listed.append(gradient(kernel, INT4, 2, 9, 101, torch.float16))
    listed += [
        canonical(spec, N, K) for spec, N, K in ((PERM, 7, 301), (INT3, 5, 132), (AFFINE, 6, 104), (BLOCKS, 130, 264))
    ]
    listed.append(canonical(Spec("int3", "float", 8, "float16"), 3, 2061))
    listed.append(canonical(TWO_LEVELS, 6, 1096))
    listed.append(canonical(Spec("int3", "offset", 16, "uint4", "two_level", False, 16, "float16"), 5, 272))
    listed.append(canonical(Spec("int4", "none", 64, "dynamic8", "flat", False, 4), 11, 51))
    listed.append(gemm("general", COLUMNS, 1, 10, 455, torch.float32))
    listed += [
        activations(name, 3, K) for name, K in (("int8", 77), ("int8-asym", 520), ("fp8-g128", 300), ("fp8", 2056))
    ]
    for search in (False, True):
        listed.append(quantized(Spec("int3", "int", 24, "float16"), 3, 61, search, BF16, True))
        listed.append(quantized(Spec("int4", "offset", -1, "float32"), 2, 1029, search, torch.float32))
        listed.append(quantized(BLOCKS, 130, 131, search, torch.float16, search))
    return tuple(listed)


CASES = all_cases()


if __name__ == "__main__":
    sys.exit(run_all(__doc__.splitlines()[0], CASES, emulator))
