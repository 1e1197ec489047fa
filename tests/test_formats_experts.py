"""Experts that a checkpoint keeps in one tensor: each is what the reader makes of its slices, and models load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lowbit
from checkpoints import write
from hf import EXPERTS, config, load, logits, save, store, transformers
from lowbit import ArtifactError, ExpertWeights, QuantizedExperts, QuantizedWeight, formats

E = 3
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
ROWS = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}
CT = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": _GROUP}}
_INT = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
CT_INT = {**CT, "format": "int-quantized", "config_groups": {"group_0": {**_GROUP, "weights": _INT}}}
MLX = {"bits": 4, "group_size": 32}
MXFP4 = {"bits": 4, "group_size": 32, "mode": "mxfp4"}


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(N: int, K: int, seed: int) -> Tensor:
    made = torch.randint(0, 256, (N, K // 2), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return made.view(torch.uint32)


def one(kind: str, seed: int, N: int = 40, K: int = 160) -> dict[str, Tensor]:
    """The tensors of one layer, of one expert."""
    codes = values(N, K, seed=seed).to(torch.float8_e4m3fn)
    grid = values(-(-N // 128), -(-K // 128), seed=seed).abs() + 0.1
    column = values(N, 1, seed=seed).abs() + 0.1
    return {
        "fp8": {"weight": codes, "weight_scale_inv": grid},
        "rows": {"weight": codes, "weight_scale": column},
        "ct": {"weight": codes, "weight_scale": column},
        "ct-int": {"weight": (values(N, K, seed=seed) * 40).clamp(-127, 127).to(torch.int8), "weight_scale": column},
        "mlx": {
            "weight": words(N, K, seed),
            "scales": values(N, K // 32, seed=seed).half(),
            "biases": values(N, K // 32, seed=seed + 1).half(),
        },
        "mxfp4": {"weight": words(N, K, seed), "scales": torch.full((N, K // 32), 120 + seed, dtype=torch.uint8)},
    }[kind]


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("quantization_config", FP8),
    "rows": ("quantization_config", ROWS),
    "ct": ("quantization_config", CT),
    "ct-int": ("quantization_config", CT_INT),
    "mlx": ("quantization", MLX),
    "mxfp4": ("quantization", MXFP4),
}


def folder(path: Path, kind: str, tensors: dict[str, Tensor]) -> Path:
    key, quantization = CONFIGS[kind]
    write(path, tensors)
    (path / "config.json").write_text(json.dumps({key: quantization}))
    return path


def stacked(kind: str) -> dict[str, Tensor]:
    parts = [one(kind, seed) for seed in range(E)]
    return {leaf: torch.stack([part[leaf] for part in parts]) for leaf in parts[0]}


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_expert_is_read_as_a_layer_of_its_own(kind: str, tmp_path: Path) -> None:
    flat = {f"{e}.{leaf}": t for e in range(E) for leaf, t in one(kind, e).items()}
    alone = dict(formats.read(folder(tmp_path / "flat", kind, flat)))
    path = folder(tmp_path / "stacked", kind, {f"up.{leaf}": t for leaf, t in stacked(kind).items()})
    with formats.plan(path) as plan:
        assert plan.layers["up"].shape == (E, 40, 160) and plan.layers["up"].about.endswith("3 experts")
        assert plan.layers["up"].nbytes == sum(t.nbytes for t in stacked(kind).values())
    ((name, record),) = formats.read(path)
    assert name == "up" and isinstance(record, formats.ExpertsRecord)
    for e, weight in enumerate(record.weight):
        want = alone[str(e)]
        assert isinstance(want, formats.LinearRecord) and weight == want.weight
    assert record.experts()(values(2, 160), [0, 2, 0]).shape == (2, 40)
    contents = lowbit.load_checkpoint(path).contents
    assert isinstance(contents["up"], QuantizedExperts) and contents["up"].quantized_weight() == record.weight


@pytest.mark.parametrize(
    ("kind", "leaf", "value", "message"),
    [
        (
            "fp8",
            "weight_scale_inv",
            torch.ones(2, 1, 2),
            r"weight is of 3 experts, weight_scale_inv is F32 \[2, 1, 2\]",
        ),
        ("fp8", "weight", torch.zeros(0, 40, 160).to(torch.float8_e4m3fn), "weight is of 0 experts"),
        ("fp8", "weight_scale_inv", torch.full((3, 1, 2), torch.nan), "scales: 2 values are not finite"),
        ("rows", "input_scale", torch.ones(3), "the config does not say static"),
        ("ct", "weight_scale", torch.ones(3, 41, 1), r"weight_scale is F32 \[41, 1\]"),
        ("mlx", "bias", torch.zeros(3, 40), "has bias of each expert"),
        ("mlx", "scales", torch.zeros(3, 40, 4).half(), r"scales is F16 \[40, 4\]"),
    ],
)
def test_refused(kind: str, leaf: str, value: Tensor, message: str, tmp_path: Path) -> None:
    tensors = {f"up.{name}": t for name, t in {**stacked(kind), leaf: value}.items()}
    if leaf == "weight":
        tensors |= {f"up.{name}": t[:0] for name, t in stacked(kind).items() if name != "weight"}
    with pytest.raises(ArtifactError, match=message):
        list(formats.read(folder(tmp_path, kind, tensors)))


# -- gpt-oss -----------------------------------------------------------------------------------------------------------


def mxfp4(count: int, N: int, K: int, seed: int) -> tuple[Tensor, Tensor]:
    """Blocks and scales of random weights near 1/8."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, N, K // 32, 16), generator=generator).to(torch.uint8)
    return blocks, torch.randint(121, 125, (count, N, K // 32), generator=generator).to(torch.uint8)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = mxfp4(E, 40, 160, 0)
    write(tmp_path, {"up.gate_up_proj_blocks": blocks, "up.gate_up_proj_scales": scales}, {"quant_method": "mxfp4"})
    ((name, record),) = formats.read(tmp_path)
    assert name == "up.gate_up_proj" and isinstance(record, formats.ExpertsRecord)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(record.weight.dequantize(), want.transpose(1, 2))
    assert record.weight.nbytes == blocks.nbytes + scales.nbytes
    (tmp_path / "config.json").unlink()
    assert formats.detect(tmp_path).format == "mxfp4"


def test_a_gpt_oss_runs_and_is_saved(tmp_path: Path) -> None:
    save(tmp_path / "dense", "gpt_oss")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    tensors = dict(dense)
    for seed, name in enumerate(
        [name for name in dense if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    ):
        count, K, N = tensors.pop(name).shape
        blocks, scales = mxfp4(count, N, K, seed)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        parts = {"packed": blocks.reshape(count, N, K // 2), "scales": scales.view(torch.float8_e8m0fnu)}
        weight = ExpertWeights.from_tensors(parts, "mxfp4", (count, N, K))
        dense[name] = weight.dequantize().transpose(1, 2)
    store(tmp_path / "dense" / "model.safetensors", dense)
    reference = load(tmp_path / "dense", dtype=torch.float32)
    (tmp_path / "quantized").mkdir()
    store(tmp_path / "quantized" / "model.safetensors", tensors)
    about = json.loads((tmp_path / "dense" / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(about))
    asked = lowbit.LowbitConfig(from_checkpoint=True)
    model = load(tmp_path / "quantized", quantization_config=asked, dtype=torch.float32)
    assert len([m for m in model.modules() if isinstance(m, QuantizedExperts)]) == 4
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        (
            "blocks",
            torch.zeros(3, 40, 5, 8, dtype=torch.uint8),
            r"gate_up_proj_blocks is U8 \[3, 40, 5, 8\], it must be",
        ),
        ("blocks", torch.zeros(3, 40, 80, dtype=torch.uint8), r"gate_up_proj_blocks is U8 \[3, 40, 80\]"),
        ("blocks", torch.zeros(3, 0, 5, 16, dtype=torch.uint8), r"gate_up_proj_blocks is U8 \[3, 0, 5, 16\]"),
        ("scales", torch.zeros(3, 40, 4, dtype=torch.uint8), r"gate_up_proj_scales is U8 \[3, 40, 4\]"),
        ("scales", torch.full((3, 40, 5), 255, dtype=torch.uint8), "expert 0: scales: 200 values are not finite"),
        ("scales", None, "but no gate_up_proj_scales"),
    ],
)
def test_mxfp4_refused(leaf: str, value: Tensor | None, message: str, tmp_path: Path) -> None:
    blocks, scales = mxfp4(E, 40, 160, 0)
    tensors = {"up.gate_up_proj_blocks": blocks, "up.gate_up_proj_scales": scales, f"up.gate_up_proj_{leaf}": value}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ArtifactError, match=message):
        list(formats.read(write(tmp_path, kept, {"quant_method": "mxfp4"})))


# -- in models ---------------------------------------------------------------------------------------------------------


def quantized(folder: Path, layout: str) -> Any:
    """A Qwen3-MoE whose experts are kept in one tensor each, as FP8 or as MLX has them; gives the dense model."""
    save(folder / "dense", "qwen3_moe")
    tensors = load_file(folder / "dense" / "model.safetensors")
    dense = dict(tensors)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp."
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            each = [tensors.pop(f"{prefix}experts.{e}.{leaf}.weight") for e in range(EXPERTS["num_experts"])]
            weight = ExpertWeights.quantize(torch.stack(each), "fp8" if layout == "fp8" else "int4-g32-offset-fp16")
            for e, dequantized in enumerate(weight.dequantize()):
                dense[f"{prefix}experts.{e}.{leaf}.weight"] = dequantized
            tensors |= _stored(prefix, leaf, weight, layout)
    if layout == "fp8":
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp.experts."
            for end in ("", "_scale_inv"):
                gate, up = (tensors.pop(f"{prefix}{leaf}{end}") for leaf in ("gate_proj", "up_proj"))
                tensors[f"{prefix}gate_up_proj{end}"] = torch.cat([gate, up], 1)
    store(folder / "dense" / "model.safetensors", dense)
    (folder / "quantized").mkdir()
    store(folder / "quantized" / "model.safetensors", tensors)
    about = json.loads((folder / "dense" / "config.json").read_text())
    key, quantization = CONFIGS["rows" if layout == "fp8" else "mlx"]
    (folder / "quantized" / "config.json").write_text(json.dumps({**about, key: quantization}))
    return load(folder / "dense", dtype=torch.float32)


def _stored(prefix: str, leaf: str, weight: ExpertWeights, layout: str) -> dict[str, Tensor]:
    parts = weight.tensors()
    if layout == "fp8":
        name = f"{prefix}experts.{leaf}"
        return {name: parts["packed"].view(torch.float8_e4m3fn), f"{name}_scale_inv": parts["scales"]}
    name = f"{prefix}switch_mlp.{leaf}"
    words = parts["packed"].view(torch.uint32)
    return {f"{name}.weight": words, f"{name}.scales": parts["scales"], f"{name}.biases": parts["offsets"]}


@pytest.mark.parametrize("layout", ["fp8", "mlx"])
def test_models_load_them(layout: str, tmp_path: Path) -> None:
    reference = quantized(tmp_path, layout)
    model = load(
        tmp_path / "quantized", quantization_config=lowbit.LowbitConfig(from_checkpoint=True), dtype=torch.float32
    )
    about = config("qwen3_moe")
    report = lowbit.load_checkpoint(
        tmp_path / "quantized", lambda: transformers.AutoModelForCausalLM.from_config(about, dtype=torch.float32)
    )
    assert report.model is not None and len(report.layers) == 4
    for one in (model, report.model.eval()):
        experts = {name: m for name, m in one.named_modules() if isinstance(m, QuantizedExperts)}
        assert len(experts) == 4
        for name, module in experts.items():
            assert torch.equal(module.quantized_weight().dequantize(), reference.get_parameter(name)), name
        want = logits(reference)
        # FP8's inputs are quantized too.
        assert float((logits(one) - want).norm() / want.norm()) < (0.1 if layout == "fp8" else 1e-5)
    assert torch.equal(logits(model), logits(report.model))
    with torch.device("meta"):  # which Transformers, loading, would have kept from meaning linspace
        assert torch.linspace(0, 1, 2).is_meta


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    quantized(tmp_path, "mlx")
    path = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(path)
    for leaf in ("weight", "scales", "biases"):
        tensors[f"model.layers.1.mlp.switch_mlp.up_proj.{leaf}"] = tensors[
            f"model.layers.1.mlp.switch_mlp.up_proj.{leaf}"
        ][:3]
    store(path, tensors)
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: its parts are of 4 and 3 experts"):
        load(tmp_path / "quantized", quantization_config=lowbit.LowbitConfig(from_checkpoint=True))


def test_a_weight_of_one_expert_is_a_weight() -> None:
    weight = ExpertWeights.quantize(values(1, 8, 32), "int4-g32")
    assert weight[0] == QuantizedWeight.quantize(values(1, 8, 32)[0], "int4-g32")
