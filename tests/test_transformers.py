"""LowbitConfig: a model is quantized while it loads, saved as safetensors, and is the same model when it comes back."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowbit
from hf import config, greedy, ids, load, logits, same_state, save, store, transformers
from lowbit import ArtifactError, QuantizedLinear, formats

OVERRIDES = {"*.down_proj": "int8", "model.layers.1.self_attn.*": "nf4-g32", "*.0.mlp.up_proj": None}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model that was quantized on load, and where it was saved."""
    model = load(dense, quantization_config=lowbit.LowbitConfig("int4-g32", overrides=OVERRIDES))
    model.save_pretrained(folder := tmp_path_factory.mktemp("saved") / "model")
    return model, folder


def layers(model: nn.Module) -> dict[str, str]:
    return {name: str(m.scheme) for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


# -- quantize on load --------------------------------------------------------------------------------------------------


def test_quantizing_on_load_is_quantize(dense: Path, quantized: tuple[Any, Path]) -> None:
    model, _ = quantized
    reference = load(dense)
    report = lowbit.quantize_(reference, "int4-g32", overrides=OVERRIDES)
    same_state(model, reference)
    assert torch.equal(logits(model), logits(reference))
    assert str(model.hf_quantizer.report) == str(report)
    found = layers(model)
    assert len(found) == 2 * 7 - 1
    assert found["model.layers.0.self_attn.q_proj"] == "int4-g32"
    assert found["model.layers.1.self_attn.q_proj"] == "nf4-g32"
    assert found["model.layers.1.mlp.down_proj"] == "int8"
    assert type(model.lm_head) is nn.Linear and type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_the_dequantized_model(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", family, tie_word_embeddings=family == "qwen3")
    model = load(folder, quantization_config=lowbit.LowbitConfig("int4-g32"), dtype=torch.float32)
    assert len(layers(model)) == 14
    tokens, expected = greedy(model), logits(model)
    plain = copy.deepcopy(model).dequantize()
    assert not layers(plain) and not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits(plain), expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(greedy(plain), tokens)
    assert len(layers(model)) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
def test_dtype_is_that_of_everything_else(dense: Path, dtype: torch.dtype | str) -> None:
    model = load(dense, quantization_config=lowbit.LowbitConfig("int8-a8"), dtype=dtype)
    want = torch.float32 if dtype == "auto" else dtype
    assert model.dtype == want and model.lm_head.weight.dtype == want
    assert logits(model).dtype == want
    torch.testing.assert_close(logits(model).float(), logits(load(dense)), rtol=0.1, atol=1.0)


def test_tied_output_layer_stays_tied(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tie_word_embeddings=True)
    model = load(folder, quantization_config=lowbit.LowbitConfig("int4-g32", overrides={"*": "int4-g32"}))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(layers(model)) == 14
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match=r"override 'lm_head' asks for int8, but lm_head: tied to model\.embed_tokens"):
        load(folder, quantization_config=lowbit.LowbitConfig("int4-g32", overrides={"lm_head": "int8"}))


def test_output_layer_and_named_modules(dense: Path, tmp_path: Path) -> None:
    named = lowbit.LowbitConfig(
        "int4-g32", overrides={"lm_head": "int8"}, modules_to_not_convert=["layers.1", "k_proj"]
    )
    model = load(dense, quantization_config=named)
    found = layers(model)
    assert found["lm_head"] == "int8"
    # As Transformers matches them: the beginning of a name, or the end.
    assert "model.layers.1.mlp.up_proj" in found
    assert "model.layers.0.self_attn.k_proj" not in found and "model.layers.0.self_attn.q_proj" in found
    model.save_pretrained(tmp_path)
    assert layers(load(tmp_path)) == found
    begins = lowbit.LowbitConfig("int4-g32", modules_to_not_convert=["model.layers.1"])
    assert not [name for name in layers(load(dense, quantization_config=begins)) if "layers.1" in name]


def test_a_classifier_on_top_is_left_alone_and_a_new_one_too(dense: Path) -> None:
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        dense, num_labels=3, quantization_config=lowbit.LowbitConfig("int4-g32"), output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert type(loaded.score) is nn.Linear and loaded.score.weight.abs().sum() > 0
    assert len(layers(loaded)) == 14
    forced = lowbit.LowbitConfig("int4-g32", overrides={"score": "int8"})
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        dense, num_labels=3, quantization_config=forced
    )
    assert layers(model)["score"] == "int8"  # initialised, then quantized
    assert bool(model(ids()).logits.isfinite().all())


# -- and back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_round_trip_is_exact(quantized: tuple[Any, Path], tmp_path: Path, shard: str) -> None:
    model, _ = quantized
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "50GB")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    same_state(model, again)
    assert torch.equal(logits(again), logits(model))
    assert layers(again) == layers(model) == again.config.quantization_config.layers
    again.save_pretrained(tmp_path / "third")
    for path in (tmp_path / "third").glob("*.safetensors"):
        if shard == "50GB":
            assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_what_is_written(quantized: tuple[Any, Path]) -> None:
    model, folder = quantized
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert written == {
        "quant_method": "lowbit",
        "version": 1,
        "scheme": "int4-g32",
        "overrides": OVERRIDES,
        "layers": layers(model),
    }
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj."
    assert {n.removeprefix(name) for n in tensors if n.startswith(name)} == {
        "weight_packed", "weight_scales", "weight_scheme", "weight_shape",
    }  # fmt: skip
    assert tensors[name + "weight_shape"].tolist() == [32, 64]


def test_saved_models_are_read_without_transformers_too(quantized: tuple[Any, Path]) -> None:
    model, folder = quantized
    assert formats.detect(folder).format == "lowbit"
    report = lowbit.load_checkpoint(folder, transformers.LlamaForCausalLM(model.config))
    assert torch.equal(logits(report.model.eval()), logits(model))


def test_quantize_and_load_checkpoint_make_models_that_can_be_saved(
    dense: Path, quantized: tuple[Any, Path], tmp_path: Path
) -> None:
    expected = logits(quantized[0])
    model = load(dense)
    lowbit.quantize_(model, "int4-g32", overrides=OVERRIDES)
    model.save_pretrained(tmp_path / "one")
    assert torch.equal(logits(load(tmp_path / "one")), expected)
    read = lowbit.load_checkpoint(quantized[1], load(dense)).model
    read.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(load(tmp_path / "two")), expected)
    lowbit.save_quantized(model, tmp_path / "artifact")
    lowbit.load_quantized(load(dense), tmp_path / "artifact").save_pretrained(tmp_path / "three")
    assert torch.equal(logits(load(tmp_path / "three")), expected)
    model.float()  # nothing forbids what is forbidden for models that Transformers loaded quantized


def test_base_models_and_heads(quantized: tuple[Any, Path], tmp_path: Path) -> None:
    """Names with and without the prefix of the base model find each other, as for dense checkpoints."""
    model, folder = quantized
    base = transformers.AutoModel.from_pretrained(folder)
    hidden = base(ids()).last_hidden_state
    assert torch.equal(hidden, model.model(ids()).last_hidden_state)
    base.save_pretrained(tmp_path)
    whole, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert torch.equal(whole.model(ids()).last_hidden_state, hidden)


def test_names_that_transformers_changes(tmp_path: Path) -> None:
    """In a file Llava's language model is called language_model.model, in memory model.language_model."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    made = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=config("llama"), image_token_index=95)
    )
    made.save_pretrained(tmp_path / "dense")
    asked = lowbit.LowbitConfig("int4-g32", modules_to_not_convert=["model.vision_tower"])
    model = type(made).from_pretrained(tmp_path / "dense", quantization_config=asked)
    assert "model.language_model.layers.0.mlp.up_proj" in layers(model) and len(layers(model)) == 16
    model.save_pretrained(tmp_path / "saved")
    assert "language_model.model.layers.0.mlp.up_proj.weight_shape" in load_file(tmp_path / "saved/model.safetensors")
    again, info = type(made).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    same_state(again, model)


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(dense: Path, quantized: tuple[Any, Path], device_map: Any) -> None:
    model, folder = quantized
    asked = lowbit.LowbitConfig("int4-g32", overrides=OVERRIDES)
    assert torch.equal(logits(load(folder, device_map=device_map)), logits(model))
    assert torch.equal(logits(load(dense, quantization_config=asked, device_map=device_map)), logits(model))


def parts(first: Any, second: str, last: str) -> dict[str, Any]:
    names = {"model.embed_tokens": first, "model.layers.0": first, "model.layers.1": second}
    return names | {"model.norm": first, "model.rotary_emb": first, "lm_head": last}


def test_offload_to_disk(dense: Path, quantized: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = quantized
    offloaded = load(folder, device_map=parts("cpu", "disk", "disk"), offload_folder=tmp_path / "off")
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta and offloaded.lm_head.weight.is_meta
    for _ in range(2):
        assert torch.equal(logits(offloaded), logits(model))
    offloaded.save_pretrained(tmp_path / "saved")
    same_state(load(tmp_path / "saved"), model)
    asked = lowbit.LowbitConfig("int4-g32")
    with pytest.raises(ValueError, match="quantized while it loads cannot be offloaded to disk"):
        load(dense, quantization_config=asked, device_map=parts("cpu", "disk", "disk"), offload_folder=tmp_path / "off")


def test_offload_to_the_cpu(dense: Path, quantized: tuple[Any, Path], tmp_path: Path) -> None:
    """With an accelerator in the map, for which torch.device("cpu") stands: accelerate compares with the string."""
    model, folder = quantized
    device_map = parts(torch.device("cpu"), "cpu", "cpu")
    asked = lowbit.LowbitConfig("int4-g32", overrides=OVERRIDES)
    for offloaded in (
        load(folder, device_map=device_map),
        load(dense, quantization_config=asked, device_map=device_map),
    ):
        assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
        assert not offloaded.model.layers[0].self_attn.q_proj.weight.is_meta
        for _ in range(2):
            assert torch.equal(logits(offloaded), logits(model))
        offloaded.save_pretrained(tmp_path)
        same_state(load(tmp_path), model)


def test_device_maps_are_inferred_from_packed_sizes(dense: Path) -> None:
    """`max_memory` is compared with what layers will take, not with what they took."""
    from lowbit.integrations._layers import Dense
    from lowbit.integrations.transformers import LowbitQuantizer

    model = load(dense)
    quantizer = LowbitQuantizer(lowbit.LowbitConfig("int4-g32"), pre_quantized=False)
    quantizer._work = Dense(model, "int4-g32", {}, [])
    weight = model.model.layers[0].mlp.up_proj.weight
    size = quantizer.param_element_size(model, "model.layers.0.mlp.up_proj.weight", weight) * weight.numel()
    assert size == lowbit.Scheme.parse("int4-g32").nbytes(*weight.shape)
    assert quantizer.param_element_size(model, "lm_head.weight", model.lm_head.weight) == 4


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int4-g128"}, r"model\.layers\.0\.self_attn\.q_proj: group_size=128 is larger than K=64"),
        ({"scheme": "int4", "overrides": {"*.nope": "int8"}}, r"override '\*\.nope' matches no layer"),
        ({"scheme": "int8-aint8_static"}, "needs calibrated input scales"),
        ({"scheme": "int4", "overrides": {"*": None}}, "LlamaForCausalLM has no linear layer"),
    ],
)
def test_what_does_not_fit_is_refused_before_loading(dense: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(dense, quantization_config=lowbit.LowbitConfig(**arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a scheme, such as 'int4-g128', or from_checkpoint=True"),
        ({"scheme": "int4-x"}, "'int4-x'"),
        ({"scheme": "int4", "overrides": {"*": "int9"}}, "int9"),
        ({"scheme": "int4", "from_checkpoint": True}, "do not go with it"),
        ({"scheme": "int4", "modules_to_not_convert": "lm_head"}, "is a list of names, got 'lm_head'"),
    ],
)
def test_configs_that_mean_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.LowbitConfig(**arguments)


def test_configs_of_a_later_version() -> None:
    asked = lowbit.LowbitConfig("int4-g32", overrides=OVERRIDES)
    assert type(asked).from_dict(asked.to_dict()).to_dict() == asked.to_dict()
    assert type(asked).from_dict({"quant_method": "lowbit", "scheme": "int8"}).scheme == "int8"
    with pytest.raises(ValueError, match="version 2; this lowbit reads version 1"):
        type(asked).from_dict({**asked.to_dict(), "version": 2})
    with pytest.raises(ValueError, match="has codebook"):
        type(asked).from_dict({**asked.to_dict(), "codebook": 1})


def test_a_bad_weight_is_one_clear_error(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    store(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="1 of 6144 weights are NaN or infinite"):
        load(tmp_path, quantization_config=lowbit.LowbitConfig("int4-g32"))


def test_a_damaged_checkpoint_is_one_clear_error(quantized: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(quantized[1], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj."
    tensors[name + "weight_scales"][7] = float("inf")
    store(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.down_proj: scales: 1 values are not finite"):
        load(tmp_path)
    tensors[name + "weight_shape"] = torch.tensor([64, 64])
    store(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.down_proj: weight_packed is U8 \[64, 96\]"):
        load(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(quantized: tuple[Any, Path]) -> None:
    changed = copy.deepcopy(transformers.AutoConfig.from_pretrained(quantized[1]))
    changed.intermediate_size = 128
    with pytest.raises(ArtifactError, match=r"mlp\.down_proj' is N=64, K=96, the model's is N=64, K=128"):
        load(quantized[1], config=changed)


# -- registration ------------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_registration_before_and_after_transformers_and_after_reloads(quantized: tuple[Any, Path]) -> None:
    run(f"""
import importlib, sys
import lowbit
assert "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(quantized[1])!r})
assert type(model.model.layers[0].self_attn.q_proj) is lowbit.QuantizedLinear
import transformers.quantizers.auto as auto
del auto.AUTO_QUANTIZER_MAPPING["lowbit"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"]
first = lowbit.LowbitConfig
importlib.reload(lowbit)  # transformers is there already
assert "lowbit" in auto.AUTO_QUANTIZER_MAPPING and "lowbit" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
importlib.reload(sys.modules["lowbit.integrations._imports"]).install()
importlib.reload(sys.modules["lowbit.integrations.transformers"])
assert lowbit.LowbitConfig is not first
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"] is lowbit.LowbitConfig
assert sum(type(f).__name__ == "_Finder" and "lowbit" in type(f).__module__ for f in sys.meta_path) == 1
assert not hasattr(auto.get_hf_quantizer._lowbit_original, "_lowbit_original")
importlib.reload(auto)  # a new table
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"] is lowbit.LowbitConfig
AutoModelForCausalLM.from_pretrained({str(quantized[1])!r})
""")


def test_without_transformers() -> None:
    run("""
import sys
sys.modules["transformers"] = sys.modules["peft"] = None
import lowbit
for name in ("transformers", "peft"):
    try:
        __import__("lowbit.integrations." + name)
    except ModuleNotFoundError as error:
        assert "pip install 'lowbit[hf]'" in str(error) and error.name == name, error
    else:
        raise AssertionError
try:
    lowbit.LowbitConfig
except ModuleNotFoundError as error:
    assert "lowbit.LowbitConfig needs Transformers 5" in str(error)
assert not hasattr(lowbit, "Lowbit")
""")


def test_another_library_of_that_name_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    from lowbit.integrations.transformers import register

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "lowbit", dict)
    with pytest.raises(RuntimeError, match=r"builtins\.dict is registered as 'lowbit' already"):
        register()
