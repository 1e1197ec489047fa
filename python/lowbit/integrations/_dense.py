"""Quantized layers back to dense ones: what model.dequantize() puts into a Transformers model."""

from __future__ import annotations

import torch
from torch import nn

from lowbit.embedding import QuantizedEmbedding
from lowbit.experts import QuantizedExperts
from lowbit.linear import QuantizedLinear

__all__ = ["dequantize_experts", "dequantized_embedding", "dequantized_linear"]


def dequantize_experts(model: nn.Module, path: str, layer: QuantizedExperts, dtype: torch.dtype) -> None:
    """Put the Parameter that a QuantizedExperts stands for back into the model."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    dense = layer.quantized_weight().dequantize(dtype)
    if getattr(owner, "is_transposed", False):
        dense = dense.transpose(1, 2).contiguous()
    del owner._modules[name]
    owner.register_parameter(name, nn.Parameter(dense, requires_grad=False))


def dequantized_embedding(layer: QuantizedEmbedding, dtype: torch.dtype) -> nn.Embedding:
    """An nn.Embedding with the rows that a QuantizedEmbedding stands for."""
    with torch.device("meta"):
        made = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
    made.weight = nn.Parameter(layer.quantized_weight().dequantize(dtype), requires_grad=False)
    return made.train(layer.training)


def dequantized_linear(layer: QuantizedLinear, dtype: torch.dtype, shared: nn.Parameter | None = None) -> nn.Linear:
    """An nn.Linear with the weights that a QuantizedLinear stands for; its inputs are not quantized.

    Args:
        shared: the dense weight, where it is there already.
    """
    if shared is None:
        weight = layer.quantized_weight().dequantize()
        if layer.input_pre_scale is not None:
            weight = weight * layer.input_pre_scale
        shared = nn.Parameter(weight.to(dtype), requires_grad=False)
    with torch.device("meta"):
        made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    made.weight = shared
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return made.train(layer.training)
