"""MLX: what mlx wrote decodes to what mlx says, and what does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit.formats
from folders import DATA, attack, changed, codes_of, load_tensors, read, weights, write_folder
from lowbit import ArtifactError

MODES = DATA / "mlx-modes"
REAL = DATA / "mlx-lm-q4"
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]
Tensors = dict[str, torch.Tensor]


def _e4m3(byte: int) -> float:
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = fraction * 2.0**-9 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if byte & 0x80 else size


def reference(tensors: Tensors, layer: str, bits: int, group_size: int, mode: str) -> np.ndarray:
    """One row at a time, as the format is described."""
    weight, scales = tensors[f"{layer}.weight"], tensors[f"{layer}.scales"]
    N, K = weight.shape[0], weight.shape[1] * 32 // bits
    made = np.zeros((N, K), np.float32)
    for n in range(N):
        row = weight[n].view(torch.uint8).numpy().tobytes()
        for k, q in enumerate(codes_of(row, bits, K)):
            s = scales[n, k // group_size]
            if mode == "affine":
                product = np.float32(q) * np.float32(float(s))
                made[n, k] = product + np.float32(float(tensors[f"{layer}.biases"][n, k // group_size]))
            else:
                scale = _e4m3(int(s)) if mode == "nvfp4" else 2.0 ** (int(s) - 127)
                made[n, k] = (E2M1[q] if bits == 4 else _e4m3(q)) * scale
    return made


def test_what_mlx_wrote_in_every_mode_to_the_bit() -> None:
    decoded = load_tensors(MODES / "decoded.safetensors")
    tensors = load_tensors(MODES / "model.safetensors")
    config = json.loads((MODES / "config.json").read_bytes())["quantization"]
    found = read(MODES)
    assert found.pop("model.norm.weight").tolist() == [1.0] * 8
    assert found.keys() == decoded.keys() and len(found) == 11
    for name, record in found.items():
        own = config.get(name, config)
        assert torch.equal(record.weight.dequantize(), decoded[name]), name
        want = reference(tensors, name, own["bits"], own["group_size"], own["mode"])
        assert np.array_equal(record.weight.dequantize().numpy(), want), name
    schemes = {str(record.weight.scheme) for record in found.values()}
    assert {"int2-g64-offset-fp16", "int4-g32-offset-bf16", "fp4-g16-e4m3", "mxfp4", "mxfp8"} <= {
        *schemes, *(scheme.replace("-offset", "-offset-bf16") for scheme in schemes),
    }  # fmt: skip
    plan = {name: layer.about for name, layer in _plan(MODES).items()}
    assert plan["model.layers.10.mlp.up_proj"] == "nvfp4, groups of 16"
    assert plan["model.layers.0.mlp.up_proj"] == "int4, groups of 64, offsets"


def _plan(folder: Path) -> dict[str, Any]:
    with lowbit.formats.plan(folder) as plan:
        return plan.layers


def test_what_mlx_lm_wrote() -> None:
    found = lowbit.formats.detect(REAL)
    assert (found.format, found.variant) == ("mlx", "int4, groups of 64, offsets")
    tensors = load_tensors(REAL / "model.safetensors")
    for name, weight in weights(REAL).items():
        assert np.array_equal(weight.numpy(), reference(tensors, name, 4, 64, "affine"))
        assert 0.015 < float(weight.std()) < 0.025  # as the model was initialised
    assert bool((tensors["model.layers.0.self_attn.k_proj.scales"] < 0).any())  # scales below 0 are not a mistake


@pytest.mark.oracle
def test_with_mlx_itself(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    for bits in (2, 3, 4, 5, 6, 8):
        for group_size in (32, 64, 128):
            q, scales, biases = mx.quantize(mx.random.normal((16, 256)), group_size=group_size, bits=bits)
            tensors = {
                "proj.weight": torch.from_numpy(np.array(q).view(np.int32)).view(torch.uint32),
                "proj.scales": torch.from_numpy(np.array(scales)),
                "proj.biases": torch.from_numpy(np.array(biases)),
            }
            write_folder(tmp_path / "x", tensors, {"quantization": {"group_size": group_size, "bits": bits}})
            want = np.array(mx.dequantize(q, scales, biases, group_size=group_size, bits=bits))
            assert np.array_equal(weights(tmp_path / "x")["proj"].numpy(), want)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 5, 6, 8)),
    group_size=st.sampled_from((32, 64, 128)),
    kind=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_affine_weight_to_the_bit(
    bits: int, group_size: int, kind: torch.dtype, groups: int, seed: int, tmp_path_factory: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (2, group_size * groups * bits // 8), dtype=torch.uint8, generator=generator)
    tensors = {
        "a.b.weight": raw.view(torch.uint32),
        "a.b.scales": torch.randn(2, groups, generator=generator).to(kind),
        "a.b.biases": torch.randn(2, groups, generator=generator).to(kind),
        "a.b.bias": torch.randn(2, generator=generator),
    }
    config = {"quantization": {"group_size": group_size, "bits": bits}}
    folder = write_folder(tmp_path_factory.getbasetemp() / "any_mlx", tensors, config)
    record = read(folder)["a.b"]
    assert np.array_equal(record.weight.dequantize().numpy(), reference(tensors, "a.b", bits, group_size, "affine"))
    assert torch.equal(record.bias, tensors["a.b.bias"])


def _config(**values: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for key in ("quantization", "quantization_config"):
            config[key] = {key: value for key, value in {**config[key], **values}.items() if value is not None}

    return change


def _set(name: str, value: torch.Tensor | None) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        full = f"model.layers.0.self_attn.k_proj.{name}"
        tensors.pop(full, None)
        if value is not None:
            tensors[full] = value

    return change


def _disagree(tensors: Tensors, config: dict[str, Any]) -> None:
    config["quantization"]["bits"] = 8


def _no_config(tensors: Tensors, config: dict[str, Any]) -> None:
    config.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_config(bits=7), "'bits' is '7', it must be one of 2, 3, 4, 5, 6, 8"),
        (_config(group_size=48), "'group_size' is '48'"),
        (_config(bits=8), r"scales is BF16 \[128, 4\], it must be .* \[128, 2\]"),
        (_config(bits=True), "'bits' is 'True'"),
        (_config(bits=5), "1024 bits a row are not K values of 5 bits"),
        (_config(mode="mxfp9"), "'mode' is 'mxfp9', it must be one of affine, mxfp4, mxfp8, nvfp4"),
        (_config(mode="mxfp4"), "'group_size' is '64', it must be one of 32"),
        (_config(mode="mxfp4", group_size=32), r"scales is BF16 \[128, 4\], it must be U8 \[128, 8\]"),
        (
            _config(**{"model.layers.0.self_attn.k_proj": False}),
            "is false, but the tensors of that layer are quantized",
        ),
        (_config(**{"model.layers.7.x": {"bits": 4, "group_size": 64}}), "'model.layers.7.x', which is not among"),
        (_config(**{"model.layers.0.self_attn.k_proj": {"bits": 4}}), "has no 'group_size'"),
        (_disagree, "says bits='4', but .* says '8'"),
        (_no_config, "the tensors alone do not say them"),
        (_set("biases", None), "but no biases"),
        (_set("biases", torch.zeros(128, 4)), r"biases is F32 \[128, 4\], it must be BF16"),
        (_set("scales", None), "which is not a quantized layer of MLX"),
        (_set("weight", torch.zeros(128, 32)), "which is not a quantized layer of MLX"),
        (
            _set("weight", torch.zeros(3, 128, 32, dtype=torch.uint8).view(torch.uint32)),
            r"weight is of 3 experts, biases is",
        ),
        (_set("weight", torch.zeros(32, dtype=torch.uint8).view(torch.uint32)), r"weight is U32 \[8\]"),
        (_set("weight", torch.zeros(128, 0, dtype=torch.uint32)), "a weight of N=128, K=0"),
        (_set("global_scale", torch.ones(1)), "'global_scale' .* not part of this format"),
        (_set("bias", torch.zeros(127)), r"bias is F32 \[127\]"),
        (_set("scales", torch.full((128, 4), float("nan"), dtype=torch.bfloat16)), "values are not finite"),
    ],
)
def test_refused(change: Callable[[Tensors, dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    folder = changed(tmp_path / "bad", REAL, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        read(folder)
    assert str(folder) in str(caught.value)


def test_a_scale_that_is_a_nan_is_refused(tmp_path: Path) -> None:
    for mode, group_size in (("mxfp4", 32), ("nvfp4", 16)):
        tensors = {
            "a.proj.weight": torch.zeros(1, 4 * group_size // 8, dtype=torch.int32).view(torch.uint32),
            "a.proj.scales": torch.full((1, 4), 0xFF, dtype=torch.uint8),
        }
        config = {"quantization": {"group_size": group_size, "bits": 4, "mode": mode}}
        with pytest.raises(ArtifactError, match=r"a\.proj: scales: 4 values are not finite"):
            read(write_folder(tmp_path / mode, tensors, config))


def test_the_config_in_either_place_is_enough(tmp_path: Path) -> None:
    for key in ("quantization", "quantization_config"):
        folder = changed(tmp_path / key, REAL, lambda tensors, config, key=key: config.pop(key))  # type: ignore[misc]
        assert lowbit.formats.detect(folder).format == "mlx"


def test_mutated_checkpoints(tmp_path: Path) -> None:
    def keep(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [name for name in tensors if "layers.0" not in name and "layers.8" not in name]:
            del tensors[name]
        for section in (config["quantization"], config["quantization_config"]):
            for name in [name for name in section if "." in name and "layers.8" not in name]:
                del section[name]

    folder = changed(tmp_path / "fuzz", MODES, keep)
    counts = attack(folder, 500, "mlx")
    assert counts["refused"] > 200 and counts["read"] > 50
