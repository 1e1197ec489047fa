"""FP8 checkpoints with quant_method "fp8": DeepSeek, transformers, vLLM.

    weight             float8_e4m3fn [N, K]
    weight_scale_inv   [ceil(N/128), ceil(K/128)], fp32 or E8M0; despite its name it is multiplied by
    weight_scale       one scale (vLLM), or one per row
    gate_up_proj, gate_up_proj_scale_inv, down_proj, ...     of a mixture's experts, with a leading dimension for them
    input_scale, activation_scale      one number, where activation_scheme is "static"

Blocks go with inputs in groups of 1 x 128, anything else with one scale per token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final

from lowbit.errors import ArtifactError
from lowbit.formats._float8 import FP8, check_float8, read_float8
from lowbit.formats._format import Format, by_method
from lowbit.formats._inputs import Inputs
from lowbit.formats._module import Module, modules, plan_experts
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, plain_tensors
from lowbit.formats._settings import Settings, agreed
from lowbit.formats._source import Source

__all__ = ["FORMAT"]

_SCALES: Final = ("weight_scale_inv", "weight_scale")
_PROJECTIONS: Final = ("gate_up_proj", "up_proj", "down_proj")
_KEYS: Final = ("quant_method", "activation_scheme", "weight_block_size", "fmt", "scale_fmt")


def _by_tensors(source: Source) -> str | None:
    found = (module.scaled_weight(FP8, *_SCALES) for module in (*modules(source, *_SCALES), *_experts(source)))
    return next(filter(None, found), None)


def _plan(source: Source, settings: list[Settings]) -> Plan:
    if not settings:
        raise ArtifactError(f"{source.path}: FP8 layers without a config, which would say how inputs are quantized")
    config = agreed(settings, _KEYS)
    block = _block(config)
    scheme = config.text("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise config.fail("activation_scheme", "dynamic or static")
    if block and scheme == "static":
        raise config.fail("activation_scheme", "dynamic where weight_block_size is set")
    activation = "fp8_static" if scheme == "static" else "fp8_g128" if block else "fp8"
    layers: dict[str, PlannedLinear] = {}
    plan = functools.partial(_plan_layer, block=block, activation=activation)
    for module in (*modules(source, *_SCALES), *_experts(source)):
        layers[module.path] = plan_experts(module, "weight", plan)
    if not layers:
        raise ArtifactError(f"{config.where}: says fp8, but no layer of {source.path} has a weight_scale")
    variant = ("blocks of 128 x 128" if block else "one scale") + f", inputs {activation}"
    return Plan(str(source.path), FORMAT.name, variant, layers, plain_tensors(source, layers.values()))


def _experts(source: Source) -> Iterator[Module]:
    """What Transformers keeps of experts in one tensor: "...experts.down_proj" and "...experts.down_proj_scale_inv"."""
    for module in modules(source, *(f"{name}_scale_inv" for name in _PROJECTIONS)):
        for name in _PROJECTIONS:
            if name in module and f"{name}_scale_inv" in module:
                full = module.names[name]
                yield Module(source, full, {"weight": full, "weight_scale_inv": f"{full}_scale_inv"})


def _block(config: Settings) -> bool:
    size = config.values.get("weight_block_size")
    if size is not None and size != [128, 128]:
        raise config.fail("weight_block_size", "[128, 128] or null")
    return size is not None


def _plan_layer(module: Module, block: bool, activation: str) -> PlannedLinear:
    if all(leaf in module for leaf in _SCALES):
        raise module.fail("has both weight_scale and weight_scale_inv")
    scale = next(leaf for leaf in _SCALES if leaf in module)
    inputs = Inputs(module, activation, "activation_scale" if "activation_scale" in module else "input_scale")
    module.only(("weight", scale, *inputs.leaves))
    shape, about = check_float8(module, "weight", scale, block)
    inputs.check(*shape)

    def read() -> LinearRecord:
        return inputs.record(read_float8(module, "weight", scale, block, activation))

    return module.planned(shape, about, ("weight", scale, *inputs.leaves), read)


FORMAT: Final = Format(
    "fp8",
    "FP8: DeepSeek and transformers (128 x 128 blocks), vLLM (one scale)",
    by_method("fp8"),
    _by_tensors,
    _plan,
)
