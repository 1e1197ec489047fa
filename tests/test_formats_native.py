"""The format that save_pretrained writes for lowbit's models: state_dict and shapes, read back to the bit or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit
from checkpoints import write
from folders import attack
from layers import layer
from lowbit import ArtifactError, QuantizedLinear, QuantizedWeight, formats

CONFIG = {"quant_method": "lowbit", "version": 1}
CASES = {
    "a.0.q": layer("int4-g32"),
    "a.0.k": layer("int3-g32-offset", bias=False),
    "a.0.v": layer("int5-g64-asym-fp16", perm=True),
    "a.1.q": layer("nf4-g32-fp32", N=40, K=96),
    "a.1.k": layer("fp8-b128-a8", N=130, K=200),
    "a.1.v": layer("int8-a8", K=100),
}


def static() -> QuantizedLinear:
    weight = QuantizedWeight.quantize(torch.randn(16, 64), "int8-aint8_static_asym")
    one = {"input_scale": torch.tensor([0.02]), "input_zero": torch.tensor([7], dtype=torch.int32)}
    return QuantizedLinear.from_weight(weight, None, input_pre_scale=torch.rand(64), **one)


def tensors(layers: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"norm.weight": torch.ones(4)}
    for path, module in layers.items():
        found |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
        found[f"{path}.weight_shape"] = torch.tensor([module.out_features, module.in_features])
    return found


@pytest.mark.parametrize("config", [CONFIG, None], ids=["config", "no config"])
def test_every_kind_of_layer(config: dict[str, Any] | None, tmp_path: Path) -> None:
    modules = {**CASES, "b": static()}
    write(tmp_path, tensors(modules), config)
    assert formats.detect(tmp_path).format == "lowbit"
    found = dict(formats.read(tmp_path))
    assert found.keys() == {*modules, "norm.weight"}
    for path, module in modules.items():
        record = found[path]
        assert isinstance(record, formats.LinearRecord)
        assert record.weight == module.quantized_weight() and record.weight.scheme == module.scheme
        x = torch.randn(3, module.in_features)
        assert torch.equal(record.linear()(x), module(x))
    report = lowbit.load_checkpoint(tmp_path)
    assert report.contents["a.0.v"].has_perm


def changed(folder: Path, name: str, value: Tensor | None, config: dict[str, Any] | None = CONFIG) -> Path:
    made = tensors({"fc": layer("int4-g32")}) | ({} if value is None else {name: value})
    if value is None:
        del made[name]
    return write(folder, made, config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc.weight_shape", None, "no weight_shape"),
        (
            "fc.weight_shape",
            torch.tensor([48, 128], dtype=torch.int32),
            r"weight_shape is I32 \[2\], it must be I64 \[2\]",
        ),
        ("fc.weight_shape", torch.tensor([48, 64]), r"weight_packed is U8 \[48, 64\], it must be U8 \[48, 32\]"),
        ("fc.weight_shape", torch.tensor([48, -1]), "weight_shape: a weight needs N >= 1 and K >= 1"),
        ("fc.weight_shape", torch.tensor([1 << 40, 1 << 40]), r"weight_shape is \[1099511627776, "),
        ("fc.weight_scales", None, "no weight_scales"),
        ("fc.weight_scales", torch.ones(48, 4), r"weight_scales is F32 \[48, 4\], it must be BF16 \[48, 4\]"),
        ("fc.weight_scheme", torch.zeros(4), r"weight_scheme is F32 \[4\]"),
        ("fc.weight_scheme", torch.zeros(201, dtype=torch.uint8), "at most 200 bytes"),
        ("fc.weight_scheme", torch.tensor(list(b"int9-g32"), dtype=torch.uint8), "weight_scheme: .*int9"),
        ("fc.weight_scheme", torch.tensor(list(b"int8-aint8_static"), dtype=torch.uint8), "weight_packed is U8"),
        (
            "fc.weight_zeros",
            torch.zeros(48, 4, dtype=torch.uint8),
            "a tensor 'weight_zeros' .* not part of this format",
        ),
        ("fc.weight_perm", torch.zeros(128, dtype=torch.int32), "perm is not a permutation"),
        ("fc.bias", torch.zeros(47), r"bias is F32 \[47\]"),
        ("fc.input_pre_scale", torch.ones(64), r"input_pre_scale is F32 \[64\]"),
        ("fc.input_scale", torch.ones(1), "a tensor 'input_scale' .* not part of this format"),
    ],
)
def test_refused(name: str, value: Tensor | None, message: str, tmp_path: Path) -> None:
    changed(tmp_path, name, value)
    with pytest.raises(ArtifactError, match=message):
        dict(formats.read(tmp_path))


def test_other_versions_and_other_contents(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'version' is '2', it must be 1, which is what this lowbit reads"):
        formats.detect(changed(tmp_path / "a", "norm.weight", torch.ones(4), CONFIG | {"version": 2}))
    with pytest.raises(ArtifactError, match="quant_method is 'lowbit', but the tensors say otherwise"):
        formats.detect(write(tmp_path / "b", {"norm.weight": torch.ones(4)}, CONFIG))


def test_hostile_files(tmp_path: Path) -> None:
    write(tmp_path, tensors({"fc": layer("int4-g32", N=4), "gc": static()}), CONFIG)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == CONFIG
    counts = attack(tmp_path, 60, "native")
    assert min(counts.values()) > 0
