"""bitsandbytes: NF4 and FP4 in blocks (QLoRA's checkpoints), and LLM.int8().

    4 bits     weight           u8 [N*K/2, 1]: the weight row by row, the first of two values in the high nibble
               weight.absmax    one per block of `blocksize` values: f32, or u8 where it is quantized once more, and then
                                absmax = nested_quant_map[u8] * nested_absmax[i / nested_blocksize] + nested_offset
               weight.quant_state.bitsandbytes__nf4     JSON: shape, blocksize and more
    LLM.int8   weight i8 [N, K], SCB f32 [N]            w = weight * SCB / 127

Blocks run over the ends of rows; where K is a multiple of the block, and absmax is not quantized, a block is a group of the
canonical weight. An absmax that is quantized stays so, if its code book is bitsandbytes' dynamic map, as it always is: else it is
decoded to fp32, with bitsandbytes' two roundings.

Both books of 4 bits are exact. FP4 is not the E2M1 of other formats but {0, 1, 32, 48, 64, 96, 128, 192} / 192: the format
bnb_fp4, which has its levels in ascending order. Values of LLM.int8, whose scale SCB / 127 is rounded once, agree to 2^-23 of
themselves. The columns that bitsandbytes would run in fp16 when an input is large are not split off: the weight has the same
values either way, and inputs are not quantized here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lowbit import _C, _safetensors
from lowbit._canonical import scale_codes
from lowbit.formats._format import Format, by_method
from lowbit.formats._module import Module, describe
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, kinds_of, plain_tensors
from lowbit.formats._settings import Settings
from lowbit.formats._source import Source
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["FORMAT"]

_STATE: Final = "weight.quant_state.bitsandbytes__"
#: bitsandbytes' name -> the format's.
_KINDS: Final = {"nf4": "nf4", "fp4": "bnb_fp4"}
_NESTED: Final = ("weight.nested_absmax", "weight.nested_quant_map")
_BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MAX_STATE: Final = 1 << 16
_MAX_DIM: Final = 1 << 40
_INT8_TOP: Final = 127

#: Codes in files -> those of the format.
_CODES: Final = {"nf4": tuple(range(16)), "fp4": (8, 9, 14, 15, 12, 13, 10, 11, 7, 6, 1, 0, 3, 2, 5, 4)}


# -- recognising it ----------------------------------------------------------------------------------------------------------


_by_config = by_method("bitsandbytes")


def _by_tensors(source: Source) -> str | None:
    for name in source.tensors:
        if f".{_STATE}" in name:
            return f"there is a tensor {name[:200]}"
        if name.endswith(".SCB"):
            return f"there is a tensor {name[:200]} {describe(source.tensors[name])}"
    return None


def _modules(source: Source) -> Iterator[Module]:
    """Every quantized layer, with all tensors under its name: "weight", "bias", "SCB", "weight.absmax", ...."""
    names: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        match = re.fullmatch(r"(.+?)\.(weight\.[^.]+|weight\.quant_state\.[^.]+|[^.]+)", name, re.DOTALL)
        if match is not None:
            names.setdefault(match[1], {})[match[2]] = name
    for path, leaves in names.items():
        if "SCB" in leaves or "weight.absmax" in leaves or any(leaf.startswith(_STATE) for leaf in leaves):
            yield Module(source, path, leaves)


# -- plan --------------------------------------------------------------------------------------------------------------------


def _plan(source: Source, settings: list[Settings]) -> Plan:
    layers: dict[str, PlannedLinear] = {}
    for module in _modules(source):
        eight = "SCB" in module
        for one in settings:
            other = "load_in_4bit" if eight else "load_in_8bit"
            if _by_config(one) and one.boolean(other, False):
                raise module.fail(f"holds {8 if eight else 4} bits, but {one.where} says {other}")
        layers[module.path] = _planned_8bit(module) if eight else _planned_4bit(module)
    return Plan(str(source.path), FORMAT.name, kinds_of(layers), layers, plain_tensors(source, layers.values()))


def _planned_8bit(module: Module) -> PlannedLinear:
    weight = module.check("weight", (torch.int8,), None)
    N, K = weight.shape
    module.positive(N, K)
    module.check("SCB", (torch.float32,), (N,))
    leaves = ("weight", "SCB", "weight_format", "bias")
    module.only(leaves)
    if "weight_format" in module:
        module.check("weight_format", (torch.uint8,), (), (1,))
    module.check_bias(N)

    def read() -> LinearRecord:
        if "weight_format" in module and (order := int(module.read("weight_format").reshape(-1)[0])) != 0:
            raise ValueError(f"weight_format is {order}: only 0, rows in order, is read")
        packed = module.read("weight").view(torch.uint8) ^ 0x80  # two's complement to excess 128
        scales = (module.read("SCB") / _INT8_TOP).unsqueeze(1)
        scheme = Scheme("int8", scale_dtype="float32")
        weight = QuantizedWeight.from_tensors({"packed": packed, "scales": scales}, scheme, (N, K))
        return LinearRecord(weight, module.bias())

    return module.planned((N, K), "LLM.int8", leaves, read)


class _State(NamedTuple):
    """What the JSON beside a weight of 4 bits says."""

    kind: str
    N: int
    K: int
    block: int
    nested_block: int | None
    nested_offset: float


def _planned_4bit(module: Module) -> PlannedLinear:
    state = _read_state(module)
    N, K = state.N, state.K
    if K % 2:
        raise module.fail(f"K={K} is odd: a byte would hold weights of two rows")
    weight = module.info("weight")  # uint8, or another dtype that the bytes are kept in (quant_storage)
    if weight.nbytes != N * K // 2:
        raise module.fail(f"weight is {describe(weight)}, {weight.nbytes} bytes; N={N}, K={K} takes {N * K // 2}")
    blocks = -(-N * K // state.block)
    module.check("weight.quant_map", (torch.float32,), (16,))
    leaves = ["weight", "weight.absmax", "weight.quant_map", f"{_STATE}{state.kind}", "bias"]
    if state.nested_block is None:
        module.check("weight.absmax", (torch.float32,), (blocks,))
    else:
        module.check("weight.absmax", (torch.uint8,), (blocks,))
        module.check("weight.nested_absmax", (torch.float32,), (-(-blocks // state.nested_block),))
        module.check("weight.nested_quant_map", (torch.float32,), (256,))
        leaves += _NESTED
    module.only(leaves)
    module.check_bias(N)

    def read() -> LinearRecord:
        return LinearRecord(_read_4bit(module, state), module.bias())

    nested = "" if state.nested_block is None else ", absmax quantized"
    return module.planned((N, K), f"{state.kind}, blocks of {state.block}{nested}", leaves, read)


def _read_state(module: Module) -> _State:
    found = sorted(leaf for leaf in module.names if leaf.startswith(_STATE))
    if len(found) != 1:
        raise module.fail(
            f"has {', '.join(sorted(module.names))[:200]}; it must have one quant_state, not {len(found)}"
        )
    kind = found[0].removeprefix(_STATE)
    if kind not in _KINDS:
        raise module.fail(f"is quantized to {kind[:40]!r}, which is not read; {' and '.join(_KINDS)} are")
    info = module.info(found[0])
    if info.dtype != torch.uint8 or len(info.shape) != 1 or info.nbytes > _MAX_STATE:
        raise module.fail(f"{found[0]} is {describe(info)}, it must be the U8 bytes of a JSON text")
    where = f"{module.source.path}: {module.names[found[0]][:200]}"
    settings = Settings(_safetensors.parse_json(bytes(module.read(found[0]).tolist()), where), where)
    if settings.text("quant_type", kind) != kind:
        raise settings.fail("quant_type", repr(kind))
    shape = settings.values.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_size(size) for size in shape):
        raise settings.fail("shape", "[N, K]")
    nested = "nested_blocksize" in settings
    if nested != ("weight.nested_absmax" in module):
        raise module.fail("nested_blocksize and nested_absmax have to be there together")
    if not nested:
        return _State(kind, shape[0], shape[1], settings.integer("blocksize", _BLOCK_SIZES), None, 0.0)
    if settings.text("nested_dtype", "float32") != "float32":
        raise settings.fail("nested_dtype", "'float32'")
    offset = settings.values.get("nested_offset")
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise settings.fail("nested_offset", "a finite number")
    sizes = settings.integer("blocksize", _BLOCK_SIZES), settings.integer("nested_blocksize", _BLOCK_SIZES)
    return _State(kind, shape[0], shape[1], *sizes, offset)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_DIM


# -- values ------------------------------------------------------------------------------------------------------------------


def _read_4bit(module: Module, state: _State) -> QuantizedWeight:
    _check_book(module.read("weight.quant_map"), state.kind)
    raw = module.read("weight").reshape(-1).view(torch.uint8)
    tensors, scheme = _nested_absmax(module, state) if _is_dynamic(module, state) else _plain_absmax(module, state)
    return QuantizedWeight.from_tensors({"packed": _codes(raw, state), **tensors}, scheme, (state.N, state.K))


def _codes(raw: Tensor, state: _State) -> Tensor:
    """Two codes in a byte, the first in the low nibble: [N, K/2]."""
    codes = torch.tensor(_CODES[state.kind], dtype=torch.uint8)
    byte = torch.arange(256)
    swapped = codes[byte >> 4] | (codes[byte & 15] << 4)
    return swapped.index_select(0, raw.int()).view(state.N, -1)


def _is_dynamic(module: Module, state: _State) -> bool:
    """Whether absmax is quantized by the code book that scales can have."""
    if state.nested_block is None:
        return False
    return torch.equal(module.read("weight.nested_quant_map"), torch.tensor(scale_codes("dynamic8")))


def _nested_absmax(module: Module, state: _State) -> tuple[dict[str, Tensor], Scheme]:
    """absmax as it is stored."""
    assert state.nested_block is not None
    return {
        "scales": module.read("weight.absmax"),
        "super_scales": module.read("weight.nested_absmax"),
        "scale_offset": torch.tensor([state.nested_offset], dtype=torch.float32),
    }, Scheme(_KINDS[state.kind], state.block, "none", "dynamic8", "flat", super_groups=state.nested_block)


def _plain_absmax(module: Module, state: _State) -> tuple[dict[str, Tensor], Scheme]:
    """absmax in fp32."""
    scales, format = _read_absmax(module, state), _KINDS[state.kind]
    if state.K % state.block == 0:
        return {"scales": scales.reshape(state.N, -1)}, Scheme(format, state.block, scale_dtype="float32")
    return {"scales": scales}, Scheme(format, state.block, scale_dtype="float32", scaling="flat")


def _check_book(book: Tensor, kind: str) -> None:
    levels = torch.tensor(next(row["code"] for row in _C.format_table() if row["name"] == _KINDS[kind]))
    if not torch.equal(book, levels[list(_CODES[kind])]):
        raise ValueError(f"quant_map is {book.tolist()}, not the code book of {kind}")


def _read_absmax(module: Module, state: _State) -> Tensor:
    absmax = module.read("weight.absmax")
    if state.nested_block is None:
        return absmax
    factors = module.read("weight.nested_absmax").repeat_interleave(state.nested_block)[: absmax.numel()]
    return module.read("weight.nested_quant_map")[absmax.long()] * factors + state.nested_offset


FORMAT = Format("bitsandbytes", "NF4, FP4 and LLM.int8 of bitsandbytes", _by_config, _by_tensors, _plan)
