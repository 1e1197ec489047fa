"""Mixtures of experts in Transformers: their Parameters are quantized, run by our implementation, saved and loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowbit
from checkpoints import Layer, awq_gemm, ct_config, ct_packed, gptq, gptq_config, named
from hf import greedy, load, logits, save, store, transformers
from lowbit import ArtifactError, QuantizedExperts, QuantizedLinear
from lowbit.cli import main

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"]
UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
_MORE = {"mixtral": {"num_local_experts": 4}}


def dense(folder: Path, family: str = "mixtral") -> Path:
    return save(folder / "dense", family, **_MORE.get(family, {}))


def experts(model: nn.Module) -> dict[str, QuantizedExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedExperts)}


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_on_load_saved_and_loaded(family: str, tmp_path: Path) -> None:
    folder = dense(tmp_path, family)
    model = load(folder, quantization_config=lowbit.LowbitConfig("int4-g32"), dtype=torch.float32)
    found = experts(model)
    assert UP in found and DOWN in found and model.config._experts_implementation != "lowbit"
    assert model.model.layers[1].mlp.experts.config._experts_implementation == "lowbit"
    assert found[UP].weight.dim() == 2 and not [p for p in model.parameters() if p.dim() == 3]
    expected, tokens = logits(model), greedy(model, 6)

    reference = load(folder)
    before = reference.config._experts_implementation
    report = lowbit.quantize_(reference, "int4-g32")
    assert torch.equal(logits(reference), expected)
    assert {layer.name: layer.shape for layer in report.layers}[DOWN] == tuple(found[DOWN]._shape)
    assert report.bytes_after == sum(t.nbytes for t in (*reference.parameters(), *reference.buffers()))

    plain = copy.deepcopy(model).dequantize()
    assert not experts(plain) and plain.model.layers[1].mlp.experts.config._experts_implementation == before
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(plain, 6), tokens)

    for i, one in enumerate((model, reference)):
        one.save_pretrained(tmp_path / str(i))
        again = load(tmp_path / str(i))
        assert experts(again).keys() == found.keys() and torch.equal(logits(again), expected)
        about = json.loads((tmp_path / str(i) / "config.json").read_text())
        assert about["quantization_config"]["layers"][UP] == "int4-g32"
        assert "experts_implementation" not in json.dumps(about)


def test_overrides_name_a_parameter_or_its_module(tmp_path: Path) -> None:
    folder = dense(tmp_path)
    overrides = {"*.1.*down_proj": "int8", "*.1.mlp.experts": "nf4-g32", "*.0.mlp.experts": None}
    model = load(folder, quantization_config=lowbit.LowbitConfig("int4-g32", overrides=overrides))
    assert {name: str(m.scheme) for name, m in experts(model).items()} == {UP: "nf4-g32", DOWN: "int8"}
    assert type(model.model.layers[0].mlp.experts.down_proj) is nn.Parameter
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and len(experts(again)) == 2

    half = load(folder)
    report = lowbit.quantize_(half, "int4-g32", overrides={DOWN: None})
    assert UP in experts(half) and DOWN not in experts(half)
    plain = copy.deepcopy(half).dequantize()
    torch.testing.assert_close(logits(half), logits(plain), rtol=1e-4, atol=1e-4)
    assert DOWN not in {layer.name for layer in report.layers}
    with pytest.raises(
        ValueError, match=r"override '\*\.w1' matches no layer; layers are called, for example, .*q_proj"
    ):
        lowbit.quantize_(load(folder), "int4-g32", overrides={"*.w1": "int8"})


def test_filters_are_shown_an_experts_features(tmp_path: Path) -> None:
    model = load(dense(tmp_path, "gpt_oss"))
    asked: dict[str, tuple[int, int]] = {}

    def only_down(name: str, linear: nn.Linear) -> bool:
        asked[name] = linear.in_features, linear.out_features
        return name.endswith("experts.down_proj")

    lowbit.quantize_(model, "int4-g32", filter_fn=only_down)
    assert asked[UP] == (64, 192) and asked[DOWN] == (96, 64)
    assert list(experts(model)) == [DOWN.replace(".1.", ".0."), DOWN]


def test_importance_names_experts(tmp_path: Path) -> None:
    folder = dense(tmp_path)
    columns = torch.rand(4, 96, generator=torch.Generator().manual_seed(0)) * 50
    one, other = load(folder), load(folder)
    lowbit.quantize_(one, "int3-g32", importance={DOWN: columns})
    lowbit.quantize_(other, "int3-g32", importance={DOWN: columns[0]})
    assert experts(one)[DOWN].quantized_weight()[0] == experts(other)[DOWN].quantized_weight()[0]
    assert experts(one)[DOWN].quantized_weight() != experts(other)[DOWN].quantized_weight()
    with pytest.raises(ValueError, match="down_proj: importance must be"):
        lowbit.quantize_(load(folder), "int3-g32", importance={DOWN: columns[:, :5]})


def test_errors_name_the_parameter(tmp_path: Path) -> None:
    model = load(dense(tmp_path))
    with torch.no_grad():
        model.get_parameter(DOWN)[2, 1, 1] = torch.nan
    sizes = {"*.down_proj": "int8", "*.experts.gate_up_proj": "int4-g96"}
    with pytest.raises(ValueError, match="gate_up_proj: group_size=96 is larger than K=64"):
        lowbit.quantize_(model, "int4-g32", overrides=sizes)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: 1 of 6144 weights are NaN"):
        lowbit.quantize_(model, "int4-g32")
    assert not experts(model)


def test_another_implementation_leaves_quantized_experts_alone(tmp_path: Path) -> None:
    model = load(dense(tmp_path))
    lowbit.quantize_(model, "int4-g32", overrides={"*.0.mlp.experts": None})
    expected = logits(model)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    other = transformers.AutoModelForCausalLM.from_config(model.config)  # of the same config, and not quantized
    assert not experts(other) and other.model.layers[1].mlp.experts.config._experts_implementation == "eager"


def test_other_parameters_of_three_dimensions_are_announced(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, intermediate_size_mlp=96, num_hidden_layers=1, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, interleave_moe_layer_step=1, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"2 tensors of 3 dimensions \(model\.layers\.0\..*experts.*not quantized"):
        load(tmp_path, quantization_config=lowbit.LowbitConfig("int4-g32"))


def test_adapters_on_the_other_layers_train(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(dense(tmp_path, "qwen3_moe"), quantization_config=lowbit.LowbitConfig("int4-g32"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.arange(1, 17).view(2, 8)
    losses = []
    for _ in range(6):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


# -- checkpoints that keep each expert by itself -----------------------------------------------------------------------


def per_expert(folder: Path, kind: str, family: str = "mixtral", shared: bool = True) -> tuple[Any, Path]:
    """A model whose experts another library quantized one by one, and the dense one that it stands for.

    shared: columns of act-order weights are in the same order for all layers of an expert.
    """
    tensors = load_file(dense(folder, family) / "model.safetensors")
    plain = dict(tensors)
    for seed, name in enumerate([name for name in tensors if ".experts." in name]):
        layer = Layer(4, *tensors.pop(name).shape, 32, True, order=kind == "gptq", seed=seed)
        if shared:
            layer.g_idx = Layer(4, 8, layer.K, 32, True, order=kind == "gptq").g_idx
        tensors |= named(name.removesuffix(".weight"), awq_gemm(layer) if kind == "awq" else gptq(layer, version=2))
        plain[name] = torch.from_numpy(layer.W)
    about = json.loads((folder / "dense" / "config.json").read_text())
    store(folder / "dense" / "model.safetensors", plain)
    (folder / "quantized").mkdir()
    store(folder / "quantized" / "model.safetensors", tensors)
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    about["quantization_config"] = awq if kind == "awq" else gptq_config(layer, checkpoint_format="gptq_v2")
    (folder / "quantized" / "config.json").write_text(json.dumps(about))
    return load(folder / "dense", dtype=torch.float32), folder / "quantized"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_experts_that_are_kept_one_by_one(kind: str, family: str, tmp_path: Path) -> None:
    reference, folder = per_expert(tmp_path, kind, family)
    model = load(folder, quantization_config=lowbit.LowbitConfig(from_checkpoint=True), dtype=torch.float32)
    found = experts(model)
    assert len(found) == 4 and not [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert torch.equal(found[UP].quantized_weight().dequantize(), reference.get_parameter(UP))
    assert torch.equal(found[DOWN].quantized_weight().dequantize(), reference.get_parameter(DOWN))
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(model, 6), greedy(reference, 6))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))

    def mine(name: str) -> str:
        return name.replace("block_sparse_moe.", "mlp.")

    about = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    report = lowbit.load_checkpoint(
        folder, lambda: transformers.AutoModelForCausalLM.from_config(about, dtype=torch.float32), rename=mine
    )
    assert report.model is not None and {layer.shape for layer in report.layers} == {
        tuple(m._shape) for m in found.values()
    }
    assert torch.equal(logits(report.model.eval()), logits(model))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])  # w1, w2, w3 in a block_sparse_moe; gate, up, down_proj
def test_compared_and_converted_expert_by_expert(family: str, tmp_path: Path) -> None:
    folder = dense(tmp_path, family)
    asked = lowbit.LowbitConfig("int4-g32", overrides={"*.experts.down_proj": "int8-g32"})
    model = load(folder, quantization_config=asked, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    if transformers.__version__.startswith("5.0.") and family == "mixtral":
        pytest.skip("it saves what is quantized by other names than what is dense")
    found = lowbit.compare_checkpoints(folder, tmp_path / "saved")
    assert not found.only_a and not found.only_b and not found.different
    stored = {name.removesuffix(".weight") for name in load_file(folder / "model.safetensors") if ".experts." in name}
    errors = {layer.name: layer.relative_error for layer in found.layers}
    assert len(stored) == 2 * 4 * 3 and stored < errors.keys()
    report = lowbit.convert_checkpoint(tmp_path / "saved", tmp_path / "ct", "compressed-tensors")
    assert {layer.name: layer.relative_error for layer in report.layers} == dict.fromkeys(errors, 0.0)
    again = load(tmp_path / "ct", quantization_config=lowbit.LowbitConfig(from_checkpoint=True), dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    lowbit.save_quantized(model, tmp_path / "artifact")
    other = lowbit.compare_checkpoints(tmp_path / "ct", tmp_path / "artifact")
    alike = [layer for layer in other.layers if ".experts." in layer.name]
    assert all(layer.relative_error == 0 for layer in alike) and len(alike) == (24 if family == "qwen3_moe" else 0)


def test_experts_whose_rows_alternate_are_not_taken_apart(tmp_path: Path) -> None:
    model = load(dense(tmp_path, "gpt_oss"), quantization_config=lowbit.LowbitConfig("int8"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(
        ArtifactError, match=r"experts\.down_proj: holds the weights of experts in an order that no other"
    ):
        lowbit.convert_checkpoint(tmp_path / "saved", tmp_path / "ct", "compressed-tensors")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # the second with a bias
def test_routers_that_a_checkpoint_has_quantized(family: str, tmp_path: Path) -> None:
    """Libraries that see an nn.Linear in them quantize routers, which have a Parameter of their own here: it stays dense."""
    tensors = load_file(dense(tmp_path, family) / "model.safetensors")
    plain, last = dict(tensors), ".gate.weight" if family == "mixtral" else ".router.weight"
    for name in [name for name in tensors if name.endswith(last)]:
        layer = Layer(8, *tensors.pop(name).shape, 32, True)
        tensors |= named(name.removesuffix(".weight"), ct_packed(layer))
        plain[name] = torch.from_numpy(layer.W)
    store(tmp_path / "dense" / "model.safetensors", plain)
    reference = load(tmp_path / "dense", dtype=torch.float32)
    about = json.loads((tmp_path / "dense" / "config.json").read_text())
    about["quantization_config"] = ct_config(layer)
    (tmp_path / "dense" / "config.json").write_text(json.dumps(about))
    store(tmp_path / "dense" / "model.safetensors", tensors)
    model = load(tmp_path / "dense", quantization_config=lowbit.LowbitConfig(from_checkpoint=True), dtype=torch.float32)
    assert torch.equal(logits(model), logits(reference))

    made = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    del made.quantization_config
    if family == "gpt_oss":
        report = lowbit.load_checkpoint(
            tmp_path / "dense",
            lambda: transformers.AutoModelForCausalLM.from_config(
                made, dtype=torch.float32, attn_implementation="eager"
            ),
        )
        assert {(one.name.rpartition(".")[2], one.scheme) for one in report.layers} == {("router", "dequantized")}
        assert report.model is not None and torch.equal(logits(report.model.eval()), logits(reference))


def test_an_artifact_that_was_made_from_files(tmp_path: Path) -> None:
    """`lowbit quantize` works on the checkpoint's tensors, an expert's own; the model has one Parameter for all."""
    folder = dense(tmp_path, "qwen3_moe")
    out = tmp_path / "artifact"
    asked = ["--scheme", "int4-g32", "--quiet"]
    assert main(["quantize", str(folder), "--out", str(out), *asked]) == 0
    about = transformers.AutoConfig.from_pretrained(folder)

    def make() -> Any:
        return transformers.AutoModelForCausalLM.from_config(about, dtype=torch.float32)

    model = lowbit.load_quantized(make, out).eval()
    reference = load(folder, dtype=torch.float32)
    lowbit.quantize_(reference, "int4-g32")
    assert experts(model).keys() == experts(reference).keys() and len(experts(model)) == 4
    for name, module in experts(model).items():
        assert module.quantized_weight() == experts(reference)[name].quantized_weight(), name
    assert torch.equal(logits(model), logits(reference))
    again = lowbit.load_quantized(model, out)  # into experts that are quantized already
    assert torch.equal(logits(again), logits(reference))
    mixed = [*asked, "--override", "*.1.mlp.experts.2.up_proj=int8-g32"]
    assert main(["quantize", str(folder), "--out", str(tmp_path / "mixed"), *mixed]) == 0
    with pytest.raises(ArtifactError, match=r"gate_up_proj': its experts are int4-g32 .* and int8-g32 .*in one weight"):
        lowbit.load_quantized(make, tmp_path / "mixed")


def test_experts_whose_columns_are_in_another_order_each(tmp_path: Path) -> None:
    _, folder = per_expert(tmp_path, "gptq", shared=False)
    with pytest.raises(
        ArtifactError, match=r"w1, .*w3: the model keeps them in one weight, and cannot join .*perm differs"
    ):
        load(folder, quantization_config=lowbit.LowbitConfig(from_checkpoint=True))


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    _, folder = per_expert(tmp_path, "awq")
    tensors = load_file(folder / "model.safetensors")
    lost = {name: t for name, t in tensors.items() if ".1.block_sparse_moe.experts.2.w1." not in name}
    assert len(lost) < len(tensors)
    store(folder / "model.safetensors", lost)
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: .*3 .*4"):
        load(folder, quantization_config=lowbit.LowbitConfig(from_checkpoint=True))
    about = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    with pytest.raises(ArtifactError, match=r"the model has no .*experts\.0\.w1"):
        lowbit.load_checkpoint(
            folder,
            lambda: transformers.AutoModelForCausalLM.from_config(about),
            rename=lambda name: name.replace("block_sparse_moe.", "mlp."),
        )
