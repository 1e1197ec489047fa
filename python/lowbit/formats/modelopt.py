"""Checkpoints of NVIDIA's Model Optimizer. quant_algo says what the layers are:

    FP8                          weight e4m3 [N, K], weight_scale and input_scale: one number each
    FP8_PER_CHANNEL_PER_TOKEN    weight e4m3 [N, K], weight_scale [N]
    W4A16_AWQ                    weight uint8 [N/2, K]: rows 2i and 2i + 1 in the low and the high nibbles of row i, two's
                                 complement; weight_scale fp32 [N, G]; pre_quant_scale [K], which x is multiplied by
    W8A16, W8A8_SQ_PER_CHANNEL   weight int8 [N, K], weight_scale [N]; the latter (SmoothQuant) with pre_quant_scale [K]
                                 and input_scale
    NVFP4, W4A16_NVFP4           weight uint8 [N, K/2], weight_scale e4m3 [N, K/16], weight_scale_2: one factor of those
    MXFP4, MXFP8                 weight uint8 [N, K/2] or e4m3 [N, K], weight_scale E8M0 [N, K/32]
    MIXED_PRECISION              quantized_layers: {layer: {"quant_algo": one of these, "group_size"}}

It stands in config.json's quantization_config, or in hf_quant_config.json under "quantization".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from lowbit.errors import ArtifactError
from lowbit.formats._bits import pack_codes
from lowbit.formats._codes import group_about, integer_weight
from lowbit.formats._float8 import FP8, check_float8, read_float8
from lowbit.formats._format import Format
from lowbit.formats._inputs import Inputs
from lowbit.formats._microscaling import Microscaling, check_microscaling
from lowbit.formats._module import SCALE_DTYPES, Module, describe, modules
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, plain_tensors
from lowbit.formats._settings import Settings, agreed
from lowbit.formats._source import Source

__all__ = ["FORMAT"]

_SCALES: Final = tuple(SCALE_DTYPES)
_WEIGHT: Final = ("weight", "weight_scale")
_KEYS: Final = ("quant_algo", "group_size")


def _details(settings: Settings) -> Settings:
    """hf_quant_config.json keeps them one level down."""
    return settings.section("quantization") or settings


def _by_config(settings: Settings) -> str | None:
    if settings.values.get("quant_method") == "modelopt":
        return "quant_method is 'modelopt'"
    inner = settings.values.get("quantization")
    values = inner if isinstance(inner, dict) else settings.values
    if settings.values.get("quant_method") is None and "quant_algo" in values:
        return f"quant_algo is {str(values['quant_algo'])[:40]!r}"
    return None


def _by_tensors(source: Source) -> str | None:
    dtypes = (torch.uint8, torch.int8, *FP8)
    found = (module.scaled_weight(dtypes, "weight_scale") for module in modules(source, "weight_scale"))
    return next(filter(None, found), None)


def _plan(source: Source, settings: list[Settings]) -> Plan:
    if not settings:
        raise ArtifactError(f"{source.path}: no config, which would say what quant_algo the layers are of")
    config = agreed([_details(one) for one in settings], _KEYS)
    default = config.text("quant_algo", "")
    mixed = config.section("quantized_layers") if default in ("", "MIXED_PRECISION") else None
    layers: dict[str, PlannedLinear] = {}
    algos: dict[str, None] = {}  # those in use, in order
    for module in modules(source, "weight_scale"):
        details = config if mixed is None else mixed.section(module.path)
        if details is None:
            raise module.fail(f"is quantized, but {config.where} does not list it in quantized_layers")
        algo = details.text("quant_algo")
        if algo not in _LAYOUTS:
            raise ArtifactError(f"{details.where}: quant_algo {algo[:80]!r} is not read yet; {', '.join(_LAYOUTS)} are")
        layers[module.path] = _LAYOUTS[algo](module, details)
        algos[algo] = None
    if not layers:
        raise ArtifactError(f"{config.where}: says {default[:80]!r}, but no layer of {source.path} has a weight_scale")
    return Plan(str(source.path), FORMAT.name, ", ".join(algos), layers, plain_tensors(source, layers.values()))


# -- layouts ---------------------------------------------------------------------------------------------------------------


def _plan_fp8(module: Module, details: Settings) -> PlannedLinear:
    per_token = details.text("quant_algo") == "FP8_PER_CHANNEL_PER_TOKEN"
    # A layer that was exported without a calibrated scale had its inputs left alone.
    activation = "fp8" if per_token else "fp8_static" if "input_scale" in module else None
    inputs = Inputs(module, activation, "input_scale")
    module.only((*_WEIGHT, *inputs.leaves))
    shape, about = check_float8(module, *_WEIGHT, block=False)
    inputs.check(*shape)

    def read() -> LinearRecord:
        return inputs.record(read_float8(module, *_WEIGHT, False, activation))

    return module.planned(shape, about, (*_WEIGHT, *inputs.leaves), read)


def _plan_int8(module: Module, details: Settings) -> PlannedLinear:
    smooth = details.text("quant_algo") == "W8A8_SQ_PER_CHANNEL"
    activation = None if not smooth else "int8_static" if "input_scale" in module else "int8"
    inputs = Inputs(module, activation, "input_scale", None, "pre_quant_scale")
    module.only((*_WEIGHT, *inputs.leaves))
    N, K = module.check("weight", (torch.int8,), None).shape
    module.positive(N, K)
    module.check("weight_scale", _SCALES, (N,), (N, 1))
    inputs.check(N, K)

    def read() -> LinearRecord:
        packed = module.read("weight").view(torch.uint8) ^ 0x80
        scales = module.read("weight_scale").reshape(N, 1)
        return inputs.record(integer_weight(8, (N, K), -1, packed, scales, activation=activation))

    return module.planned((N, K), group_about(8, -1), (*_WEIGHT, *inputs.leaves), read)


def _plan_int4(module: Module, details: Settings) -> PlannedLinear:
    inputs = Inputs(module, None, None, None, "pre_quant_scale")
    module.only((*_WEIGHT, *inputs.leaves))
    if details.boolean("has_zero_point", False):
        raise details.fail("has_zero_point", "false")
    pairs, K = module.check("weight", (torch.uint8,), None).shape
    N = 2 * pairs
    module.positive(N, K)
    scale = module.check("weight_scale", _SCALES, None)
    G = scale.shape[1]
    # config.json written as compressed-tensors' groups has it there; the shapes give it as well.
    group_size = details.integer("group_size", default=K // G if G and K % G == 0 else -1)
    size = -1 if group_size == -1 or group_size >= K else group_size
    if size != -1 and size < 1:
        raise details.fail("group_size", "-1 or above 0")
    if scale.shape != (N, 1 if size == -1 else -(-K // size)):
        raise module.fail(
            f"weight_scale is {describe(scale)}, for N={N}, K={K}, {details.where} says group_size={group_size}"
        )
    inputs.check(N, K)

    def read() -> LinearRecord:
        stored = module.read("weight")
        codes = torch.stack((stored & 15, stored >> 4), 1).view(N, K) ^ 8
        packed = pack_codes(codes, 4)
        return inputs.record(integer_weight(4, (N, K), size, packed, module.read("weight_scale")))

    return module.planned((N, K), group_about(4, size), (*_WEIGHT, *inputs.leaves), read)


def _plan_microscaling(kind: str) -> Callable[[Module, Any], PlannedLinear]:
    store = Microscaling(kind, *_WEIGHT, "weight_scale_2" if kind == "nvfp4" else None)

    def plan(module: Module, details: Settings) -> PlannedLinear:
        # Inputs that the checkpoint rounds to 4 or 8 bits in small groups stay as they are: that rounds less.
        inputs = Inputs(module, None, None, None, "pre_quant_scale")
        leaves = (*store.leaves, *inputs.leaves, "input_scale")
        module.only(leaves)
        shape, weight = check_microscaling(module, store)
        inputs.check(*shape)
        return module.planned(shape, store.about, leaves, lambda: inputs.record(weight()))

    return plan


_LAYOUTS: Final[dict[str, Callable[[Module, Any], PlannedLinear]]] = {
    "FP8": _plan_fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _plan_fp8,
    "W4A16_AWQ": _plan_int4,
    "W8A16": _plan_int8,
    "W8A8_SQ_PER_CHANNEL": _plan_int8,
    "NVFP4": _plan_microscaling("nvfp4"),
    "NVFP4_AWQ": _plan_microscaling("nvfp4"),
    "W4A16_NVFP4": _plan_microscaling("nvfp4"),
    "MXFP4": _plan_microscaling("mxfp4"),
    "W4A8_MXFP4_FP8": _plan_microscaling("mxfp4"),
    "MXFP8": _plan_microscaling("mxfp8"),
}

FORMAT: Final = Format(
    "modelopt",
    "NVIDIA Model Optimizer: FP8, NVFP4, MXFP4, MXFP8, W4A16_AWQ, W8A16, INT8 SmoothQuant",
    _by_config,
    _by_tensors,
    _plan,
)
