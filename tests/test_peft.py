"""LoRA on quantized layers: trained, saved, reloaded, merged and unmerged; the base keeps every bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from hf import ids, load, logits, save, transformers
from lowbit import QuantizedLinear, QuantizedWeight
from test_transformers_checkpoints import complete, run, whole

peft = pytest.importorskip("peft", minversion="0.19", reason="needs peft: pip install 'lowbit[test]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases, quantized in several ways and saved."""
    dense = save(tmp_path_factory.mktemp("dense") / "model", "qwen2")
    overrides = {"*.o_proj": "int8-a8", "*.down_proj": "nf4-g32", "*.v_proj": "int3-g32-offset"}
    model = load(dense, quantization_config=lowbit.LowbitConfig("int4-g32-asym", overrides=overrides))
    model.save_pretrained(made := tmp_path_factory.mktemp("saved") / "model")
    return made


def config(**more: Any) -> Any:
    return peft.LoraConfig(
        **{"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **more}
    )


def randomize(*models: nn.Module) -> None:
    """The same random adapters for all: B is zero after PEFT's initialisation, which hides A's gradient."""
    generator = torch.Generator().manual_seed(3)
    for named in zip(*(model.named_parameters() for model in models), strict=True):
        if "lora_" in named[0][0]:
            value = torch.randn(named[0][1].shape, generator=generator) / 10
            for _, parameter in named:
                parameter.data.copy_(value)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def base(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def train(model: Any, steps: int = 12) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


# -- training ----------------------------------------------------------------------------------------------------------


def test_every_layer_is_found_and_the_output_layer_is_not(folder: Path) -> None:
    model = peft.get_peft_model(load(folder), config())
    found = {name for name, m in model.named_modules() if type(m).__name__ == "LoraQuantizedLinear"}
    assert len(found) == 14 and not any("lm_head" in name for name in found)
    some = peft.get_peft_model(load(folder), config(target_modules=["q_proj", "v_proj"]))
    assert sum(type(m).__name__ == "LoraQuantizedLinear" for m in some.modules()) == 4
    assert {name.split(".")[-3] for name, p in some.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_gradients_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    quantized = load(save(tmp_path, "qwen2"), quantization_config=lowbit.LowbitConfig("int4-g32-asym"))
    models = [peft.get_peft_model(m, config()) for m in (quantized, copy.deepcopy(quantized).dequantize())]
    randomize(*models)
    for model in models:
        model.train()
        model(ids(), labels=ids()).loss.backward()
    ours, reference = (adapters(model) for model in models)
    assert len(ours) == 28 and ours.keys() == reference.keys()
    for name, parameter in ours.items():
        assert parameter.grad is not None and reference[name].grad is not None
        scale = float(reference[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_leaves_the_base_alone(folder: Path, checkpointing: bool) -> None:
    model = load(folder)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, config())
    before = base(model)
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    same(base(model), before)


def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    plain, checkpointed = (peft.get_peft_model(load(folder), config()) for _ in range(2))
    randomize(plain, checkpointed)
    checkpointed.enable_input_require_grads()
    checkpointed.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for model in (plain, checkpointed):
        model.train()
        model(ids(), labels=ids()).loss.backward()
    for name, parameter in adapters(plain).items():
        torch.testing.assert_close(parameter.grad, adapters(checkpointed)[name].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prepare_model_for_kbit_training_does_no_harm(folder: Path, dtype: torch.dtype) -> None:
    model = load(folder, dtype=dtype)
    before = {name: m.quantized_weight() for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    prepared = peft.prepare_model_for_kbit_training(model)
    assert {p.dtype for p in prepared.parameters()} == {torch.float32, torch.uint8}
    assert not any(p.requires_grad for p in prepared.parameters())
    for name, weight in before.items():
        assert prepared.get_submodule(name).quantized_weight() == weight
    losses = train(peft.get_peft_model(prepared, config()))
    assert losses[-1] < 0.8 * losses[0]


def test_qlora_on_a_checkpoint_of_bitsandbytes(tmp_path: Path) -> None:
    model = run(complete("bitsandbytes-nf4", tmp_path / "model"), dtype=torch.float32)
    names = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert names and all(str(model.get_submodule(name).scheme) == "nf4-g64-flat-dyn8-x256fp32" for name in names)
    model = peft.get_peft_model(model, config())
    before = base(model)
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    same(base(model), before)


def test_the_trainer_accepts_adapters_on_a_quantized_model(folder: Path) -> None:
    utils = pytest.importorskip("transformers.trainer_utils")
    if not hasattr(utils, "validate_quantization_for_training"):
        pytest.skip("this Transformers checks it inside of Trainer")
    with pytest.raises(ValueError, match="purely quantized"):
        utils.validate_quantization_for_training(load(folder))
    utils.validate_quantization_for_training(peft.get_peft_model(load(folder), config()))


# -- saving ------------------------------------------------------------------------------------------------------------


def test_adapters_come_back(folder: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(load(folder), config())
    randomize(model)
    model.eval()
    model.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name == "model.safetensors"]
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    same(dict(adapters(again)), dict(adapters(model)))
    own = load(folder)  # Transformers' own way
    own.load_adapter(tmp_path)
    assert torch.equal(logits(own), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(load(folder)))


def test_add_adapter_of_transformers(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.add_adapter(config(target_modules=["q_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    again = load(folder)
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(model))


# -- merging -----------------------------------------------------------------------------------------------------------


def merged(model: Any, **more: Any) -> None:
    with pytest.warns(UserWarning, match="rounds to its scheme again"):
        model.merge_adapter(**more)


def test_merging_quantizes_the_sum_and_unmerging_restores_every_bit(folder: Path) -> None:
    model = peft.get_peft_model(load(folder), config())
    randomize(model)
    model.eval()
    before, expected = base(model), logits(model)
    merged(model, safe_merge=True)
    untouched = load(folder)
    for name, module in model.named_modules():
        if type(module).__name__ == "LoraQuantizedLinear":
            old = untouched.get_submodule(name.removeprefix("base_model.model.")).quantized_weight()
            total = old.dequantize() + module.get_delta_weight("default").detach()
            assert module.get_base_layer().quantized_weight() == QuantizedWeight.quantize(total, old.scheme)
    assert not torch.equal(logits(model), expected)
    model.unmerge_adapter()
    same(base(model), before)
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_two_adapters_are_rounded_once(folder: Path) -> None:
    model = peft.get_peft_model(load(folder), config())
    model.add_adapter("second", config(r=2))
    randomize(model)
    before = base(model)
    merged(model, adapter_names=["default"])
    merged(model, adapter_names=["second"])
    step_by_step = base(model)
    model.unmerge_adapter()
    same(base(model), before)
    merged(model, adapter_names=["default", "second"])
    same(base(model), step_by_step)


def test_merge_and_unload_gives_a_model_to_save(folder: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(load(folder), config())
    randomize(model)
    model.eval()
    merged(model)
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.merge_and_unload()
    assert isinstance(plain, transformers.Qwen2ForCausalLM)
    assert sum(isinstance(m, QuantizedLinear) for m in plain.modules()) == 14
    assert torch.equal(logits(plain), expected)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)
    kept = peft.get_peft_model(load(folder), config()).unload()
    assert torch.equal(logits(kept), logits(load(folder)))


def test_merging_without_rounding(folder: Path) -> None:
    """As the docs say: into a dequantized copy."""
    dense = copy.deepcopy(load(folder)).dequantize()
    model = peft.get_peft_model(dense, config())
    randomize(model)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_act_order_is_kept(tmp_path: Path) -> None:
    whole(tmp_path)
    model = peft.get_peft_model(run(tmp_path, dtype=torch.float32), config(target_modules=["q_proj"]))
    randomize(model)
    before = base(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    old = layer.get_base_layer().quantized_weight()
    total = old.dequantize() + layer.get_delta_weight("default").detach()
    merged(model)
    new = layer.get_base_layer().quantized_weight()
    assert old.perm is not None and new.perm is not None and torch.equal(new.perm, old.perm)
    in_order = QuantizedWeight.quantize(total[:, old.perm.long()], old.scheme)
    assert torch.equal(new.dequantize()[:, old.perm.long()], in_order.dequantize())
    model.unmerge_adapter()
    same(base(model), before)


class One(nn.Module):
    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.fc = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_scaled_inputs_and_the_bias(tmp_path: Path) -> None:
    """The adapter sees x, the weight x * input_pre_scale: what is merged is divided by it. lora_bias goes into the bias."""
    weight = QuantizedWeight.quantize(torch.randn(24, 64), "int8")
    pre_scale = torch.rand(64) + 0.5
    layer = QuantizedLinear.from_weight(weight, torch.randn(24), input_pre_scale=pre_scale)
    model = peft.get_peft_model(One(layer), config(target_modules=["fc"], task_type=None, lora_bias=True))
    randomize(model)
    x, before = torch.randn(5, 64), base(model)
    with torch.no_grad():
        expected = model(x)
        merged(model)
        torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.2)
        assert not torch.equal(layer.bias, before["base_model.model.fc.base_layer.bias"])
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)
    same(base(model), before)


def test_an_adapter_of_zeros_changes_nothing(folder: Path) -> None:
    model = peft.get_peft_model(load(folder), config())
    before = base(model)
    merged(model)
    same(base(model), before)


def test_a_broken_adapter_is_not_merged(folder: Path) -> None:
    model = peft.get_peft_model(load(folder), config(target_modules=["q_proj"]))
    randomize(model)
    before = base(model)
    next(p for name, p in adapters(model).items() if "lora_B" in name).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="default hold values that are not finite"):
        model.merge_adapter(safe_merge=True)
    same(base(model), before)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"use_dora": True},
            "use_dora=True needs the norms of a dense weight; a QuantizedLinear of scheme int4-g32-asym",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base weight"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base weight"),
        ({"use_qalora": True}, "use_qalora: not supported on a QuantizedLinear of scheme int4-g32-asym"),
        ({"arrow_config": peft.tuners.lora.ArrowConfig()}, "arrow_config: not supported on a QuantizedLinear"),
    ],
)
def test_what_needs_a_dense_weight(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(load(folder), config(target_modules=["q_proj"], **arguments))


def test_other_tuners_are_left_as_they_are(folder: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="not supported"):  # which one depends on PEFT's version
        peft.get_peft_model(load(folder), peft.LoHaConfig(target_modules=["q_proj"]))


def test_copies_of_quantized_layers_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """modules_to_save and trainable_token_indices train a copy, which packed weights do not allow."""
    with pytest.raises(
        TypeError, match=r"modules_to_save cannot be applied to QuantizedLinear of scheme nf4-g32: .*None"
    ):
        peft.get_peft_model(load(folder), config(target_modules=["q_proj"], modules_to_save=["down_proj"]))
    model = tied(tmp_path)
    with pytest.raises(TypeError, match="QuantizedEmbedding of scheme int8"):
        peft.get_peft_model(model, config(target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    kept = peft.get_peft_model(load(folder), config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    losses = train(kept, 3)
    assert losses[-1] < losses[0]


def test_adapters_that_cannot_be_merged(folder: Path) -> None:
    """As PEFT refuses them on dense layers, and before anything has changed."""
    for more, message in (
        ({"alora_invocation_tokens": [5]}, "default: an adapter that is active for some tokens only cannot be merged"),
        ({"lora_bias": True}, "lora_bias=True cannot be merged: a QuantizedLinear of scheme int8-a8 has no bias"),
    ):
        model = peft.get_peft_model(load(folder), config(target_modules=["o_proj"], **more))
        randomize(model)
        before = base(model)
        with pytest.raises(ValueError, match=message):
            model.merge_adapter()
        same(base(model), before)


def test_fan_in_fan_out_is_ignored_aloud(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"fan_in_fan_out=True is ignored: .*nf4-g32 keeps \[N, K\]"):
        model = peft.get_peft_model(load(folder), config(target_modules=["down_proj"], fan_in_fan_out=True))
    randomize(model)
    expected = logits(model)
    merged(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def tied(folder: Path) -> Any:
    """A model whose output layer shares the packed weight of its embedding."""
    asked = lowbit.LowbitConfig("int4-g32", overrides={"*.embed_tokens": "int8"})
    return load(save(folder / "tied", tie_word_embeddings=True), quantization_config=asked)


def test_merging_into_a_tied_output_layer_leaves_the_embedding_alone(tmp_path: Path) -> None:
    model = peft.get_peft_model(tied(tmp_path), config(target_modules=["lm_head"]))
    randomize(model)
    embedding, before = model.get_input_embeddings(), base(model)
    rows, expected = embedding(ids()), logits(model)
    head = model.get_output_embeddings()
    assert head.get_base_layer().weight is embedding.weight
    merged(model)
    assert torch.equal(embedding(ids()), rows) and head.get_base_layer().weight is not embedding.weight
    torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.3)
    model.unmerge_adapter()
    same(base(model), before)
    assert head.get_base_layer().weight is embedding.weight and torch.equal(logits(model), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(plain))
