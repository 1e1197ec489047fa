"""What every op must compute, written from the definitions in numpy, without a line of lowbit.

Formats, bit stream and formulas are spelled out a second time on purpose: a mistake in the library cannot hide in a
reference that shares its code. Everything that the contract fixes to the bit (codes, scales, dequantized weights) is
computed in fp32 in the order that the contract gives; products of matrices are computed in fp64.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCALE_TENSORS = {**DTYPES, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}  # others: codes in bytes
SCALE_BITS = {"uint4": 4, "uint6": 6, "int6": 6, "int8": 8, "dynamic8": 8}
BITS = {
    "int2": 2,
    "int3": 3,
    "int4": 4,
    "int5": 5,
    "int6": 6,
    "int8": 8,
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "fp4_e2m1": 4,
    "nf4": 4,
    "iq4_nl": 4,
    "bnb_fp4": 4,
}
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
BNB_FP4 = (-192, -128, -96, -64, -48, -32, -1, 0, 0, 1, 32, 48, 64, 96, 128, 192)  # of 192


def _minifloat(code: int, exponent_bits: int, mantissa_bits: int, special: str) -> float:
    """One code of a small float; special: "ieee" (top exponent: inf, nan), "fn" (all ones: nan) or "none"."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    top = (1 << exponent_bits) - 1
    bias = top >> 1
    if special == "ieee" and exponent == top:
        return sign * np.inf if mantissa == 0 else np.nan
    if special == "fn" and exponent == top and mantissa == (1 << mantissa_bits) - 1:
        return np.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


#: The value of every code of the coded formats, fp32 [2^bits].
CODES: dict[str, np.ndarray] = {
    "fp8_e4m3": np.array([_minifloat(q, 4, 3, "fn") for q in range(256)], np.float32),
    "fp8_e5m2": np.array([_minifloat(q, 5, 2, "ieee") for q in range(256)], np.float32),
    "fp4_e2m1": np.array([_minifloat(q, 2, 1, "none") for q in range(16)], np.float32),
    "nf4": np.array(NF4, np.float32),
    "iq4_nl": np.array(IQ4_NL, np.float32),
    "bnb_fp4": np.array(BNB_FP4, np.float32) / np.float32(192),
}


def exact16(format: str) -> bool:
    """Whether fp16 and bf16 hold every value of a coded format; of integers it is q - zero, which both do."""
    values = torch.from_numpy(CODES.get(format, np.zeros(1, np.float32)))
    return all(
        torch.equal(values.to(dtype).float().nan_to_num(), values.nan_to_num())
        for dtype in (torch.float16, torch.bfloat16)
    )


def _dynamic8() -> np.ndarray:
    """bitsandbytes' dynamic map: in the decade below 10^-i, 2^(6-i) means of neighbours, as torch rounds them."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(values, np.float32))


#: The value of every code that a scale can be.
SCALE_CODES: dict[str, np.ndarray] = {
    "e8m0": np.array([2.0 ** (u - 127) for u in range(255)] + [np.nan], np.float32),
    "e4m3": CODES["fp8_e4m3"],
    "uint4": np.arange(16, dtype=np.float32),
    "uint6": np.arange(64, dtype=np.float32),
    "int6": np.arange(-32, 32, dtype=np.float32),
    "int8": np.arange(-128, 128, dtype=np.float32),
    "dynamic8": _dynamic8(),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a desc says, in words."""

    format: str
    zero_kind: str = "none"
    group_size: int = -1
    scale_dtype: str = "float32"
    scaling: str = "group"
    has_perm: bool = False
    super_groups: int = dataclasses.field(default=0, repr=False)  # repr seeds the random weights
    super_dtype: str = dataclasses.field(default="float32", repr=False)

    @property
    def bits(self) -> int:
        return BITS[self.format]

    @property
    def coded(self) -> bool:
        return self.format in CODES

    def groups(self, K: int) -> int:
        return 1 if self.group_size == -1 else -(-K // self.group_size)

    def scales_shape(self, N: int, K: int) -> tuple[int, int]:
        return (-(-N // 128), -(-K // 128)) if self.scaling == "block128" else (N, self.groups(K))


@dataclasses.dataclass
class Weight:
    """Canonical tensors, and the codes [N, K] in packed column order that they were made from."""

    spec: Spec
    N: int
    K: int
    codes: np.ndarray
    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    super_scales: torch.Tensor | None = None
    super_zeros: torch.Tensor | None = None

    @property
    def supers(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.super_scales, self.super_zeros

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return self.packed, self.scales, self.zeros, self.perm

    def dense(self) -> torch.Tensor:
        """W [N, K] in fp32, as the formulas define it, columns in original order."""
        return dequantize(self)


# -- bit stream --------------------------------------------------------------------------------------------------------


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [N, K] -> uint8 [N, ceil(K * bits / 8)]: bit i of element k is bit k * bits + i of the row."""
    N, K = codes.shape
    stream = (codes[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(N, K * bits).astype(np.uint8), axis=1, bitorder="little")


def unpack_stream(packed: np.ndarray, K: int, bits: int) -> np.ndarray:
    """The inverse: int64 [N, K]."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : K * bits].reshape(len(packed), K, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(-1)


# -- dequantize --------------------------------------------------------------------------------------------------------


def scale_values(stored: torch.Tensor, spec: Spec, count: int) -> np.ndarray:
    """What a tensor of scales (or offsets) holds, in fp32: [rows, count], or flat as it is."""
    if stored.dtype in DTYPES.values():
        return stored.float().numpy()
    codes = stored.view(torch.uint8).numpy()
    if SCALE_BITS.get(spec.scale_dtype, 8) < 8:
        codes = unpack_stream(codes, count, SCALE_BITS[spec.scale_dtype])
    return SCALE_CODES[spec.scale_dtype][codes]


def spread_supers(table: np.ndarray, spec: Spec, N: int, K: int) -> np.ndarray:
    """Entries of the second level -> entries per weight [N, K]."""
    if table.size == 1:
        return np.broadcast_to(table.reshape(1, 1), (N, K))
    if spec.scaling == "flat":
        return table[np.arange(N * K).reshape(N, K) // spec.group_size // spec.super_groups]
    return table[:, np.arange(K) // spec.group_size // spec.super_groups]


def two_levels(w: Weight) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales, and zeros or offsets, per weight [N, K]: every product and sum rounded to fp32."""
    spec, N, K = w.spec, w.N, w.K
    scales = spread(scale_values(w.scales, spec, spec.groups(K)), spec, N, K)
    zeros = None
    if w.zeros is not None:
        table = w.zeros.float().numpy() if spec.zero_kind == "int" else scale_values(w.zeros, spec, spec.groups(K))
        zeros = spread(table, spec, N, K)
    if w.super_scales is not None:
        scales = scales * spread_supers(w.super_scales.float().numpy(), spec, N, K)
    if w.super_zeros is not None:
        supers = spread_supers(w.super_zeros.float().numpy(), spec, N, K)
        if spec.scale_dtype == "dynamic8":
            scales = scales + supers
        else:
            assert zeros is not None
            zeros = zeros * supers
    return scales, zeros


def spread(table: np.ndarray, spec: Spec, N: int, K: int) -> np.ndarray:
    """Entries per group or block -> entries per weight [N, K]."""
    if spec.scaling == "flat":
        return table[np.arange(N * K).reshape(N, K) // spec.group_size]
    if spec.scaling == "block128":
        return table[np.arange(N)[:, None] // 128, np.arange(K)[None, :] // 128]
    return table[:, np.arange(K) // (K if spec.group_size == -1 else spec.group_size)]


def dequantize(w: Weight) -> torch.Tensor:
    """W in fp32: every operation rounded to fp32, in the order of the formula."""
    scales, zeros = two_levels(w)
    with np.errstate(invalid="ignore", over="ignore"):
        if w.spec.coded:
            value = CODES[w.spec.format][w.codes] * scales
        elif w.spec.zero_kind == "none":
            value = (w.codes - 2 ** (w.spec.bits - 1)).astype(np.float32) * scales
        else:
            assert zeros is not None
            q = w.codes.astype(np.float32)
            value = q * scales + zeros if w.spec.zero_kind == "offset" else (q - zeros) * scales
    assert value.dtype == np.float32
    out = torch.from_numpy(np.ascontiguousarray(value))
    if w.perm is not None:
        packed_order, out = out, torch.empty_like(out)
        out[:, w.perm.long()] = packed_order
    return out


# -- quantize (round to nearest) -----------------------------------------------------------------------------------------

#: What absmax goes to: the largest value, or the middle of both ends.
_MAX = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "fp4_e2m1": 6.0, "nf4": 1.0, "iq4_nl": 120.0, "bnb_fp4": 1.0}
_BOOKS = ("nf4", "iq4_nl", "bnb_fp4")  # of levels that ascend
_SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def _stored(value: np.float32, dtype: str) -> np.float32:
    return np.float32(torch.tensor(float(value), dtype=torch.float32).to(DTYPES[dtype]).float().item())


def _stored_scale(value: np.float32, dtype: str) -> np.float32:
    """1 for a group of zeros; never 0 for another."""
    if value == 0:
        return np.float32(1)
    stored = _stored(value, dtype)
    return stored if stored != 0 else np.float32(_SMALLEST[dtype])


def nearest_code(t: np.ndarray, format: str) -> np.ndarray:
    """The code nearest to each value: ties to the even code, in books to the lower level."""
    table = CODES[format].astype(np.float64)
    if format in _BOOKS:
        middles = ((CODES[format][:-1] + CODES[format][1:]) * np.float32(0.5)).astype(np.float64)
        return np.searchsorted(middles, t.astype(np.float64), side="left")
    half = len(table) // 2
    magnitudes = table[:half][np.isfinite(table[:half])]  # ascending
    a = np.abs(t.astype(np.float64))
    above = np.clip(np.searchsorted(magnitudes, a, side="left"), 1, len(magnitudes) - 1)
    below = above - 1
    to_above, to_below = magnitudes[above] - a, a - magnitudes[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.where(up, above, below) + half * np.signbit(t)


def _encode_group(v: np.ndarray, spec: Spec) -> tuple[np.ndarray, np.float32, np.float32 | None]:
    """One group of fp32 values, flat -> (codes, scale, zero or offset)."""
    f32, dtype, top = np.float32, spec.scale_dtype, f32_top(spec)
    low, high = f32(v.min()), f32(v.max())
    if spec.coded:
        limit = f32(_MAX[spec.format])
        if not v.any() and 0 not in CODES[spec.format]:
            return np.zeros(v.shape, np.int64), f32(0), None
        scale = _stored_scale(f32(np.abs(v).max()) / limit, dtype)
        return nearest_code(np.clip(v / scale, -limit, limit), spec.format), scale, None
    if spec.zero_kind == "none":
        scale = _stored_scale(f32(np.abs(v).max()) / f32(2 ** (spec.bits - 1) - 0.5), dtype)
        return np.clip(np.rint(v / scale) + f32(2 ** (spec.bits - 1)), 0, top), scale, None
    if spec.zero_kind == "offset":
        scale, offset = _stored_scale((high - low) / top, dtype), _stored(low, dtype)
        return np.clip(np.rint((v - offset) / scale), 0, top), scale, offset
    low, high = min(low, f32(0)), max(high, f32(0))
    scale = _stored_scale((high - low) / top, dtype)
    if spec.zero_kind == "float":
        zero = _stored(-low / scale, dtype)
        return np.clip(np.rint(v / scale + zero), 0, top), scale, zero
    zero = f32(np.clip(np.rint(-low / scale), 0, top))
    return np.clip(np.rint(v / scale) + zero, 0, top), scale, zero


def f32_top(spec: Spec) -> np.float32:
    """The largest code."""
    return np.float32(2**spec.bits - 1)


def quantize(weight: torch.Tensor, spec: Spec) -> Weight:
    """Round to nearest of a finite W [N, K]."""
    N, K = weight.shape
    values = weight.float().numpy()
    codes = np.zeros((N, K), np.int64)
    scales = np.zeros(spec.scales_shape(N, K), np.float32)
    zeros = np.zeros_like(scales)
    rows = 128 if spec.scaling == "block128" else 1
    columns = 128 if spec.scaling == "block128" else K if spec.group_size == -1 else spec.group_size
    for i in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            part = np.s_[i * rows : (i + 1) * rows, g * columns : (g + 1) * columns]
            code, scales[i, g], zero = _encode_group(values[part].reshape(-1), spec)
            codes[part] = code.reshape(values[part].shape)
            zeros[i, g] = 0 if zero is None else zero
    dtype = DTYPES[spec.scale_dtype]
    third = None
    if spec.zero_kind != "none":
        third = torch.from_numpy(zeros).to(torch.uint8 if spec.zero_kind == "int" else dtype)
    return Weight(
        spec, N, K, codes, torch.from_numpy(pack_stream(codes, spec.bits)), torch.from_numpy(scales).to(dtype), third
    )


# -- activations -------------------------------------------------------------------------------------------------------


def quantize_activation(
    x: torch.Tensor,
    format: str,
    group_size: int = -1,
    scale: float | None = None,
    zero: int | None = None,
    pre_scale: torch.Tensor | None = None,
    symmetric: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x [M, K], finite -> (xq, x_scales, x_zeros)."""
    v = x.float().numpy()
    if pre_scale is not None:
        v = v * pre_scale.numpy()
    M, K = v.shape
    size = K if group_size == -1 else group_size
    G = -(-K // size)
    f32 = np.float32
    xq = np.zeros((M, K), np.float32)
    scales, zeros = np.zeros((M, G), f32), np.zeros((M, 1), np.int32)
    for m in range(M):
        for g in range(G):
            part = v[m, g * size : (g + 1) * size]
            low, high, z = min(part.min(), f32(0)), max(part.max(), f32(0)), f32(0)
            if scale is not None:
                s, z = f32(scale), f32(zero or 0)
            elif symmetric:
                s = np.abs(part).max() / f32(127 if format == "int8" else 448)
            else:
                s = (high - low) / f32(255)
                z = np.clip(np.rint(f32(-128) - low / s), -128, 127) if s > 0 else z
            s = s if s != 0 else f32(1)
            least = -127 if symmetric and scale is None else -128
            q = np.clip(np.rint(part / s) + z, least, 127) if format == "int8" else np.clip(part / s, -448, 448)
            xq[m, g * size : (g + 1) * size] = q
            scales[m, g], zeros[m, 0] = s, int(z)
    if format == "int8":
        codes = torch.from_numpy(xq).to(torch.int8)
    else:
        codes = torch.from_numpy(nearest_code(xq, "fp8_e4m3").astype(np.uint8)).view(torch.float8_e4m3fn)
    return codes, torch.from_numpy(scales), None if symmetric else torch.from_numpy(zeros)


def dequantize_activation(
    xq: torch.Tensor, x_scales: torch.Tensor, x_zeros: torch.Tensor | None, group_size: int = -1
) -> torch.Tensor:
    """(xq - xz) * xs [..., K] in fp64, where it is exact."""
    codes = xq.numpy() if xq.dtype == torch.int8 else CODES["fp8_e4m3"][xq.view(torch.uint8).numpy()]
    value = torch.from_numpy(codes.astype(np.float64))
    if x_zeros is not None:
        value = value - x_zeros.double()
    group = torch.arange(xq.shape[-1]) // (xq.shape[-1] if group_size == -1 else group_size)
    return value * x_scales.double()[..., group]


# -- products ----------------------------------------------------------------------------------------------------------

#: Unit roundoff.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def product(
    x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, weight_unit: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x @ W.T + bias in fp64, and the most that a correct kernel may differ from it, per element.

    With u = 2^-24 and K products: each product and each of the K additions rounds once, the scale of a group and the bias
    once more, and each step of the chain multiplies what came before by 1 + u at most. Hence (K + 4) u sum|x||w|, whatever
    the order. `weight_unit`, the unit roundoff of the dtype that weights may be rounded to, adds its own share;
    then comes one rounding to the output.
    """
    x, W = x.double(), W.double()
    y, size = x @ W.T, x.abs() @ W.abs().T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    within = ((x.shape[-1] + 4) * UNIT[torch.float32] + weight_unit) * size
    return y, within + UNIT[out_dtype] * (y.abs() + within) + _TINY[out_dtype]


def assert_close(y: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor], where: object = "") -> None:
    """Every element within its own bound; the message tells the worst."""
    ref, bound = expected
    assert y.shape == ref.shape, f"{where}: shape {tuple(y.shape)}, not {tuple(ref.shape)}"
    if y.numel() == 0:
        return
    excess = (y.double() - ref).abs() / bound
    excess = torch.where(torch.isnan(excess), torch.inf, excess)
    worst = int(excess.argmax())
    assert excess.max() <= 1, (
        f"{where}: element {worst} of {tuple(y.shape)} is {y.flatten()[worst].item()}, should be "
        f"{ref.flatten()[worst].item()} within {bound.flatten()[worst].item():.3g} ({excess.max().item():.3g} x the bound)"
    )
