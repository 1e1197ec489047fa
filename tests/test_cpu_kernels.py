"""CPU kernels called one by one, without torch around them: this machine's, and AArch64's under qemu.

The other tests reach kernels through the ops and so only those of the CPU they run on. Here a small program
(kernel_runner/runner.cpp) calls every function of csrc/cpu/kernels/job.h. For AArch64 it is cross-compiled and runs
under qemu, on a CPU without dot products, one with, and one with matrix products; on an AArch64 machine natively.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import platform
import shutil
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
import torch

import reference
from cases import (
    DTYPES,
    INT_FORMATS,
    KINDS,
    SCALE_DTYPES,
    cpu_desc,
    desc,
    pack,
    packed,
    random_weight,
    random_x,
    rng,
    with_zero_column,
)
from kernel_runner.build import EMULATOR, build, cannot_cross
from kernel_runner.client import Refused, Runner, kernels
from lowbit import _C, ops
from reference import Spec, Weight

NATIVE = "native"
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
#: CPUs that qemu knows, and their levels.
CROSS = {
    "cortex-a57": ["neon", "portable"],
    "cortex-a76": ["neondotprod", "neon", "portable"],
    "max": ["neoni8mm", "neondotprod", "neon", "portable"],
}
#: (machine, level): every function of every level of AArch64 that is a function of its own, and two levels of this machine.
INTEGER_TARGETS = [(NATIVE, level) for level in (_C.isa_levels() if IS_ARM else {_C.isa_levels()[0], "portable"})]
FLOAT_TARGETS = list(INTEGER_TARGETS)
if not IS_ARM:
    INTEGER_TARGETS += [("max", "portable"), *((machine, levels[0]) for machine, levels in CROSS.items())]
    FLOAT_TARGETS += [("max", "portable"), ("cortex-a57", "neon")]

#: Levels where few rows are multiplied as int8 planes: two of them for bf16, four for the others.
PLANE_TARGETS = [
    (NATIVE, level)
    for level in _C.isa_levels()[:1]
    if any(row["name"] == "planes_i8" and row["isa"] == level for row in _C.kernel_table())
]
if not IS_ARM:
    PLANE_TARGETS += [("cortex-a76", "neondotprod"), ("max", "neoni8mm")]
PLANE_INPUTS = [
    (torch.bfloat16, 1),
    (torch.float32, 1),
    (torch.bfloat16, 37),
    (torch.float32, 3),
    (torch.bfloat16, 3),
    (torch.float16, 2),
]

INTEGER_KINDS = [kind for kind in KINDS if KINDS[kind][0] in INT_FORMATS]

Target = tuple[Runner, str]


@functools.cache
def _command(machine: str) -> tuple[str, ...]:
    if machine == NATIVE:
        return (str(build(cross=False)),)
    return str(shutil.which(EMULATOR)), "-cpu", machine, str(build(cross=True))


@pytest.fixture(scope="module")
def runners() -> Iterator[dict[str, Runner]]:
    """Runners that were started, by machine."""
    started: dict[str, Runner] = {}
    yield started
    for runner in started.values():
        runner.close()


def _start(machine: str, started: dict[str, Runner]) -> Runner:
    if machine != NATIVE and (reason := cannot_cross()):
        pytest.skip(reason)
    if machine not in started:
        started[machine] = Runner(_command(machine))
    return started[machine]


@pytest.fixture
def target(request: pytest.FixtureRequest, runners: dict[str, Runner]) -> Target:
    """The runner of a machine, and a level."""
    machine, level = request.param
    return _start(machine, runners), level


def _targets(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("target", sorted(pairs), indirect=True, ids="-".join)


@pytest.mark.parametrize("machine", [NATIVE, *([] if IS_ARM else CROSS)])
def test_levels_follow_the_cpu(machine: str, runners: dict[str, Runner]) -> None:
    runner = _start(machine, runners)
    if machine == NATIVE:
        assert runner.levels == _C.isa_levels()
        assert runner.features == _C.cpu_features()
    else:
        assert runner.levels == CROSS[machine]
        assert runner.features == {
            "neon": True,
            "dotprod": "neondotprod" in runner.levels,
            "i8mm": "neoni8mm" in runner.levels,
        }


def _refuses(runner: Runner, level: str, kernel: str, M: int, weight: Weight) -> bool:
    """Whether a kernel does not take M rows in bf16."""
    try:
        x = torch.zeros(M, weight.K, dtype=torch.bfloat16)
        runner.gemm(level, kernel, x, weight, pack(weight), None, torch.bfloat16)
    except Refused:
        return True
    return False


@pytest.mark.skipif(IS_ARM, reason="the page of supported problems is written on x86-64")
def test_neon_chooses_as_documented(runners: dict[str, Runner]) -> None:
    """docs/support.md: planes_i8 as avx512vnni, but on neondotprod to six bits and on neon not at all; else as avx2."""
    runner = _start("max", runners)
    for format in ("int4", "int8", "fp8_e4m3", "nf4"):
        for group_size in (24, 32):
            spec = Spec(format, "none", group_size)
            weight = random_weight(spec, 16, 96)
            for M in (1, 8, 9, 128):
                problem = (M, 16, 96, cpu_desc(spec), "bfloat16", 0)
                vnni = dict(_C.explain("gemm", "cpu:avx512vnni", *problem))
                others = {n: r for n, r in _C.explain("gemm", "cpu:avx2", *problem) if "planes" not in n}
                takes = ("", "slower than the chosen one")
                instead = next(n for n, r in others.items() if r in takes).removeprefix("cpu_").rpartition("_")[0]
                for level, bits in (("neon", 0), ("neondotprod", 6), ("neoni8mm", 8)):
                    planes = vnni["cpu_planes_i8_avx512vnni"] == "" and spec.bits <= bits
                    expected = "planes_i8" if planes else instead
                    chosen = next(n for n in kernels("gemm") if not _refuses(runner, level, n, M, weight))
                    assert chosen == expected, (level, spec, M)


# ---- products ----------------------------------------------------------------------------------------------------------


def _cases(kind: str) -> Iterator[tuple[Spec, int, int]]:
    """Every scale dtype of a kind, on groups and shapes that end in the middle of something, and a group that only the
    general kernels take."""
    format, zero_kind, scaling = KINDS[kind]
    for i, dtype in enumerate(SCALE_DTYPES):
        group_size = 128 if scaling == "block128" else (32, -1, 64)[i]
        yield Spec(format, zero_kind, group_size, dtype, scaling, i == 1), *((33, 96), (130, 257), (16, 130))[i]
    if scaling == "group":
        yield Spec(format, zero_kind, 24, "float16"), 17, 100


ROWS = (1, 2, 3, 4, 5, 6, 7, 9, 13, 8, 128)


@_targets(FLOAT_TARGETS)
def test_gemm_is_within_the_bound(target: Target) -> None:
    runner, level = target
    names, turn = kernels("gemm"), count()
    served = {name: set[str]() for name in names}
    for kind in KINDS:
        for spec, N, K in _cases(kind):
            weight, w = random_weight(spec, N, K), packed(spec, N, K)
            W = weight.dense()
            i = next(turn)
            x_dtype, y_dtype = DTYPES[i % 3], DTYPES[i % 3]
            x = random_x(ROWS[i % len(ROWS)], K, dtype=x_dtype)
            bias = (None, random_x(N))[i % 2]
            for name in names:
                try:
                    y = runner.gemm(level, name, x, weight, w, bias, y_dtype)
                except Refused:
                    continue
                served[name].add(kind)
                # They may round weights to bf16, once.
                unit = reference.UNIT[torch.bfloat16] if name in ("panel_bf16", "stream_bf16") else 0
                expected = reference.product(x, W, bias, unit, y_dtype)
                reference.assert_close(y, expected, (level, name, spec, N, K, len(x)))
    for name in ("panel_f32", "general_f32", *([] if level == "portable" else ["stream_f32"])):
        assert served[name] == set(KINDS), name


@_targets(PLANE_TARGETS)
def test_products_of_planes_are_within_the_bound(target: Target) -> None:
    runner, level = target
    turn = count()
    for kind in INTEGER_KINDS:
        served = False
        for spec, N, K in list(_cases(kind))[:3]:
            weight, w = random_weight(spec, N, K), packed(spec, N, K)
            for dtype, M in PLANE_INPUTS[next(turn) % 2 :: 2]:
                x = random_x(M, K, dtype=dtype)
                x[M // 2, K // 2] = 1500.0
                bias = random_x(N) if M % 2 else None
                with contextlib.suppress(Refused):
                    y = runner.gemm(level, "planes_i8", x, weight, w, bias, dtype)
                    expected = reference.product(x, weight.dense(), bias, 0, dtype)
                    reference.assert_close(y, expected, (level, spec, N, K, M, dtype))
                    served = True
        assert served == (level != "neondotprod" or not kind.startswith("int8")), kind


@_targets(FLOAT_TARGETS)
def test_one_hot_rows_read_out_every_code(target: Target) -> None:
    """y is W's first column, to the last bit, with every code of the format in it: NaNs, infinities, subnormals."""
    runner, level = target
    for kind in KINDS:
        for spec, _, _ in list(_cases(kind))[:2]:
            spec = dataclasses.replace(spec, group_size=128 if spec.scaling == "block128" else 32, has_perm=False)
            N, K = max(2**spec.bits, 16), 32
            codes = np.full((N, K), 2 ** (spec.bits - 1) if not spec.coded else 0)
            codes[:, 0] = np.arange(N) % 2**spec.bits
            stream = torch.from_numpy(reference.pack_stream(codes, spec.bits))
            weight = dataclasses.replace(random_weight(spec, N, K), codes=codes, packed=stream)
            for M, name in itertools.product((1, 2, 4), kernels("gemm")):
                if name == "planes_i8" and spec.zero_kind == "offset":
                    continue  # (q - r) * s + (r * s + o), not q * s + o: equal but for rounding
                x = torch.zeros(M, K)
                x[:, 0] = 1
                with contextlib.suppress(Refused):
                    y = runner.gemm(level, name, x, weight, pack(weight), None, torch.float32)
                    W = weight.dense()[:, 0].expand(M, N)
                    assert torch.equal(y.isnan(), W.isnan()), (name, spec)
                    assert torch.equal(y.nan_to_num(), W.nan_to_num()), (name, spec)


@_targets(FLOAT_TARGETS)
def test_an_outlier_spoils_nothing(target: Target) -> None:
    """1500 among values of 0.05, where the weight is zero: the bound does not see it."""
    runner, level = target
    for kind, (format, zero_kind, scaling) in KINDS.items():
        if format == "iq4_nl":  # no code of it is 0
            continue
        N, K = 33, 128
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 32, "float32", scaling)
        weight = with_zero_column(spec, N, K, 77)
        for M in (1, 3, 8):
            x = random_x(M, K) * 0.05
            x[M // 2, 77] = 1501.2345
            expected = reference.product(x, weight.dense(), None, 0, torch.float32)
            for name in kernels("gemm"):
                with contextlib.suppress(Refused):
                    y = runner.gemm(level, name, x, weight, pack(weight), None, torch.float32)
                    reference.assert_close(y, expected, (level, name, kind, M))


@_targets(FLOAT_TARGETS)
def test_grad_input_is_within_the_bound(target: Target) -> None:
    runner, level = target
    turn = count()
    for kind in KINDS:
        for spec, N, K in _cases(kind):
            weight, w = random_weight(spec, N, K), packed(spec, N, K)
            dy = random_x((1, 3, 8, 17)[next(turn) % 4], N)
            expected = reference.product(dy, weight.dense().t(), None, 0, torch.float32)
            for name in kernels("gemm_grad_input"):
                try:
                    dx = runner.grad(level, name, dy, weight, w)
                except Refused:
                    continue
                reference.assert_close(dx, expected, (level, name, spec, N, K, len(dy)))


def _gemm_a8_here(
    activation: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], weight: Weight, w: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    before = _C.isa()
    _C.set_isa("portable")
    try:
        return ops.gemm_a8(*activation, w, bias, weight.N, weight.K, cpu_desc(weight.spec), 0, torch.float32)
    finally:
        _C.set_isa(before)


@_targets(INTEGER_TARGETS)
def test_integer_products_have_the_same_bits(target: Target) -> None:
    """Through the portable ops here, and called one by one there."""
    runner, level = target
    turn = count()
    for kind in INTEGER_KINDS:
        for spec, N, K in _cases(kind):
            weight, w = random_weight(spec, N, K), packed(spec, N, K)
            for symmetric in (True, False):
                i = next(turn)
                x = random_x((1, 2, 3, 4, 5, 8, 9, 17)[i % 8], K) + 0.25
                activation = ops.quantize_activation(x, 6, -1, symmetric=symmetric)
                bias = (None, random_x(N))[i // 2 % 2]
                expected = _gemm_a8_here(activation, weight, w, bias)
                name = "general_i8" if spec.group_size == 24 else "dot_i8"
                y = runner.gemm_a8(level, name, activation, weight, w, bias, torch.float32)
                assert torch.equal(y, expected), (level, name, spec, N, K, len(x), symmetric)


@_targets(INTEGER_TARGETS)
@pytest.mark.parametrize("kind", ["int8", "int8-int", "int4-int"])
def test_integer_products_at_the_ends_of_their_range(target: Target, kind: str) -> None:
    """The largest codes and activations of -128, in rows too long for one int32 sum: 255 * 255 * 32768 < 2^31."""
    runner, level = target
    format, zero_kind, _ = KINDS[kind]
    N, K = 16, 40000
    weight = random_weight(Spec(format, zero_kind, -1, "float32"), N, K)
    codes = np.where(rng(kind).integers(0, 8, (N, K)) > 0, 2**weight.spec.bits - 1, 0)
    stream = torch.from_numpy(reference.pack_stream(codes, weight.spec.bits))
    weight = dataclasses.replace(weight, codes=codes, packed=stream)
    w = pack(weight)
    for M in (1, 4):
        x = torch.full((M, K), -128, dtype=torch.int8)
        x[:, ::7] = 127
        for zeros in (None, torch.full((M, 1), 127, dtype=torch.int32), torch.full((M, 1), -128, dtype=torch.int32)):
            activation = (x, torch.full((M, 1), 0.125), zeros)
            y = runner.gemm_a8(level, "dot_i8", activation, weight, w, None, torch.float32)
            assert torch.equal(y, _gemm_a8_here(activation, weight, w, None)), (level, kind, M, zeros)


# ---- what must have the same bits everywhere -----------------------------------------------------------------------------


def _awkward_groups(groups: int, size: int) -> torch.Tensor:
    """fp32 [groups, size]: Gaussian ones, and groups that are flat, tiny, huge, one-sided or not finite."""
    values = random_x(groups, size)
    values[1] = 0.0
    values[2] = 0.3
    values[3] *= 1e-30
    values[4] *= 1e30
    values[5] = values[5].abs()
    values[6] = -values[6].abs() - 1
    values[7, size // 2] = torch.nan
    values[8, size // 3] = torch.inf
    values[9] *= 2.0**-22
    return values


@_targets(FLOAT_TARGETS)
def test_quantize_has_the_same_bits(target: Target) -> None:
    runner, level = target
    groups, turn = 12, count()
    for format, zero_kind, scaling in KINDS.values():
        if scaling != "group":
            continue  # its blocks are groups of 16384 values to the kernel
        for dtype in SCALE_DTYPES:
            i = next(turn)
            size = (32, 40, 129)[i % 3]
            spec = Spec(format, zero_kind, -1, dtype)
            values = _awkward_groups(groups, size)
            importance = torch.rand(size) + 0.1 if i % 2 else None
            search = i % 4 != 0
            expected = torch.ops.lowbit.quantize(values, desc(spec), search, importance)
            repeated = None if importance is None else importance.expand(groups, size)
            codes, scales, zeros = runner.quantize(level, values, repeated, desc(spec), search)
            stream = reference.pack_stream(np.frombuffer(codes, np.uint8).reshape(groups, size), spec.bits)
            found = (stream.tobytes(), scales, zeros)
            for name, a, b in zip(("codes", "scales", "zeros"), found, expected, strict=True):
                assert a == b.view(torch.uint8).numpy().tobytes(), (level, name, spec, size, search)


@_targets(FLOAT_TARGETS)
def test_quantize_activation_has_the_same_bits(target: Target) -> None:
    runner, level = target
    x = _awkward_groups(12, 300)
    scale, zero = torch.tensor([0.02]), torch.tensor([-7], dtype=torch.int32)
    for dtype, format, group_size, symmetric, given in (
        (torch.int8, 6, -1, True, False),
        (torch.int8, 6, -1, False, False),
        (torch.int8, 6, -1, True, True),
        (torch.int8, 6, -1, False, True),
        (torch.float8_e4m3fn, 7, -1, True, False),
        (torch.float8_e4m3fn, 7, 128, True, False),
        (torch.float8_e4m3fn, 7, -1, True, True),
    ):
        s, z = (scale if given else None), (zero if given and not symmetric else None)
        expected = ops.quantize_activation(x, format, group_size, s, z, None, symmetric)
        size = x.shape[1] if group_size == -1 else group_size
        found = runner.quantize_activation(level, x, size, dtype, symmetric, s, z)
        for name, a, b in zip(("codes", "scales", "zeros"), found, expected, strict=True):
            if b is not None:
                assert a == b.view(torch.uint8).numpy().tobytes(), (level, name, dtype, group_size, symmetric, given)


@_targets(FLOAT_TARGETS)
def test_dequantize_has_the_same_bits(target: Target) -> None:
    runner, level = target
    for kind in KINDS:
        for spec, N, K in _cases(kind):
            weight = random_weight(dataclasses.replace(spec, has_perm=False), N, K)
            assert torch.equal(runner.dequantize(level, weight, desc(weight.spec)), weight.dense()), (level, spec)


@_targets(FLOAT_TARGETS)
def test_rows_are_loaded_exactly(target: Target) -> None:
    """Every 16-bit pattern; gathered, multiplied and padded."""
    runner, level = target
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(1, -1)
    for dtype in (torch.float16, torch.bfloat16):
        values = runner.load(level, patterns.view(dtype), None, None, 65536)
        expected = patterns.view(dtype).float()
        assert torch.equal(values.isnan(), expected.isnan())
        assert torch.equal(values.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32)), dtype
    for dtype in DTYPES:
        for K in (1, 15, 16, 33):
            x, scale = random_x(3, K, dtype=dtype), random_x(K)
            perm = torch.from_numpy(rng(K).permutation(K).astype(np.int32))
            rows = runner.load(level, x, perm, scale, K + 7)
            assert torch.equal(rows[:, :K], (x.float() * scale)[:, perm.long()]), (dtype, K)
            assert not rows[:, K:].any()


@_targets(FLOAT_TARGETS)
def test_rows_are_stored_with_one_rounding(target: Target) -> None:
    """Around every 16-bit value: it, its neighbours in fp32, the ties between two and their neighbours."""
    runner, level = target
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()
        every = every[every.isfinite()].sort().values
        near = torch.cat([every, (every[1:] / 2 + every[:-1] / 2)])
        bits = near.view(torch.int32)
        row = torch.cat([near, (bits + 1).view(torch.float32), (bits - 1).view(torch.float32)])
        row = torch.cat([row, torch.tensor([torch.inf, -torch.inf, torch.nan, 65504.0, 65519.9, 65520.0, 3.4e38])])
        stored, expected = runner.store(level, row, dtype), row.to(dtype)
        assert torch.equal(stored.isnan(), expected.isnan())
        kept = ~expected.isnan()
        assert torch.equal(stored[kept].view(torch.uint16).int(), expected[kept].view(torch.uint16).int()), dtype
    row = random_x(37)
    assert torch.equal(runner.store(level, row, torch.float32), row)
