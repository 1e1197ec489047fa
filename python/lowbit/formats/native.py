"""lowbit's own checkpoints, as `save_pretrained` of a Transformers model writes them: what state_dict holds, and shapes.

    weight_packed, weight_scales, weight_zeros or weight_offsets, weight_perm      the canonical tensors
    weight_scheme                           uint8, the scheme's string
    weight_shape                            int64 [2]: N, K; or [3]: E, N, K of experts, whose tensors are stacked
    bias                                    [N]
    input_scale, input_zero                 fp32 [1] and int32 [1], of schemes with static activations
    input_pre_scale                         fp32 [K]

The config says `quant_method: "lowbit"`; what a layer is, its own tensors say.
"""

from __future__ import annotations

from typing import Final

import torch

from lowbit._canonical import check_shape, stored_tensors
from lowbit.errors import ArtifactError
from lowbit.experts import ExpertWeights
from lowbit.formats._format import Format, by_method
from lowbit.formats._module import Module, describe, modules
from lowbit.formats._record import ExpertsRecord, LinearRecord, Plan, PlannedLinear, plain_tensors
from lowbit.formats._settings import Settings
from lowbit.formats._source import Source
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["FORMAT", "METHOD", "VERSION"]

#: `quant_method` and `version` of the config.
METHOD: Final = "lowbit"
VERSION: Final = 1
_LONGEST: Final = 200  # bytes of a scheme's string
_LARGEST: Final = 1 << 31  # products of E, N and K are computed before they are compared with what is stored


_by_config = by_method(METHOD)


def _by_tensors(source: Source) -> str | None:
    for module in modules(source, "weight_scheme"):
        if "weight_packed" in module:
            return f"{module.path} has weight_packed {describe(module.info('weight_packed'))} and weight_scheme"
    return None


def _plan(source: Source, settings: list[Settings]) -> Plan:
    for one in settings:
        if _by_config(one) and one.integer("version", default=VERSION) != VERSION:
            raise one.fail("version", f"{VERSION}, which is what this lowbit reads")
    layers: dict[str, PlannedLinear] = {}
    kinds: dict[str, int] = {}
    for module in modules(source, "weight_scheme"):
        scheme = _scheme(module)
        layers[module.path] = _plan_layer(module, scheme)
        kinds[str(scheme)] = kinds.get(str(scheme), 0) + 1
    if not layers:
        raise ArtifactError(f"{source.path}: says {METHOD}, but has no layer with a weight_scheme")
    return Plan(str(source.path), FORMAT.name, ", ".join(kinds), layers, plain_tensors(source, layers.values()))


def _scheme(module: Module) -> Scheme:
    info = module.info("weight_scheme")
    if info.dtype != torch.uint8 or len(info.shape) != 1 or not 0 < info.shape[0] <= _LONGEST:
        raise module.fail(f"weight_scheme is {describe(info)}, it must be U8 of at most {_LONGEST} bytes")
    text = bytes(module.read("weight_scheme").tolist()).decode(errors="replace")
    try:
        return Scheme.parse(text)
    except ValueError as error:
        raise module.fail(f"weight_scheme: {error}") from None


def _wanted(module: Module, scheme: Scheme) -> tuple[tuple[int, ...], dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """The shape, and the canonical tensors that scheme and shape ask for."""
    module.check("weight_shape", (torch.int64,), (2,), (3,))
    shape = tuple(module.read("weight_shape").tolist())
    if max(shape) >= _LARGEST or shape[0] < 1:
        raise module.fail(f"weight_shape is {list(shape)}")
    try:
        check_shape(scheme, shape[-2:])
    except ValueError as error:
        raise module.fail(f"weight_shape: {error}") from None
    return shape, stored_tensors(scheme, shape, "weight_perm" in module)


def _plan_layer(module: Module, scheme: Scheme) -> PlannedLinear:
    shape, wanted = _wanted(module, scheme)
    for part, (dtype, want) in wanted.items():
        module.check(f"weight_{part}", (dtype,), want)
    if len(shape) == 3:
        return _plan_experts(module, scheme, shape, tuple(wanted))
    N, K = shape
    inputs = {"input_pre_scale": (torch.float32, (K,))} if "input_pre_scale" in module else {}
    if scheme.activation_static:
        inputs["input_scale"] = (torch.float32, (1,))
        if not scheme.activation_symmetric:
            inputs["input_zero"] = (torch.int32, (1,))
    for leaf, (dtype, want) in inputs.items():
        module.check(leaf, (dtype,), want)
    module.check_bias(N)
    leaves = (*(f"weight_{part}" for part in wanted), "weight_scheme", "weight_shape", "bias", *inputs)
    module.only(leaves)

    def read() -> LinearRecord:
        tensors = {part: module.read(f"weight_{part}") for part in wanted}
        weight = QuantizedWeight.from_tensors(tensors, scheme, (N, K))
        return LinearRecord(weight, module.bias(), **{leaf: module.read(leaf) for leaf in inputs})

    return module.planned((N, K), str(scheme), leaves, read)


def _plan_experts(module: Module, scheme: Scheme, shape: tuple[int, ...], parts: tuple[str, ...]) -> PlannedLinear:
    if scheme.activation_static:
        raise module.fail(f"experts of scheme {scheme}, whose input scales would be static")
    leaves = (*(f"weight_{part}" for part in parts), "weight_scheme", "weight_shape")
    module.only(leaves)

    def read() -> ExpertsRecord:
        tensors = {part: module.read(f"weight_{part}") for part in parts}
        return ExpertsRecord(ExpertWeights.from_tensors(tensors, scheme, shape))

    return module.planned(shape, f"{scheme}, {shape[0]} experts", leaves, read)


FORMAT: Final = Format(
    METHOD,
    "lowbit, as save_pretrained of a Transformers model writes it",
    _by_config,
    _by_tensors,
    _plan,
)
