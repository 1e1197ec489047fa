"""MXFP4, MXFP8 and NVFP4 as compressed-tensors and Model Optimizer write them: exact, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import named, records, stream, write
from lowbit import ArtifactError
from reference import CODES, SCALE_CODES

N, K = 24, 96
CT = {
    "nvfp4": ("nvfp4-pack-quantized", 4, "tensor_group", 16),
    "mxfp4": ("mxfp4-pack-quantized", 4, "group", 32),
    "mxfp8": ("mxfp8-quantized", 8, "group", 32),
}
SCHEMES = {"nvfp4": "nvfp4", "mxfp4": "mxfp4", "mxfp8": "mxfp8"}


def ct_config(kind: str) -> dict[str, Any]:
    format, bits, strategy, group = CT[kind]
    weights = {"num_bits": bits, "type": "float", "strategy": strategy, "group_size": group, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": weights}},
    }


def made(kind: str) -> tuple[np.ndarray, torch.Tensor, torch.Tensor, np.ndarray]:
    """Codes as they are stored, scales, and what the weight is before the number above the scales."""
    r = np.random.default_rng(7)
    group = CT[kind][3]
    codes = r.integers(0, 16, (N, K))
    if kind == "mxfp8":
        codes = r.integers(0, 256, (N, K))
        codes[codes % 128 == 127] = 0
    stored = torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)
    if kind != "mxfp8":
        stored = torch.from_numpy(stream(codes, 4, 8).astype(np.uint8))
    scales = torch.from_numpy(r.integers(1, 127 if kind == "nvfp4" else 200, (N, K // group)).astype(np.uint8))
    table = SCALE_CODES["e4m3" if kind == "nvfp4" else "e8m0"]
    values = CODES["fp8_e4m3" if kind == "mxfp8" else "fp4_e2m1"]
    return values[codes], stored, scales, table[scales.numpy()].repeat(group, 1)


@pytest.mark.parametrize("kind", CT)
def test_compressed_tensors(kind: str, tmp_path: Path) -> None:
    codes, stored, scales, factors = made(kind)
    tensors: dict[str, Any] = {"weight" if kind == "mxfp8" else "weight_packed": stored, "weight_scale": scales}
    if kind == "nvfp4":
        tensors["weight_scale"] = scales.view(torch.float8_e4m3fn)
        tensors |= {"weight_global_scale": torch.tensor([28928.0]), "input_global_scale": torch.tensor([3.0])}
        factors = factors * (np.float32(1) / np.float32(28928))
    (record,) = records(write(tmp_path, named("fc", tensors), ct_config(kind))).values()
    assert np.array_equal(record.weight.dequantize().numpy(), codes * factors)
    assert str(record.weight.scheme) == SCHEMES[kind] and record.weight.scheme.activation is None


@pytest.mark.parametrize("algo", ["NVFP4", "W4A16_NVFP4", "MXFP4", "MXFP8"])
def test_modelopt(algo: str, tmp_path: Path) -> None:
    kind = algo.rpartition("_")[2].lower()
    codes, stored, scales, factors = made(kind)
    tensors: dict[str, Any] = {"weight": stored, "weight_scale": scales, "bias": torch.ones(N)}
    if kind == "nvfp4":
        tensors |= {"weight_scale": scales.view(torch.float8_e4m3fn), "weight_scale_2": torch.tensor(0.0123)}
        factors = factors * np.float32(0.0123)
        if algo == "NVFP4":
            tensors["input_scale"] = torch.tensor(0.5)
    config = {"quant_method": "modelopt", "quant_algo": algo}
    (record,) = records(write(tmp_path, named("fc", tensors), config)).values()
    assert np.array_equal(record.weight.dequantize().numpy(), codes * factors)
    assert str(record.weight.scheme) == SCHEMES[kind] and record.bias is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.ones(N, 5)}, r"weight_scale is F32 \[24, 5\], it must be F8_E4M3 \[24, 6\]"),
        ({"weight_global_scale": torch.ones(2)}, r"weight_global_scale is F32 \[2\]"),
        ({"weight_global_scale": torch.zeros(1)}, "weight_global_scale is 0; it must be finite and above 0"),
        ({"weight_global_scale": torch.tensor([float("nan")])}, "weight_global_scale is nan"),
        ({"weight_packed": torch.zeros(N, 20, dtype=torch.uint8)}, "K=40 is not a multiple of 16"),
        (
            {"weight_packed": torch.zeros(2, N, 48, dtype=torch.uint8)},
            "weight_packed is of 2 experts, weight_global_scale is",
        ),
        ({"weight_zero_point": torch.zeros(N, 6)}, "'weight_zero_point' .* not part of this format"),
        (
            {"weight_scale": torch.full((N, 6), 127, dtype=torch.uint8).view(torch.float8_e4m3fn)},
            "values are not finite",
        ),
    ],
)
def test_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, stored, scales, _ = made("nvfp4")
    tensors = {"weight_packed": stored, "weight_scale": scales.view(torch.float8_e4m3fn)}
    tensors |= {"weight_global_scale": torch.ones(1), **change}
    with pytest.raises(ArtifactError, match=message):
        records(write(tmp_path, named("fc", tensors), ct_config("nvfp4")))


@pytest.mark.parametrize(
    ("key", "value"), [("num_bits", 8), ("strategy", "group"), ("group_size", 32), ("type", "int")]
)
def test_config_and_format_disagree(key: str, value: object, tmp_path: Path) -> None:
    _, stored, scales, _ = made("nvfp4")
    config = ct_config("nvfp4")
    config["config_groups"]["group_0"]["weights"][key] = value
    tensors = {"weight_packed": stored, "weight_scale": scales.view(torch.float8_e4m3fn)}
    with pytest.raises(ArtifactError, match=f"'{key}' is '{value}', it must be"):
        records(write(tmp_path, named("fc", tensors), config))
