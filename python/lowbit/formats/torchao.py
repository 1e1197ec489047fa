"""torchao: safetensors in which tensor subclasses are taken apart, as Transformers saves them.

    _weight_qdata       int8 or float8 [N, K], a code each
    _weight_scale       [N, G], or one per row, per block of 128 x 128, or one
    _weight_zero_point  int8 [N, G]                          W = (q - zero) * scale

What a weight is stands in the file's metadata, a JSON object under the weight's name: its class, block_size, and how inputs are
quantized. Classes whose codes are in the order of one device's kernels are refused by name, and pickles (.bin) like any other.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lowbit import _safetensors
from lowbit.errors import ArtifactError
from lowbit.formats._bits import pack_codes
from lowbit.formats._codes import group_about, integer_weight
from lowbit.formats._float8 import FP8, check_float8, read_float8
from lowbit.formats._format import Format, by_method
from lowbit.formats._module import SCALE_DTYPES, Module, describe, modules
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, kinds_of, plain_tensors
from lowbit.formats._settings import Settings
from lowbit.formats._source import Source

__all__ = ["FORMAT"]

_PREFIX: Final = "_weight_"
_QDATA, _SCALE, _ZERO = (f"{_PREFIX}{part}" for part in ("qdata", "scale", "zero_point"))
_KNOWN: Final = (_QDATA, _SCALE, _ZERO, "bias")
_BITS: Final = {f"int{bits}": bits for bits in range(2, 9)}
_INTEGERS: Final = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_REFUSED: Final = {
    "Int4Tensor": "only a CUDA kernel says what its codes mean",
    "Int4TilePackedTo4dTensor": "its codes are in the order of a CUDA kernel",
    "Int4PlainInt32Tensor": "its codes are in the order of an XPU kernel",
    "MXTensor": "a prototype that changes",
    "NVFP4Tensor": "a prototype that changes",
}


class _About(NamedTuple):
    """The metadata of a weight."""

    kind: str
    data: Settings
    block: tuple[int, int]
    activation: str | None


def _by_tensors(source: Source) -> str | None:
    for module in modules(source, _QDATA):
        return f"{module.path} has {_QDATA} {describe(module.info(_QDATA))}"
    return None


def _plan(source: Source, settings: list[Settings]) -> Plan:
    layers = {}
    for module in modules(source, _QDATA):
        about = _about(source, module)
        plan = _plan_float if about.kind == "Float8Tensor" else _plan_integer
        layers[module.path] = plan(module, about)
    if not layers:
        raise ArtifactError(f"{source.path}: says torchao, but no weight has a {_QDATA}")
    _refuse_others(source, {f"{path}.weight" for path in layers})
    return Plan(str(source.path), FORMAT.name, kinds_of(layers), layers, plain_tensors(source, layers.values()))


# -- metadata --------------------------------------------------------------------------------------------------------------


def _entry(source: Source, name: str) -> Settings:
    where = f"{source.path}: metadata of {name[:200]}"
    return Settings(_safetensors.parse_json(source.metadata[name].encode(errors="replace"), where), where)


def _about(source: Source, module: Module) -> _About:
    name = f"{module.path}.weight"
    if name not in source.metadata:
        raise module.fail("has no entry in the metadata of the file, which would say what it is")
    entry = _entry(source, name)
    kind = entry.text("_type")
    if kind not in (*_INTEGERS, "Float8Tensor"):
        why = _REFUSED.get(kind, "not a class that is known here")
        raise module.fail(f"is of torchao's {kind[:80]!r}, which is not read: {why}")
    data = entry.section("_data")
    if data is None:
        raise entry.fail("_data", "an object")
    return _About(kind, data, _block(data), _activation(data))


def _block(data: Settings) -> tuple[int, int]:
    block = data.values.get("block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise data.fail("block_size", "two sizes")
    return block[0], block[1]


def _activation(data: Settings) -> str | None:
    """How inputs are quantized: by an IntxUnpackedToInt8Tensor's name for it, or by the arguments of a quantizer."""
    if "activation_quantization" in data:
        if data.text("activation_quantization") != "int8_asym_per_token":
            raise data.fail("activation_quantization", "'int8_asym_per_token' or null")
        return "int8_asym"
    kwargs = data.section("act_quant_kwargs")
    if kwargs is None:
        return None
    kind, inner = kwargs.text("_type"), kwargs.section("_data") or Settings({}, kwargs.where)
    granularity = inner.section("granularity")
    if granularity is None or granularity.text("_type") != "PerRow":
        raise inner.fail("granularity", "PerRow")
    if kind == "QuantizeTensorToFloat8Kwargs":
        return "fp8"
    mapping = inner.section("mapping_type")
    if (
        kind != "QuantizeTensorToInt8Kwargs"
        or mapping is None
        or mapping.text("_data") not in ("SYMMETRIC", "ASYMMETRIC")
    ):
        raise kwargs.fail("_type", "QuantizeTensorToInt8Kwargs or QuantizeTensorToFloat8Kwargs")
    return "int8" if mapping.text("_data") == "SYMMETRIC" else "int8_asym"


def _refuse_others(source: Source, layers: set[str]) -> None:
    """Parameters that are quantized, but not the weight of a module: what they are for is not known."""
    names = _names(source)
    for name in names:
        if name in layers or name not in source.metadata:
            continue
        if _entry(source, name).values.get("_type") != "Tensor":
            raise ArtifactError(f"{source.path}: {name[:200]} is quantized, and not the weight of a layer")


def _names(source: Source) -> list[str]:
    import json

    try:
        found: Any = json.loads(source.metadata.get("tensor_names", "[]"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ArtifactError(f"{source.path}: tensor_names of its metadata is not a list of names")
    return found


# -- layers ----------------------------------------------------------------------------------------------------------------


def _plan_integer(module: Module, about: _About) -> PlannedLinear:
    module.only(_KNOWN)
    N, K = module.check(_QDATA, (torch.int8,), None).shape
    module.positive(N, K)
    bits = _bits(about.data) if about.kind == "IntxUnpackedToInt8Tensor" else 8
    size = about.block[1]
    if about.block[0] != 1 or K % size or (size != K and size % 8):
        raise module.fail(f"block_size {list(about.block)} is not groups along rows of K={K}")
    G = K // size
    module.check(_SCALE, tuple(SCALE_DTYPES), (N, G))
    if _ZERO in module:
        module.check(_ZERO, (torch.int8,), (N, G))
    module.check_bias(N)
    group_size = -1 if G == 1 else size

    def read() -> LinearRecord:
        codes = _unsigned(module.read(_QDATA), bits, _QDATA)
        zeros = _unsigned(module.read(_ZERO), bits, _ZERO) if _ZERO in module else None
        packed = pack_codes(codes, bits)
        weight = integer_weight(
            bits, (N, K), group_size, packed, module.read(_SCALE), zeros, activation=about.activation
        )
        return LinearRecord(weight, module.bias())

    text = group_about(bits, group_size) + (f", inputs {about.activation}" if about.activation else "")
    return module.planned((N, K), text, _KNOWN, read)


def _bits(data: Settings) -> int:
    target = data.section("target_dtype")
    name = None if target is None else target.text("_data")
    if name not in _BITS:
        raise data.fail("target_dtype", f"one of {', '.join(_BITS)}")
    return _BITS[name]


def _unsigned(signed: Tensor, bits: int, what: str) -> Tensor:
    """Codes from 0 on."""
    offset = 1 << (bits - 1)
    codes = signed.view(torch.uint8) + offset  # modulo 256
    if int(codes.max()) >= 2 * offset:
        raise ValueError(f"{what} holds values outside {bits} bits")
    return codes


def _plan_float(module: Module, about: _About) -> PlannedLinear:
    module.only((_QDATA, _SCALE, "bias"))
    info = module.check(_QDATA, tuple(FP8), None)
    N, K = info.shape
    if about.block not in ((1, K), (N, K), (128, 128)):
        raise module.fail(
            f"block_size {list(about.block)} is not one of [1, K], [N, K] and [128, 128] with N={N}, K={K}"
        )
    block = about.block == (128, 128) and module.info(_SCALE).shape != (N, 1)
    shape, text = check_float8(module, _QDATA, _SCALE, block)
    module.check_bias(N)
    activation = "fp8_g128" if block and about.activation else about.activation

    def read() -> LinearRecord:
        return LinearRecord(read_float8(module, _QDATA, _SCALE, block, activation), module.bias())

    text += f", inputs {activation}" if activation else ""
    return module.planned(shape, text, (_QDATA, _SCALE, "bias"), read)


FORMAT: Final = Format(
    "torchao", "models quantized by torchao, as Transformers saves them", by_method("torchao"), _by_tensors, _plan
)
