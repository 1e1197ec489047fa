"""torchao, HQQ and quanto: what those libraries wrote decodes to what they say, and what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from folders import DATA, attack, changed, load_tensors, read, write_folder
from lowbit import ArtifactError
from lowbit._safetensors import SafetensorsFile
from lowbit.formats import LinearRecord

NAMES = ["torchao", "hqq", "quanto"]
FIRST = {"torchao": "model.layers.0.int8_rows", "hqq": "model.layers.0.w4", "quanto": "model.layers.0.int8"}
SCHEMES = {
    "torchao": [
        "int8", "int8-g32-fp32", "int8-a8", "int4-g32", "int4-g32-asym", "int2-g32-asym", "int3-g32", "int5-bf16",
        "int8-g32", "int4-g32-aint8_asym", "fp8",
    ],
    "hqq": [
        "int4-g32-fzero-fp16", "int8-g32-fzero", "int3-fzero-fp16", "int2-g16-fzero-fp32", "int4-fzero-fp16",
        "int5-g32-fzero-fp16", "int4-g32-fzero-fp16",
    ],
    "quanto": ["int8-fp16", "fp8-fp16", "fp8_e5m2-fp16"],
}  # fmt: skip
Tensors = dict[str, Tensor]
Change = Callable[[Tensors, Any], object]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_library_wrote_to_the_bit(name: str) -> None:
    decoded = load_tensors(DATA / name / "decoded.safetensors")
    found = {path: record for path, record in read(DATA / name).items() if isinstance(record, LinearRecord)}
    assert found.keys() == decoded.keys() and len(found) == len(SCHEMES[name])
    for path, record in found.items():
        assert torch.equal(record.weight.dequantize(), decoded[path]), path
        assert (record.bias is not None) == (path == FIRST[name])
    assert [str(record.weight.scheme) for record in found.values()] == SCHEMES[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_loads_it(name: str) -> None:
    decoded = load_tensors(DATA / name / "decoded.safetensors")
    stored = load_tensors(DATA / name / "model.safetensors")

    def make() -> nn.Module:
        model = nn.Module()
        model.model = nn.Module()
        model.model.layers = nn.ModuleList()
        for i, path in enumerate(sorted(decoded, key=lambda path: int(path.split(".")[2]))):
            layer = nn.Module()
            setattr(layer, path.rpartition(".")[2], nn.Linear(64, 24, bias=i == 0))
            model.model.layers.append(layer)
        model.model.norm = nn.RMSNorm(64)
        return model

    model = lowbit.load_checkpoint(DATA / name, make).model
    assert model is not None
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for path, weight in decoded.items():
        layer = model.get_submodule(path)
        want = x @ weight.T + (stored[f"{path}.bias"].float() if layer.bias is not None else 0)
        error = float((layer(x) - want).norm() / want.norm())
        assert error < (0.02 if layer.scheme.activation else 1e-5), (path, error)


# -- refused -----------------------------------------------------------------------------------------------------------


def _put(leaf: str, value: Tensor | None) -> Change:
    def change(tensors: Tensors, _: Any) -> None:
        name = next(key for key in (f"{FIRST[kind]}.{leaf}" for kind in NAMES) if leaf == "extra" or key in tensors)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


def _text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def _extra(tensors: Tensors, _: Any) -> None:
    tensors["model.layers.0.w4.smooth"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put("axis", torch.tensor(0, dtype=torch.int32)), "axis is 0: groups that are not along a row"),
        (_put("axis", None), "but no axis"),
        (_put("nbits", torch.tensor(3, dtype=torch.int32)), "nbits is 3, which packing 4bit_u8 does not hold"),
        (_put("nbits", torch.tensor(1.58)), "nbits is 1.58, which is no whole number"),
        (_put("nbits", torch.tensor([4, 4], dtype=torch.int32)), r"nbits is I32 \[2\]"),
        (_put("packing", _text("1bit_u8")), "packing is '1bit_u8'; 8bit_u8, 4bit_u8"),
        (_put("packing", torch.zeros(7)), "packing is F32"),
        (
            _put("group_size", torch.tensor(48, dtype=torch.int32)),
            "group_size is 48, which does not divide rows of K=64",
        ),
        (_put("group_size", torch.tensor(4, dtype=torch.int32)), "group_size is 4, which does not divide"),
        (_put("group_size", torch.tensor(64, dtype=torch.int32)), r"W_q is U8 \[24, 32\], it must be U8 \[12, 64\]"),
        (_put("shape", torch.tensor([24, 128])), r"W_q is U8 \[24, 32\], it must be U8 \[48, 32\]"),
        (_put("shape", torch.tensor([-24, 64])), "a weight of N=-24, K=64"),
        (_put("shape", torch.tensor([1 << 40, 64])), r"shape is \[1099511627776, 64\]"),
        (_put("scale", torch.ones(48)), r"scale is F32 \[48\], it must be F16 or BF16 or F32 \[48, 1\]"),
        (_put("scale", torch.full((48, 1), torch.inf).half()), "scales: 48 values are not finite"),
        (_put("zero", torch.ones(48, 1)), r"zero is F32 \[48, 1\], it must be F16"),
        (_put("zero", torch.full((48, 1), torch.nan).half()), "zeros or offsets|zeros: 48 values are not finite"),
        (_put("quant_zero", torch.tensor(1, dtype=torch.uint8)), "quant_zero is set"),
        (_put("view_as_float", torch.tensor(1, dtype=torch.uint8)), r"W_q is U8 \[24, 32\], it must be F16"),
        (_put("bias", torch.zeros(23)), r"bias is F32 \[23\]"),
        (_extra, "a tensor 'smooth' .* not part of this format"),
    ],
)
def test_hqq_refused(change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(changed(tmp_path / "bad", DATA / "hqq", change))


def test_hqq_codes_beyond_their_bits(tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Any) -> None:
        tensors["model.layers.5.w5.W_q"][3, 3] = 32

    with pytest.raises(ArtifactError, match="w5: W_q holds codes of more than 5 bits"):
        read(changed(tmp_path / "bad", DATA / "hqq", change))


def test_hqq_zeros_that_are_whole_take_a_byte(tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Any) -> None:
        for name in [name for name in tensors if name.endswith(".zero")]:
            tensors[name] = tensors[name].round().clamp(0, 3)

    found = read(changed(tmp_path / "whole", DATA / "hqq", change))
    weight = found["model.layers.0.w4"].weight
    assert str(weight.scheme) == "int4-g32-asym-fp16" and weight.zeros.dtype == torch.uint8


@pytest.mark.parametrize(
    ("change", "qmap", "message"),
    [
        (_put("weight._data", torch.zeros(24, 64)), None, r"_data is F32 \[24, 64\]"),
        (_put("weight._data", torch.zeros(0, 64, dtype=torch.int8)), None, "a weight of N=0, K=64"),
        (_put("weight._scale", torch.ones(23, 1)), None, r"_scale is F32 \[23, 1\]"),
        (_put("weight._scale", None), None, "but no _scale"),
        (_put("weight._scale", torch.full((24, 1), torch.nan).half()), None, "scales: 24 values are not finite"),
        (_put("input_scale", torch.tensor(0.5)), None, "input_scale is not 1: quantized activations are not read"),
        (lambda t, _: t.update({"model.layers.0.int8.weight._shift": torch.ones(1)}), None, "'weight._shift'|'_shift'"),
        (
            lambda t, _: t.update({"a.weight._data._data": torch.zeros(8, 64, dtype=torch.uint8)}), None,
            "a: quanto keeps weights of 2 and 4 bits without their shape",
        ),
        (lambda *_: None, {}, None),
        (lambda *_: None, {"activations": "qint8"}, "'activations' is 'qint8', it must be 'none': what quanto does"),
        (lambda *_: None, {"weights": "qint4"}, "'weights' is 'qint4', it must be qint8, as the tensors are"),
        (lambda *_: None, {"weights": 3}, "'weights' is '3', it must be a string"),
    ],
)  # fmt: skip
def test_quanto_refused(change: Change, qmap: dict[str, Any] | None, message: str | None, tmp_path: Path) -> None:
    folder = changed(tmp_path / "bad", DATA / "quanto", change)
    if qmap is not None:
        about = json.loads((DATA / "quanto" / "quanto_qmap.json").read_text())
        about[FIRST["quanto"]].update(qmap)
        (folder / "quanto_qmap.json").write_text(json.dumps(about))
    if message is None:
        assert len(read(folder)) == 4
        return
    with pytest.raises(ArtifactError, match=message):
        read(folder)


def test_a_quanto_map_of_another_model(tmp_path: Path) -> None:
    folder = changed(tmp_path / "bad", DATA / "quanto", lambda *_: None)
    about = json.loads((DATA / "quanto" / "quanto_qmap.json").read_text())
    about["model.layers.9.fc"] = about.pop(FIRST["quanto"])
    (folder / "quanto_qmap.json").write_text(json.dumps(about))
    with pytest.raises(ArtifactError, match=r"int8: is quantized, but .*quanto_qmap.json does not name it"):
        read(folder)


def _torchao(folder: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> Path:
    """A copy of torchao's folder; `change` sees the metadata of the first weight, which is an Int8Tensor, and of int4."""
    tensors = load_tensors(DATA / "torchao" / "model.safetensors")
    with SafetensorsFile(DATA / "torchao" / "model.safetensors") as file:
        metadata = dict(file.metadata)
    abouts = {
        name: json.loads(metadata[f"{name}.weight"]) for name in ("model.layers.0.int8_rows", "model.layers.3.intx4")
    }
    change(
        tensors, {"int8": abouts["model.layers.0.int8_rows"], "intx4": abouts["model.layers.3.intx4"], "all": metadata}
    )
    metadata |= {f"{name}.weight": json.dumps(about) for name, about in abouts.items() if f"{name}.weight" in metadata}
    config = json.loads((DATA / "torchao" / "config.json").read_text())
    return write_folder(folder, tensors, config, metadata)


def _set(which: str, key: str, value: Any) -> Callable[[Tensors, dict[str, Any]], object]:
    return lambda _, about: about[which].update(
        {key: value} if key == "_type" else {"_data": {**about[which]["_data"], key: value}}
    )


_KWARGS = {"_type": "QuantizeTensorToInt8Kwargs", "_data": {"granularity": {"_type": "PerRow", "_data": {}}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("int8", "_type", "Int4TilePackedTo4dTensor"), "'Int4TilePackedTo4dTensor', which is not read: its codes are"),
        (_set("int8", "_type", "Int4Tensor"), "'Int4Tensor', which is not read: only a CUDA kernel says"),
        (_set("int8", "_type", "os.system"), "'os.system', which is not read: not a class that is known here"),
        (_set("int8", "_type", 3), "'_type' is '3', it must be a string"),
        (_set("int8", "block_size", [2, 64]), r"block_size \[2, 64\] is not groups along rows of K=64"),
        (_set("int8", "block_size", [1, 24]), r"block_size \[1, 24\] is not groups"),
        (_set("int8", "block_size", [1, 32]), r"_weight_scale is F32 \[24, 1\], it must be .* \[24, 2\]"),
        (_set("int8", "block_size", [True, 64]), "it must be two sizes"),
        (_set("int8", "block_size", None), "it must be two sizes"),
        (_set("int8", "act_quant_kwargs", {"_type": "x"}), "has no 'granularity', which must be PerRow"),
        (_set("int8", "act_quant_kwargs", _KWARGS), "it must be QuantizeTensorToInt8Kwargs or"),
        (_set("intx4", "activation_quantization", "int8"), "it must be 'int8_asym_per_token' or null"),
        (_set("intx4", "target_dtype", {"_data": "int1"}), "'target_dtype' is .*, it must be one of int2, int3"),
        (_set("intx4", "target_dtype", {"_data": "int3"}), "_weight_qdata holds values outside 3 bits"),
        (lambda t, _: t.update({"model.layers.0.int8_rows._weight_act_pre_scale": torch.ones(64)}), "'_weight_act_pre_scale'"),
        (lambda t, _: t["model.layers.0.int8_rows._weight_scale"].fill_(torch.nan), "scales: 24 values are not finite"),
        (lambda t, _: t.pop("model.layers.0.int8_rows._weight_scale"), "but no _weight_scale"),
        (lambda _, about: about["all"].pop("model.layers.1.int8_groups.weight"), "int8_groups: has no entry in the metadata"),
        (lambda _, about: about["all"].update({"model.layers.1.int8_groups.weight": "[" * 9000}), "metadata of model.layers.1"),
        (lambda _, about: about["all"].update(tensor_names="{"), "tensor_names of its metadata is not a list of names"),
        (
            lambda _, about: about["all"].update(tensor_names='["experts.up"]', **{"experts.up": '{"_type": "Int8Tensor"}'}),
            "experts.up is quantized, and not the weight of a layer",
        ),
    ],
)  # fmt: skip
def test_torchao_refused(change: Callable[[Tensors, dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(_torchao(tmp_path, change))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin cannot be read: convert to safetensors first"):
        read(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "qmodel.pt")
    with pytest.raises(ArtifactError, match=r"qmodel\.pt cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_mutations(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    (folder / "decoded.safetensors").unlink()
    counts = attack(folder, 30, name)
    assert counts["refused"] > 5 and counts["read"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_mutations(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    (folder / "decoded.safetensors").unlink()
    attack(folder, 1500, f"{name}-slow")
