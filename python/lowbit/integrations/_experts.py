"""Mixtures of experts in Transformers: "lowbit" among its experts implementations, for experts that are quantized.

Transformers looks up what runs a module of experts by `config._experts_implementation`. Ours sorts the rows by expert and
multiplies the rows of each by its weights, quantized or not, so that it takes modules of which only a part is quantized.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from lowbit.experts import QuantizedExperts

__all__ = ["NAME", "experts_forward", "restore", "switch"]

NAME: Final = "lowbit"
_BEFORE: Final = "_lowbit_experts_before"


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum over a row's experts, each weighted.

    Args:
        self: the module of experts.
        hidden_states: [rows, K].
        top_k_index: the experts of each row, [rows, k].
        top_k_weights: their weights, [rows, k].

    Raises:
        RuntimeError: the experts are spread over processes (expert parallelism), which is not supported.
    """
    if getattr(self, "_is_expert_parallel", False):
        raise RuntimeError("quantized experts cannot be spread over processes (expert parallelism)")
    width = top_k_index.shape[-1]
    expert = top_k_index.reshape(-1)
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=self.num_experts).tolist()
    gated = hasattr(self, "gate_up_proj")
    up = _product(self, "gate_up_proj" if gated else "up_proj", hidden_states[order // width], counts)
    inner = self._apply_gate(up) if gated else self.act_fn(up)
    out = _product(self, "down_proj", inner, counts)
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    # A sum in a fixed order; index_add_ has none on a GPU.
    return out[back].view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


def _product(module: Any, name: str, x: Tensor, counts: list[int]) -> Tensor:
    bias = getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
    weights = getattr(module, name)
    if isinstance(weights, QuantizedExperts):
        found: Tensor = weights(x, counts, bias)
        return found
    parts, begin = [], 0
    for e, count in enumerate(counts):
        if count:
            weight = weights[e].T if module.is_transposed else weights[e]
            rows = x[begin : begin + count]
            parts.append(nn.functional.linear(rows, weight, None if bias is None else bias[e]))
            begin += count
    return torch.cat(parts)


def switch(model: nn.Module) -> None:
    """Let Transformers run the model's quantized experts with `experts_forward`.

    The modules get a config of their own, so that the model's stays as it is, for itself and for whoever makes another model
    from it.
    """
    for module in _owners(model):
        _register()
        if module.config._experts_implementation != NAME:
            setattr(module, _BEFORE, module.config)
            module.config = copy.copy(module.config)
            module.config._experts_implementation_internal = NAME


def restore(model: nn.Module) -> None:
    """Undo `switch`, before experts are dense again."""
    for module in list(_owners(model)):
        if hasattr(module, _BEFORE):
            module.config = getattr(module, _BEFORE)
            delattr(module, _BEFORE)


def _owners(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        quantized = any(isinstance(child, QuantizedExperts) for child in module.children())
        if quantized and hasattr(getattr(module, "config", None), "_experts_implementation"):
            yield module


def _register() -> None:
    moe = sys.modules["transformers.integrations.moe"]  # a module of experts has imported it
    if NAME not in moe.ALL_EXPERTS_FUNCTIONS:
        type(moe.ALL_EXPERTS_FUNCTIONS).register(NAME, experts_forward)
