"""quantize_: which layers change, what is reported, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from torch import nn

from lowbit import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, Scheme, quantize_
from lowbit.report import format_bytes


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Model(nn.Module):
    def __init__(self, width: int = 64, vocabulary: int = 100, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


ALL = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]


def quantized(model: nn.Module) -> dict[str, str]:
    return {name: str(m.scheme) for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def test_quantizes_linear_layers_in_place() -> None:
    model = Model().eval()
    ids = torch.randint(100, (2, 7))
    before = model(ids)
    report = quantize_(model, "int8")
    assert quantized(model) == dict.fromkeys(ALL, "int8")
    assert type(model.lm_head) is nn.Linear
    assert not model.layers[0].up.training
    assert torch.nn.functional.cosine_similarity(before.flatten(), model(ids).flatten(), 0) > 0.999
    assert [layer.name for layer in report.layers] == ALL


# -- choosing ------------------------------------------------------------------------------------------------------------


def test_overrides_first_match_wins() -> None:
    model = Model()
    quantize_(
        model,
        "int4-g32",
        overrides={
            "layers.0.down": "int8",
            "*.down": Scheme("int6", 32),
            "re:layers\\.0\\..*": None,
            "layers.?.up": "nf4-g64",
        },
    )
    assert quantized(model) == {"layers.0.down": "int8", "layers.1.down": "int6-g32", "layers.1.up": "nf4-g64"}


def test_an_override_reaches_the_output_layer() -> None:
    model = Model()
    quantize_(model, "int4-g32", overrides={"lm_head": "int8", "embed": None})
    assert quantized(model)["lm_head"] == "int8"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.gate": "int8"}, r"override '\*\.gate' matches no layer; .* layers\.0\.up"),
        ({"nothing": None}, "override 'nothing' matches no layer"),
        ({"up": "int8"}, "override 'up' matches no layer"),
        ({"*norm": "int8"}, r"override '\*norm' matches no layer"),
        ({"embed": "int8-a8"}, "embed: .*quantizes inputs, and the inputs of an embedding are indices"),
        ({"re:[": None}, "not a regular expression"),
        ({"*.up": "int9"}, "unknown format 'int9'"),
        ({"*.up": "int4-g128"}, "layers.0.up: group_size=128 is larger than K=64"),
        ({"*.up": "int8-aint8_static"}, "layers.0.up: .* calibrated input scales"),
    ],
)
def test_bad_overrides_change_nothing(overrides: dict[str, str | None], message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        quantize_(model, "int4-g32", overrides=overrides)
    assert quantized(model) == {}


def test_a_bad_layer_at_the_end_changes_nothing() -> None:
    model = Model()
    with torch.no_grad():
        model.layers[1].down.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.down: 1 of 8192 weights are NaN or infinite"):
        quantize_(model, "int4-g32")
    assert quantized(model) == {}
    with torch.device("meta"):
        model.layers[1].down = nn.Linear(128, 64)
    with pytest.raises(ValueError, match=r"layers\.1\.down: .*meta device"):
        quantize_(model, "int4-g32")
    assert quantized(model) == {}


def test_filter_fn() -> None:
    model = Model()
    asked = []

    def choose(name: str, linear: nn.Linear) -> bool:
        asked.append(name)
        return linear.in_features == 64

    quantize_(model, "int4-g32", filter_fn=choose, overrides={"layers.0.up": "int8"})
    assert quantized(model) == {"layers.0.up": "int8", "layers.1.up": "int4-g32"}
    assert asked == ["layers.0.down", "layers.1.up", "layers.1.down"]


def test_a_linear_itself_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match=r"QuantizedLinear\.from_linear"):
        quantize_(nn.Linear(8, 8), "int8")


def test_get_output_embeddings_marks_the_output_layer() -> None:
    class Named(Model):
        def get_output_embeddings(self) -> nn.Module:
            return self.layers[1].down

    class Base(Model):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    model = Named()
    quantize_(model, "int8")
    assert "layers.1.down" not in quantized(model)
    quantize_(Base(), "int8")


def test_subclasses_are_left_alone() -> None:
    model = nn.Sequential(nn.MultiheadAttention(64, 4), nn.Linear(64, 64))
    quantize_(model, "int8")
    assert quantized(model) == {"1": "int8"}
    x = torch.randn(3, 2, 64)
    assert model[0](x, x, x)[0].shape == (3, 2, 64)


def test_transformer_encoder_in_eval_mode_takes_the_ordinary_path() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 64)
    with torch.inference_mode():
        before = encoder(x)
    report = quantize_(encoder, "int8")
    assert [layer.name for layer in report.layers] == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), before, rtol=0.1, atol=0.1)


def test_again_is_a_no_op() -> None:
    model = Model()
    quantize_(model, "int4-g32")
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert quantize_(model, "int8").layers == ()
    assert all(model.get_submodule(name).weight is weight for name, weight in weights.items())


# -- sharing -----------------------------------------------------------------------------------------------------------------


def test_tied_weights_stay_tied_and_are_reported() -> None:
    model = Model(vocabulary=4000, tie=True)
    report = quantize_(model, "int4-g32")
    assert model.lm_head.weight is model.embed.weight
    assert [(s.name, s.reason) for s in report.skipped] == [("embed.weight", "an embedding")]
    with pytest.raises(ValueError, match=r"lm_head: tied to embed\.weight"):
        quantize_(Model(tie=True), "int8", overrides={"lm_head": "int8"})


@pytest.mark.parametrize("tie", [False, True])
def test_an_embedding_that_an_override_names(tie: bool) -> None:
    model, ids = Model(tie=tie), torch.tensor([[1, 2, 3]])
    before = model.embed.weight.detach().clone()
    report = quantize_(model, "int4-g32", overrides={"embed": "int8-g32"})
    weight = QuantizedWeight.quantize(before, "int8-g32")
    assert isinstance(model.embed, QuantizedEmbedding) and model.embed.quantized_weight() == weight
    assert torch.equal(model.embed(ids), weight.dequantize()[ids])
    line = next(line for line in report.layers if line.name == "embed")
    assert line.shape == tuple(before.shape) and 0 < line.relative_error < 0.01
    if tie:
        assert isinstance(model.lm_head, QuantizedLinear) and model.lm_head.weight is model.embed.weight
        assert report.bytes_after == sum(p.nbytes for p in model.parameters())  # each Parameter once
    else:
        assert type(model.lm_head) is nn.Linear
    assert bool(model(ids).isfinite().all())
    plain = Model()
    quantize_(plain, "int4-g32", overrides={"*": "int8"})
    assert type(plain.embed) is nn.Embedding  # a pattern has to name it


def test_an_embedding_that_something_else_shares() -> None:
    model = Model()
    model.other = nn.Embedding(*model.embed.weight.shape)
    model.other.weight = model.embed.weight
    with pytest.raises(ValueError, match=r"embed: its weight is tied to that of a module which is no nn\.Linear"):
        quantize_(model, "int4-g32", overrides={"embed": "int8"})


def test_two_layers_that_share_a_weight_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    quantize_(model, "int8")
    assert quantized(model) == {"2": "int8"}


def test_one_layer_at_two_paths_is_quantized_once() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    report = quantize_(model, "int8")
    assert len(report.layers) == 1
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], QuantizedLinear)


def test_hooks_stay_in_place() -> None:
    model = Model()
    seen = []
    model.layers[0].up.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    model.layers[0].up.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    quantize_(model, "int8")
    model(torch.randint(100, (1, 2)))
    assert seen == [[], QuantizedLinear]


# -- report -----------------------------------------------------------------------------------------------------------------


def test_large_parameters_left_unquantized_are_listed_with_the_reason() -> None:
    class Extra(Model):
        def __init__(self) -> None:
            super().__init__(width=512, vocabulary=1000)
            self.conv = nn.Conv1d(512, 512, 3)
            self.table = nn.Parameter(torch.zeros(512, 512))

    model = Extra()
    overrides = {"layers.0.up": None}
    report = quantize_(model, "int4-g32", overrides=overrides, filter_fn=lambda name, _: name != "layers.1.up")
    assert {(s.name, s.reason, s.chosen) for s in report.skipped} == {
        ("table", "Extra is not nn.Linear", False),
        ("embed.weight", "an embedding", False),
        ("conv.weight", "Conv1d is not nn.Linear", False),
        ("lm_head.weight", "an output layer; name it in overrides to quantize it", False),
        ("layers.0.up.weight", "override 'layers.0.up' is None", True),
        ("layers.1.up.weight", "filter_fn returned False", True),
    }
    assert all(s.nbytes >= 1_000_000 for s in report.skipped)
    for name in ("table", "conv.weight", "an output layer"):
        assert name in str(report)


def test_strict_raises_before_anything_changes() -> None:
    model = Model(width=256, vocabulary=1000)
    with pytest.raises(ValueError, match=r"strict: .*embed\.weight \(1024000 bytes\): an embedding; lm_head\.weight"):
        quantize_(model, "int4-g32", strict=True)
    assert quantized(model) == {}
    quantize_(model, "int4-g32", strict=True, overrides={"embed": None, "lm_head": "int8"})
    assert len(quantized(model)) == 5


def test_report_numbers() -> None:
    model = Model(width=128)
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in ALL}
    before = sum(p.nbytes for p in model.parameters())
    report = quantize_(model, "int4-g32")
    assert report.bytes_before == before
    assert report.bytes_after == sum(p.nbytes for p in model.parameters())
    for row in report.layers:
        module = model.get_submodule(row.name)
        made = module.quantized_weight().dequantize()
        assert row.relative_error == pytest.approx(
            float((made - dense[row.name]).norm() / dense[row.name].norm()), rel=1e-5
        )
        assert row.sqnr_db == pytest.approx(-20 * torch.tensor(row.relative_error).log10().item(), rel=1e-5)
        assert row.shape == tuple(dense[row.name].shape)
        assert (row.bytes_before, row.bytes_after) == (dense[row.name].nbytes, module.weight.nbytes)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["scheme"] == "int4-g32"
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "scheme", "N", "x", "K", "before", "after", "error", "SQNR", "dB"]
    assert len({len(line) for line in lines[:2]}) == 1
    assert lines[-1].startswith("4 layers quantized; model ")


@pytest.mark.parametrize("scheme", ["fp8-b128", "int4-g64-asym", "int8"])
def test_error_is_right_for_layers_of_many_slices(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.convert._ERROR_CHUNK", 1)  # 128 rows at a time
    model = nn.Sequential(nn.Linear(64, 300))
    dense = model[0].weight.detach().clone()
    (row,) = quantize_(model, scheme).layers
    made = model[0].quantized_weight().dequantize()
    assert row.relative_error == pytest.approx(float((made - dense).norm() / dense.norm()), rel=1e-5)


def test_zeros_have_no_error() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    nn.init.zeros_(model[0].weight)
    (row,) = quantize_(model, "int4-g32").layers
    assert (row.relative_error, row.sqnr_db) == (0.0, float("inf"))


def test_bytes_for_people() -> None:
    sizes = [0, 999, 1000, 999_949, 999_950, 5_000_000_000, 10**18]
    assert [format_bytes(n) for n in sizes] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "5.0 GB",
        "1000000.0 TB",
    ]


# -- importance, memory, progress ----------------------------------------------------------------------------------------------


def test_importance_is_used_and_checked() -> None:
    torch.manual_seed(0)
    state = Model().state_dict()
    column = torch.zeros(64)
    column[0] = 1.0

    def first_column_error(importance: dict[str, torch.Tensor]) -> float:
        model = Model()
        model.load_state_dict(state)
        quantize_(model, "int3-g64", importance=importance)
        made = model.layers[0].up.quantized_weight().dequantize()
        return float((made - state["layers.0.up.weight"])[:, 0].norm())

    assert first_column_error({"layers.0.up": column}) < first_column_error({})
    for importance, message in (
        ({"layers.0.up": torch.ones(3)}, r"layers\.0\.up: importance must be \[K=64\]"),
        ({"layers.9.up": torch.ones(64)}, "importance names layers.9.up, which are not linear layers of the model"),
    ):
        model = Model()
        with pytest.raises(ValueError, match=message):
            quantize_(model, "int4-g32", importance=importance)
        assert quantized(model) == {}


def test_dense_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    alive = [weakref.ref(linear.weight) for linear in model]
    counts = []
    original = QuantizedLinear.from_weight

    def spy(*args: object, **kwargs: object) -> QuantizedLinear:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        return original(*args, **kwargs)

    monkeypatch.setattr(QuantizedLinear, "from_weight", spy)
    quantize_(model, "int4-g32")
    assert counts == [6, 5, 4, 3, 2, 1]


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    quantize_(Model(), "int8")
    assert capsys.readouterr() == ("", "")
    quantize_(Model(), "int8", progress=True)
    assert capsys.readouterr().out == ""  # a bar belongs on stderr


class Mixture(nn.Module):
    """A mixture of experts with routers as they are named in the wild."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4, bias=False)
        self.router = nn.ModuleDict({"classifier": nn.Linear(64, 4)})
        self.shared_expert_gate = nn.Linear(64, 1, bias=False)
        self.gate_proj = nn.Linear(64, 32)
        self.experts = nn.ModuleList(nn.ModuleDict({"gate": nn.Linear(64, 64)}) for _ in range(2))


def test_routers_are_left_alone() -> None:
    """A few bytes that decide everything; Transformers 5.0 also reads the weight of DeepSeek-V2's past its module."""
    names = ["0.gate_proj", "0.experts.0.gate", "0.experts.1.gate", "1"]
    model = nn.Sequential(Mixture(), nn.Linear(64, 64))
    assert [layer.name for layer in quantize_(model, "int8").layers] == names
    model = nn.Sequential(Mixture(), nn.Linear(64, 64))
    report = quantize_(model, "int8", overrides={"0.gate": "int8-g32", "*.router.*": "int8"})
    assert [layer.name for layer in report.layers] == ["0.gate", "0.router.classifier", *names]
    plain = nn.Sequential(nn.ModuleDict({"gate": nn.Linear(64, 64)}))  # no experts: a gate of another kind
    assert [layer.name for layer in quantize_(plain, "int8").layers] == ["0.gate"]


class Direct(nn.Module):
    """Uses of a layer's weight past the layer, as in T5, Mamba and DETR, and others that do no harm."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("wo", "dt_proj", "k_proj", "harmless", "called"):
            setattr(self, name, nn.Linear(64, 64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.called.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x).to(self.harmless.weight.device)
        x = self.wo(x.to(self.wo.weight.dtype)) + self.harmless(x)
        return self.inner(x) @ self.dt_proj.weight

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.k_proj.weight, self.k_proj.bias)


def test_weights_that_are_used_without_the_layer() -> None:
    model = nn.Sequential(Direct(), nn.TransformerEncoderLayer(64, 4, 64, batch_first=True))
    report = quantize_(model, "int8")
    names = ["0.harmless", "0.called", "1.linear1", "1.linear2"]
    assert [layer.name for layer in report.layers] == names
    assert model[0](torch.randn(2, 64)).shape == (2, 64)
    with pytest.raises(ValueError, match="would be left unquantized"):
        quantize_(nn.Sequential(Large()), "int8", strict=True)


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.wo = nn.Linear(8, 8), nn.Linear(512, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(self.fc(x).to(self.wo.weight.dtype))
