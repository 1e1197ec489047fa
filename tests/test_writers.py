"""Writers of checkpoints: the same tensors as encoders written from the layouts' descriptions, and bit for bit what was given
when our readers read them again. What other libraries make of the files: test_writers_recorded.py and test_oracle_writers.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import writers
from checkpoints import Layer, awq_gemm, ct_packed, gptq, named, records
from lowbit import QuantizedWeight, Scheme, formats
from lowbit._safetensors import SafetensorsFile
from lowbit.formats import LinearRecord
from lowbit.formats._writers import WRITERS, writer
from writers import CONFIG, NAME, canonical, contents, round_trip, write

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FOLDERS = ("compressed-tensors", "gptq", "awq")


def quantized(scheme: str, N: int = 64, K: int = 256, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    return QuantizedWeight.quantize(torch.randn(N, K, generator=generator) * 0.05, scheme)


def same_values(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    x, y = a.dequantize(), b.dequantize()
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


# -- against encoders of tests/checkpoints.py ------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_gptq_tensors(tmp_path: Path, bits: int, group_size: int, order: bool, symmetric: bool) -> None:
    layer = Layer(bits, group_size=group_size, order=order, symmetric=symmetric, seed=bits)
    write("gptq", contents({NAME: canonical(layer)}), tmp_path / "out")
    wanted = named(NAME, gptq(layer, version=2))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_awq_tensors(tmp_path: Path, group_size: int, symmetric: bool) -> None:
    layer = Layer(4, group_size=group_size, symmetric=symmetric)
    write("awq", contents({NAME: canonical(layer)}), tmp_path / "out")
    wanted = named(NAME, awq_gemm(layer))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("N", "K", "group_size"), [(32, 128, 32), (17, 72, 8), (5, 33, -1)])
def test_pack_quantized_tensors(tmp_path: Path, bits: int, N: int, K: int, group_size: int, symmetric: bool) -> None:
    layer = Layer(bits, N, K, group_size, symmetric=symmetric, scale=torch.bfloat16, seed=bits)
    write("compressed-tensors", contents({NAME: canonical(layer)}), tmp_path / "out")
    wanted = named(NAME, ct_packed(layer))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# -- and back ----------------------------------------------------------------------------------------------------------------

INTEGERS = st.builds(
    Layer,
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    N=st.integers(1, 12).map(lambda n: 8 * n),
    K=st.integers(1, 6).map(lambda k: 64 * k),
    group_size=st.sampled_from([-1, 8, 32, 64]),
    symmetric=st.booleans(),
    order=st.booleans(),
    scale=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1 << 30),
)


@QUICK
@given(layer=INTEGERS, to=st.sampled_from([row.name for row in WRITERS]))
def test_integers_come_back(tmp_path_factory: pytest.TempPathFactory, layer: Layer, to: str) -> None:
    """Or are refused, with the scheme in the message; scales in bf16 and fp16 lose nothing."""
    weight = canonical(layer)
    path = tmp_path_factory.mktemp("written") / "out"
    try:
        stored, found = round_trip(to, weight, path) if to != "artifact" else _artifact(weight, path)
    except ValueError as refused:
        if str(weight.scheme).partition("-")[0] not in str(refused) or path.exists():
            raise
        return
    assert same_values(stored, found)
    exact = layer.scale != torch.float32 or to in ("compressed-tensors", "artifact")
    if exact and (to != "gguf" or layer.symmetric):  # zeros become offsets, which are rounded
        assert same_values(weight, found)
    else:
        torch.testing.assert_close(found.dequantize(), weight.dequantize(), rtol=2**-9, atol=2e-3)


def _artifact(weight: QuantizedWeight, path: Path) -> tuple[QuantizedWeight, QuantizedWeight]:
    from lowbit.formats._contents import open_artifact

    (stored,) = write("artifact", contents({NAME: weight}), path).values()
    with open_artifact(path) as made:
        return stored, made.layers[NAME].read()[0].weight


@pytest.mark.parametrize(
    ("to", "scheme"),
    [
        ("compressed-tensors", "int8-a8"),
        ("compressed-tensors", "int8-aint8_asym"),
        ("compressed-tensors", "int4-g32-asym-a8"),
        ("compressed-tensors", "fp8"),
        ("compressed-tensors", "fp8-a8"),
        ("compressed-tensors", "fp8-b128-a8"),
        ("compressed-tensors", "int8-asym"),
        ("gguf", "int4-g32-fp16"),
        ("gguf", "int4-g64-fp16"),
        ("gguf", "int4-fp16"),
        ("gguf", "int5-g32-fp16"),
        ("gguf", "int4-g32-offset-fp16"),
        ("gguf", "int5-g128-offset-fp16"),
        ("gguf", "int8-g32-fp16"),
    ],
)
def test_schemes_come_back(tmp_path: Path, to: str, scheme: str) -> None:
    weight = quantized(scheme, 160, 384)
    stored, found = round_trip(to, weight, tmp_path / "out")
    assert same_values(weight, stored) and same_values(stored, found)
    assert found.scheme.activation == weight.scheme.activation
    if to == "compressed-tensors":
        assert found == weight


def test_ragged_blocks_of_fp8(tmp_path: Path) -> None:
    weight = quantized("fp8-b128-a8", 200, 333)
    assert round_trip("compressed-tensors", weight, tmp_path / "out")[1] == weight


def test_bias_and_static_inputs_come_back(tmp_path: Path) -> None:
    weight = quantized("int8")
    scheme = Scheme.parse("int8-aint8_static_asym")
    static = QuantizedWeight.from_tensors(weight.tensors(), scheme, weight.shape)
    bias = torch.randn(64).bfloat16()
    record = LinearRecord(static, bias, torch.tensor([0.25]), torch.tensor([-3], dtype=torch.int32))
    write("compressed-tensors", contents({NAME: record}), tmp_path / "out")
    (found,) = records(tmp_path / "out").values()
    assert found.bias is not None and torch.equal(found.bias, bias)
    assert found.input_scale is not None and found.input_scale.item() == 0.25
    assert found.input_zero is not None and found.input_zero.item() == -3
    assert found.weight == static
    for to in ("gptq", "awq", "gguf"):
        path = tmp_path / to
        write(to, contents({NAME: LinearRecord(quantized("int4-g32-fp16"), bias)}), path)
        (found,) = writers.read(path).values()
        assert found.bias is not None and torch.equal(found.bias.float(), bias.float())


def test_scales_are_rounded_to_half_once() -> None:
    from lowbit.formats._writer import to_half

    weight = quantized("int4-g32")
    assert same_values(weight, to_half(weight))  # bf16 in the usual range
    wide = QuantizedWeight.quantize(torch.full((8, 32), 3e7), "int4-g32")
    with pytest.raises(ValueError, match=r"scales reach 3\.75194e\+06, and the format keeps them in fp16"):
        to_half(wide)
    tiny = QuantizedWeight.quantize(torch.full((8, 32), 3e-7), "int4-g32")
    assert torch.equal(to_half(tiny).scales, tiny.scales.half())


# -- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "scheme", "message"),
    [
        ("compressed-tensors", "nf4-g64", "compressed-tensors holds integers and fp8 e4m3, not nf4"),
        ("compressed-tensors", "fp8_e5m2", "not fp8_e5m2"),
        ("compressed-tensors", "fp8-g64", "fp8 has one scale per row or per 128 x 128 block"),
        ("compressed-tensors", "int4-g32-offset", "integer zeros, not offsets"),
        ("compressed-tensors", "int4-g32-fzero", "integer zeros, not fractional ones"),
        ("compressed-tensors", "int4-g96", "needs K=256 to be a multiple of the group size"),
        ("gptq", "int5-g32", "gptq holds integers of 2, 3, 4, 8 bits"),
        ("gptq", "fp8", "gptq holds integers"),
        ("gptq", "int4-g32-offset", "gptq has scales and integer zeros"),
        ("gptq", "int4-g128-a8", "gptq does not say how inputs are quantized"),
        ("awq", "int8", "awq holds integers of 4 bits"),
        ("awq", "int4-g96", "awq needs K=256 to be a multiple of the group size"),
        ("gguf", "int3-g32", "gguf is written as int4 and int5"),
        ("gguf", "nf4-g32", "gguf is written as int4 and int5"),
        ("gguf", "int8-g32-asym", "gguf is written as int4 and int5"),
        ("gguf", "int4-g32-fzero", "gguf is written as int4 and int5"),
        ("gguf", "int4-g8", "gguf has a scale for each 32 weights"),
        ("gguf", "int4-g128-a8", "gguf does not say how inputs are quantized"),
    ],
)
def test_refused_by_name(tmp_path: Path, to: str, scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        write(to, contents({NAME: quantized(scheme)}), tmp_path / "out")
    assert str(Scheme.parse(scheme)) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "N", "K", "message"),
    [
        ("gptq", 36, 64, "packs N=36 codes of 4 bits into words of 32"),
        ("gptq", 64, 36, "packs K=36 codes of 4 bits into words of 32"),
        ("awq", 36, 64, "needs N=36 to be a multiple of 8"),
        ("gguf", 36, 40, "needs K=40 to be a multiple of 32"),
    ],
)
def test_shapes_refused_by_name(tmp_path: Path, to: str, N: int, K: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(to, contents({NAME: quantized("int4", N, K)}), tmp_path / "out")


@pytest.mark.parametrize("to", ["compressed-tensors", "awq", "gguf"])
def test_act_order_is_refused_but_for_one_group(tmp_path: Path, to: str) -> None:
    with pytest.raises(ValueError, match=r"with act-order: .* (gptq does|gptq has g_idx)"):
        write(to, contents({NAME: canonical(Layer(order=True, symmetric=True))}), tmp_path / "out")
    perm = torch.randperm(128)
    weight = quantized("int4-fp16", 32, 128)
    tensors = {**weight.tensors(), "perm": perm.int()}
    mixed = QuantizedWeight.from_tensors(tensors, weight.scheme, weight.shape)
    assert same_values(mixed, round_trip(to, mixed, tmp_path / "one")[1])


def test_inputs_scaled_by_column_are_refused(tmp_path: Path) -> None:
    record = LinearRecord(quantized("int8"), input_pre_scale=torch.ones(256))
    for to in FOLDERS:
        with pytest.raises(ValueError, match=r"input_pre_scale|inputs are quantized|4 bits"):
            write(to, contents({NAME: record}), tmp_path / "out")


# -- configs -------------------------------------------------------------------------------------------------------------------


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def test_layers_of_different_schemes(tmp_path: Path) -> None:
    up, down, head = (f"model.layers.0.mlp.{n}_proj" for n in ("up", "down", "gate"))
    made = {up: quantized("int4-g32"), down: quantized("int8-a8"), head: quantized("int4-g32", seed=1)}
    write("compressed-tensors", contents(made), tmp_path / "ct")
    config = config_of(tmp_path / "ct")["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [g["targets"] for g in config["config_groups"].values()] == [["Linear"], [down]]
    assert {n: r.weight for n, r in writers.read(tmp_path / "ct").items()} == made

    made[down] = quantized("int8-g64")
    write("gptq", contents(made), tmp_path / "gptq")
    config = config_of(tmp_path / "gptq")["quantization_config"]
    assert (config["bits"], config["group_size"], config["checkpoint_format"]) == (4, 32, "gptq_v2")
    assert config["dynamic"] == {r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": 64}}
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()) == config
    found = writers.read(tmp_path / "gptq")
    assert all(same_values(found[name].weight, made[name]) for name in made)

    made[down] = quantized("int4-g64")
    with pytest.raises(ValueError, match=r"one group size for all layers, here there are: 32 in .*up_proj; 64 in"):
        write("awq", contents(made), tmp_path / "awq")


def test_what_is_not_quantized_is_named(tmp_path: Path) -> None:
    """Loaders make every linear layer a quantized one that no config excludes."""
    gate, embedding = "model.layers.0.mlp.gate", "model.embed_tokens"
    tensors = {f"{gate}.weight": torch.randn(4, 256), f"{embedding}.weight": torch.randn(320, 256)}
    tensors["model.norm.weight"] = torch.ones(256)
    made = contents({NAME: quantized("int4-g32")}, tensors)
    for to in FOLDERS:
        write(to, made, tmp_path / to)
        config = config_of(tmp_path / to)
        assert {key: config[key] for key in CONFIG} == CONFIG
        about = config["quantization_config"]
        if to == "gptq":
            assert list(about["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.gate$"]
        else:
            named_ = about["ignore" if to == "compressed-tensors" else "modules_to_not_convert"]
            assert sorted(named_) == ["lm_head", embedding, gate]
        found = load_file(tmp_path / to / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        with SafetensorsFile(tmp_path / to / "model.safetensors") as file:
            assert file.metadata == {"format": "pt"}


def test_shards(tmp_path: Path) -> None:
    layers = {f"model.layers.{i}.mlp.up_proj": quantized("int4-g32", seed=i) for i in range(12)}
    write("compressed-tensors", contents(layers), tmp_path / "out", max_shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 4 and files[0] == "model-00001-of-00004.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    for file in files:  # layers in their natural order, 2 before 10
        assert set(load_file(tmp_path / "out" / file)) == {n for n, f in index["weight_map"].items() if f == file}
    assert index["weight_map"]["model.layers.2.mlp.up_proj.weight_packed"] == files[0]
    assert {n: r.weight for n, r in writers.read(tmp_path / "out").items()} == layers


def test_registry() -> None:
    assert {row.name for row in WRITERS} == {"artifact", *FOLDERS, "gguf"}
    with pytest.raises(ValueError, match="there is no writer 'onnx'; artifact, compressed-tensors, gptq, awq, gguf"):
        writer("onnx")
    readable = {row.name for row in (*formats.FORMATS, *formats.CONTAINERS)}
    assert {row.name for row in WRITERS} - readable == {"artifact"}


def test_fp8_bytes_are_the_codes(tmp_path: Path) -> None:
    weight = quantized("fp8-a8")
    write("compressed-tensors", contents({NAME: weight}), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    product = found[f"{NAME}.weight"].float().numpy() * found[f"{NAME}.weight_scale"].float().numpy()
    np.testing.assert_array_equal(product, weight.dequantize().numpy())
