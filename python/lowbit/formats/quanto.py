"""optimum-quanto: what QuantizedModelForCausalLM.save_pretrained writes, with quanto_qmap.json beside it.

    weight._data        int8, float8_e4m3fn or float8_e5m2 [N, K]
    weight._scale       [N, 1], or one number                W = data * scale
    input_scale, output_scale       1 where activations are not quantized

Weights of 2 and 4 bits are kept as rows of one group each, and neither N nor K is written anywhere: they are refused by name.
So are quantized activations, whose outputs are rounded too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from lowbit.errors import ArtifactError
from lowbit.formats._codes import group_about, integer_weight
from lowbit.formats._float8 import FP8
from lowbit.formats._format import Format, by_method
from lowbit.formats._module import SCALE_DTYPES, Module, describe
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, kinds_of, plain_tensors
from lowbit.formats._settings import Settings
from lowbit.formats._source import Source
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["FORMAT"]

_MAP: Final = "quanto_qmap.json"
_DATA: Final = ".weight._data"
_PACKED: Final = ".weight._data._data"
_WEIGHT: Final = ("_data", "_scale")
_INPUTS: Final = ("input_scale", "output_scale")
_KINDS: Final = {torch.int8: "qint8", torch.float8_e4m3fn: "qfloat8_e4m3fn", torch.float8_e5m2: "qfloat8_e5m2"}


def _by_tensors(source: Source) -> str | None:
    for name in source.tensors:
        if name.endswith((_DATA, _PACKED)):
            return f"has {name} {describe(source.tensors[name])}"
    return None


def _modules(source: Source) -> Iterator[Module]:
    """The tensors of a layer, those of its weight as "_data" and "_scale"."""
    for name in source.tensors:
        if name.endswith(_PACKED):
            path = name.removesuffix(_PACKED)
            raise ArtifactError(
                f"{source.path}: {path[:200]}: quanto keeps weights of 2 and 4 bits without their shape, so that they "
                "cannot be read from the file; int8 and float8 are read"
            )
        if name.endswith(_DATA):
            path = name.removesuffix(_DATA)
            found = {other[len(path) + 1 :]: other for other in source.tensors if other.startswith(f"{path}.")}
            yield Module(source, path, {leaf.removeprefix("weight."): full for leaf, full in found.items()})


def _plan(source: Source, settings: list[Settings]) -> Plan:
    where = f"{source.root / _MAP}"
    qmap = Settings(source.json(_MAP), where)
    layers: dict[str, PlannedLinear] = {}
    for module in _modules(source):
        own = qmap.section(module.path) if qmap.values else None
        if qmap.values and own is None:
            raise module.fail(f"is quantized, but {where} does not name it")
        if own is not None and own.text("activations", "none") != "none":
            raise own.fail("activations", "'none': what quanto does to outputs is not computed")
        layers[module.path] = _planned(module, own)
    if not layers:
        raise ArtifactError(f"{source.path}: no layer has a weight._data")
    for name in qmap.values:
        if name not in layers:
            raise ArtifactError(f"{where}: names {name[:200]!r}, which has no weight._data")
    return Plan(str(source.path), FORMAT.name, kinds_of(layers), layers, plain_tensors(source, layers.values()))


def _planned(module: Module, own: Settings | None) -> PlannedLinear:
    module.only((*_WEIGHT, *_INPUTS, "bias"))
    info = module.check("_data", tuple(_KINDS), None)
    N, K = info.shape
    module.positive(N, K)
    if own is not None and own.text("weights") != _KINDS[info.dtype]:
        raise own.fail("weights", f"{_KINDS[info.dtype]}, as the tensors are")
    module.check("_scale", tuple(SCALE_DTYPES), (N, 1), (), (1,))
    for leaf in _INPUTS:
        if leaf in module:
            module.check(leaf, tuple(SCALE_DTYPES), (), (1,))
            if module.read(leaf).float().item() != 1:
                raise module.fail(f"{leaf} is not 1: quantized activations are not read")
    module.check_bias(N)
    about = group_about(8, -1) if info.dtype == torch.int8 else FP8[info.dtype].replace("_", " ")

    def read() -> LinearRecord:
        codes = module.read("_data").view(torch.uint8)
        scales = module.read("_scale").reshape(-1, 1).expand(N, 1).contiguous()
        if info.dtype == torch.int8:
            return LinearRecord(integer_weight(8, (N, K), -1, codes + 128, scales), module.bias())
        scheme = Scheme(FP8[info.dtype], scale_dtype=str(scales.dtype).removeprefix("torch."))
        weight = QuantizedWeight.from_tensors({"packed": codes, "scales": scales}, scheme, (N, K))
        return LinearRecord(weight, module.bias())

    return module.planned((N, K), about, (*_WEIGHT, *_INPUTS, "bias"), read)


FORMAT: Final = Format(
    "quanto", "models quantized by optimum-quanto: int8 and float8", by_method("quanto"), _by_tensors, _plan
)
