"""LowbitConfig(from_checkpoint=True): from_pretrained runs on our kernels what another library quantized."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowbit
from checkpoints import DATA, Layer, gptq, gptq_config, named, stream
from hf import config, greedy, ids, load, logits, same_state, save, store, transformers
from lowbit import ArtifactError, QuantizedEmbedding, QuantizedLinear, formats

# Committed folders, which hold one or two layers of a Llama that the peer's own code wrote; weights only, then with inputs.
WEIGHTS = ["gptq-v1-sym", "gptq-v2-asym-act-order", "awq-gemm", "ct-w4a16", "ct-w4a16-asym", "bitsandbytes-nf4"]
WEIGHTS += ["bitsandbytes-int8", "mlx-lm-q4"]
INPUTS = ["ct-w8a8", "ct-fp8-dynamic", "fp8-block128"]


def run(folder: Path | str, **more: Any) -> Any:
    return load(folder, quantization_config=lowbit.LowbitConfig(from_checkpoint=True), **more)


def layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def complete(case: str, folder: Path) -> Path:
    """A committed folder, with random dense tensors for everything that was cut out of it."""
    shutil.copytree(DATA / case, folder)
    tensors = load_file(folder / "model.safetensors")
    about = transformers.AutoConfig.from_pretrained(folder)
    del about.quantization_config
    quantized = formats.read(folder)
    have = {name if isinstance(value, Tensor) else f"{name}.weight" for name, value in quantized}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformers.AutoModelForCausalLM.from_config(about).named_parameters():
        if name not in have:
            random = torch.randn(parameter.shape, generator=generator) / 12
            tensors[name] = (random if parameter.dim() > 1 else torch.ones_like(random)).to(torch.float16)
    store(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("case", WEIGHTS + INPUTS)
def test_checkpoints_of_the_libraries(case: str, tmp_path: Path) -> None:
    folder = complete(case, tmp_path / "model")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=lowbit.LowbitConfig(from_checkpoint=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    records = {name: one for name, one in formats.read(folder) if isinstance(one, formats.LinearRecord)}
    found = layers(model)
    assert found.keys() == records.keys() == model.config.quantization_config.layers.keys()
    assert all(found[name].quantized_weight() == record.weight for name, record in records.items())
    about = transformers.AutoConfig.from_pretrained(folder)
    del about.quantization_config
    by_names = lowbit.load_checkpoint(folder, transformers.LlamaForCausalLM(about).float(), dtype=torch.float32).model
    assert torch.equal(logits(model), logits(by_names))
    tokens, plain = greedy(model), copy.deepcopy(model).dequantize()
    if case in WEIGHTS:
        assert torch.equal(greedy(plain), tokens)
    else:  # inputs in 8 bits
        torch.testing.assert_close(logits(model), logits(plain), rtol=0.1, atol=0.2 * float(logits(plain).std()))
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    same_state(again, model)
    assert torch.equal(logits(again), logits(model))


def whole(folder: Path, family: str = "llama", shards: int = 1, lm_head: bool = False, **more: Any) -> dict[str, Layer]:
    """A GPTQ checkpoint with act-order in which every linear layer is quantized; its layers."""
    save(folder, family, **more)
    tensors = load_file(folder / "model.safetensors")
    made: dict[str, Layer] = {}
    for name in list(tensors):
        path = name.removesuffix(".weight")
        if path.endswith("_proj") or (lm_head and path == "lm_head"):
            N, K = tensors.pop(name).shape
            made[path] = Layer(4, N, K, 32, order="down" not in path, seed=len(made))
            tensors |= named(path, gptq(made[path], version=2))
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    for file, some in files.items():
        store(folder / file, {name: tensors[name] for name in some})
    index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    about = json.loads((folder / "config.json").read_text())
    about["quantization_config"] = gptq_config(Layer(4, 32, 64, 32, order=True), checkpoint_format="gptq_v2")
    (folder / "config.json").write_text(json.dumps(about))
    return made


@pytest.mark.parametrize(("family", "shards"), [("llama", 1), ("qwen2", 3)])
def test_a_whole_model(family: str, shards: int, tmp_path: Path) -> None:
    made = whole(tmp_path / "model", family, shards)
    model = run(tmp_path / "model", dtype=torch.float32)
    assert layers(model).keys() == made.keys()
    reference = load(save(tmp_path / "dense", family))
    with torch.no_grad():
        for path, layer in made.items():
            reference.get_submodule(path).weight.copy_(torch.from_numpy(layer.W))
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(model), greedy(reference))
    half = run(tmp_path / "model", dtype=torch.bfloat16, device_map="auto")
    assert half.dtype == torch.bfloat16 and logits(half).dtype == torch.bfloat16
    if family == "qwen2":
        assert half.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
        assert torch.equal(model.model.layers[1].self_attn.k_proj.bias, reference.model.layers[1].self_attn.k_proj.bias)


def test_a_base_model_and_offloading(tmp_path: Path) -> None:
    whole(tmp_path / "model")
    expected = run(tmp_path / "model")
    base = transformers.AutoModel.from_pretrained(
        tmp_path / "model", quantization_config=lowbit.LowbitConfig(from_checkpoint=True)
    )
    assert torch.equal(base(ids()).last_hidden_state, expected.model(ids()).last_hidden_state)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    offloaded = run(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off")
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(offloaded), logits(expected))


def test_a_quantized_output_layer_of_a_model_that_ties_it(tmp_path: Path) -> None:
    """The checkpoint holds a weight of its own for it, so that it is not tied."""
    made = whole(tmp_path / "model", lm_head=True)
    about = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**about, "tie_word_embeddings": True}))
    model = run(tmp_path / "model", dtype=torch.float32)
    assert isinstance(model.lm_head, QuantizedLinear) and isinstance(model.model.embed_tokens, nn.Embedding)
    assert torch.equal(model.lm_head.quantized_weight().dequantize(), torch.from_numpy(made["lm_head"].W))
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    same_state(again, model)
    assert torch.equal(logits(again), logits(model))


def test_a_quantized_embedding_that_the_output_layer_is_tied_to(tmp_path: Path) -> None:
    """MLX quantizes embeddings; the output layer shares the packed weight, saved once and tied again."""
    folder = save(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    embedding = Layer(4, *tensors.pop("model.embed_tokens.weight").shape, 32, symmetric=True)
    mlx = {
        "weight": torch.from_numpy(stream(embedding.codes, 4)).view(torch.uint32),
        "scales": embedding.scales,
        "biases": (embedding.scales.float() * -8).half(),
    }
    store(folder / "model.safetensors", tensors | named("model.embed_tokens", mlx))
    about = json.loads((folder / "config.json").read_text()) | {"quantization": {"bits": 4, "group_size": 32}}
    (folder / "config.json").write_text(json.dumps(about | {"quantization_config": about["quantization"]}))
    model = run(folder, dtype=torch.float32)
    quantized, dense = model.model.embed_tokens, torch.from_numpy(embedding.W)
    assert isinstance(quantized, QuantizedEmbedding) and isinstance(model.lm_head, QuantizedLinear)
    assert torch.equal(quantized(torch.arange(len(dense))), dense)
    assert model.lm_head.weight is quantized.weight
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    plain = copy.deepcopy(model).dequantize()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and torch.equal(plain.lm_head.weight, dense)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(plain), greedy(model))
    model.save_pretrained(tmp_path / "saved")
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if name.startswith("lm_head")]
    again = load(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_embeddings_that_are_quantized_on_load(tmp_path: Path) -> None:
    for tie in (False, True):
        folder = save(tmp_path / str(tie), tie_word_embeddings=tie)
        asked = lowbit.LowbitConfig("int4-g32", overrides={"*.embed_tokens": "int8-g32"})
        model = load(folder, quantization_config=asked, dtype=torch.float32)
        assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
        assert (type(model.lm_head) is nn.Linear) == (not tie)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
        reference = load(folder)
        lowbit.quantize_(reference, "int4-g32", overrides={"*.embed_tokens": "int8-g32"})
        assert torch.equal(logits(reference), logits(model))
        for one in (model, reference):
            one.save_pretrained(tmp_path / "saved")
            again = load(tmp_path / "saved")
            assert torch.equal(logits(again), logits(model))
            assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie


# -- refused -----------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    path = next(folder.glob("model-00001*.safetensors"))
    tensors = {k: v for k, v in (load_file(path) | changes).items() if v is not None}
    store(path, tensors)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, path.name)}))


def test_a_scheme_for_what_is_quantized_already(tmp_path: Path) -> None:
    whole(tmp_path)
    with pytest.raises(ValueError, match=r"quantized already, with 'gptq': pass LowbitConfig\(from_checkpoint=True\)"):
        load(tmp_path, quantization_config=lowbit.LowbitConfig("int4-g32"))


def test_what_is_not_quantized(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ArtifactError, match="nothing in it is quantized"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}, r"up_proj' has a bias, the model's has none"),
        ({"model.layers.0.mlp.act.scales": torch.ones(96)}, r"act\.scales scales an activation"),
        ({"model.layers.0.mlp.up_proj.g_idx": torch.full((64,), -1, dtype=torch.int32)}, r"mlp\.up_proj: .*g_idx"),
        ({"model.layers.0.mlp.up_proj.scales": None}, r"mlp\.up_proj: has .* no scales"),
        (
            {"model.layers.0.mlp.up_proj.scales": torch.full((2, 96), float("nan")).half()},
            r"up_proj: scales: 192 values",
        ),
    ],
)
def test_what_makes_no_sense(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    whole(tmp_path)
    rewrite(tmp_path, changes)
    with pytest.raises(ArtifactError, match=message):
        run(tmp_path)


def test_a_bias_of_zeros_is_no_bias(tmp_path: Path) -> None:
    whole(tmp_path)
    expected = logits(run(tmp_path))
    rewrite(tmp_path, {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=lowbit.LowbitConfig(from_checkpoint=True), output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(logits(model), expected)


def test_another_shape(tmp_path: Path) -> None:
    whole(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "intermediate_size": 128}))
    with pytest.raises(ArtifactError, match=r"down_proj' is N=64, K=96, the model's is N=64, K=128"):
        run(tmp_path)


def test_no_files(tmp_path: Path) -> None:
    whole(tmp_path)
    asked = lowbit.LowbitConfig(from_checkpoint=True)
    with pytest.raises(ValueError, match="state_dict= does not go with lowbit"):
        transformers.LlamaForCausalLM.from_pretrained(
            None, config=config(), state_dict=load(save(tmp_path / "dense")).state_dict(), quantization_config=asked
        )


# -- memory ------------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys, threading, time, torch, lowbit, transformers
torch.set_num_threads(1)
def anonymous():  # files that are mapped do not count
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
from transformers.models.llama import modeling_llama
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
asked = {"quantization_config": lowbit.LowbitConfig(sys.argv[2])} if sys.argv[2] else {}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], **asked)
done = True; thread.join()
assert isinstance(model.model.layers[0].mlp.up_proj, lowbit.QuantizedLinear)
print(peak - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_held_twice(tmp_path: Path) -> None:
    """About a layer above the model, both when it is quantized while it loads and when it is read back."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 256}
    save(tmp_path / "dense", **sizes)
    load(tmp_path / "dense", quantization_config=lowbit.LowbitConfig("int8"), dtype="auto").save_pretrained(
        tmp_path / "saved"
    )
    for folder, scheme in (("dense", "int8"), ("saved", "")):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / folder), scheme]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, size = map(int, done.stdout.split())
        assert peak - size < 48e6 < 4 * size, (folder, peak, size)  # the largest layer is 17 MB in fp32
