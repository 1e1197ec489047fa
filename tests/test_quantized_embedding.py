"""QuantizedEmbedding: nn.Embedding over a packed weight, alone and tied to an output layer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from lowbit import QuantizedEmbedding, QuantizedLinear, QuantizedWeight

N, K = 50, 64
IDS = torch.tensor([[0, 49, 7], [7, 3, 1]])


def dense() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(N, K, padding_idx=3)


@pytest.mark.parametrize("scheme", ["int8-g64", "int4-g32-asym", "nf4-g64", "int3-g32-offset", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_dequantized_weight(scheme: str, dtype: torch.dtype) -> None:
    layer = QuantizedEmbedding.from_embedding(dense().to(dtype), scheme)
    want = QuantizedWeight.quantize(dense().to(dtype).weight, scheme)
    assert layer.quantized_weight() == want and layer.dtype == dtype and layer.padding_idx == 3
    got = layer(IDS)
    assert got.dtype == dtype and torch.equal(got, want.dequantize(dtype)[IDS])
    assert layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
    assert "padding_idx=3" in repr(layer)


def test_dtype_follows_casts_and_bytes_do_not() -> None:
    layer = QuantizedEmbedding.from_embedding(dense(), "int4-g32")
    before = layer.weight.detach().clone()
    assert layer.half()(IDS).dtype == torch.float16
    assert layer.to(torch.bfloat16)(IDS).dtype == torch.bfloat16
    assert copy.deepcopy(layer).float()(IDS).dtype == torch.float32 and layer.dtype == torch.bfloat16
    assert torch.equal(layer.weight, before)
    assert layer.to("meta").weight.is_meta and layer.to_empty(device="cpu").layout == 0
    with pytest.raises(RuntimeError, match=r"QuantizedEmbedding\(50, 64, .* is not prepared"):
        layer(IDS)


def test_state_dict() -> None:
    layer = QuantizedEmbedding.from_embedding(dense(), "int4-g32")
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert layer.state_dict().keys() == {"weight_packed", "weight_scales", "weight_scheme"}
    other = QuantizedEmbedding(N, K, scheme="int4-g32")
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(IDS), layer(IDS))
    with pytest.raises(RuntimeError, match="the module is int8-g64"):
        QuantizedEmbedding(N, K).load_state_dict(layer.state_dict())


def tied() -> tuple[QuantizedEmbedding, QuantizedLinear]:
    embedding = QuantizedEmbedding.from_embedding(dense(), "int4-g32")
    head = QuantizedLinear(K, N, bias=False, scheme="int4-g32")
    embedding.tie(head)
    return embedding, head


def test_a_tied_output_layer_shares_the_bytes() -> None:
    embedding, head = tied()
    assert head.weight is embedding.weight and head.layout == embedding.layout
    x = torch.randn(2, K)
    torch.testing.assert_close(head(x), x @ embedding.quantized_weight().dequantize().T, rtol=1e-5, atol=1e-4)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert sum(p.nbytes for p in model.parameters()) == embedding.weight.nbytes
    twin = copy.deepcopy(model)
    assert twin["head"].weight is twin["embedding"].weight and twin["head"].weight is not head.weight
    for made in (copy.deepcopy(model).half(), copy.deepcopy(model).to("cpu")):
        assert made["head"].weight is made["embedding"].weight
    gone = copy.deepcopy(model).to("meta")
    assert gone["head"].weight is gone["embedding"].weight and gone["head"].weight.is_meta


def test_what_replaces_one_weight_replaces_both() -> None:
    embedding, head = tied()
    embedding.load_state_dict(QuantizedEmbedding.from_embedding(nn.Embedding(N, K), "int4-g32").state_dict())
    assert head.weight is embedding.weight and head.quantized_weight() == embedding.quantized_weight()
    head.load_state_dict(tied()[1].state_dict())
    assert head.weight is embedding.weight and embedding.quantized_weight() == tied()[0].quantized_weight()


def test_moving_to_another_layout_moves_both(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, head = tied()
    before = embedding.quantized_weight()
    layout = 2  # a GPU's
    monkeypatch.setattr("lowbit._packed.preferred_layout", lambda *args: layout)
    head.prepare()
    assert head.layout == embedding.layout == layout and head.weight is embedding.weight
    assert embedding.quantized_weight() == before


def test_refused() -> None:
    with pytest.raises(ValueError, match="int8-a8 quantizes inputs, and the inputs of an embedding are indices"):
        QuantizedEmbedding(N, K, scheme="int8-a8")
    with pytest.raises(ValueError, match="max_norm changes its weight"):
        QuantizedEmbedding.from_embedding(nn.Embedding(N, K, max_norm=1.0), "int8")

    class Other(nn.Embedding):
        pass

    with pytest.raises(ValueError, match=r"Other is a subclass of nn\.Embedding"):
        QuantizedEmbedding.from_embedding(Other(N, K), "int8")
    embedding, _ = tied()
    with pytest.raises(ValueError, match=r"cannot tie a weight int4-g32 \[50, 64\] to one of int8 \[50, 64\]"):
        embedding.tie(QuantizedLinear(K, N, bias=False, scheme="int8"))
    with pytest.raises(ValueError, match=r"to one of int4-g32 \[51, 64\]"):
        embedding.tie(QuantizedLinear(K, N + 1, bias=False, scheme="int4-g32"))
    with pytest.raises(RuntimeError, match="index 50 at position 1 is not a row of a weight of N=50"):
        embedding(torch.tensor([1, 50]))
