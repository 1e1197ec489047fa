"""load_checkpoint: everything finds its place, nothing is half done, and no tensor is held twice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowbit
from checkpoints import DATA, Layer, ct_config, ct_packed, gptq, gptq_config, named, write
from lowbit import ArtifactError, QuantizedEmbedding, QuantizedLinear, load_checkpoint

HIDDEN, INNER = 64, 96


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER, bias=bias), nn.Linear(INNER, HIDDEN, bias=bias)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """With tied weights, a buffer that is saved and one that is computed."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, HIDDEN)
        self.blocks = nn.ModuleList(Block(bias) for _ in range(2))
        self.head = nn.Linear(HIDDEN, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("saved", torch.zeros(HIDDEN))
        self.register_buffer("table", torch.linspace(0, 1, HIDDEN), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.table + self.saved
        for block in self.blocks:
            x = block(x)
        return self.head(x)


LAYERS = {
    f"blocks.{i}.{name}": Layer(4, *shape, 32, order=name == "up", seed=10 * i + shape[0])
    for i in range(2)
    for name, shape in (("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER)))
}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {key: value for name, layer in LAYERS.items() for key, value in named(name, gptq(layer)).items()}
    made |= {f"{name}.bias": torch.randn(layer.N, generator=generator) for name, layer in LAYERS.items()}
    for i in range(2):
        made[f"blocks.{i}.norm.weight"] = torch.rand(HIDDEN, generator=generator) + 0.5
        made[f"blocks.{i}.norm.bias"] = torch.randn(HIDDEN, generator=generator)
    made["embed.weight"] = torch.randn(11, HIDDEN, generator=generator)
    made["saved"] = torch.randn(HIDDEN, generator=generator)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", tensors(), gptq_config(Layer()))


def dense() -> Model:
    """The model with the weights that the checkpoint stands for."""
    model, given = Model(), tensors()
    for name, layer in LAYERS.items():
        given[f"{name}.weight"] = torch.from_numpy(layer.W)
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            del given[f"{name}.{leaf}"]
    model.load_state_dict({**given, "head.weight": given["embed.weight"]})
    return model.eval()


def on_meta() -> Model:
    with torch.device("meta"):
        model = Model()
    model.table = torch.linspace(0, 1, HIDDEN)
    return model


IDS = torch.tensor([[1, 2, 3, 10]])


@pytest.mark.parametrize("how", ["a function", "a model", "a model on the meta device"])
def test_into_a_model(folder: Path, how: str) -> None:
    given: Any = {"a function": Model, "a model": Model(), "a model on the meta device": on_meta()}[how]
    report = load_checkpoint(folder, given)
    model = report.model
    assert isinstance(model, Model) and (how == "a function" or model is given)
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in LAYERS)
    torch.testing.assert_close(model(IDS), dense()(IDS), rtol=1e-4, atol=1e-3)
    assert model.head.weight is model.embed.weight and not any(p.is_meta for p in model.parameters())
    assert torch.equal(model.saved, tensors()["saved"]) and torch.equal(model.table, torch.linspace(0, 1, HIDDEN))
    assert not report.unused and not report.missing and not report.contents


def test_the_report(folder: Path) -> None:
    report = load_checkpoint(folder, Model)
    assert [layer.name for layer in report.layers] == ["blocks.0.down", "blocks.0.up", "blocks.1.down", "blocks.1.up"]
    assert (report.format, report.variant) == ("gptq", "v1, int4, groups of 32, act-order")
    assert report.layers[1].scheme == "int4-g32-asym-fp16" and report.layers[1].shape == (INNER, HIDDEN)
    assert report.tensors == 6 and report.tensor_bytes == 4 * HIDDEN * (4 + 11 + 1)
    text = str(report)
    assert "4 quantized layers" in text and "blocks.1.down" in text and "6 other tensors" in text
    plain = report.to_dict()
    assert plain["layers"][0]["name"] == "blocks.0.down" and "model" not in plain and "contents" not in plain


def test_without_a_model(folder: Path) -> None:
    report = load_checkpoint(folder)
    assert report.model is None and report.contents.keys() == {*LAYERS, *_plain()}
    layer = report.contents["blocks.0.up"]
    assert isinstance(layer, QuantizedLinear) and layer.bias is not None
    assert report.tensors == len(_plain())


def _plain() -> set[str]:
    return {name for name in tensors() if "norm" in name or name in ("embed.weight", "saved")}


def test_dtype(folder: Path) -> None:
    report = load_checkpoint(folder, Model, dtype=torch.bfloat16)
    assert isinstance(report.model, Model)
    assert {p.dtype for n, p in report.model.named_parameters() if p.dtype != torch.uint8} == {torch.bfloat16}
    assert report.model.to(torch.bfloat16)(IDS).dtype == torch.bfloat16


def test_a_bias_of_another_dtype_becomes_fp32(tmp_path: Path) -> None:
    """Kernels take a bias in x's dtype or in fp32, and fp32 holds both halves exactly."""
    given = {k: v.half() if k.endswith(("up.bias", "down.bias")) else v for k, v in tensors().items()}
    given = {k: v.bfloat16() if v.dtype == torch.float32 else v for k, v in given.items()}
    report = load_checkpoint(write(tmp_path, given, gptq_config(Layer())), Model)
    assert isinstance(report.model, Model)
    layer = report.model.blocks[0].up
    assert layer.bias.dtype == torch.float32 and torch.equal(layer.bias, given["blocks.0.up.bias"].float())
    assert bool(torch.isfinite(layer(torch.randn(2, HIDDEN).bfloat16())).all())


def test_a_device_and_train_mode(folder: Path) -> None:
    model = Model()
    model.blocks[0].eval()
    load_checkpoint(folder, model, device="cpu")
    assert not model.blocks[0].up.training and model.blocks[1].up.training
    assert not model.blocks[0].up.weight.requires_grad and model.embed.weight.requires_grad


def test_rename(tmp_path: Path) -> None:
    given = {f"model.{name}": value for name, value in tensors().items()}
    given["model.extra.weight"] = torch.zeros(2)
    folder = write(tmp_path, given, gptq_config(Layer()))
    rename: Callable[[str], str | None] = lambda name: None if "extra" in name else name.removeprefix("model.")  # noqa: E731
    report = load_checkpoint(folder, Model, rename=rename)
    assert isinstance(report.model, Model)
    torch.testing.assert_close(report.model(IDS), dense()(IDS), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="the same name 'x'"):
        load_checkpoint(folder, Model, rename=lambda name: "x")


def test_a_module_at_two_paths(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(HIDDEN, INNER, bias=False)
            self.again = self.first

    layer = LAYERS["blocks.0.up"]
    report = load_checkpoint(write(tmp_path, named("first", gptq(layer)), gptq_config(layer)), Shared)
    assert isinstance(report.model, Shared)
    assert report.model.first is report.model.again and isinstance(report.model.first, QuantizedLinear)


def test_over_layers_that_are_quantized_already(folder: Path) -> None:
    model = Model()
    lowbit.quantize_(model, "int8")
    load_checkpoint(folder, model)
    torch.testing.assert_close(model(IDS), dense()(IDS), rtol=1e-4, atol=1e-3)


def test_gpt2_keeps_weights_transposed(tmp_path: Path) -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(HIDDEN, INNER)), nn.Parameter(torch.zeros(INNER))

    layer = LAYERS["blocks.0.up"]
    given = {**named("fc", gptq(layer)), "fc.bias": torch.ones(INNER)}
    report = load_checkpoint(write(tmp_path, given, gptq_config(layer)), lambda: nn.ModuleDict({"fc": Conv1D()}))
    assert report.model is not None and isinstance(report.model.get_submodule("fc"), QuantizedLinear)


@pytest.mark.parametrize("shared", ["out", "nothing", "another embedding"])
def test_a_quantized_embedding(shared: str, tmp_path: Path) -> None:
    layer = Layer(8, N=11, K=HIDDEN, group_size=32, symmetric=True)
    fc = Layer(8, N=INNER, K=HIDDEN, group_size=32)
    given = {**named("embed", ct_packed(layer)), **named("fc", ct_packed(fc)), "norm.weight": torch.ones(2).bfloat16()}

    def make() -> nn.Module:
        model = nn.ModuleDict({"embed": nn.Embedding(11, HIDDEN), "fc": nn.Linear(HIDDEN, INNER, False)})
        model["norm"] = nn.RMSNorm(2)
        model["out"] = nn.Linear(HIDDEN, 11, False)
        if shared == "out":
            model["out"].weight = model["embed"].weight
        if shared == "another embedding":
            model["out"] = nn.Embedding(11, HIDDEN)
            model["out"].weight = model["embed"].weight
        return model

    if shared == "nothing":
        given["out.weight"] = torch.randn(11, HIDDEN).bfloat16()
    report = load_checkpoint(write(tmp_path, given, ct_config(layer)), make)
    model, want = report.model, torch.from_numpy(layer.W).bfloat16()
    assert isinstance(model, nn.ModuleDict)
    assert torch.equal(model["embed"](torch.arange(11)), want)
    schemes = {line.name: line.scheme for line in report.layers}
    if shared == "another embedding":
        assert model["out"].weight is model["embed"].weight and torch.equal(model["embed"].weight, want)
        assert schemes["embed"] == "dequantized"
        return
    assert schemes == {"embed": "int8-g32-fp16", "fc": "int8-g32-asym-fp16"}
    assert isinstance(model["embed"], QuantizedEmbedding)
    if shared == "nothing":
        assert type(model["out"]) is nn.Linear
        return
    assert model["out"].weight is model["embed"].weight and isinstance(model["out"], QuantizedLinear)
    x = torch.randn(2, HIDDEN)
    torch.testing.assert_close(model["out"](x), x @ torch.from_numpy(layer.W).T, rtol=1e-4, atol=1e-3)
    lowbit.save_quantized(model, tmp_path / "artifact")
    again = lowbit.load_quantized(make, tmp_path / "artifact")
    assert isinstance(again, nn.ModuleDict) and again["out"].weight is again["embed"].weight
    assert torch.equal(again["out"](x), model["out"](x)) and again["embed"].dtype == torch.float32
    stored = sum(path.stat().st_size for path in (tmp_path / "artifact").glob("*.safetensors"))
    assert stored < model["embed"].weight.nbytes + model["fc"].weight.nbytes + 4000


def test_inputs_and_pre_scales_reach_the_modules(tmp_path: Path) -> None:
    layer = Layer(8, N=INNER, K=HIDDEN, group_size=-1, symmetric=True, scale=torch.float32)
    given = named("fc", {"weight": (layer.codes - 128).astype(np.int8), "weight_scale": layer.scales[:, 0]})
    given |= {"fc.pre_quant_scale": torch.rand(HIDDEN) + 0.5, "fc.input_scale": torch.tensor(0.05)}
    about = {"quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL"}}
    folder = write(tmp_path, given, None, hf_quant_config=about)
    report = load_checkpoint(folder, lambda: nn.ModuleDict({"fc": nn.Linear(HIDDEN, INNER, bias=False)}))
    assert report.model is not None
    made = report.model.get_submodule("fc")
    assert isinstance(made, QuantizedLinear) and made.input_scale is not None and made.input_pre_scale is not None
    assert torch.equal(made.input_pre_scale, given["fc.pre_quant_scale"]) and made.input_scale.tolist() == [
        0.05000000074505806
    ]


# -- what does not fit -----------------------------------------------------------------------------------------------------


def _model(**changes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Model()
        for path, module in changes.items():
            parent, _, name = path.replace("__", ".").rpartition(".")
            setattr(model.get_submodule(parent), name, module)
        return model

    return make


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (_model(blocks__0__up=nn.Linear(HIDDEN, 8)), {}, r"layer 'blocks.0.up' is N=96, K=64, the model's is N=8, K=64"),
        (_model(blocks__0__up=nn.ReLU()), {}, "layer 'blocks.0.up' is quantized, the model has a ReLU there"),
        (_model(blocks__0__up=nn.Bilinear(2, 2, 2)), {}, "the model has a Bilinear there"),
        (_model(extra=nn.Linear(2, 2)), {}, "nothing is stored for the model's extra.weight, extra.bias"),
        (_model(), {"other.weight": torch.ones(1)}, "the model has no other.weight"),
        (_model(), {"saved": torch.ones(3)}, r"saved is \[3\], the model's is \[64\]"),
        (_model(), {"saved": None}, "nothing is stored for the model's saved"),
        (_model(), {"blocks.1.up.bias": None}, "nothing is stored for the model's blocks.1.up.bias"),
        (_model(blocks__1__up=nn.Linear(HIDDEN, INNER, bias=False)), {}, "layer 'blocks.1.up' has a bias, the model's has none"),
        (nn.Identity, {}, "the model has no blocks.0.down, blocks.0.up, .* and 5 more"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, make: Callable[[], nn.Module], change: dict[str, Tensor | None], message: str) -> None:
    given = {name: value for name, value in {**tensors(), **change}.items() if value is not None}
    folder = write(tmp_path, given, gptq_config(Layer()))
    model = make()
    before = _state(model)
    with pytest.raises(ArtifactError, match=message):
        load_checkpoint(folder, model)
    assert _same(before, _state(model))


def _state(model: nn.Module) -> list[tuple[str, object, object]]:
    found: list[tuple[str, object, object]] = [(name, module, None) for name, module in model.named_modules()]
    tensors_of = [*model.named_parameters(), *model.named_buffers()]
    return found + [(name, tensor, tensor.detach().clone()) for name, tensor in tensors_of]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x[0] == y[0] and x[1] is y[1] and (x[2] is None or torch.equal(x[2], y[2])) for x, y in zip(a, b, strict=True)
    )


def test_a_bad_value_leaves_the_model_alone(tmp_path: Path) -> None:
    """Found when the last layer is read, long after the headers passed."""
    given = tensors()
    given["blocks.1.up.scales"] = torch.full_like(given["blocks.1.up.scales"], torch.nan)
    model = Model()
    before = _state(model)
    with pytest.raises(ArtifactError, match=r"blocks\.1\.up: scales: .* values are not finite"):
        load_checkpoint(write(tmp_path, given, gptq_config(Layer())), model)
    assert _same(before, _state(model))


def test_not_strict(tmp_path: Path) -> None:
    given = {**tensors(), "other.weight": torch.ones(1), "blocks.0.up.k_scale": torch.ones(1)}
    given["rotary_emb.inv_freq"] = torch.ones(3)
    del given["blocks.0.norm.bias"]
    folder = write(tmp_path, given, gptq_config(Layer()))
    report = load_checkpoint(folder, Model(), strict=False)
    assert dict(report.unused) == {
        "other.weight": "the model has no such tensor",
        "blocks.0.up.k_scale": "the scale of a quantized KV cache",
        "rotary_emb.inv_freq": "models compute it",
    }
    assert report.missing == ("blocks.0.norm.bias",)
    assert "not used: " in str(report) and "missing: blocks.0.norm.bias" in str(report)
    with pytest.raises(ArtifactError, match=r"no quantized layer of the checkpoint \(blocks\..*\) is in the model"):
        load_checkpoint(folder, nn.Identity(), strict=False)


def test_tensors_that_the_model_has_already(tmp_path: Path) -> None:
    """The head's weight beside the embedding's that it is tied to, and a table that the model computes."""
    given = {**tensors(), "head.weight": tensors()["embed.weight"], "table": torch.zeros(HIDDEN)}
    report = load_checkpoint(write(tmp_path, given, gptq_config(Layer())), Model)
    assert dict(report.unused) == {"head.weight": "tied to embed.weight", "table": "the model computes it"}
    assert isinstance(report.model, Model) and report.model.head.weight is report.model.embed.weight
    torch.testing.assert_close(report.model(IDS), dense()(IDS), rtol=1e-4, atol=1e-3)


def test_a_bias_of_zeros_that_the_model_does_not_have(tmp_path: Path) -> None:
    """As auto-gptq writes one for layers without."""
    given = {k: torch.zeros_like(v) if k.endswith(("up.bias", "down.bias")) else v for k, v in tensors().items()}
    report = load_checkpoint(write(tmp_path, given, gptq_config(Layer())), lambda: Model(bias=False))
    assert isinstance(report.model, Model) and report.model.blocks[0].up.bias is None
    wanted = dense()
    for name in LAYERS:
        nn.init.zeros_(wanted.get_submodule(name).bias)
    torch.testing.assert_close(report.model(IDS), wanted(IDS), rtol=1e-4, atol=1e-3)


def test_a_computed_buffer_on_the_meta_device(folder: Path) -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ArtifactError, match="nothing is stored for the model's table"):
        load_checkpoint(folder, model)


# -- real ones, and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gptq-v2-asym-act-order", "awq-gemm", "ct-w4a16-asym", "ct-w8a8", "ct-fp8-dynamic", "fp8-block128"]
)
def test_real_checkpoints_run(name: str) -> None:
    contents = load_checkpoint(DATA / name).contents
    layer = contents["model.layers.0.self_attn.k_proj"]
    assert isinstance(layer, QuantizedLinear)
    source = load_file(DATA / "dense" / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"].float()
    x = torch.randn(16, 256)
    wanted = x @ source.T
    assert float((layer(x) - wanted).norm() / wanted.norm()) < (
        0.15 if "4" in layer.scheme.format or "awq" in name else 0.05
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_holds_the_packed_model_and_one_layer(tmp_path: Path) -> None:
    """64 layers of a million weights take little more than their packed size (35 MB; dense they would take 270)."""
    code = """
import re, sys
import lowbit
from torch import nn

def load(folder, count):
    make = lambda: nn.ModuleDict({f"l{i}": nn.Linear(1024, 1024, bias=False) for i in range(count)})
    return lowbit.load_checkpoint(folder, make)

def memory(what):
    return int(re.search(rf"{what}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

load(sys.argv[1], 1)  # libraries, and the memory of one layer
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
report = load(sys.argv[2], 64)
print(memory("VmHWM") - before)
"""
    layer = Layer(4, 1024, 1024, 128)
    stored = named("x", gptq(layer))
    for count in (1, 64):
        given = {f"l{i}.{name[2:]}": value for i in range(count) for name, value in stored.items()}
        write(tmp_path / str(count), given, gptq_config(layer))
    args = [sys.executable, "-c", code, str(tmp_path / "1"), str(tmp_path / "64")]
    run = subprocess.run(args, capture_output=True, text=True, check=True)
    packed = 64 * 1024 * 1024 * 4.2 / 8
    assert int(run.stdout) * 1024 < 1.5 * packed
