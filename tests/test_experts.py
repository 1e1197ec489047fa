"""ExpertWeights and QuantizedExperts: the weights of experts in one tensor, run as a loop over the experts' own products."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import (
    ArtifactError,
    ExpertWeights,
    FormatError,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedWeight,
    _artifact,
)

E, N, K = 3, 40, 96
SCHEMES = [
    "int4-g32",
    "int4-g32-asym",
    "int3",
    "int5-g16-offset",
    "nf4-g32",
    "fp8-b128",
    "int8-a8",
    "int4-g32-a8",
    "fp8-a8",
]
COUNTS = [4, 0, 3]


def dense(seed: int = 0) -> Tensor:
    return torch.randn(E, N, K, generator=torch.Generator().manual_seed(seed))


def rows(count: int = 7) -> Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(9))


# -- canonical weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_expert_is_quantized_as_by_itself(scheme: str) -> None:
    weight = ExpertWeights.quantize(dense(), scheme)
    assert weight.shape == (E, N, K) and len(weight) == E and not weight.has_perm
    for e, one in enumerate(weight):
        assert one == QuantizedWeight.quantize(dense()[e], scheme)
    assert torch.equal(weight.dequantize(), torch.stack([one.dequantize() for one in weight]))
    assert weight.nbytes == sum(one.nbytes for one in weight)
    packed = weight.pack()
    assert packed.shape[0] == E and torch.equal(packed[2], weight[2].pack())
    layout = lowbit._C.preferred_layout("cpu", weight.scheme.desc())
    assert ExpertWeights.unpack(packed, scheme, weight.shape, layout) == weight
    assert ExpertWeights.from_tensors(weight.tensors(), scheme, weight.shape) == weight
    assert ExpertWeights.stack(list(weight), E) == weight


def test_importance_for_all_experts_or_for_each() -> None:
    columns = torch.rand(E, K, generator=torch.Generator().manual_seed(1)) * 100
    each = ExpertWeights.quantize(dense(), "int3-g32", columns)
    assert each[1] == QuantizedWeight.quantize(dense()[1], "int3-g32", columns[1])
    shared = ExpertWeights.quantize(dense(), "int3-g32", columns[0])
    assert shared[0] == each[0] and shared[1] != each[1]
    with pytest.raises(ValueError, match=r"importance must be \[K=96\] or \[E=3, K\], got \[2, 96\]"):
        ExpertWeights.quantize(dense(), "int3-g32", columns[:2])


def test_each_expert_has_its_own_permutation() -> None:
    def one(e: int) -> QuantizedWeight:
        stored = QuantizedWeight.quantize(dense()[e], "int4-g32")
        perm = torch.randperm(K, generator=torch.Generator().manual_seed(e)).int()
        return QuantizedWeight.from_tensors({**stored.tensors(), "perm": perm}, stored.scheme, stored.shape)

    weight = ExpertWeights.stack([one(e) for e in range(E)], E)
    assert weight.has_perm and weight.tensors()["perm"].shape == (E, K)
    layer = QuantizedExperts.from_weight(weight)
    want = torch.cat([rows()[:4] @ weight[0].dequantize().T, rows()[4:] @ weight[2].dequantize().T])
    torch.testing.assert_close(layer(rows(), COUNTS), want, rtol=1e-5, atol=1e-4)
    assert layer.quantized_weight() == weight
    with pytest.raises(ValueError, match=r"expert 1 has \['packed', 'scales'\], expert 0 has .*'perm'"):
        ExpertWeights.stack([one(0), QuantizedWeight.quantize(dense()[1], "int4-g32")], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scales"), r"need \['packed', 'scales'\], got \['packed'\]"),
        (lambda t: t.update(zeros=t["packed"]), r"need \['packed', 'scales'\], got"),
        (lambda t: t.update(packed=t["packed"][:2]), r"packed of int4-g32 experts \[3, 40, 96\] must be torch.uint8"),
        (lambda t: t.update(scales=t["scales"].float()), "scales .* must be torch.bfloat16"),
        (lambda t: t["scales"][1].view(-1)[5].fill_(torch.nan), "expert 1: scales: 1 values are not finite"),
        (lambda t: t.update(perm=torch.zeros(E, K, dtype=torch.int32)), "expert 0: perm is not a permutation"),
    ],
)
def test_refused_tensors(change: object, message: str) -> None:
    tensors = {name: t.clone() for name, t in ExpertWeights.quantize(dense(), "int4-g32").tensors().items()}
    assert callable(change)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        ExpertWeights.from_tensors(tensors, "int4-g32", (E, N, K))


def test_refused_arguments() -> None:
    with pytest.raises(ValueError, match=r"the weights of experts are \[E, N, K\], got \[40, 96\]"):
        ExpertWeights.quantize(dense()[0], "int4-g32")
    with pytest.raises(ValueError, match=r"have shape \(E, N, K\), got \[0, 40, 96\]"):
        ExpertWeights.quantize(dense()[:0], "int4-g32")
    bad = dense()
    bad[2, 3, 4] = torch.inf
    with pytest.raises(ValueError, match="expert 2: 1 of 3840 weights are NaN or infinite"):
        ExpertWeights.quantize(bad, "int4-g32")
    one, other = QuantizedWeight.quantize(dense()[0], "int4-g32"), QuantizedWeight.quantize(dense()[1, :8], "int4-g32")
    with pytest.raises(ValueError, match=r"expert 1 is int4-g32 \[8, 96\], expert 0 is int4-g32 \[40, 96\]"):
        ExpertWeights.stack([one, other], 2)
    with pytest.raises(IndexError, match="expert 3 of 3"):
        ExpertWeights.quantize(dense(), "int4-g32")[3]


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_get_what_their_experts_layer_gives(scheme: str, dtype: torch.dtype) -> None:
    weight = ExpertWeights.quantize(dense(), scheme)
    layer = QuantizedExperts.from_weight(weight, batch_invariant=True)
    assert layer.weight.shape[0] == E and layer.weight.dtype == torch.uint8
    x = rows().to(dtype)
    bias = torch.randn(E, N, generator=torch.Generator().manual_seed(3)).to(dtype)
    ones = [QuantizedLinear.from_weight(weight[e], bias[e], batch_invariant=True) for e in range(E)]
    got = layer(x, COUNTS, bias)
    assert got.dtype == dtype and torch.equal(got, torch.cat([ones[0](x[:4]), ones[2](x[4:])]))
    plain = layer(x, COUNTS)
    assert torch.equal(plain[4:], layer.expert(2)(x[4:]))
    assert layer(x[:0], [0, 0, 0]).shape == (0, N)


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-a8"])
def test_gradients_are_those_of_the_dequantized_weights(scheme: str) -> None:
    weight = ExpertWeights.quantize(dense(), scheme)
    layer, w = QuantizedExperts.from_weight(weight), weight.dequantize()
    x, bias = rows().requires_grad_(), torch.zeros(E, N, requires_grad=True)
    layer(x, COUNTS, bias).square().sum().backward()
    with torch.no_grad():
        dy = 2 * layer(x, COUNTS)
        want = torch.cat([dy[:4] @ w[0], dy[4:] @ w[2]])
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(bias.grad, torch.stack([dy[:4].sum(0), torch.zeros(N), dy[4:].sum(0)]))


def test_an_expert_shares_the_memory() -> None:
    layer = QuantizedExperts.from_dense(dense(), "int4-g32")
    one = layer.expert(1)
    assert one.weight.data_ptr() == layer.weight[1].data_ptr() and not one.weight.requires_grad
    with pytest.raises(IndexError, match="expert 3 of 3"):
        layer.expert(3)


def test_refused_calls() -> None:
    layer = QuantizedExperts.from_dense(dense(), "int4-g32")
    with pytest.raises(ValueError, match=r"x must be \[S, K=96\], got \[7, 64\]"):
        layer(torch.zeros(7, 64), COUNTS)
    for counts in ([4, 3], [4, 0, 2], [8, -1, 0]):
        with pytest.raises(ValueError, match="counts must be 3 numbers that add up to S=7"):
            layer(rows(), counts)
    with pytest.raises(ValueError, match=r"bias must be \[E=3, N=40\], got \[40\]"):
        layer(rows(), COUNTS, torch.zeros(N))
    with pytest.raises(TypeError, match="have no dense slices"):
        layer[0]
    with pytest.raises(RuntimeError, match="is not prepared"):
        QuantizedExperts(E, K, N, "int4-g32")(rows(), COUNTS)
    with pytest.raises(
        RuntimeError, match=r"expert\(\): the weight of QuantizedExperts\(3, 96, 40, .* was never loaded"
    ):
        QuantizedExperts(E, K, N, "int4-g32").expert(0)
    with pytest.raises(ValueError, match="static activations, which experts do not take"):
        QuantizedExperts(E, K, N, "int8-aint8_static")


# -- state -------------------------------------------------------------------------------------------------------------


def test_state_dict_is_canonical_and_comes_back() -> None:
    layer = QuantizedExperts.from_dense(dense(), "int4-g32-asym")
    state = layer.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items() if n != "weight_scheme"} == {
        "weight_packed": (E, N, K // 2), "weight_scales": (E, N, 3), "weight_zeros": (E, N, 3)
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = QuantizedExperts(E, K, N, "int4-g32-asym")
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(rows(), COUNTS), layer(rows(), COUNTS)) and torch.equal(other.weight, layer.weight)
    empty = QuantizedExperts(E, K, N, "int4-g32-asym", device="meta")
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.weight, layer.weight)
    with pytest.raises(
        RuntimeError, match="the state_dict holds a weight of scheme int4-g32-asym, the module is int4-g32"
    ):
        QuantizedExperts(E, K, N, "int4-g32").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_packed"):
        QuantizedExperts(E, K, N, "int4-g32-asym").load_state_dict({})


def test_moving_and_casting_keep_the_bytes() -> None:
    layer = QuantizedExperts.from_dense(dense(), "int4-g32")
    before = layer.weight.detach().clone()
    assert torch.equal(layer.half().weight, before)
    assert copy.deepcopy(layer).quantized_weight() == layer.quantized_weight()
    assert layer.to("meta").weight.is_meta and layer.to_empty(device="cpu").layout == 0
    assert "num_experts=3, in_features=96, out_features=40, scheme='int4-g32', not prepared" in repr(layer)


class Mixture(nn.Module):
    """A model that holds experts of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.up = QuantizedExperts(E, K, N, "int4-g32")
        self.head = nn.Linear(N, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.up(x, COUNTS))
        return found


def mixture() -> Mixture:
    model = Mixture()
    model.up = QuantizedExperts.from_dense(dense(), "int4-g32")
    return model


def test_an_artifact_holds_them(tmp_path: Path) -> None:
    model = mixture()
    lowbit.quantize_(model, "int8")
    assert lowbit.save_quantized(model, tmp_path / "one") == lowbit.save_quantized(model, tmp_path / "two")
    again = lowbit.load_quantized(Mixture, tmp_path / "one")
    assert torch.equal(again(rows()), model(rows())) and again.up.quantized_weight() == model.up.quantized_weight()
    with pytest.raises(ArtifactError, match="up: holds the weights of experts in an order"):
        lowbit.convert_checkpoint(tmp_path / "one", tmp_path / "three", "compressed-tensors")
    with pytest.raises(ArtifactError, match="up: holds the weights of experts"):
        lowbit.compare_checkpoints(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"shape": [0, N, K]}, FormatError, "0 experts"),
        ({"shape": [E, N, 1, K]}, FormatError, r"invalid shape \[3, 40, 1, 96\]"),
        ({"shape": [E + 1, N, K]}, FormatError, r"weight_packed' is .*its layer needs torch.uint8 \[4, 40, 48\]"),
        ({"scheme": {"format": "int8", "activation": "int8_static"}}, FormatError, "input scales would be static"),
    ],
)
def test_a_hostile_manifest(change: dict[str, object], kind: type[Exception], message: str, tmp_path: Path) -> None:
    lowbit.save_quantized(mixture(), tmp_path)
    body = json.loads((tmp_path / "lowbit.json").read_text())
    body.pop("sha256")
    body["layers"]["up"].update(change)
    (tmp_path / "lowbit.json").write_text(json.dumps({**body, "sha256": _artifact._seal(body)}))
    with pytest.raises(kind, match=message):
        lowbit.load_quantized(Mixture, tmp_path)


def test_a_model_of_another_size(tmp_path: Path) -> None:
    lowbit.save_quantized(mixture(), tmp_path)
    other = Mixture()
    other.up = QuantizedExperts(E + 1, K, N, "int4-g32")
    with pytest.raises(ArtifactError, match="layer 'up' is E=3, N=40, K=96, the model's is E=4, N=40, K=96"):
        lowbit.load_quantized(other, tmp_path)
    linear = Mixture()
    linear.up = nn.Linear(K, N)  # type: ignore[assignment]
    with pytest.raises(ArtifactError, match="layer 'up' is E=3, N=40, K=96, the model's is N=40, K=96"):
        lowbit.load_quantized(linear, tmp_path)
