"""Where checkpoints come from and what they are taken for: folders, shards, hostile indexes, detection, plans."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import DATA, Layer, awq_gemm, check, ct_config, ct_packed, gptq, gptq_config, named, records, write
from lowbit import ArtifactError, FormatError, QuantizedWeight, formats
from lowbit.formats._settings import Settings


def sharded(folder: Path, layers: dict[str, Layer], weight_map: dict[str, object] | None = None) -> Path:
    """A layer to a file, and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for i, (name, layer) in enumerate(layers.items(), 1):
        file = f"model-{i:05}-of-{len(layers):05}.safetensors"
        tensors = named(name, gptq(layer))
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / file)
        files |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 1}, "weight_map": files if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"quantization_config": gptq_config(Layer())}))
    return folder


LAYERS = {"layers.2.fc": Layer(seed=1), "layers.10.fc": Layer(seed=2), "layers.1.fc": Layer(seed=3)}


# -- files ---------------------------------------------------------------------------------------------------------------


def test_shards_in_natural_order(tmp_path: Path) -> None:
    found = records(sharded(tmp_path, LAYERS))
    assert list(found) == ["layers.1.fc", "layers.2.fc", "layers.10.fc"]
    for name, layer in LAYERS.items():
        check(found[name], layer.W)


def test_one_file_with_its_config_beside_it(tmp_path: Path) -> None:
    folder = sharded(tmp_path, LAYERS)
    assert list(records(folder / "model-00002-of-00003.safetensors")) == ["layers.10.fc"]


def test_a_file_of_any_name(tmp_path: Path) -> None:
    write(tmp_path, named("fc", gptq(Layer())), gptq_config(Layer()))
    os.rename(tmp_path / "model.safetensors", tmp_path / "gptq_model-4bit-128g.safetensors")
    assert list(records(tmp_path)) == ["fc"]


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", "", ".", 3, None, ["x"]]
)
def test_an_index_that_points_elsewhere(tmp_path: Path, name: object) -> None:
    save_file({"secret": torch.zeros(1)}, tmp_path / "outside.safetensors")
    folder = sharded(tmp_path / "model", LAYERS, {"secret": name})
    with pytest.raises(FormatError, match="which is not a file name"):
        records(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no weight_map"),
        ([1], "has no weight_map"),
        ({"x": "missing.safetensors"}, r"missing\.safetensors: no such file"),
        ({"x": "model-00001-of-00003.safetensors"}, "has no tensor 'x', which the index puts there"),
    ],
)
def test_a_broken_index(tmp_path: Path, weight_map: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        records(sharded(tmp_path, LAYERS, weight_map))


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"acme/tiny-7B\.v2: no such folder; .*: hf download acme/tiny-7B\.v2$"):
        next(iter(formats.read("acme/tiny-7B.v2")))
    with pytest.raises(ArtifactError, match=r"no such folder$"):
        records(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors files"):
        records(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin cannot be read: convert to safetensors first"):
        records(tmp_path)
    with pytest.raises(ArtifactError, match="not a folder"):
        records(tmp_path / "pytorch_model.bin")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="not a regular file"):
        records(tmp_path)


def test_an_artifact_of_our_own(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.zeros(2)}, None, lowbit={})
    with pytest.raises(ArtifactError, match="is a lowbit artifact: use load_quantized"):
        records(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"quantization_config": 3}', '{"a": 1, "a": 2}', '{"quantization_config": {"bits": NaN}}']
)
def test_a_broken_config(tmp_path: Path, text: str) -> None:
    write(tmp_path, named("fc", gptq(Layer())))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        records(tmp_path)


# -- detection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "format", "variant"),
    [
        ("gptq-v1-sym", "gptq", "v1, int4, groups of 128"),
        ("gptq-v2-asym-act-order", "gptq", "v2, int4, groups of 64, act-order"),
        ("awq-gemm", "awq", "gemm, int4, groups of 64"),
        ("ct-w4a16", "compressed-tensors", "int4, groups of 128"),
        ("ct-w8a8", "compressed-tensors", "int8, one scale per row, inputs int8"),
        ("ct-fp8-dynamic", "compressed-tensors", "fp8, one scale per row, inputs fp8"),
        ("fp8-block128", "fp8", "blocks of 128 x 128, inputs fp8_g128"),
    ],
)
def test_detect(name: str, format: str, variant: str) -> None:
    found = formats.detect(DATA / name)
    assert (found.format, found.variant) == (format, variant)
    assert "quant_method is" in found.why and "k_proj has" in found.why


def test_both_sides_of_a_contradiction(tmp_path: Path) -> None:
    layer = Layer()
    config = {"quant_method": "awq", "bits": 4, "group_size": 32}
    with pytest.raises(ArtifactError) as caught:
        records(write(tmp_path / "a", named("fc", gptq(layer)), config))
    assert "quant_method is 'awq'" in str(caught.value) and "packed along K" in str(caught.value)
    write(tmp_path / "b", named("fc", gptq(layer)), gptq_config(layer), quant_config={"quant_method": "awq"})
    with pytest.raises(ArtifactError, match=r"the configs contradict each other: .*'gptq' \(gptq\); .*'awq' \(awq\)"):
        records(tmp_path / "b")
    with pytest.raises(ArtifactError, match="the tensors say otherwise: no tensor of the 1 tensors is gptq's"):
        records(write(tmp_path / "c", {"w": torch.zeros(2)}, gptq_config(layer)))


def test_a_format_that_was_asked_for(tmp_path: Path) -> None:
    layer = Layer()
    folder = write(tmp_path, named("fc", awq_gemm(layer)), {"bits": 4, "group_size": 32, "made_by": "somebody"})
    with pytest.raises(ArtifactError, match=r"is not a format that this lowbit reads .*; fc has qweight .*AWQ's gemm"):
        records(folder)
    check(records(folder, "awq")["fc"], layer.W)
    with pytest.raises(ValueError, match="unknown format 'awk'; the formats are gptq, awq, "):
        records(folder, "awk")
    with pytest.raises(ArtifactError):
        records(folder, "gptq")
    with pytest.raises(ArtifactError, match="is a gguf file, not awq"):
        records(DATA / "gguf-q4_k_m.gguf", "awq")


def test_quantization_config_of_the_text_model(tmp_path: Path) -> None:
    layer = Layer()
    write(tmp_path, named("fc", gptq(layer)), None, config={"text_config": {"quantization_config": gptq_config(layer)}})
    check(records(tmp_path)["fc"], layer.W)


# -- plans ---------------------------------------------------------------------------------------------------------------


def test_a_plan_reads_headers_and_then_what_is_asked_for(tmp_path: Path) -> None:
    folder = sharded(tmp_path, LAYERS)
    with formats.plan(folder) as plan:
        assert plan.format == "gptq" and list(plan.layers) == ["layers.1.fc", "layers.2.fc", "layers.10.fc"]
        planned = plan.layers["layers.10.fc"]
        assert (
            planned.shape == (32, 128)
            and planned.about == "int4, groups of 32"
            and planned.nbytes == 2048 + 64 + 256 + 512
        )
        check(plan.read("layers.10.fc"), LAYERS["layers.10.fc"].W)
        with pytest.raises(KeyError):
            plan.read("layers.3.fc")


def test_names_that_collide(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'a\.fc' is the name of a tensor and of a layer"):
        records(write(tmp_path, {**named("a.fc", ct_packed(Layer())), "a.fc": torch.zeros(1)}, ct_config()))


def test_a_record_is_what_modules_and_engines_take(tmp_path: Path) -> None:
    layer = Layer(order=True)
    bias = torch.randn(layer.N)
    tensors = {**named("fc", gptq(layer)), "fc.bias": bias}
    (record,) = records(write(tmp_path, tensors, gptq_config(layer))).values()
    x = torch.randn(3, layer.K)
    wanted = x @ torch.from_numpy(layer.W).T + bias
    torch.testing.assert_close(record.linear()(x), wanted, rtol=1e-4, atol=1e-3)
    assert record.linear(batch_invariant=True).flags
    record.weight.save(tmp_path / "fc.safetensors")
    assert QuantizedWeight.load(tmp_path / "fc.safetensors") == record.weight


def test_settings_say_where_and_what() -> None:
    settings = Settings({"a": 1, "b": "x", "c": None, "d": [1], "e": {"f": True}}, "file: key")
    assert settings.integer("a") == 1 and settings.text("b") == "x" and settings.integer("c", default=7) == 7
    section = settings.section("e")
    assert section is not None and section.boolean("f") and section.where == "file: key.e"
    assert settings.section("c") is None and settings.strings("c") == []
    for call, message in (
        (lambda: settings.integer("b"), "file: key: 'b' is 'x', it must be an integer"),
        (lambda: settings.integer("missing"), "file: key: has no 'missing', which must be an integer"),
        (lambda: settings.boolean("a"), "'a' is '1', it must be true or false"),
        (lambda: settings.text("a"), "'a' is '1', it must be a string"),
        (lambda: settings.strings("d"), r"'d' is '\[1\]', it must be a list of strings"),
        (lambda: settings.section("d"), r"'d' is '\[1\]', it must be an object"),
    ):
        with pytest.raises(ArtifactError, match=message):
            call()
