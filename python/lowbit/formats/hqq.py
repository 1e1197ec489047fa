"""HQQ: what HQQLinear.state_dict() holds, which Transformers 4 saved as safetensors.

    W_q         codes of W seen as [R, g] (g: group_size, R = N*K/g), packed along R: of 4 bits the first half of the rows is
                in the high nibbles, of 2 bits in quarters likewise, of 3 bits ten tenths in one int32, first in bits 27-29;
                5, 6 and 8 bits in a byte each. With view_as_float the same bytes are called a float tensor
    scale, zero [R, 1]          W = (q - zero) * scale; zero is any number
    nbits, group_size, shape, axis, packing, ...        numbers and names, as small tensors

Values are exact in fp32; HQQ itself rounds twice in compute_dtype.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from lowbit.errors import ArtifactError
from lowbit.formats._bits import pack_codes
from lowbit.formats._codes import group_about, integer_weight
from lowbit.formats._format import Format, by_method
from lowbit.formats._module import SCALE_DTYPES, Module, describe, modules, scale_name
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, kinds_of, plain_tensors
from lowbit.formats._settings import Settings
from lowbit.formats._source import Source
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["FORMAT"]

# Name of a packing -> dtype of words, and where in a word the rows of each part are, first part first.
_PACKINGS: Final[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "8bit_u8": (torch.uint8, (0,)),
    "4bit_u8": (torch.uint8, (4, 0)),
    "2bit_u8": (torch.uint8, (6, 4, 2, 0)),
    "3bit_32": (torch.int32, tuple(range(27, -1, -3))),
}
_BITS: Final = {"8bit_u8": (8, 6, 5), "4bit_u8": (4,), "2bit_u8": (2,), "3bit_32": (3,)}
_LARGEST: Final = 1 << 31
_NUMBERS: Final = ("nbits", "axis", "view_as_float", "quant_scale", "quant_zero", "group_size")
# What says how the weight was made, and not what it is.
_ABOUT: Final = (
    "unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip
_WEIGHT: Final = ("W_q", "scale", "zero", "shape", "packing", *_NUMBERS)


def _by_tensors(source: Source) -> str | None:
    for module in modules(source, "W_q"):
        if "scale" in module and "zero" in module:
            return f"{module.path} has W_q {describe(module.info('W_q'))} beside scale and zero"
    return None


def _plan(source: Source, settings: list[Settings]) -> Plan:
    layers = {module.path: _planned(module) for module in modules(source, "W_q")}
    if not layers:
        raise ArtifactError(f"{source.path}: says hqq, but no layer has a W_q")
    return Plan(str(source.path), FORMAT.name, kinds_of(layers), layers, plain_tensors(source, layers.values()))


def _number(module: Module, leaf: str, default: int | None = None) -> int:
    if leaf not in module and default is not None:
        return default
    info = module.check(leaf, (torch.uint8, torch.int32, torch.int64, torch.float32), (), (1,))
    value = module.read(leaf).reshape(()).item()
    if info.dtype == torch.float32 and value != value // 1:
        raise module.fail(f"{leaf} is {value:.3g}, which is no whole number")
    return int(value)


def _packing(module: Module) -> str:
    info = module.info("packing")
    if info.dtype != torch.uint8 or len(info.shape) != 1 or info.shape[0] > 40:
        raise module.fail(f"packing is {describe(info)}, it must be U8 of at most 40 bytes")
    name = bytes(module.read("packing").tolist()).decode(errors="replace")
    if name not in _PACKINGS:
        raise module.fail(f"packing is {name!r}; {', '.join(_PACKINGS)} are read")
    return name


def _shape(module: Module) -> tuple[int, int]:
    module.check("shape", (torch.int64, torch.int32), (2,))
    N, K = (int(size) for size in module.read("shape").tolist())
    module.positive(N, K)
    if max(N, K) >= _LARGEST:
        raise module.fail(f"shape is [{N}, {K}]")
    return N, K


def _planned(module: Module) -> PlannedLinear:
    module.only((*_WEIGHT, *_ABOUT, "bias"))
    numbers = {leaf: _number(module, leaf, 0) for leaf in _NUMBERS if leaf not in ("nbits", "axis")}
    bits, axis, packing = _number(module, "nbits"), _number(module, "axis"), _packing(module)
    if bits not in _BITS[packing]:
        raise module.fail(f"nbits is {bits}, which packing {packing} does not hold")
    if axis != 1:
        raise module.fail(
            f"axis is {axis}: groups that are not along a row have no canonical form, quantize with axis=1"
        )
    for leaf in ("quant_scale", "quant_zero"):
        if numbers[leaf]:
            raise module.fail(f"{leaf} is set: scales that are quantized themselves are not read")
    N, K = _shape(module)
    size = numbers["group_size"] or K
    if K % size or (size != K and size % 8):
        raise module.fail(f"group_size is {size}, which does not divide rows of K={K} into groups of multiples of 8")
    R = N * K // size
    word, places = _PACKINGS[packing]
    rows = -(-R // len(places))
    _check_codes(module, bool(numbers["view_as_float"]), word, rows, size)
    if len(places) in (2, 4) and R % len(places):
        raise module.fail(f"{R} rows of {size} cannot be packed in {len(places)} parts")
    scale = module.check("scale", tuple(SCALE_DTYPES), (R, 1))
    module.check("zero", (scale.dtype,), (R, 1))
    module.check_bias(N)

    def read() -> LinearRecord:
        words = module.read("W_q").contiguous().view(word).reshape(rows, size)
        return LinearRecord(_weight(module, words, packing, bits, (N, K), size), module.bias())

    group_size = -1 if size == K else size
    about = f"{group_about(bits, group_size)}, float zeros"
    return module.planned((N, K), about, (*_WEIGHT, *_ABOUT, "bias"), read)


def _check_codes(module: Module, as_float: bool, word: torch.dtype, rows: int, size: int) -> None:
    if not as_float:
        module.check("W_q", (word,), (rows, size))
        return
    info = module.check("W_q", tuple(SCALE_DTYPES), None)
    if info.shape[0] != rows or info.shape[1] * info.dtype.itemsize != size * word.itemsize:
        raise module.fail(f"W_q is {describe(info)}, which are not {rows} rows of {size * word.itemsize} bytes")


def _weight(
    module: Module, words: Tensor, packing: str, bits: int, shape: tuple[int, int], size: int
) -> QuantizedWeight:
    N, K = shape
    _, places = _PACKINGS[packing]
    mask = 255 if packing == "8bit_u8" else (1 << bits) - 1
    codes = torch.cat([((words >> place) & mask).to(torch.uint8) for place in places])[: N * K // size]
    if bits < 8 and int(codes.max()) >= 1 << bits:
        raise ValueError(f"W_q holds codes of more than {bits} bits")
    packed = pack_codes(codes.reshape(N, K), bits)
    G = K // size
    scales, zeros = (module.read(leaf).reshape(N, G) for leaf in ("scale", "zero"))
    group_size = -1 if G == 1 else size
    whole = zeros.float()
    if bool(((whole == whole.round()) & (whole >= 0) & (whole < 1 << bits)).all()):
        return integer_weight(bits, (N, K), group_size, packed, scales, whole.to(torch.uint8))
    scheme = Scheme(f"int{bits}", group_size, "float", scale_name(module.info("scale")))
    return QuantizedWeight.from_tensors({"packed": packed, "scales": scales, "zeros": zeros}, scheme, (N, K))


FORMAT: Final = Format(
    "hqq", "models quantized by HQQ, as Transformers 4 saved them", by_method("hqq"), _by_tensors, _plan
)
