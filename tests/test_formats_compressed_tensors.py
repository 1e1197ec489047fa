"""compressed-tensors readers: packed, int and float layers, groups of layers, inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import Layer, check, ct_config, ct_packed, named, peer_tensors, records, write
from lowbit import ArtifactError, formats

BITS = (2, 3, 4, 5, 6, 8)
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}


def save(folder: Path, layer: Layer, tensors: dict[str, Any] | None = None, **more: Any) -> Path:
    return write(folder, named("fc", ct_packed(layer) if tensors is None else tensors), ct_config(layer, **more))


# -- packed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("packer", ["ct", "ct-old"])
def test_what_compressed_tensors_packs(tmp_path: Path, packer: str, bits: int) -> None:
    tensors, expected = peer_tensors(f"{packer}-{bits}")
    config = ct_config(Layer(bits, group_size=8), version="0.13.0" if packer == "ct-old" else "0.20.0")
    (record,) = records(write(tmp_path, named("fc", tensors), config)).values()
    g = torch.arange(72) // 8
    difference = expected["codes"].float() - expected["zeros"].float()[:, g]
    check(record, (difference * expected["scales"].float()[:, g]).numpy())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("zeros", ["none", "packed", "int8"])
@pytest.mark.parametrize("order", [False, True])
def test_packed(tmp_path: Path, bits: int, dense: bool, zeros: str, order: bool) -> None:
    layer = Layer(bits, N=17, K=120, group_size=24, symmetric=zeros == "none", order=order, scale=torch.bfloat16)
    tensors = ct_packed(layer, dense, zeros == "int8")
    version = "0.20.0" if dense else "0.9.3"
    (record,) = records(save(tmp_path, layer, tensors, version=version)).values()
    check(record, layer.W)
    assert (record.weight.perm is not None) == order and record.weight.scheme.symmetric == (zeros == "none")


@pytest.mark.parametrize("group_size", [-1, 128, 32])
def test_groups(tmp_path: Path, group_size: int) -> None:
    layer = Layer(group_size=group_size)
    check(records(save(tmp_path, layer))["fc"], layer.W)


def test_one_scale_for_the_tensor(tmp_path: Path) -> None:
    layer = Layer(8, group_size=-1, symmetric=True)
    layer.scales[:] = layer.scales[0]
    for i, shape in enumerate([(1,), ()]):
        tensors = {**ct_packed(layer), "weight_scale": layer.scales[0, 0].reshape(shape)}
        check(records(save(tmp_path / str(i), layer, tensors, weights={"strategy": "tensor"}))["fc"], layer.W)


def test_g_idx_that_was_never_set(tmp_path: Path) -> None:
    layer = Layer()
    tensors = {**ct_packed(layer), "weight_g_idx": np.full(layer.K, -1, np.int32)}
    (record,) = records(save(tmp_path, layer, tensors)).values()
    check(record, layer.W)
    assert record.weight.perm is None


def test_as_many_words_either_way(tmp_path: Path) -> None:
    """At 3 bits 11 codes take two words in both packings, which are not the same: the version tells, or the zeros' width."""
    layer = Layer(3, K=11, group_size=-1, symmetric=True)
    for version, dense in (("0.17.1", False), ("0.18.0", True), ("0.20.1.a2", True), ("1.0", True)):
        folder = save(tmp_path / version, layer, ct_packed(layer, dense), version=version)
        check(records(folder)["fc"], layer.W)
    for version in ("", "x.y"):
        with pytest.raises(ArtifactError, match="the config's version would tell, but it is"):
            records(save(tmp_path / f"v{version}", layer, version=version))
    zeros = Layer(3, N=32, K=11, group_size=-1)  # 32 of them take 3 or 4 words
    for dense in (False, True):
        folder = save(tmp_path / f"zeros{dense}", zeros, ct_packed(zeros, dense), version="")
        check(records(folder)["fc"], zeros.W)
    small = Layer(3, K=10, group_size=-1, symmetric=True)  # one word: the same in both
    check(records(save(tmp_path / "small", small, version=""))["fc"], small.W)


def test_bits_past_the_last_code_do_not_count(tmp_path: Path) -> None:
    layer = Layer(3, K=11, group_size=-1)
    clean, dirty = ct_packed(layer), ct_packed(layer)
    dirty["weight_packed"] = dirty["weight_packed"] | np.array([0, -2], np.int32)
    first, second = (records(save(tmp_path / n, layer, t))["fc"].weight for n, t in (("a", clean), ("b", dirty)))
    assert first == second


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(BITS), st.integers(1, 40), st.integers(1, 100), st.sampled_from([-1, 8, 16]), st.booleans(), st.booleans(),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    tmp_path_factory: pytest.TempPathFactory, bits: int, N: int, K: int, group: int, dense: bool, symmetric: bool,
    order: bool, seed: int,
) -> None:  # fmt: skip
    layer = Layer(bits, N, K, group, symmetric, order, seed=seed)
    version = "0.20.0" if dense else "0.17.0"
    folder = save(tmp_path_factory.mktemp("any"), layer, ct_packed(layer, dense), version=version)
    check(records(folder)["fc"], layer.W)


# -- int and float -------------------------------------------------------------------------------------------------------


def signed(layer: Layer) -> np.ndarray:
    return (layer.codes - (1 << (layer.bits - 1))).astype(np.int8)


def test_int(tmp_path: Path) -> None:
    layer = Layer(8, group_size=-1, symmetric=True, scale=torch.bfloat16)
    tensors = {"weight": signed(layer), "weight_scale": layer.scales}
    (record,) = records(save(tmp_path, layer, tensors, inputs=TOKEN, format="int-quantized")).values()
    check(record, layer.W)
    assert str(record.weight.scheme) == "int8-bf16-a8" and record.input_scale is None


@pytest.mark.parametrize("bits", [4, 8])
def test_int_in_groups_with_zeros_and_order(tmp_path: Path, bits: int) -> None:
    layer = Layer(bits, order=True)
    zeros = (layer.zeros - (1 << (bits - 1))).astype(np.int8)
    tensors = {
        "weight": signed(layer),
        "weight_scale": layer.scales,
        "weight_zero_point": zeros,
        "weight_g_idx": layer.g_idx.astype(np.int32),
    }
    check(records(save(tmp_path, layer, tensors, format="naive-quantized"))["fc"], layer.W)


@pytest.mark.parametrize(
    ("inputs", "activation"),
    [
        (None, None),
        (TOKEN, "int8"),
        ({**TOKEN, "symmetric": False}, "int8_asym"),
        ({**TOKEN, "strategy": "tensor"}, "int8"),
        (STATIC, "int8_static"),
        ({**STATIC, "symmetric": False}, "int8_static_asym"),
        ({**TOKEN, "type": "float"}, "fp8"),
        ({**STATIC, "type": "float"}, "fp8_static"),
        ({**TOKEN, "type": "float", "strategy": "group", "group_size": 128}, "fp8_g128"),
    ],
)
def test_inputs(tmp_path: Path, inputs: dict[str, Any] | None, activation: str | None) -> None:
    layer = Layer(8, group_size=-1, symmetric=True)
    tensors: dict[str, Any] = {"weight": signed(layer), "weight_scale": layer.scales}
    if activation is not None and "static" in activation:
        tensors["input_scale"] = np.array([0.25], np.float32)
        if "asym" in activation:
            tensors["input_zero_point"] = np.array([-7], np.int8)
    (record,) = records(save(tmp_path, layer, tensors, inputs=inputs, format="int-quantized")).values()
    assert record.weight.scheme.activation == activation
    if activation is not None and "static" in activation:
        assert record.input_scale.tolist() == [0.25]
        assert (record.input_zero is None) == ("asym" not in activation)
    y = record.linear()(torch.randn(3, layer.K))
    assert y.shape == (3, layer.N) and bool(torch.isfinite(y).all())


def float_layer(N: int = 40, K: int = 96, seed: int = 0) -> torch.Tensor:
    """Every finite code of E4M3."""
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (N, K)).astype(np.uint8))
    codes[(codes & 0x7F) == 0x7F] = 0
    return codes.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("shape", [(40, 96), (200, 300), (1, 1)])
def test_float(tmp_path: Path, strategy: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    N, K = shape
    weight = float_layer(N, K)
    sizes = {"tensor": (1,), "channel": (N, 1), "block": (-(-N // 128), -(-K // 128))}
    scale = (torch.rand(sizes[strategy]) + 0.01).to(dtype)
    inputs = {**TOKEN, "type": "float"}
    if strategy == "block":
        inputs |= {"strategy": "group", "group_size": 128}
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": [128, 128]}
    folder = save(tmp_path, Layer(8), {"weight": weight, "weight_scale": scale}, weights=weights, inputs=inputs)
    full = scale.float().reshape(-1, 1) if strategy != "block" else scale.float().repeat_interleave(128, 0)[:N]
    full = full.repeat_interleave(128, 1)[:, :K] if strategy == "block" else full.expand(N, K)
    (record,) = records(folder).values()
    check(record, (weight.float() * full).numpy())
    assert record.weight.scheme.activation == ("fp8_g128" if strategy == "block" else "fp8")


# -- groups of layers ------------------------------------------------------------------------------------------------------


def mixed_config() -> dict[str, Any]:
    """down_proj in 8 bits by name, layers of the first block in 3 bits by expression, the rest in 4."""
    config = ct_config(Layer(4, group_size=32), format="mixed-precision")
    (rest,) = config["config_groups"].values()
    groups = {"group_0": {**rest, "format": "pack-quantized"}}
    for i, (bits, targets) in enumerate([(3, ["re:.*layers\\.0\\..*"]), (8, ["layers.0.down_proj"])], 1):
        group = copy.deepcopy(rest)
        group |= {"targets": targets, "format": "pack-quantized"}
        group["weights"]["num_bits"] = bits
        groups[f"group_{i}"] = group
    return {**config, "config_groups": groups, "ignore": ["lm_head", "re:.*gate$"]}


def test_groups_of_layers(tmp_path: Path) -> None:
    layers = {
        "layers.0.up_proj": Layer(3, seed=1),
        "layers.0.down_proj": Layer(8, seed=2),
        "layers.10.up_proj": Layer(4, seed=3),
    }
    tensors = {k: v for name, layer in layers.items() for k, v in named(name, ct_packed(layer)).items()}
    tensors["layers.0.gate.weight"] = torch.randn(4, 4)
    found = dict(formats.read(write(tmp_path, tensors, mixed_config())))
    assert list(found) == ["layers.0.down_proj", "layers.0.gate.weight", "layers.0.up_proj", "layers.10.up_proj"]
    for name, layer in layers.items():
        check(found[name], layer.W)


def test_ignored_yet_quantized(tmp_path: Path) -> None:
    tensors = named("layers.0.gate", ct_packed(Layer(3)))
    with pytest.raises(
        ArtifactError, match=r"layers.0.gate: .* ignores it \('re:\.\*gate\$'\), but it has weight_packed"
    ):
        records(write(tmp_path, tensors, mixed_config()))


def test_no_target(tmp_path: Path) -> None:
    config = mixed_config()
    del config["config_groups"]["group_0"]
    with pytest.raises(
        ArtifactError, match=r"layers.1.up: it has weight_packed, but no group of .* has it as a target"
    ):
        records(write(tmp_path, named("layers.1.up", ct_packed(Layer(4))), config))


def test_embeddings_have_a_group_of_their_own(tmp_path: Path) -> None:
    config = mixed_config()
    config["config_groups"]["group_2"]["targets"] = ["Embedding"]
    embed, linear = Layer(8, seed=1), Layer(4, seed=2)
    tensors = {**named("embed_tokens", ct_packed(embed)), **named("fc", ct_packed(linear))}
    found = records(write(tmp_path, tensors, config))
    check(found["embed_tokens"], embed.W)
    check(found["fc"], linear.W)


# -- refused -------------------------------------------------------------------------------------------------------------


def _at(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split("/")
    node = config
    for key in parents:
        node = node[key]
    node[last] = value
    return config


GROUP, WEIGHTS, INPUTS = (
    "config_groups/group_0",
    "config_groups/group_0/weights",
    "config_groups/group_0/input_activations",
)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{GROUP}/format", "nvfp4-pack-quantized", "'type' is 'int', it must be 'float' in nvfp4-pack-quantized"),
        ("format", "mxfp6-pack-quantized", "mxfp6-pack-quantized is not read yet: it has 6-bit floats"),
        ("format", "marlin-24", "format 'marlin-24' is not read"),
        ("format", 4, "'format' is '4', it must be a string"),
        ("config_groups", {}, "'config_groups' is '{}', it must be an object with a group of layers"),
        ("config_groups", {"W8A8": ["Linear"]}, r"'W8A8' is .*, it must be an object"),
        ("config_groups", None, "config_groups"),
        (GROUP, None, "'group_0' is 'None', it must be an object"),
        (WEIGHTS, {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64]}, r"must be \[128, 128\]"),
        (f"{GROUP}/targets", "Linear", "'targets' is 'Linear', it must be a list of strings"),
        (f"{GROUP}/targets", ["re:(a"], r"'re:\(a' is not a pattern that is understood: a '\(' is not closed"),
        (f"{GROUP}/targets", [r"re:(?<=a)b"], "not a pattern that is understood"),
        ("ignore", ["re:*"], "nothing to repeat"),
        (f"{WEIGHTS}/num_bits", 7, "'num_bits' is '7', it must be one of 2, 3, 4, 5, 6, 8"),
        (f"{WEIGHTS}/num_bits", 8, r"weight_shape says N=32, K=128, which at 8 bits is weight_packed \[32, 32\]"),
        (f"{WEIGHTS}/group_size", 64, r"weight_scale is F16 \[32, 4\], it must be F16 or BF16 or F32 \[32, 2\]"),
        (f"{WEIGHTS}/group_size", 0, "'group_size' is '0', it must be -1 or above 0"),
        (f"{WEIGHTS}/strategy", "block", "'strategy' is 'block', it must be tensor, channel or group for integers"),
        (f"{WEIGHTS}/type", "float", "4-bit float weights with strategy 'group' are not read"),
        (f"{WEIGHTS}/type", "complex", "4-bit complex weights"),
        (f"{GROUP}/weights", None, "no group of .* that quantizes weights has it as a target"),
        (INPUTS, {**TOKEN, "num_bits": 4}, "4-bit int inputs, strategy 'token', dynamic, symmetric: not supported"),
        (INPUTS, {**STATIC, "strategy": "token"}, "8-bit int inputs, strategy 'token', static, symmetric"),
        (INPUTS, {**TOKEN, "type": "float", "symmetric": False}, "8-bit float inputs, .* asymmetric: not supported"),
        (INPUTS, {**TOKEN, "dynamic": "local"}, "'dynamic' is 'local', it must be true or false"),
        (INPUTS, STATIC, "but no input_scale"),
        (f"{GROUP}/output_activations", TOKEN, "quantized outputs"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparse format 'sparse-24-bitmask' is not read"),
        ("transform_config", {"config_groups": {"R1": {}}}, "rotations of inputs"),
    ],
)  # fmt: skip
def test_config_is_refused(tmp_path: Path, path: str, value: Any, message: str) -> None:
    layer = Layer()
    config = _at(ct_config(layer), path, value)
    with pytest.raises(ArtifactError, match=message):
        records(write(tmp_path, named("fc", ct_packed(layer)), config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_shape": None}, "but no weight_shape"),
        ({"weight_shape": np.array([32, 129])}, "weight_shape says N=32, K=129"),
        ({"weight_shape": np.array([33, 128])}, "weight_shape says N=33, K=128"),
        ({"weight_shape": np.array([32, -128])}, "a weight of N=32, K=-128"),
        ({"weight_shape": np.array([32, 2**62])}, "weight_shape says N=32, K=4611686018427387904"),
        ({"weight_shape": np.array([1, 2, 3])}, r"weight_shape is I64 \[3\]"),
        ({"weight_packed": np.zeros((2, 32, 16), np.int32)}, r"weight_packed is of 2 experts, weight_scale is F16 \[32, 4\]"),
        ({"weight_packed": np.zeros((32, 16), np.int64)}, r"weight_packed is I64 \[32, 16\], it must be I32"),
        ({"weight_scale": None}, "but no weight_scale"),
        ({"weight_scale": np.full((32, 4), np.inf, np.float32)}, "not finite"),
        ({"weight_zero_point": np.zeros((4, 3), np.int32)}, r"weight_zero_point is I32 \[4, 3\], it must be I32 \[4, 4\]"),
        ({"weight_zero_point": np.full((32, 4), 8, np.int8)}, "weight_zero_point holds values outside 4 bits"),
        ({"weight_g_idx": np.zeros(5, np.int32)}, r"weight_g_idx is I32 \[5\]"),
        ({"weight_g_idx": np.zeros(128, np.int32)}, "g_idx gives group 0 128 columns"),
        ({"input_scale": np.ones(1, np.float32)}, "has input_scale, a calibrated scale, but the config does not say static"),
        ({"weight_scale_2": np.ones(1, np.float32)}, "'weight_scale_2' .* not part of this format"),
    ],
)  # fmt: skip
def test_tensors_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    layer = Layer()
    tensors = {k: v for k, v in {**ct_packed(layer), **change}.items() if v is not None}
    with pytest.raises(ArtifactError, match=message):
        records(save(tmp_path, layer, tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_scale": np.array([-1.0], np.float32)}, "input_scale holds -1; a scale is finite and above 0"),
        ({"input_scale": np.array([np.nan], np.float32)}, "input_scale holds nan"),
        ({"input_scale": np.ones(2, np.float32)}, r"input_scale is F32 \[2\]"),
        ({"input_zero_point": np.array([300], np.int32)}, r"input_zero_point is \[300.0\], not an int8"),
        ({"input_zero_point": np.array([0.5], np.float32)}, r"input_zero_point is \[0.5\], not an int8"),
    ],
)
def test_static_inputs_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    layer = Layer(8, group_size=-1, symmetric=True)
    static = {"input_scale": np.ones(1, np.float32), "input_zero_point": np.zeros(1, np.int8)}
    tensors = {"weight": signed(layer), "weight_scale": layer.scales, **static, **change}
    with pytest.raises(ArtifactError, match=message):
        records(save(tmp_path, layer, tensors, inputs={**STATIC, "symmetric": False}))


def test_static_inputs_without_their_zero(tmp_path: Path) -> None:
    layer = Layer(8, group_size=-1, symmetric=True)
    tensors = {"weight": signed(layer), "weight_scale": layer.scales, "input_scale": np.ones(1, np.float32)}
    with pytest.raises(ArtifactError, match="but no input_zero_point"):
        records(save(tmp_path, layer, tensors, inputs={**STATIC, "symmetric": False}))


def test_without_a_config_and_without_layers(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", named("fc", ct_packed(Layer())))
    with pytest.raises(ArtifactError, match="no config, which would say what compressed-tensors layers mean"):
        records(folder)
    folder = write(tmp_path / "b", {"norm.weight": torch.ones(2)}, ct_config())
    with pytest.raises(ArtifactError, match=r"says compressed-tensors, but no layer of .* has a weight_scale"):
        records(folder, "compressed-tensors")


def test_a_name_without_end(tmp_path: Path) -> None:
    folder = write(tmp_path, named("x" * 2000, ct_packed(Layer())), ct_config(ignore=["re:.*y"]))
    with pytest.raises(ArtifactError, match="a layer's name of 2000 characters is too long"):
        records(folder)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    tensors = {"weight": np.zeros((2, 4, 8), np.int8), "weight_scale": np.ones((4, 1), np.float32)}
    with pytest.raises(ArtifactError, match=r"weight is of 2 experts, weight_scale is F32 \[4, 1\]"):
        records(save(tmp_path, Layer(8, group_size=-1, symmetric=True), tensors))


def test_codes_outside_their_bits(tmp_path: Path) -> None:
    layer = Layer(4)
    tensors = {"weight": signed(layer), "weight_scale": layer.scales}
    tensors["weight"][3, 4] = 8
    with pytest.raises(ArtifactError, match="weight holds codes outside the 4 bits that the config says"):
        records(save(tmp_path, layer, tensors))
