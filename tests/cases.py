"""The cases that tests and benches run: every format, zero kind, group size, scale dtype and awkward shape.

Built from the library's own tables, so that a new format or kernel is covered, or fails, the moment it exists.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator

import numpy as np
import torch

import reference
from lowbit import _C
from reference import Spec, Weight

ENUMS = _C.enums()
FORMATS = [row["name"] for row in _C.format_table()]
INT_FORMATS = [row["name"] for row in _C.format_table() if row["kind"] == "int"]
ZERO_KINDS = list(ENUMS["zero_kind"])
SCALE_DTYPES = ("float32", "float16", "bfloat16")
GROUP_SIZES = (8, 16, 24, 32, 40, 64, 128, -1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT8, FP8 = ENUMS["format"]["int8"], ENUMS["format"]["fp8_e4m3"]
BATCH_INVARIANT = ENUMS["flags"]["batch_invariant"]

#: (N, K) on every side of what kernels count in: 8, 16, 32, 128.
SHAPES = (
    (1, 1),
    (7, 15),
    (15, 16),
    (16, 7),
    (16, 32),
    (17, 31),
    (31, 33),
    (33, 64),
    (48, 100),
    (64, 128),
    (100, 130),
    (130, 257),
    (144, 384),
)
#: Large enough for every op to be split over threads, also at M = 1 (csrc/cpu/scratch.h: kGrainWork), and ragged.
LARGE = (1030, 520)
#: Rows of x on every side of what kernels count in.
FEW_ROWS = tuple(range(18))
MANY_ROWS = (33, 64, 130, 257)


def _kinds() -> dict[str, tuple[str, str, str]]:
    kinds = {}
    for row in _C.format_table():
        zero_kinds = ZERO_KINDS if row["kind"] == "int" else ["none"]
        for zero_kind in zero_kinds:
            kinds[row["name"] if zero_kind == "none" else f"{row['name']}-{zero_kind}"] = (
                row["name"],
                zero_kind,
                "group",
            )
        if row["name"].startswith("fp8"):
            kinds[f"{row['name']}-block128"] = (row["name"], "none", "block128")
    return kinds


#: name -> (format, zero kind, scaling): everything that changes how a code becomes a weight.
KINDS = _kinds()


#: Those that can make a weight 0: IQ4_NL has no such level.
KINDS_WITH_ZERO = [kind for kind, (format, _, _) in KINDS.items() if 0 in reference.CODES.get(format, (0,))]


def fits(group_size: int, K: int) -> bool:
    """Whether a weight with this K may have the group size."""
    return group_size <= -(-K // 8) * 8


def desc(spec: Spec, layout: int = 0) -> int:
    """The int that ops take."""
    return _C.make_desc(
        ENUMS["format"][spec.format],
        spec.group_size,
        ENUMS["zero_kind"][spec.zero_kind],
        ENUMS["scale_dtype"][spec.scale_dtype],
        ENUMS["scaling"][spec.scaling],
        spec.has_perm,
        layout,
        ENUMS["scale_dtype"][spec.super_dtype],
        spec.super_groups,
    )


def cpu_desc(spec: Spec) -> int:
    """The desc with the layout that CPU kernels read."""
    return desc(spec, _C.preferred_layout("cpu", desc(spec)))


def rng(*key: object) -> np.random.Generator:
    """A generator whose seed is what it is used for, the same in every run."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def generator(*key: object) -> torch.Generator:
    """The same for torch."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def specs(kind: str) -> Iterator[tuple[Spec, int, int]]:
    """(spec, N, K): every group size of the kind on two or three shapes; scale dtypes and perm take turns."""
    format, zero_kind, scaling = KINDS[kind]
    sizes = (128,) * 4 if scaling == "block128" else GROUP_SIZES
    turn = zlib.crc32(kind.encode())
    for i, group_size in enumerate(sizes):
        shapes = [s for s in SHAPES if scaling == "block128" or fits(group_size, s[1])]
        for j in range(3):
            N, K = shapes[(turn + i + 5 * j) % len(shapes)]
            spec = Spec(format, zero_kind, group_size, SCALE_DTYPES[(i + j) % 3], scaling, (turn + i + j) % 3 == 0)
            yield spec, N, K


@functools.lru_cache(maxsize=2048)
def random_weight(spec: Spec, N: int, K: int) -> Weight:
    """Canonical tensors with every code equally likely (finite ones), scales around 1/16 and negative ones among them."""
    r = rng(spec, N, K)
    codes = r.integers(0, 2**spec.bits, (N, K))
    if spec.coded:
        finite = np.flatnonzero(np.isfinite(reference.CODES[spec.format]))
        codes = finite[r.integers(0, len(finite), (N, K))]
    if spec.scale_dtype not in SCALE_DTYPES or spec.scaling == "flat":
        return _random_scales(spec, N, K, codes)
    dtype = reference.DTYPES[spec.scale_dtype]
    shape = spec.scales_shape(N, K)
    top = 57344 if spec.format == "fp8_e5m2" else 448 if spec.format == "fp8_e4m3" else 2**spec.bits
    scales = torch.from_numpy(r.uniform(0.5, 1.5, shape) * r.choice([-1, 1, 1, 1], shape) * 4 / top).to(dtype)
    zeros = None
    if spec.zero_kind == "int":
        zeros = torch.from_numpy(r.integers(0, 2**spec.bits, shape)).to(torch.uint8)
    elif spec.zero_kind == "float":
        zeros = torch.from_numpy(r.uniform(0, 2**spec.bits - 1, shape)).to(dtype)
    elif spec.zero_kind == "offset":
        zeros = torch.from_numpy(r.uniform(-2, 2, shape)).to(dtype)
    perm = torch.from_numpy(r.permutation(K).astype(np.int32)) if spec.has_perm else None
    return Weight(spec, N, K, codes, torch.from_numpy(reference.pack_stream(codes, spec.bits)), scales, zeros, perm)


#: name -> (spec, shapes): scales of one byte, of two levels, and blocks that run across rows.
SCALED: dict[str, tuple[Spec, tuple[tuple[int, int], ...]]] = {
    "mxfp4": (Spec("fp4_e2m1", group_size=32, scale_dtype="e8m0"), ((17, 96), (33, 40))),
    "mxfp8": (Spec("fp8_e4m3", group_size=32, scale_dtype="e8m0", has_perm=True), ((16, 64), (7, 100))),
    "ue8m0": (Spec("fp8_e4m3", group_size=128, scale_dtype="e8m0", scaling="block128"), ((130, 257),)),
    "e4m3": (Spec("fp4_e2m1", group_size=16, scale_dtype="e4m3"), ((33, 64), (15, 40))),
    "int4-e4m3-zeros": (Spec("int4", "int", 48, "e4m3"), ((20, 144), (16, 48))),
    "nvfp4": (
        Spec("fp4_e2m1", group_size=16, scale_dtype="e4m3", scaling="two_level", super_groups=-1),
        ((33, 80), (5, 16)),
    ),
    "q2_k": (Spec("int2", "offset", 16, "uint4", "two_level", False, 16, "float16"), ((17, 512), (5, 272))),
    "q3_k": (Spec("int3", "none", 16, "int6", "two_level", True, 16, "float16"), ((17, 512),)),
    "q4_k": (Spec("int4", "offset", 32, "uint6", "two_level", False, 8, "float16"), ((17, 512), (33, 320))),
    "q5_k": (Spec("int5", "offset", 32, "uint6", "two_level", False, 8, "float16"), ((18, 256),)),
    "q6_k": (Spec("int6", "none", 16, "int8", "two_level", False, 16, "float16"), ((17, 512),)),
    "short": (Spec("int8", "offset", 8, "int8", "two_level", False, 2, "bfloat16"), ((17, 40),)),
    "flat": (Spec("nf4", group_size=64, scaling="flat"), ((20, 128), (20, 80), (35, 200), (9, 33))),
    "nested": (Spec("nf4", "none", 64, "dynamic8", "flat", False, 4), ((40, 192), (33, 128), (40, 112), (11, 51))),
    "nested-all": (Spec("nf4", "none", 32, "dynamic8", "flat", False, -1), ((18, 96), (18, 48))),
}


def scaled() -> list[tuple[str, Spec, int, int]]:
    """(name, spec, N, K) of all of those."""
    return [(name, spec, N, K) for name, (spec, shapes) in SCALED.items() for N, K in shapes]


def _random_scales(spec: Spec, N: int, K: int, codes: np.ndarray) -> Weight:
    """`random_weight` where scales are codes, have a second level, or run on across rows."""
    r = rng("scales", spec, N, K)
    shapes = _C.canonical_shapes(N, K, desc(spec))
    groups, top = spec.groups(K), 448 if spec.format == "fp8_e4m3" else 2**spec.bits

    def entries(shape: tuple[int, ...]) -> torch.Tensor:
        if spec.scale_dtype in SCALE_DTYPES:
            return torch.from_numpy(r.uniform(0.5, 1.5, shape) * 4 / top).to(reference.DTYPES[spec.scale_dtype])
        bits = reference.SCALE_BITS.get(spec.scale_dtype, 8)
        if bits < 8:
            return torch.from_numpy(reference.pack_stream(r.integers(0, 2**bits, (N, groups)), bits))
        low, high = {"e8m0": (110, 126), "e4m3": (8, 0x7F)}.get(spec.scale_dtype, (0, 256))
        stored = torch.from_numpy(r.integers(low, high, shape).astype(np.uint8))
        return stored.view(reference.SCALE_TENSORS.get(spec.scale_dtype, torch.uint8))

    def above(shape: tuple[int, ...] | None, low: float, high: float) -> torch.Tensor | None:
        dtype = reference.DTYPES[spec.super_dtype]
        return None if shape is None else torch.from_numpy(r.uniform(low, high, shape)).to(dtype)

    zeros = None
    if shapes["zeros"] is not None:
        integers = torch.from_numpy(r.integers(0, 2**spec.bits, shapes["zeros"]).astype(np.uint8))
        zeros = integers if spec.zero_kind == "int" else entries(shapes["zeros"])
    perm = torch.from_numpy(r.permutation(K).astype(np.int32)) if spec.has_perm else None
    return Weight(
        spec, N, K, codes, torch.from_numpy(reference.pack_stream(codes, spec.bits)), entries(shapes["scales"]), zeros, perm,
        above(shapes["super_scales"], 0.5 / 64 / top, 2 / 64 / top), above(shapes["super_zeros"], -0.05, 0.05),
    )  # fmt: skip


def with_zero_column(spec: Spec, N: int, K: int, column: int) -> Weight:
    """`random_weight` with W[:, column] = 0, although the codes there are not 0."""
    w = random_weight(spec, N, K)
    codes, scales, zeros = w.codes.copy(), w.scales, w.zeros
    if spec.coded:
        codes[:, column] = int(np.flatnonzero(reference.CODES[spec.format] == 0)[0])
    elif spec.zero_kind == "none":
        codes[:, column] = 2 ** (spec.bits - 1)
    else:
        codes[:, column] = 3
        assert zeros is not None
        if spec.zero_kind == "offset":
            scales = (2.0 ** torch.floor(torch.log2(scales.float().abs()))).to(scales.dtype)
            zeros = (-3 * scales.float()).to(zeros.dtype)
        else:
            zeros = torch.full_like(zeros, 3)
    stream = torch.from_numpy(reference.pack_stream(codes, spec.bits))
    return dataclasses.replace(w, codes=codes, packed=stream, scales=scales, zeros=zeros)


@functools.lru_cache(maxsize=2048)
def dense(spec: Spec, N: int, K: int) -> torch.Tensor:
    """W of `random_weight`, in fp32."""
    return random_weight(spec, N, K).dense()


@functools.lru_cache(maxsize=2048)
def packed(spec: Spec, N: int, K: int) -> torch.Tensor:
    """`random_weight` in the layout of `cpu_desc`."""
    return pack(random_weight(spec, N, K))


def pack(w: Weight) -> torch.Tensor:
    """A weight in the layout of `cpu_desc`."""
    return torch.ops.lowbit.pack(*w.tensors, w.N, w.K, cpu_desc(w.spec), *w.supers)


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gaussian activations."""
    return torch.randn(*shape, generator=generator(shape)).to(dtype)
