"""MLX: weights that mlx and mlx-lm quantized, one array each of codes, scales and, where there are any, biases.

    affine          weight u32 [N, K*b/32], scales and biases [N, K/g]     w = q * scale + bias; scales may be negative
    mxfp4, mxfp8    weight u32 [N, K*b/32], scales u8 [N, K/32]            w = code * 2^(scale - 127)
    nvfp4           weight u32 [N, K/8], scales u8 [N, K/16]               w = code * scale, an E4M3 number

Codes are a bit stream along K, as in the canonical weight; codes, scales and biases are taken as they are. Embeddings are
quantized like linear layers.
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import torch

from lowbit import _checks
from lowbit.errors import ArtifactError
from lowbit.formats._format import Format
from lowbit.formats._module import SCALE_DTYPES, Module, describe, modules, plan_experts, scale_name
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, kinds_of, plain_tensors
from lowbit.formats._settings import Settings, agreed
from lowbit.formats._source import Source
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["FORMAT"]

_KEYS: Final = ("group_size", "bits", "mode")
_BITS: Final = (2, 3, 4, 5, 6, 8)
_GROUPS: Final = (16, 32, 64, 128)


#: The modes whose codes are floating point numbers. MLX's nvfp4 has no scale above those of groups.
_MODES: Final = {
    "mxfp4": Scheme.parse("mxfp4"),
    "mxfp8": Scheme.parse("mxfp8"),
    "nvfp4": Scheme.parse("fp4-g16-e4m3"),
}


class _Setting(NamedTuple):
    """How one layer is quantized."""

    bits: int
    group_size: int
    mode: str

    @property
    def about(self) -> str:
        if self.mode != "affine":
            return f"{self.mode}, groups of {self.group_size}"
        return f"int{self.bits}, groups of {self.group_size}, offsets"


def _by_config(settings: Settings) -> str | None:
    values = settings.values
    if "group_size" not in values or "bits" not in values or "quant_method" in values:
        return None
    if settings.where.endswith(": quantization"):
        return "config.json has a section 'quantization' with group_size and bits"
    # mlx-lm writes the same a second time, as quantization_config; what else it holds are layers.
    others = [value for key, value in values.items() if key not in _KEYS]
    if settings.where.endswith(": quantization_config") and all(isinstance(value, (dict, bool)) for value in others):
        return "quantization_config has group_size and bits, and no quant_method"
    return None


def _is_layer(module: Module) -> bool:
    if "weight" not in module or "scales" not in module:
        return False
    return module.info("weight").dtype == torch.uint32


def _by_tensors(source: Source) -> str | None:
    for module in modules(source, "scales"):
        if _is_layer(module):
            scales = module.info("scales")
            return f"{module.path} has weight {describe(module.info('weight'))} beside scales {describe(scales)}"
    return None


def _plan(source: Source, settings: list[Settings]) -> Plan:
    ours = [one for one in settings if _by_config(one) is not None]
    if not ours:
        raise ArtifactError(
            f"{source.path}: there is no config with bits and group_size: the tensors alone do not say them"
        )
    config = agreed(ours, _KEYS)
    layers: dict[str, PlannedLinear] = {}
    for module in modules(source, "scales", "biases"):
        if not _is_layer(module):
            raise module.fail(f"has {', '.join(sorted(module.names))[:200]}, which is not a quantized layer of MLX")
        plan = functools.partial(_planned, setting=_setting(config, module.path))
        layers[module.path] = plan_experts(module, "weight", plan)
    for key, value in config.values.items():
        if isinstance(value, dict) and key not in layers:
            raise ArtifactError(f"{config.where}: has a layer {key[:200]!r}, which is not among the tensors")
    return Plan(str(source.path), FORMAT.name, kinds_of(layers), layers, plain_tensors(source, layers.values()))


def _setting(config: Settings, path: str) -> _Setting:
    """How a layer is quantized: its own entry, else what holds for all."""
    if config.values.get(path) is False:
        raise ArtifactError(f"{config.where}: {path[:200]!r} is false, but the tensors of that layer are quantized")
    own = config.section(path) if config.values.get(path) is not True else None
    one = config if own is None else own
    mode = one.text("mode", "affine")
    if mode not in ("affine", *_MODES):
        raise one.fail("mode", f"one of affine, {', '.join(_MODES)}")
    if mode == "affine":
        return _Setting(one.integer("bits", _BITS), one.integer("group_size", _GROUPS), mode)
    fixed = _MODES[mode]
    bits, group_size = one.integer("bits", (fixed.bits,)), one.integer("group_size", (fixed.group_size,))
    return _Setting(bits, group_size, mode)


def _planned(module: Module, setting: _Setting) -> PlannedLinear:
    weight = module.info("weight")
    module.check("weight", (torch.uint32,), None)
    N, words = weight.shape
    K = words * 32 // setting.bits
    module.positive(N, K)
    if words * 32 % setting.bits or K % setting.group_size:
        raise module.fail(
            f"weight is {describe(weight)}: {words * 32} bits a row are not K values of {setting.bits} bits in groups of "
            f"{setting.group_size}"
        )
    groups = (N, K // setting.group_size)
    leaves = ["weight", "scales"]
    if setting.mode == "affine":
        scales = module.check("scales", tuple(SCALE_DTYPES), groups)
        module.check("biases", (scales.dtype,), groups)
        leaves.append("biases")
    else:
        module.check("scales", (torch.uint8,), groups)
    module.only({*leaves, "bias"})
    module.check_bias(N)

    def read() -> LinearRecord:
        return LinearRecord(_weight(module, setting, (N, K)), module.bias())

    return module.planned((N, K), setting.about, (*leaves, "bias"), read)


def _weight(module: Module, setting: _Setting, shape: tuple[int, int]) -> QuantizedWeight:
    tensors = {"packed": module.read("weight").view(torch.uint8), "scales": module.read("scales")}
    if setting.mode == "affine":
        tensors["offsets"] = module.read("biases")
        scheme = Scheme(f"int{setting.bits}", setting.group_size, "offset", scale_name(module.info("scales")))
    else:
        scheme = _MODES[setting.mode]
        tensors["scales"] = tensors["scales"].view(_checks.SCALE_DTYPES[str(scheme.scale_dtype)])
    return QuantizedWeight.from_tensors(tensors, scheme, shape)


FORMAT = Format("mlx", "models quantized by mlx and mlx-lm", _by_config, _by_tensors, _plan)
