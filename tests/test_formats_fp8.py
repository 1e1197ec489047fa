"""FP8 and Model Optimizer readers: every scale shape decodes to the bit; what is not known for certain is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import Layer, check, named, peer_tensors, records, write
from lowbit import ArtifactError, formats

BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def codes(N: int, K: int, seed: int = 0, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Random codes without infinities and NaN."""
    made = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (N, K)).astype(np.uint8)).view(dtype)
    made.view(torch.uint8)[~torch.isfinite(made.float())] = 0
    return made


def blocks(scale: torch.Tensor, N: int, K: int) -> np.ndarray:
    """One number for each weight from those of its 128 x 128 block."""
    found = np.empty((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            found[n, k] = float(scale[n // 128, k // 128])
    return found


# -- quant_method fp8 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (100, 90), (128, 129), (1, 300)])
def test_blocks(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Ragged edges have the scale of their block."""
    N, K = shape
    weight, scale = codes(N, K), torch.rand(-(-N // 128), -(-K // 128)) + 0.5
    (record,) = records(write(tmp_path, named("fc", {"weight": weight, "weight_scale_inv": scale}), BLOCK)).values()
    check(record, weight.float().numpy() * blocks(scale, N, K))
    assert str(record.weight.scheme) == "fp8-b128-a8"


def test_ue8m0(tmp_path: Path) -> None:
    """Every power of two that E8M0 has, 2^-127 included, is exact in fp32."""
    exponents = torch.arange(255, dtype=torch.uint8)
    weight = torch.full((255 * 128, 1), 1.0).to(torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale_inv": exponents.view(255, 1).view(torch.float8_e8m0fnu)}
    folder = write(tmp_path, named("fc", tensors), {**BLOCK, "scale_fmt": "ue8m0"})
    (record,) = records(folder).values()
    assert record.weight.scales.float()[:, 0].tolist() == [2.0 ** (u - 127) for u in range(255)]
    assert record.weight.dequantize()[::128, 0].tolist() == [2.0 ** (u - 127) for u in range(255)]
    assert record.weight.scales.dtype == torch.float8_e8m0fnu and str(record.weight.scheme) == "fp8-b128-e8m0-a8"
    tensors["weight_scale_inv"] = torch.full((255, 1), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(ArtifactError, match="scales: 255 values are not finite"):
        records(write(tmp_path, named("fc", tensors), BLOCK))


@pytest.mark.parametrize("shape", [(), (1,), (24,), (24, 1)])
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_without_blocks(tmp_path: Path, shape: tuple[int, ...], scheme: str, dtype: torch.dtype) -> None:
    weight, scale = codes(24, 40, dtype=dtype), torch.rand(shape) + 0.5
    tensors: dict[str, Any] = {"weight": weight, "weight_scale": scale}
    if scheme == "static":
        tensors["input_scale"] = torch.tensor(0.5)
    folder = write(tmp_path, named("fc", tensors), {"quant_method": "fp8", "activation_scheme": scheme})
    (record,) = records(folder).values()
    check(record, (weight.float() * scale.reshape(-1, 1)).numpy())
    assert record.weight.scheme.activation == ("fp8_static" if scheme == "static" else "fp8")
    assert (record.input_scale is None) == (scheme == "dynamic")
    assert bool(torch.isfinite(record.linear()(torch.randn(3, 40))).all())


def test_transformers_static(tmp_path: Path) -> None:
    tensors = {"weight": codes(8, 16), "weight_scale_inv": torch.tensor(0.5), "activation_scale": torch.tensor(0.25)}
    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    (record,) = records(write(tmp_path, named("fc", tensors), config)).values()
    assert record.input_scale.tolist() == [0.25]


def test_kv_scales_are_plain_tensors(tmp_path: Path) -> None:
    tensors = {"weight": codes(8, 16), "weight_scale": torch.tensor(0.5), "k_scale": torch.tensor(0.25)}
    found = dict(formats.read(write(tmp_path, named("k_proj", tensors), {"quant_method": "fp8"})))
    assert list(found) == ["k_proj", "k_proj.k_scale"] and float(found["k_proj.k_scale"]) == 0.25


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_any_shape(tmp_path_factory: pytest.TempPathFactory, N: int, K: int, dtype: torch.dtype, seed: int) -> None:
    weight, scale = codes(N, K, seed), (torch.rand(-(-N // 128), -(-K // 128)) + 0.5).to(dtype)
    tensors = named("fc", {"weight": weight, "weight_scale_inv": scale})
    (record,) = records(write(tmp_path_factory.mktemp("any"), tensors, BLOCK)).values()
    repeated = scale.float().repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    check(record, (weight.float() * repeated).numpy())


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"weight_block_size": [64, 64]}, {}, r"'weight_block_size' is '\[64, 64\]', it must be \[128, 128\] or null"),
        ({"weight_block_size": "x"}, {}, "'weight_block_size' is 'x'"),
        ({"activation_scheme": "static"}, {}, "it must be dynamic where weight_block_size is set"),
        ({"activation_scheme": 3}, {}, "'activation_scheme' is '3', it must be a string"),
        ({"activation_scheme": "half"}, {}, "'activation_scheme' is 'half', it must be dynamic or static"),
        ({"weight_block_size": None, "activation_scheme": "static"}, {}, r"weight_scale_inv is F32 \[2, 1\], it must be"),
        ({"weight_block_size": None, "activation_scheme": "static"}, {"weight_scale_inv": torch.ones(1)}, "no input_scale"),
        ({"quant_method": "fbgemm_fp8"}, {}, "'fbgemm_fp8' is not a format that this lowbit reads .*fc has weight F8_E4M3"),
        ({"quant_method": "gptq"}, {}, "quant_method is 'gptq', but the tensors say otherwise: fc has weight F8_E4M3"),
        ({}, {"weight_scale_inv": torch.ones(2, 2)}, r"weight_scale_inv is F32 \[2, 2\], it must be .* \[2, 1\]"),
        ({}, {"weight_scale": torch.ones(1)}, "has both weight_scale and weight_scale_inv"),
        ({}, {"weight": torch.ones(2, 200, 100).to(torch.float8_e4m3fn)}, r"weight_scale_inv is F32 \[1\], it must be"),
        ({}, {"weight": torch.ones(3, 200, 100).to(torch.float8_e4m3fn)}, r"of 3 experts, weight_scale_inv is F32 \[2, 1\]"),
        ({}, {"weight": torch.ones(1, 2, 200, 100).to(torch.float8_e4m3fn)}, r"weight is F8_E4M3 \[1, 2, 200, 100\], it must"),
        ({}, {"weight": torch.ones(0, 100).to(torch.float8_e4m3fn)}, "a weight of N=0, K=100"),
        ({}, {"weight": torch.ones(200, 100)}, "tensors say otherwise"),
        ({}, {"weight_scale_inv": torch.full((2, 1), torch.nan)}, "scales: 2 values are not finite"),
        ({}, {"input_scale": torch.ones(1)}, "the config does not say static"),
        ({}, {"smooth": torch.ones(1)}, "a tensor 'smooth'"),
    ],
)  # fmt: skip
def test_fp8_refused(tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], message: str) -> None:
    made = {"weight": codes(200, 100), "weight_scale_inv": torch.ones(2, 1), **tensors}
    with pytest.raises(ArtifactError, match=message):
        records(write(tmp_path, named("fc", made), {**BLOCK, **config}))


def test_fp8_without_a_config(tmp_path: Path) -> None:
    tensors = named("fc", {"weight": codes(8, 16), "weight_scale_inv": torch.ones(1, 1)})
    with pytest.raises(ArtifactError, match="without a config, which would say how inputs are quantized"):
        records(write(tmp_path, tensors))
    with pytest.raises(ArtifactError, match=r"the tensors fit several: .*compressed-tensors.*fp8.*modelopt"):
        records(write(tmp_path, named("fc", {"weight": codes(8, 16), "weight_scale": torch.ones(1)})))


@pytest.mark.parametrize("name", ["fp8", "modelopt"])
def test_without_layers(tmp_path: Path, name: str) -> None:
    config = {"quant_method": name, "quant_algo": "FP8"}
    folder = write(tmp_path, {"norm.weight": torch.ones(2)}, config)
    with pytest.raises(ArtifactError, match=r"says .*, but no layer of .* has a weight_scale"):
        records(folder, name)


# -- Model Optimizer -------------------------------------------------------------------------------------------------------


def modelopt(folder: Path, tensors: dict[str, Any], nested: bool = True, **quantization: Any) -> Path:
    """hf_quant_config.json as older versions write it, or config.json as newer ones do."""
    made = named("fc", tensors)
    if nested:
        about = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
        return write(folder, made, None, hf_quant_config=about)
    return write(folder, made, {"quant_method": "modelopt", "config_groups": {}, **quantization})


def int4(layer: Layer) -> np.ndarray:
    """Pairs of rows in one byte, two's complement."""
    nibbles = (layer.codes - 8) & 15
    return (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8)


def test_what_modelopt_packs(tmp_path: Path) -> None:
    tensors, expected = peer_tensors("modelopt-awq")
    (record,) = records(modelopt(tmp_path, tensors, quant_algo="W4A16_AWQ", group_size=32)).values()
    difference = expected["codes"].float() - 8
    check(record, (difference * expected["scales"].repeat_interleave(32, 1)).numpy())


@pytest.mark.parametrize("nested", [True, False])
def test_int4_awq(tmp_path: Path, nested: bool) -> None:
    """Without a group_size in config.json, where newer versions leave it out, the scales say how large groups are."""
    layer = Layer(symmetric=True, scale=torch.float32)
    pre = torch.rand(layer.K) + 0.5
    tensors = {"weight": int4(layer), "weight_scale": layer.scales, "pre_quant_scale": pre.bfloat16()}
    more = {"group_size": 32, "has_zero_point": False, "pre_quant_scale": True} if nested else {}
    (record,) = records(modelopt(tmp_path, tensors, nested, quant_algo="W4A16_AWQ", **more)).values()
    check(record, layer.W)
    assert str(record.weight.scheme) == "int4-g32-fp32" and torch.equal(record.input_pre_scale, pre.bfloat16().float())
    x = torch.randn(3, layer.K)
    torch.testing.assert_close(record.linear()(x), (x * record.input_pre_scale) @ torch.from_numpy(layer.W).T)


@pytest.mark.parametrize("static", [True, False])
def test_smoothquant(tmp_path: Path, static: bool) -> None:
    layer = Layer(8, group_size=-1, symmetric=True, scale=torch.float32)
    pre = torch.rand(layer.K) + 0.5
    tensors: dict[str, Any] = {"weight": (layer.codes - 128).astype(np.int8), "weight_scale": layer.scales[:, 0]}
    tensors["pre_quant_scale"] = pre
    if static:
        tensors["input_scale"] = torch.tensor(0.05)  # 6.35 at most
    (record,) = records(modelopt(tmp_path, tensors, quant_algo="W8A8_SQ_PER_CHANNEL")).values()
    check(record, layer.W)
    assert record.weight.scheme.activation == ("int8_static" if static else "int8")
    x = torch.randn(3, layer.K)
    wanted = (x * pre) @ torch.from_numpy(layer.W).T
    assert float((record.linear()(x) - wanted).norm() / wanted.norm()) < 0.02


def test_int8_weights_alone(tmp_path: Path) -> None:
    layer = Layer(8, group_size=-1, symmetric=True)
    tensors = {"weight": (layer.codes - 128).astype(np.int8), "weight_scale": layer.scales[:, 0]}
    check(records(modelopt(tmp_path, tensors, quant_algo="W8A16"))["fc"], layer.W)


@pytest.mark.parametrize("algo", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_modelopt_fp8(tmp_path: Path, algo: str) -> None:
    weight = codes(24, 40)
    scale = torch.rand(()) if algo == "FP8" else torch.rand(24)
    tensors: dict[str, Any] = {"weight": weight, "weight_scale": scale}
    if algo == "FP8":
        tensors["input_scale"] = torch.tensor(0.5)
    (record,) = records(modelopt(tmp_path, tensors, quant_algo=algo, kv_cache_quant_algo="FP8")).values()
    check(record, (weight.float() * scale.reshape(-1, 1)).numpy())
    assert record.weight.scheme.activation == ("fp8_static" if algo == "FP8" else "fp8")


def test_mixed_precision(tmp_path: Path) -> None:
    layer = Layer(symmetric=True, scale=torch.float32)
    tensors = named("a.fc", {"weight": int4(layer), "weight_scale": layer.scales})
    weight = codes(8, 16)
    tensors |= named("b.fc", {"weight": weight, "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(1.0)})
    layers = {"a.fc": {"quant_algo": "W4A16_AWQ", "group_size": 32}, "b.fc": {"quant_algo": "FP8"}}
    about = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    found = records(write(tmp_path / "good", tensors, None, hf_quant_config=about))
    check(found["a.fc"], layer.W)
    check(found["b.fc"], weight.float().numpy() * 0.5)
    del layers["b.fc"]
    with pytest.raises(ArtifactError, match=r"b\.fc: is quantized, but .* does not list it in quantized_layers"):
        records(write(tmp_path / "bad", tensors, None, hf_quant_config=about))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"quant_algo": "W4A8_AWQ"}, {}, "quant_algo 'W4A8_AWQ' is not read yet"),
        ({"quant_algo": None}, {}, "has no 'quant_algo', which must be a string"),
        ({"quant_algo": 4}, {}, "'quant_algo' is '4', it must be a string"),
        ({"quant_algo": "FP8"}, {}, r"weight is U8 \[16, 128\], it must be F8_E4M3 or F8_E5M2"),
        ({"group_size": 64}, {}, r"weight_scale is F32 \[32, 4\], for N=32, K=128, .* says group_size=64"),
        ({"group_size": -3}, {}, "'group_size' is '-3', it must be -1 or above 0"),
        ({"has_zero_point": True}, {}, "'has_zero_point' is 'True', it must be false"),
        ({}, {"pre_quant_scale": torch.ones(127)}, r"pre_quant_scale is F32 \[127\], it must be .* \[128\]"),
        ({}, {"pre_quant_scale": torch.zeros(128)}, "pre_quant_scale holds 0; a scale is finite and above 0"),
        ({}, {"weight_scale_2": torch.ones(1)}, "'weight_scale_2'"),
        ({}, {"input_scale": torch.ones(1)}, "'input_scale' .* not part of this format"),
    ],
)  # fmt: skip
def test_modelopt_refused(tmp_path: Path, config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    layer = Layer(symmetric=True, scale=torch.float32)
    tensors = {"weight": int4(layer), "weight_scale": layer.scales, **change}
    with pytest.raises(ArtifactError, match=message):
        records(modelopt(tmp_path, tensors, **{"quant_algo": "W4A16_AWQ", "group_size": 32, **config}))


def test_modelopt_without_a_config(tmp_path: Path) -> None:
    layer = Layer(symmetric=True, scale=torch.float32)
    tensors = {"weight": int4(layer), "weight_scale": layer.scales}
    with pytest.raises(ArtifactError, match="no config, which would say what quant_algo the layers are of"):
        records(write(tmp_path, named("fc", tensors)))
