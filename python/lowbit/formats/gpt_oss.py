"""gpt-oss: the weights of experts in MXFP4, as OpenAI keeps them (quant_method "mxfp4").

    gate_up_proj_blocks, down_proj_blocks      u8 [E, N, K/32, 16], the even k in the low nibble
    gate_up_proj_scales, down_proj_scales      u8 [E, N, K/32]          w = e2m1 * 2^(scale - 127)

Bytes are taken as they are. Everything else is bf16: attention, routers, biases of experts, embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from lowbit.errors import ArtifactError
from lowbit.experts import ExpertWeights
from lowbit.formats._format import Format, by_method
from lowbit.formats._module import Module, describe, modules
from lowbit.formats._record import ExpertsRecord, Plan, PlannedLinear, plain_tensors
from lowbit.formats._settings import Settings
from lowbit.formats._source import Source
from lowbit.scheme import Scheme

__all__ = ["FORMAT"]

_BLOCKS, _SCALES = "_blocks", "_scales"
_PROJECTIONS: Final = ("gate_up_proj", "down_proj")
_SCHEME: Final = Scheme.parse("mxfp4")


def _stored(source: Source) -> Iterator[tuple[Module, str]]:
    """Modules of experts, and their projections that are stored in blocks."""
    for module in modules(source, *(f"{name}{_BLOCKS}" for name in _PROJECTIONS)):
        for name in _PROJECTIONS:
            if f"{name}{_BLOCKS}" in module:
                yield module, name


def _by_tensors(source: Source) -> str | None:
    for module, name in _stored(source):
        return f"{module.path} has {name}{_BLOCKS} {describe(module.info(f'{name}{_BLOCKS}'))}"
    return None


def _plan(source: Source, settings: list[Settings]) -> Plan:
    layers = {f"{module.path}.{name}": _planned(module, name) for module, name in _stored(source)}
    if not layers:
        raise ArtifactError(f"{source.path}: says mxfp4, but no experts have gate_up_proj{_BLOCKS}")
    return Plan(str(source.path), FORMAT.name, "MXFP4", layers, plain_tensors(source, layers.values()))


def _planned(module: Module, name: str) -> PlannedLinear:
    blocks, scales = f"{name}{_BLOCKS}", f"{name}{_SCALES}"
    info = module.info(blocks)
    if info.dtype != torch.uint8 or len(info.shape) != 4 or info.shape[3] != 16 or 0 in info.shape:
        raise module.fail(f"{blocks} is {describe(info)}, it must be U8 [E, N, K/32, 16]")
    E, N, groups, _ = info.shape
    module.check(scales, (torch.uint8,), (E, N, groups))
    shape = (E, N, groups * 32)

    def read() -> ExpertsRecord:
        packed = module.read(blocks).reshape(E, N, groups * 16)
        tensors = {"packed": packed, "scales": module.read(scales).view(torch.float8_e8m0fnu)}
        return ExpertsRecord(ExpertWeights.from_tensors(tensors, _SCHEME, shape))

    return module.planned(shape, f"mxfp4, {E} experts", (blocks, scales), read)


FORMAT: Final = Format("mxfp4", "gpt-oss: experts in MXFP4, one tensor each", by_method("mxfp4"), _by_tensors, _plan)
