"""Scheme: how a weight, and optionally its input, is quantized.

The string form is the one used everywhere: on the command line, in `overrides`, in manifests.

    scheme      = ( format | named ) { "-" option } options in any order, each at most once
    format      = int2 | int3 | int4 | int5 | int6 | int8 | fp8 | fp8_e5m2 | fp4 | nf4 | iq4_nl | bnb_fp4
                  (fp8 is short for fp8_e4m3, fp4 for fp4_e2m1; bnb_fp4 is what bitsandbytes calls FP4)
    named       = mxfp4 | mxfp8                     OCP MX: fp4-g32-e8m0, fp8-g32-e8m0
                | nvfp4                             fp4-g16-e4m3-xfp32
    option      = groups | flat | zero | scale | super | activation | rounding
    groups      = "g" INT                           one scale per INT weights along K, a multiple of 8
                | "b128"                            one scale per 128 x 128 block (fp8 formats only)
                                                    neither: one scale per row
    flat        = "flat"                            groups run on across the ends of rows (bitsandbytes)
    zero        = "asym"                            integer zeros:        w = (q - zero) * scale
                | "fzero"                           fractional zeros:     w = (q - zero) * scale
                | "offset"                          scale and offset:     w = q * scale + offset
                                                    none: symmetric       (integer formats only)
    scale       = "fp32" | "fp16" | "bf16"          dtype of scales; by default bf16 for groups, else fp32
                | "e8m0" | "e4m3"                   powers of two; fp8
                | "u4" | "u6" | "i6" | "i8"         integers under a second scale (K-quants of GGUF)
                | "dyn8"                            bitsandbytes' dynamic code book, under a second scale
    super       = "x" [INT] dtype                   a second scale, fp32, fp16 or bf16, for INT scales, or for all of them
    activation  = "a8"                              8-bit inputs of the kind that goes with the format (below)
                | "aint8" | "aint8_asym"            int8 per token, dynamic
                | "aint8_static" | "aint8_static_asym"      int8 with one calibrated scale
                | "afp8" | "afp8_g128"              fp8 per token; per 1 x 128 group
                | "afp8_static"                     fp8 with one calibrated scale
                                                    none: inputs stay fp32, bf16 or fp16
    rounding    = "rtn" | "search"                  absmax/min-max, or the scale of least squared error;
                                                    by default search below 8 bits, rtn at 8

"a8" means int8 for integer formats, fp8_g128 for "b128", fp8 for the other coded formats. `str(scheme)` is
canonical: names where there are any, options in the order above and defaults left out, so that equal schemes have equal strings.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Final

import torch

from lowbit import _C
from lowbit._checks import packed_shape, parse, tables

__all__ = ["ACTIVATIONS", "PRESETS", "FormatInfo", "Scheme", "format_info"]

# Nothing below 8 is a whole number of bytes at every bit width, and every kernel reads at least 8 codes at once.
_GROUP_MULTIPLE: Final = 8
_BLOCK: Final = 128

_ALIASES: Final = {"fp8": "fp8_e4m3", "fp4": "fp4_e2m1"}
_SHORT: Final = {full: short for short, full in _ALIASES.items()}
_ZERO_TOKENS: Final = {"asym": "int", "fzero": "float", "offset": "offset"}
_FLOAT_TOKENS: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_CODE_TOKENS: Final = {"u4": "uint4", "u6": "uint6", "i6": "int6", "i8": "int8", "dyn8": "dynamic8"}
_SCALE_TOKENS: Final = {**_FLOAT_TOKENS, "e8m0": "e8m0", "e4m3": "e4m3", **_CODE_TOKENS}
_SCALINGS: Final = ("group", "block128", "two_level", "flat")
_NAMED: Final = {"mxfp4": "fp4-g32-e8m0", "mxfp8": "fp8-g32-e8m0", "nvfp4": "fp4-g16-e4m3-xfp32"}

#: Accepted values of `Scheme.activation`, besides None.
ACTIVATIONS: Final = ("int8", "int8_asym", "int8_static", "int8_static_asym", "fp8", "fp8_g128", "fp8_static")

#: Schemes worth trying first, and what each is good for. Every string that parses is allowed, not only these.
PRESETS: Final[Mapping[str, str]] = {
    "int8": "8-bit integers, one scale per row: the safe default, no visible loss",
    "int8-a8": "8-bit weights and inputs: fastest for large batches on int8 hardware",
    "fp8": "8-bit floats, one scale per row",
    "fp8-a8": "fp8 weights and inputs, per row and per token",
    "fp8-b128-a8": "fp8 in 128 x 128 blocks with 1 x 128 inputs (DeepSeek style)",
    "int6-g64": "6-bit integers: close to int8 at three quarters of the size",
    "int4-g128": "4-bit integers in groups of 128: the usual choice for large models",
    "int4-g32": "4-bit integers in groups of 32: for small models, where 128 costs accuracy",
    "int4-g32-asym": "as int4-g32 with integer zeros, for one-sided weights",
    "int4-g128-a8": "4-bit weights with int8 inputs",
    "nf4-g64": "4-bit codes placed for normally distributed weights (QLoRA)",
    "fp4-g32": "4-bit floats (E2M1) in groups of 32",
    "mxfp4": "4-bit floats with a power of two per 32 (OCP MX)",
    "nvfp4": "4-bit floats with an fp8 scale per 16, under one scale per weight",
    "int3-g64-offset": "3-bit integers with scale and offset",
    "int2-g32-offset": "2-bit integers with scale and offset: smallest, with a visible loss",
}


@dataclasses.dataclass(frozen=True)
class FormatInfo:
    """One row of the format table: its id in `desc`, its name, bits per weight, and kind ("int" or "code").

    Example:
        >>> format_info("fp8").bits
        8
    """

    id: int
    name: str
    bits: int
    kind: str


@functools.cache
def _formats() -> dict[str, FormatInfo]:
    rows = _C.format_table()
    return {row["name"]: FormatInfo(row["id"], row["name"], row["bits"], row["kind"]) for row in rows}


@functools.cache
def _enums() -> dict[str, dict[str, int]]:
    return _C.enums()


def format_info(name: str) -> FormatInfo:
    """The row of the format table called `name`; the short names "fp8" and "fp4" are understood.

    Raises:
        ValueError: there is no such format.

    Example:
        >>> format_info("nf4").kind
        'code'
    """
    info = _formats().get(_ALIASES.get(name, name))
    if info is None:
        known = [_SHORT.get(n, n) for n in _formats()]
        near = difflib.get_close_matches(name.replace("_", "-"), [*known, *PRESETS], 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown format {name!r}; the formats are {', '.join(known)}{meant}")
    return info


def _default_scale_dtype(group_size: int, scaling: str) -> str:
    # bf16 has the exponent range of fp32: a scale cannot overflow or vanish in it, as it can in fp16. Its 8-bit
    # significand costs nothing, because codes are computed against the rounded scale. A scale per row or per block is
    # so rare that fp32 is free.
    return "bfloat16" if group_size != -1 and scaling == "group" else "float32"


def _dtype_name(name: object) -> str:
    """torch.bfloat16 and "bf16" are accepted as well."""
    text = str(name).removeprefix("torch.")
    return _SCALE_TOKENS.get(text, text)


def _default_activation(kind: str, scaling: str) -> str:
    if kind == "int":
        return "int8"
    return "fp8_g128" if scaling == "block128" else "fp8"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How to quantize a weight W[N, K], and optionally the input x[..., K] it multiplies. Immutable and hashable.

    Args:
        format: element format: int2 int3 int4 int5 int6 int8 fp8 (= fp8_e4m3) fp8_e5m2 fp4 (= fp4_e2m1) nf4 iq4_nl bnb_fp4.
        group_size: weights along K that share a scale; a multiple of 8, or -1 for all of K.
        zero_kind: "none" (symmetric), "int", "float" or "offset"; integer formats only.
        scale_dtype: "float32", "float16", "bfloat16", "e8m0" or "e4m3"; under a second scale also "uint4", "uint6", "int6",
            "int8" or "dynamic8". By default bfloat16 for groups, else float32.
        scaling: "group"; "block128" for one scale per 128 x 128 block (fp8 formats only; group_size is then 128); "flat" for
            groups that run across the ends of rows; "two_level", which super_groups implies, for scales of scales.
        activation: None, or one of `ACTIVATIONS`: the input is quantized too, and the product is 8-bit by b-bit.
        search: find the scale of least squared error instead of rounding to nearest with the absmax scale; by default
            only below 8 bits, where it pays. It decides how codes are made, not how they are stored.
        super_groups: scales that share a scale of their own: a power of two, -1 for all of the weight, 0 for none.
        super_dtype: dtype of that: "float32" (by default), "float16" or "bfloat16".

    Raises:
        ValueError: a value is unknown, or the combination has no meaning; the message holds the values.

    Example:
        >>> Scheme("int4", group_size=128)
        Scheme('int4-g128')
        >>> Scheme.parse("int4-g32-asym").zero_kind
        'int'
    """

    format: str
    group_size: int = -1
    zero_kind: str = "none"
    scale_dtype: str | None = None
    scaling: str = "group"
    activation: str | None = None
    search: bool | None = None
    super_groups: int = 0
    super_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("format", "zero_kind", "scaling"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Scheme.{name} must be a string, got {getattr(self, name)!r}")
        info = format_info(self.format)
        fill = functools.partial(object.__setattr__, self)  # the dataclass is frozen
        fill("format", info.name)
        for name in ("group_size", "super_groups"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Scheme.{name} must be an int, got {value!r}")
        if self.super_groups != 0 and self.scaling == "group":
            fill("scaling", "two_level")
        if self.scaling == "block128" and self.group_size == -1:
            fill("group_size", _BLOCK)  # a block is 128 wide
        if self.scale_dtype is None:
            fill("scale_dtype", _default_scale_dtype(self.group_size, self.scaling))
        else:
            fill("scale_dtype", _dtype_name(self.scale_dtype))
        fill("super_dtype", "float32" if self.super_dtype is None else _dtype_name(self.super_dtype))
        if self.activation is not None:
            if not isinstance(self.activation, str):
                raise TypeError(f"Scheme.activation must be a string or None, got {self.activation!r}")
            fill("activation", self.activation.replace("-", "_"))
        if self.search is None:
            fill("search", info.bits < 8)
        elif not isinstance(self.search, bool):
            raise TypeError(f"Scheme.search must be a bool, got {self.search!r}")
        self._check(info)

    def _check(self, info: FormatInfo) -> None:
        if self.group_size != -1 and (self.group_size < _GROUP_MULTIPLE or self.group_size % _GROUP_MULTIPLE):
            raise ValueError(f"group_size={self.group_size} is neither -1 nor a positive multiple of {_GROUP_MULTIPLE}")
        if self.group_size >= 1 << 24:  # the width of its field in desc
            raise ValueError(f"group_size={self.group_size} is too large; use -1 for all of K")
        if self.zero_kind not in ("none", "int", "float", "offset"):
            raise ValueError(f"unknown zero_kind {self.zero_kind!r}; it is none, int, float or offset")
        if self.zero_kind != "none" and info.kind != "int":
            raise ValueError(f"zero_kind={self.zero_kind!r} needs an integer format; {info.name} is a coded format")
        if self.scale_dtype not in _SCALE_TOKENS.values():
            known = ", ".join(_SCALE_TOKENS.values())
            raise ValueError(f"scale_dtype {self.scale_dtype!r} is not supported; it is one of {known}")
        if self.super_dtype not in _FLOAT_TOKENS.values():
            known = ", ".join(_FLOAT_TOKENS.values())
            raise ValueError(f"super_dtype {self.super_dtype!r} is not supported; it is one of {known}")
        if self.scaling not in _SCALINGS:
            raise ValueError(f"scaling {self.scaling!r} is not supported; it is one of {', '.join(_SCALINGS)}")
        if self.scaling == "block128" and not info.name.startswith("fp8"):
            raise ValueError(f"scaling='block128' needs an fp8 format, not {info.name}")
        if self.scaling == "block128" and self.group_size != _BLOCK:
            raise ValueError(f"scaling='block128' means group_size={_BLOCK}, got {self.group_size}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; it is None or one of {', '.join(ACTIVATIONS)}")
        self.desc()  # what is left: which scales, zeros and scalings go together

    # -- derived ------------------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return format_info(self.format).bits

    @property
    def symmetric(self) -> bool:
        """True when there are neither zeros nor offsets."""
        return self.zero_kind == "none"

    @property
    def activation_format(self) -> str | None:
        """Element format of the quantized input: "int8", "fp8_e4m3", or None when inputs are not quantized."""
        if self.activation is None:
            return None
        return "int8" if self.activation.startswith("int8") else "fp8_e4m3"

    @property
    def activation_group_size(self) -> int:
        """Inputs that share an activation scale: 128, or -1 for the whole row."""
        return 128 if self.activation == "fp8_g128" else -1

    @property
    def activation_static(self) -> bool:
        """True when the input scale is calibrated beforehand instead of computed per token."""
        return self.activation is not None and "static" in self.activation

    @property
    def activation_symmetric(self) -> bool:
        """True unless inputs carry a zero point."""
        return self.activation is None or "asym" not in self.activation

    def same_storage(self, other: Scheme) -> bool:
        """Whether tensors of the two schemes mean the same; `search` and `activation` do not matter."""
        mine, theirs = (dataclasses.replace(s, search=False, activation=None) for s in (self, other))
        return mine == theirs

    def check_quantizable(self) -> None:
        """Raise ValueError where weights of this scheme are read from files only, and nothing here makes them.

        Example:
            >>> Scheme.parse("nvfp4").check_quantizable()
        """
        one = self.super_groups == 0 or (self.super_groups == -1 and self.super_dtype == "float32")
        if self.scaling == "flat" or self.scale_dtype in _CODE_TOKENS.values() or not one:
            raise ValueError(
                f"scheme {self} is read from checkpoints and not made: there is no quantizer for its scales; "
                "nvfp4 and mxfp4 have scales of one byte"
            )

    # -- the int that ops take ------------------------------------------------------------------------------------------

    def desc(self, layout: int = 0, has_perm: bool = False) -> int:
        """The int that ops take: format, zero kind, scale dtype, scaling, perm, layout and group_size in one.

        Args:
            layout: value of the layout enum; 0 is the canonical one.
            has_perm: the weight carries a column permutation.

        Example:
            >>> torch.ops.lowbit.dequantize(packed, scales, None, None, N, K, scheme.desc(), torch.float32)
        """
        return _desc(self, layout, has_perm)

    @classmethod
    def from_desc(cls, desc: int) -> Scheme:
        """The scheme stored in a desc; `activation` and `search` are not in it and take their defaults."""
        fields = _C.parse_desc(desc)
        enums = _enums()
        by_value = {kind: {value: name for name, value in enums[kind].items()} for kind in enums}
        scaling = by_value["scaling"][fields["scaling"]]
        return cls(
            format=by_value["format"][fields["format"]],
            group_size=fields["group_size"],
            zero_kind=by_value["zero_kind"][fields["zero_kind"]],
            scale_dtype=by_value["scale_dtype"][fields["scale_dtype"]],
            scaling=scaling,
            super_groups=fields["super_groups"],
            super_dtype=by_value["scale_dtype"][fields["super_dtype"]],
        )

    def check_shape(self, N: int, K: int) -> None:
        """Raise ValueError, with the values, if a weight [N, K] cannot be stored in this scheme."""
        if N < 1 or K < 1:
            raise ValueError(f"a weight needs N >= 1 and K >= 1, got N={N}, K={K}")
        limit = -(-K // _GROUP_MULTIPLE) * _GROUP_MULTIPLE
        if self.group_size > limit and self.scaling in ("group", "two_level"):
            raise ValueError(
                f"group_size={self.group_size} is larger than K={K}; use at most {limit}, or -1 for all of K"
            )

    def bits_per_weight(self, N: int, K: int) -> float:
        """Stored bits per weight of W[N, K], scales and zeros included.

        Example:
            >>> Scheme.parse("int4-g128").bits_per_weight(4096, 4096)
            4.125
        """
        return self.nbytes(N, K) * 8 / (N * K)

    def nbytes(self, N: int, K: int) -> int:
        """Bytes of the canonical tensors of W[N, K] (without perm)."""
        self.check_shape(N, K)
        d = parse(self.desc())
        packed = packed_shape(N, K, d)
        tensors = [(packed, torch.uint8), *(spec for spec in tables(N, K, d) if spec is not None)]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)

    # -- text and JSON ------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        info = format_info(self.format)
        parts = [_SHORT.get(self.format, self.format)]
        if self.scaling == "block128":
            parts.append("b128")
        elif self.group_size != -1:
            parts.append(f"g{self.group_size}")
        if self.scaling == "flat":
            parts.append("flat")
        parts += [token for token, kind in _ZERO_TOKENS.items() if kind == self.zero_kind]
        if self.scale_dtype != _default_scale_dtype(self.group_size, self.scaling):
            parts += [token for token, name in _SCALE_TOKENS.items() if name == self.scale_dtype]
        if self.super_groups != 0:
            every = "" if self.super_groups == -1 else self.super_groups
            parts += [f"x{every}{token}" for token, name in _FLOAT_TOKENS.items() if name == self.super_dtype]
        if self.activation is not None:
            short = self.activation == _default_activation(info.kind, self.scaling)
            parts.append("a8" if short else f"a{self.activation}")
        if self.search != (info.bits < 8):
            parts.append("search" if self.search else "rtn")
        text = "-".join(parts)
        for name, meaning in _NAMED.items():
            if f"{text}-".startswith(f"{meaning}-"):
                return name + text[len(meaning) :]
        return text

    def __repr__(self) -> str:
        return f"Scheme({str(self)!r})"

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """The scheme written as `text` (grammar at the head of this module); a Scheme is returned as it is.

        Raises:
            ValueError: with the option that was not understood.

        Example:
            >>> str(Scheme.parse("FP8_E4M3-a8"))
            'fp8-a8'
        """
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise TypeError(f"a scheme is a Scheme or a string such as 'int4-g128', got {text!r}")
        head, *options = text.strip().lower().split("-")
        head, *implied = _NAMED.get(head, head).split("-")
        options = [*implied, *options]
        info = format_info(head)
        found: dict[str, Any] = {}
        for option in options:
            key, value = _parse_option(option, text)
            if key in found:
                raise ValueError(f"scheme {text!r} says {key} twice")
            found[key] = value
        scaling = "block128" if found.get("groups") == "b128" else "flat" if "flat" in found else "group"
        super_groups, super_dtype = found.get("super", (0, None))
        if found.get("activation") == "8":
            found["activation"] = _default_activation(info.kind, scaling)
        return cls(
            format=info.name,
            group_size=-1 if found.get("groups") == "b128" else found.get("groups", -1),
            zero_kind=found.get("zero", "none"),
            scale_dtype=found.get("scale"),
            scaling=scaling,
            activation=found.get("activation"),
            search=found.get("rounding"),
            super_groups=super_groups,
            super_dtype=super_dtype,
        )

    def to_dict(self) -> dict[str, str | int | bool | None]:
        """Every field, as plain JSON values.

        Example:
            >>> Scheme.from_dict(scheme.to_dict()) == scheme
            True
        """
        fields = dataclasses.asdict(self)
        if self.super_groups == 0:  # as it was written before there was a second level
            del fields["super_groups"], fields["super_dtype"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Scheme:
        """The inverse of `to_dict`; missing fields take their defaults, unknown ones are refused.

        Raises:
            ValueError: an unknown field or value.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"a scheme must be a JSON object, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(str(key) for key in fields if key not in known)
        if unknown or "format" not in fields:
            raise ValueError(f"unknown scheme fields {unknown}" if unknown else "a scheme needs a format")
        try:
            return cls(**fields)
        except TypeError as error:  # a value of the wrong JSON type
            raise ValueError(str(error)) from None


def _parse_option(option: str, text: str) -> tuple[str, Any]:
    if match := re.fullmatch(r"g([0-9]{1,9})", option):
        return "groups", int(match[1])
    if option == "b128":
        return "groups", option
    if option == "flat":
        return "flat", option
    if match := re.fullmatch(r"x([1-9][0-9]{0,4}|)(fp32|fp16|bf16)", option):
        return "super", (int(match[1] or -1), match[2])
    if option in _ZERO_TOKENS:
        return "zero", _ZERO_TOKENS[option]
    if option in _SCALE_TOKENS:
        return "scale", _SCALE_TOKENS[option]
    if option in ("rtn", "search"):
        return "rounding", option == "search"
    if option == "a8" or (option[:1] == "a" and option[1:] in ACTIVATIONS):
        return "activation", option[1:]
    raise ValueError(
        f"scheme {text!r}: option {option!r} is not one of g<size>, b128, flat, {', '.join(_ZERO_TOKENS)}, "
        f"{', '.join(_SCALE_TOKENS)}, x<scales>fp32, x<scales>fp16, x<scales>bf16, a8, "
        f"{', '.join('a' + a for a in ACTIVATIONS)}, rtn, search"
    )


@functools.lru_cache(maxsize=1024)
def _desc(scheme: Scheme, layout: int, has_perm: bool) -> int:
    enums = _enums()
    return _C.make_desc(
        enums["format"][scheme.format],
        scheme.group_size,
        enums["zero_kind"][scheme.zero_kind],
        enums["scale_dtype"][str(scheme.scale_dtype)],
        enums["scaling"][scheme.scaling],
        has_perm,
        layout,
        enums["scale_dtype"][str(scheme.super_dtype)],
        scheme.super_groups,
    )
