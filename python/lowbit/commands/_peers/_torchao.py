"""torchao's quantized tensors under F.linear, as `quantize_` leaves them; not compiled."""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.commands._contenders import Contender
from lowbit.commands._measure import copies_for
from lowbit.commands._peers._peer import Peer, from_copies

__all__ = ["PEERS"]


def _quantized(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torchao").setLevel(logging.ERROR)
        quantize = importlib.import_module("torchao.quantization").quantize_
        try:
            config = getattr(importlib.import_module(peer.options["module"]), peer.options["config"])
        except (ImportError, AttributeError):
            raise RuntimeError(f"this torchao has no {peer.options['config']}") from None
        arguments = peer.options.get("arguments", {})
        count = copies_for(_size(peer, weight), warm)
        first = _convert(quantize, config(**arguments), weight, dtype)
        copies = [(first,), *((copy.deepcopy(first),) for _ in range(count - 1))]
    return from_copies(peer, _size(peer, weight), copies, F.linear, peer.options["config"])


def _size(peer: Peer, weight: Tensor) -> int:
    return weight.numel() * peer.bits // 8


def _convert(quantize: Any, config: Any, weight: Tensor, dtype: torch.dtype) -> Any:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    holder = nn.Sequential(layer)
    try:
        with torch.no_grad():
            quantize(holder, config)
    except (AssertionError, ImportError, NotImplementedError) as error:
        raise RuntimeError(f"this torchao refuses: {str(error) or type(error).__name__}") from None
    converted = holder[0].weight
    if type(converted) is nn.Parameter:
        raise RuntimeError(f"torchao leaves a weight of shape {list(weight.shape)} as it is")
    return converted


def _row(name: str, what: str, kind: str, config: str, module: str = "torchao.quantization", **arguments: Any) -> Peer:
    options = {"config": config, "module": module, "arguments": arguments}
    return Peer(f"torchao-{name}", what, kind, "torchao", _quantized, options)


_INT4 = "torchao.prototype.quantization.int4.inference_workflow"

PEERS = (
    _row("int4-g128", "torchao, int4 weights for tinygemm, groups of 128", "W4A16", "PrototypeInt4WeightOnlyConfig", _INT4,
         group_size=128, set_inductor_config=False),
    _row("int4-g32-a8", "torchao, da8w4, groups of 32", "W4A8", "Int8DynamicActivationInt4WeightConfig", _INT4,
         group_size=32, set_inductor_config=False),
    _row("int8", "torchao, int8 weights, one scale per row", "W8A16", "Int8WeightOnlyConfig", set_inductor_config=False),
    _row("int8-a8", "torchao, int8 weights and inputs", "W8A8", "Int8DynamicActivationInt8WeightConfig",
         set_inductor_config=False),
)  # fmt: skip
