"""AMX's kernels on a software model of the tile instructions (tests/amx): the model is right, and so are the kernels.

The numerics tests run over it as over any other instruction set: they are imported, and find the fixture `isa` of this
module. Where the CPU has AMX, they run on the real one as well, in their own modules.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator

import pytest
import torch

import reference
from amx import build
from cases import (
    BATCH_INVARIANT,
    DTYPES,
    INT8,
    INT_FORMATS,
    KINDS,
    ZERO_KINDS,
    cpu_desc,
    dense,
    generator,
    packed,
    random_weight,
    random_x,
)
from cases import pack as pack_weight
from lowbit import _C, ops
from lowbit._selection import explain
from reference import Spec
from test_gemm import (  # noqa: F401 - run here with this module's `isa`
    test_an_outlier_spoils_nothing,
    test_every_number_of_rows,
    test_integers_are_exact,
    test_large_and_small_activations,
    test_one_hot_rows_read_out_the_weight,
    test_representable_weights_need_no_allowance,
    test_within_the_bound,
)
from test_gemm_a8 import (  # noqa: F401
    test_fractional_zeros_near_the_codes,
    test_int8_times_integers_is_exact,
    test_int32_does_not_overflow,
)
from test_gemm_inputs import (  # noqa: F401
    test_every_nan_stays_nan_when_rounded,
    test_infinity_in_x,
    test_nan_in_the_weight_reaches_its_column,
    test_nan_in_x_stays_in_its_row,
    test_strides,
)
from test_gemm_repeatable import (  # noqa: F401
    test_batch_invariant,
    test_neighbours_never_leak_without_the_flag,
    test_same_bits_every_time,
)

pytestmark = pytest.mark.skipif(bool(build.refusal()), reason=build.refusal())


@pytest.fixture(scope="module")
def model() -> Iterator[build.Model]:
    """Registered for the time of this module."""
    loaded = build.Model.load()
    with loaded.registered():
        yield loaded


@pytest.fixture
def isa(model: build.Model) -> Iterator[str]:
    """AMX on the model; a test that misuses a tile fails."""
    before = _C.isa()
    _C.set_isa(build.NAME)
    model.reset()
    yield build.NAME
    _C.set_isa(before)
    assert model.error == ""


# -- the model ---------------------------------------------------------------------------------------------------------

#: Mistakes that model.cpp makes on purpose, and what the model says.
MISTAKES = {
    "no configuration": "tileloadd: this thread has no tile configuration",
    "released": "tdpbf16ps: this thread has no tile configuration",
    "other thread": "tilezero: this thread has no tile configuration",
    "rows": "ldtilecfg: tile 3 has 17 rows of 64 bytes",
    "row bytes": "ldtilecfg: tile 3 has 16 rows of 68 bytes",
    "palette": "ldtilecfg: palette 0 is not 1",
    "tile without rows": "tileloadd: tile 5 is not configured",
    "shapes": "tdpbf16ps: shapes do not fit: sums 16 x 64 bytes, a 16 x 64, b 8 x 64",
    "rows of sums": "tdpbsud: shapes do not fit: sums 8 x 64 bytes, a 16 x 64, b 16 x 64",
    "same tile": "tdpbsud: tiles 0, 1, 1 are not three",
    "not released": "a kernel left its tile configuration loaded",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_finds_mistakes(mistake: str, model: build.Model) -> None:
    model.reset()
    model.c.amx_model_mistake(mistake.encode())
    assert model.error == MISTAKES[mistake]
    model.reset()


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_the_model_multiplies_bf16(model: build.Model) -> None:
    """Pairs of k per lane, fp32 sums; integers are exact, and subnormals are zeros both ways."""
    r = generator("bf16")
    a = torch.randint(-9, 10, (16, 32), generator=r).bfloat16()
    b = torch.randint(-9, 10, (32, 16), generator=r).bfloat16()
    sums = torch.randint(-99, 100, (16, 16), generator=r).float()
    expected = sums + a.float() @ b.float()
    pairs = b.view(16, 2, 16).transpose(1, 2).contiguous()
    model.c.amx_model_multiply(0, _address(a), _address(pairs), _address(sums))
    assert torch.equal(sums, expected)
    for x, w in ((2.0**-130, 2.0**100), (2.0**-70, 2.0**-70)):  # an operand, a product
        a, b = torch.full((16, 32), x).bfloat16(), torch.full((16, 32), w).bfloat16()
        sums = torch.full((16, 16), 2.0**-130)  # and a sum
        model.c.amx_model_multiply(0, _address(a), _address(b), _address(sums))
        assert not sums.any()


def test_the_model_multiplies_int8(model: build.Model) -> None:
    """A signed, B unsigned, quads of k per lane; sums wrap around."""
    r = generator("int8")
    a = torch.randint(-128, 128, (16, 64), generator=r, dtype=torch.int8)
    b = torch.randint(0, 256, (64, 16), generator=r, dtype=torch.uint8)
    sums = torch.randint(-(2**31), 2**31, (16, 16), generator=r).int()
    expected = (sums.long() + a.long() @ b.long()).int()
    quads = b.view(16, 4, 16).transpose(1, 2).contiguous()
    model.c.amx_model_multiply(1, _address(a), _address(quads), _address(sums))
    assert torch.equal(sums, expected)


def test_a_level_that_is_added_is_named_and_never_chosen(model: build.Model) -> None:
    assert build.NAME in _C.isa_levels() and _C.isa_levels()[-1] == "portable"
    assert _C.isa() != build.NAME
    _C.set_isa(build.NAME)
    assert _C.isa() == build.NAME
    _C.set_extra_isa(build.NAME, 0)
    try:
        assert _C.isa() == _C.isa_levels()[0] and build.NAME not in _C.isa_levels()
        with pytest.raises(ValueError, match=f"instruction set '{build.NAME}' is not one that this CPU can run"):
            _C.set_isa(build.NAME)
    finally:
        _C.set_extra_isa(build.NAME, model.c.amx_model_kernels())


# -- which kernel ------------------------------------------------------------------------------------------------------


def _chosen(op: str, M: int, scheme: Spec, dtype: str, device: str = "cpu:amx", invariant: bool = False) -> str:
    answer = explain(
        op, M=M, N=4096, K=4096, scheme=cpu_desc(scheme), device=device, dtype=dtype, batch_invariant=invariant
    )
    assert answer.chosen is not None
    return answer.chosen.removeprefix("cpu_").removesuffix("_" + device.partition(":")[2])


def test_crossovers() -> None:
    """Few rows, some, many; what rounds a weight to bf16 serves bf16 alone."""
    g128, nf4 = Spec("int4", group_size=128), Spec("nf4", group_size=64)
    few = _chosen("gemm", 7, g128, "bfloat16")
    assert not few.startswith("tiles")
    rows = [_chosen("gemm", M, g128, "bfloat16") for M in (8, 95, 96, 1000)]
    assert rows == ["tiles_codes", "tiles_codes", "tiles_bf16", "tiles_bf16"]
    assert _chosen("gemm", 1000, Spec("int8", group_size=-1), "bfloat16") == "tiles_codes"
    assert [_chosen("gemm", M, nf4, "bfloat16") for M in (3, 4)] == ["stream_f32", "tiles_bf16"]
    for dtype in ("float16", "float32"):
        assert _chosen("gemm", 1000, g128, dtype) == "tiles_codes"
        assert _chosen("gemm", 1000, nf4, dtype) == "panel_f32"
    assert [_chosen("gemm_a8", M, g128, "int8") for M in (7, 8)] == ["dot_i8", "tiles_i8"]
    assert _chosen("gemm_a8", 64, g128, "float8_e4m3fn") == "tiles_codes"
    assert _chosen("gemm", 64, Spec("int4", group_size=40), "bfloat16") == "general_f32_portable"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_batch_invariance_takes_one_kernel(kind: str, dtype: str) -> None:
    spec = Spec(KINDS[kind][0], KINDS[kind][1], 128 if "block" in kind else 64, scaling=KINDS[kind][2])
    assert len({_chosen("gemm", M, spec, dtype, invariant=True) for M in (1, 3, 4, 20, 47, 48, 1000)}) == 1


def test_refusals_are_told() -> None:
    """On a machine without AMX: by set_isa, and where explain is asked about the machine."""
    refusals = _C.isa_refusals()
    if not refusals:
        pytest.skip("this machine has AMX")
    with pytest.raises(ValueError, match=r"'amx' is not one that this CPU can run: .*\(amx: "):
        _C.set_isa("amx")
    d = cpu_desc(Spec("int4", group_size=128))
    reasons = dict(_C.explain("gemm", "cpu", 64, 64, 128, d, "bfloat16", 0))
    assert reasons[f"cpu_tiles_bf16_{_C.isa()}"] == f"not built for {_C.isa()}; amx: {refusals['amx']}"


# -- the kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_kind", ZERO_KINDS)
@pytest.mark.parametrize("format", INT_FORMATS)
def test_int8_has_the_bits_of_the_other_instruction_sets(format: str, zero_kind: str, isa: str) -> None:
    """Every group, ragged K, both kinds of activations, more rows than one pass takes."""
    for i, group_size in enumerate((32, 64, 96, 128, -1)):
        N, K = ((33, 264), (48, 100), (16, 416), (130, 257), (100, 576))[i]
        spec = Spec(format, zero_kind, group_size, ("float32", "bfloat16", "float16")[i % 3])
        w = packed(spec, N, K)
        for M, symmetric in ((16, True), (300 if i == 4 else 45, False), (17, False), (33, True)):
            a = ops.quantize_activation(random_x(M, K) + 0.5, INT8, symmetric=symmetric)
            results = []
            for level in (isa, "avx512"):
                _C.set_isa(level)
                results.append(ops.gemm_a8(*a, w, None, N, K, cpu_desc(spec), 0, torch.float32))
            assert torch.equal(*results), (spec, N, K, M, symmetric)


@pytest.mark.parametrize("M", [20, 130, 300])
def test_more_rows_than_a_pass(M: int, isa: str) -> None:
    """One, two and three planes; passes of 256, 128 and 80 rows; both kernels for bf16."""
    for kind, group_size in (("int4", 32), ("int4-int", 128), ("fp8_e4m3-block128", 128), ("nf4", 64), ("int8", -1)):
        format, zero_kind, scaling = KINDS[kind]
        spec = Spec(format, zero_kind, group_size, "bfloat16", scaling)
        for dtype in DTYPES:
            N, K = (50, 300)
            y = ops.gemm(random_x(M, K, dtype=dtype), packed(spec, N, K), None, N, K, cpu_desc(spec))
            unit = reference.UNIT[dtype] if dtype == torch.bfloat16 else 0.0
            expected = reference.product(random_x(M, K, dtype=dtype), dense(spec, N, K), None, unit, dtype)
            reference.assert_close(y, expected, (spec, M, dtype))


def test_large_zeros(isa: str) -> None:
    """Zeros of 255 are legal for four bits: q - zero is exact, and not what the table of small differences says."""
    N, K = 33, 128
    for format in ("int2", "int3", "int4"):
        weight = random_weight(Spec(format, "int", 32), N, K)
        assert weight.zeros is not None
        zeros = weight.zeros.clone()
        zeros[::2] = torch.tensor([15, 16, 17, 255], dtype=torch.uint8)
        weight = dataclasses.replace(weight, zeros=zeros)
        x = random_x(20, K, dtype=torch.float16)
        y = ops.gemm(x, pack_weight(weight), None, N, K, cpu_desc(weight.spec))
        reference.assert_close(y, reference.product(x, weight.dense(), None, 0, torch.float16), format)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float_is_the_sum_of_its_planes(dtype: torch.dtype, isa: str) -> None:
    """A weight of ones reads out x to the last bit, from 2^-100 on and up to the largest."""
    K = 64
    spec = Spec("int4", group_size=32, scale_dtype="float32")
    ones = torch.full((16, K // 2), 0x99, dtype=torch.uint8)
    w = ops.pack(ones, torch.ones(16, 2), None, None, 16, K, cpu_desc(spec))
    bits = torch.randint(-(2**31), 2**31, (20,), generator=generator("planes")).int()
    values = bits.view(torch.float32)
    values = values[values.abs().clamp(2.0**-100) == values.abs()]
    largest = torch.finfo(dtype).max
    x = torch.zeros(len(values) + 5, K, dtype=dtype)
    x[:-5, 7] = values.to(dtype)
    x[-5:, 7] = torch.tensor([largest, -largest, 0.0, torch.inf, 1.0])
    y = ops.gemm(x, w, None, 16, K, cpu_desc(spec))
    assert torch.equal(y, x[:, 7:8].expand(-1, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype, isa: str) -> None:
    spec = Spec("fp8_e4m3", group_size=32)
    N, K = 33, 96
    for M in (8, 20, 100):
        for value in (torch.nan, torch.inf):
            x = random_x(M, K, dtype=dtype)
            x[M // 2, 40] = value
            y = ops.gemm(x, packed(spec, N, K), None, N, K, cpu_desc(spec))
            bad = ~y.isfinite()
            assert torch.equal(bad.all(1), torch.arange(M) == M // 2) and torch.equal(bad.any(1), bad.all(1))


def test_workspace_of_its_size_is_enough(isa: str) -> None:
    for spec in (Spec("int4", "int", 32, has_perm=True), Spec("nf4", group_size=-1), Spec("int8", group_size=96)):
        N, K = 33, 100
        for M in (1, 20, 130, 300):
            size = _C.workspace_size("gemm", M, N, K, cpu_desc(spec))
            for dtype in DTYPES:
                x, out = random_x(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype)
                workspace = torch.full((size,), 0xFF, dtype=torch.uint8)
                ops.gemm_out(x, packed(spec, N, K), None, N, K, cpu_desc(spec), 0, out, workspace)
                assert torch.equal(out, ops.gemm(x, packed(spec, N, K), None, N, K, cpu_desc(spec)))
            a = ops.quantize_activation(random_x(M, K), INT8)
            workspace, out = torch.full((size,), 0xFF, dtype=torch.uint8), torch.empty(M, N)
            ops.gemm_a8_out(*a, packed(spec, N, K), None, N, K, cpu_desc(spec), 0, out, workspace)
            assert out.isfinite().all()


def test_threads_configure_their_own_tiles(isa: str, model: build.Model, threads: None) -> None:
    """Every thread that gets strips loads a configuration, and releases it (the model looks)."""
    N, K = 1030, 512
    spec = Spec("int4", group_size=32)
    x = random_x(33, K, dtype=torch.bfloat16)
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        model.reset()
        results.append(ops.gemm(x, packed(spec, N, K), None, N, K, cpu_desc(spec), BATCH_INVARIANT))
        assert model.counts()["configurations"] == count
    assert torch.equal(*results)


#: (kernel, M, tile multiplications of 32 x 256 weights, loads of tiles): what docs/amx.md counts with. Loads are 4 per
#: 4 multiplications, and 4 more where sums are carried from one panel of K to the next.
COUNTED = [
    ("tiles_codes", 16, 8 * 2, 8 * 3),
    ("tiles_codes", 32, 8 * 4, 8 * 4),
    ("tiles_codes", 64, 8 * 8, 8 * 8),
    ("tiles_bf16", 128, 8 * 16, 8 * 16),
]


@pytest.mark.parametrize(("kernel", "M", "multiplications", "loads"), COUNTED)
def test_counted_tile_instructions(
    kernel: str, M: int, multiplications: int, loads: int, isa: str, model: build.Model
) -> None:
    spec = Spec("int4", group_size=128)
    N, K, panels = 64, 512, 2 * 2
    assert _chosen("gemm", M, spec, "bfloat16", f"cpu:{isa}") == kernel
    ops.gemm(random_x(M, K, dtype=torch.bfloat16), packed(spec, N, K), None, N, K, cpu_desc(spec))
    counts = model.counts()
    assert counts["multiplications"] == panels * multiplications
    carried = M // 16 * 2 * 2 if kernel == "tiles_bf16" else 0
    assert counts["loads"] == panels * loads + carried
    # Sums of a group leave the tiles once; carried ones once a panel.
    assert counts["stores"] == panels * M // 16 * 2 * (1 if kernel == "tiles_bf16" else 2)
