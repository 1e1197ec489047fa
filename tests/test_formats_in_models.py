"""Checkpoints of GGUF, MLX and bitsandbytes into models: load_checkpoint finds every place, and the model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
import lowbit.formats
from folders import DATA
from lowbit import QuantizedLinear


def model_for(path: Path) -> nn.Module:
    """A module with a place for everything in a checkpoint."""
    root = nn.Module()

    def place(name: str, module: nn.Module) -> None:
        *parents, last = name.split(".")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        at.add_module(last, module)

    with lowbit.formats.plan(path) as plan:
        for name, layer in plan.layers.items():
            N, K = layer.shape
            place(name, nn.Embedding(N, K) if name.endswith("embed_tokens") else nn.Linear(K, N, bias=False))
        for name, tensor in plan.tensors.items():
            place(name.removesuffix(".weight"), nn.RMSNorm(tensor.shape[0]))
    return root


@pytest.mark.parametrize(
    "name", ["gguf-q4_k_m.gguf", "mlx-lm-q4", "mlx-modes", "bitsandbytes-nf4", "bitsandbytes-int8"]
)
def test_a_model_runs_on_what_was_loaded(name: str) -> None:
    path = DATA / name
    report = lowbit.load_checkpoint(path, lambda: model_for(path))
    assert report.model is not None and not report.missing and not report.unused
    linears = {name: module for name, module in report.model.named_modules() if isinstance(module, QuantizedLinear)}
    records = {
        name: one.weight for name, one in lowbit.formats.read(path) if isinstance(one, lowbit.formats.LinearRecord)
    }
    assert linears.keys() == {name for name in records if not name.endswith("embed_tokens")}
    for path_of, linear in linears.items():
        weight = records[path_of].dequantize()
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
        bound = (x.abs() @ weight.abs().T) * 2.0**-18
        assert bool(((linear(x) - x @ weight.T).abs() <= bound).all()), path_of
    for path_of in records.keys() - linears.keys():
        embedding = report.model.get_submodule(path_of)
        assert isinstance(embedding, lowbit.QuantizedEmbedding)
        want = records[path_of].dequantize().to(embedding.dtype)
        assert torch.equal(embedding(torch.arange(len(want))), want)
