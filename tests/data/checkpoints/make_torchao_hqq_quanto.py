"""Makes the torchao, HQQ and quanto files of this folder, each with the code of those who own the format.

    python make_torchao_hqq_quanto.py torchao        # needs torchao (0.18 made these files)
    python make_torchao_hqq_quanto.py hqq            # needs hqq (0.2.8.post1 made these files)
    python make_torchao_hqq_quanto.py quanto         # needs optimum-quanto (0.2.7 made these files)

Small random weights in every way that the library can quantize and save on a CPU. Beside model.safetensors stands what the
library's own code decodes it to, in fp32: decoded.safetensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
N, K = 24, 64


def _layers(names: list[str], dtype: torch.dtype) -> nn.Module:
    """Modules "model.layers.I.NAME": linear layers, the first of them with a bias, of other values each."""
    torch.manual_seed(0)
    made = nn.Module()
    made.model = nn.Module()
    made.model.layers = nn.ModuleList()
    for i, name in enumerate(names):
        layer = nn.Module()
        setattr(layer, name, nn.Linear(K, N, bias=i == 0, dtype=dtype))
        made.model.layers.append(layer)
    made.model.norm = nn.RMSNorm(K, dtype=dtype)
    return made


def _save(name: str, tensors: dict[str, Tensor], decoded: dict[str, Tensor], config: Any, metadata: Any = None) -> None:
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt", **(metadata or {})})
    save_file({key: tensor.float().contiguous() for key, tensor in decoded.items()}, folder / "decoded.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def make_torchao() -> None:
    """As Transformers saves it: tensor subclasses taken apart, and what they were in the file's metadata."""
    import torchao.quantization as ao
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    group, rows = ao.PerGroup(32), ao.PerAxis(0)
    asymmetric = ao.MappingType.ASYMMETRIC
    cases: list[tuple[str, Any]] = [
        ("int8_rows", ao.Int8WeightOnlyConfig(version=2)),
        ("int8_groups", ao.Int8WeightOnlyConfig(version=2, granularity=group)),
        ("int8_dynamic", ao.Int8DynamicActivationInt8WeightConfig(version=2)),
        ("intx4", ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)),
        ("intx4_asym", ao.IntxWeightOnlyConfig(torch.int4, group, asymmetric)),
        ("intx2_asym", ao.IntxWeightOnlyConfig(torch.int2, group, asymmetric)),
        ("intx3", ao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=group)),
        ("intx5_rows", ao.IntxWeightOnlyConfig(weight_dtype=torch.int5, granularity=rows)),
        ("intx8", ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=group)),
        ("a8w4", ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=group)),
        ("float8", ao.Float8WeightOnlyConfig()),
    ]
    model = _layers([name for name, _ in cases], torch.bfloat16)
    decoded = {}
    for i, (name, config) in enumerate(cases):
        ao.quantize_(model, config, filter_fn=lambda _, path, i=i: path == f"model.layers.{i}.{cases[i][0]}")
        path = f"model.layers.{i}.{name}"
        weight = model.get_parameter(f"{path}.weight")
        # In fp32, so that the formula is what is compared, and not the rounding of 16-bit arithmetic.
        if hasattr(weight, "zero_point") and weight.zero_point is not None:
            wide = type(weight).dequantize.__globals__["dequantize_affine"](
                weight.qdata, weight.block_size, weight.scale.float(), weight.zero_point, torch.int8,
                output_dtype=torch.float32,
            )  # fmt: skip
        else:
            wide = weight.dequantize(torch.float32)
        decoded[path] = wide
        assert torch.equal(wide.bfloat16(), weight.dequantize()), name
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    config = {
        "model_type": "llama",
        "quantization_config": {"quant_method": "torchao", "quant_type": "made of several"},
    }
    _save("torchao", tensors, decoded, config, metadata)


def make_hqq() -> None:
    """HQQLinear.state_dict(), which Transformers 4 saved as it is."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    cases = [
        ("w4", {"nbits": 4, "group_size": 32}, torch.float16),
        ("w8", {"nbits": 8, "group_size": 32}, torch.bfloat16),
        ("w3", {"nbits": 3, "group_size": 64}, torch.float16),
        ("w2", {"nbits": 2, "group_size": 16}, torch.float32),
        ("w4_rows", {"nbits": 4, "group_size": None}, torch.float16),
        ("w5", {"nbits": 5, "group_size": 32}, torch.float16),
        ("w4_float", {"nbits": 4, "group_size": 32, "view_as_float": True}, torch.float16),
    ]
    model = _layers([name for name, _, _ in cases], torch.float32)
    tensors: dict[str, Tensor] = {"model.norm.weight": model.model.norm.weight}
    decoded = {}
    for i, (name, options, dtype) in enumerate(cases):
        path = f"model.layers.{i}.{name}"
        config = BaseQuantizeConfig(axis=1, **options)
        layer = HQQLinear(model.get_submodule(path), config, compute_dtype=dtype, device="cpu", del_orig=False)
        tensors |= {f"{path}.{key}": value for key, value in layer.state_dict().items() if value is not None}
        wide = {**layer.meta, "compute_dtype": torch.float32}
        wide |= {key: wide[key].float() for key in ("scale", "zero")}
        decoded[path] = Quantizer.dequantize(layer.W_q, wide)
    about = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32, "axis": 1}}}
    _save(
        "hqq", tensors, decoded, {"model_type": "llama", "quantization_config": {**about, "skip_modules": ["lm_head"]}}
    )


def make_quanto() -> None:
    """As QuantizedModelForCausalLM.save_pretrained writes it, and quanto_qmap.json with what each layer is."""
    from optimum.quanto import freeze, qfloat8, qfloat8_e5m2, qint8, quantization_map, quantize

    cases = [("int8", qint8), ("float8", qfloat8), ("float8_e5m2", qfloat8_e5m2)]
    model = _layers([name for name, _ in cases], torch.float16)
    for i, (name, kind) in enumerate(cases):
        quantize(model, weights=kind, include=f"model.layers.{i}.{name}")
    freeze(model)
    decoded = {}
    for i, (name, _) in enumerate(cases):
        weight = model.get_submodule(f"model.layers.{i}.{name}").weight
        decoded[f"model.layers.{i}.{name}"] = weight._data.float() * weight._scale.float()
        assert torch.equal(decoded[f"model.layers.{i}.{name}"].half(), weight.dequantize()), name
    _save("quanto", dict(model.state_dict()), decoded, {"model_type": "llama"})
    (HERE / "quanto" / "quanto_qmap.json").write_text(json.dumps(quantization_map(model), indent=1) + "\n")


MAKERS: dict[str, Callable[[], None]] = {"torchao": make_torchao, "hqq": make_hqq, "quanto": make_quanto}

if __name__ == "__main__":
    MAKERS[sys.argv[1]]()
