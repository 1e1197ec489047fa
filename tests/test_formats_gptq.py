"""GPTQ readers: every layout decodes to the bit, whoever wrote it; what is not known for certain is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import Layer, check, gptq, gptq_config, marlin, named, peer_tensors, records, write
from lowbit import ArtifactError, formats

BITS = (2, 3, 4, 8)


def save(folder: Path, layer: Layer, tensors: dict[str, Any] | None = None, **more: Any) -> Path:
    return write(folder, named("fc", gptq(layer) if tensors is None else tensors), gptq_config(layer, **more))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", [False, True])
def test_what_auto_gptq_packs(tmp_path: Path, bits: int, order: bool) -> None:
    tensors, expected = peer_tensors(f"gptq-{bits}{'-order' if order else ''}")
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": order, "sym": False}
    (record,) = records(write(tmp_path, named("fc", tensors), config)).values()
    g_idx = tensors["g_idx"].long()
    scales = expected["scales"].float()[:, g_idx]
    check(record, ((expected["codes"].int() - expected["zeros"].int()[:, g_idx]).float() * scales).numpy())
    assert (record.weight.perm is not None) == order


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_versions(tmp_path: Path, bits: int, version: int, symmetric: bool, order: bool) -> None:
    """With z = 0 among the zeros, which v1 stores as 2^b - 1."""
    layer = Layer(bits, symmetric=symmetric, order=order, seed=bits)
    if not symmetric:
        layer.zeros[0, 0] = 0
    more = {} if version == 1 else {"checkpoint_format": "gptq_v2"}
    (record,) = records(save(tmp_path, layer, gptq(layer, version), **more)).values()
    check(record, layer.W)
    assert record.weight.scheme.format == f"int{bits}" and record.weight.scheme.symmetric == symmetric
    assert (record.weight.perm is not None) == order


@pytest.mark.parametrize("group_size", [-1, 8, 128, 48])
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
def test_groups_and_scale_dtypes(tmp_path: Path, group_size: int, scale: torch.dtype) -> None:
    layer = Layer(group_size=group_size, scale=scale, order=group_size == 48)  # 48: the last group has 32 columns
    (record,) = records(save(tmp_path, layer)).values()
    check(record, layer.W)
    assert record.weight.scales.dtype == scale


def test_a_group_that_holds_all_of_a_narrow_layer(tmp_path: Path) -> None:
    layer = Layer(K=64, group_size=-1)
    (record,) = records(save(tmp_path, layer, group_size=128)).values()
    check(record, layer.W)


@pytest.mark.parametrize("g_idx", ["absent", "sorted", "sorted but desc_act"])
def test_trivial_g_idx(tmp_path: Path, g_idx: str) -> None:
    layer = Layer()
    tensors = gptq(layer, g_idx=g_idx != "absent")
    (record,) = records(save(tmp_path, layer, tensors, desc_act=g_idx == "sorted but desc_act")).values()
    check(record, layer.W)
    assert record.weight.perm is None


def test_act_order_without_the_flag(tmp_path: Path) -> None:
    layer = Layer(order=True)
    (record,) = records(save(tmp_path, layer, desc_act=False)).values()
    check(record, layer.W)
    assert record.weight.perm is not None and "act-order" in formats.detect(tmp_path).variant


@pytest.mark.parametrize(("word", "bits"), [(16, 2), (16, 4), (8, 4), (8, 8), (16, 8)])
def test_other_words(tmp_path: Path, word: int, bits: int) -> None:
    layer = Layer(bits)
    (record,) = records(save(tmp_path, layer, gptq(layer, word=word), pack_dtype=f"int{word}")).values()
    check(record, layer.W)


@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize(
    "flag", [{"is_marlin_format": True}, {"checkpoint_format": "marlin"}, {"quant_method": "marlin"}]
)
def test_marlin(tmp_path: Path, group_size: int, flag: dict[str, Any]) -> None:
    layer = Layer(N=128, K=192, group_size=group_size, symmetric=True)
    words, scales = marlin(layer)
    (record,) = records(save(tmp_path, layer, {"B": words, "s": scales}, **flag)).values()
    check(record, layer.W)
    assert record.weight.scheme.symmetric


def test_bias_and_everything_else(tmp_path: Path) -> None:
    layer = Layer()
    bias, norm = torch.randn(layer.N).half(), torch.randn(8).bfloat16()
    tensors = {**named("layers.0.fc", gptq(layer)), "layers.0.fc.bias": bias, "norm.weight": norm}
    found = dict(formats.read(write(tmp_path, tensors, gptq_config(layer))))
    assert list(found) == ["layers.0.fc", "norm.weight"]
    assert torch.equal(found["layers.0.fc"].bias, bias) and torch.equal(found["norm.weight"], norm)


@pytest.mark.parametrize("file", ["quantize_config", "quant_config"])
def test_config_in_a_file_of_its_own(tmp_path: Path, file: str) -> None:
    """As auto-gptq wrote it before transformers knew of it: with no quant_method."""
    layer = Layer()
    config = gptq_config(layer, damp_percent=0.01, true_sequential=True, model_name_or_path=None)
    del config["quant_method"]
    write(tmp_path, named("fc", gptq(layer)), None, **{file: config, "config": {"model_type": "llama"}})
    check(records(tmp_path)["fc"], layer.W)


@pytest.mark.parametrize(
    ("packing", "version"), [("auto_round:auto_gptq", 1), ("auto_round", 2), ("auto_round:gptqmodel", 2)]
)
def test_auto_round(tmp_path: Path, packing: str, version: int) -> None:
    layer = Layer()
    config = {**gptq_config(layer), "quant_method": "auto-round", "packing_format": packing}
    write(tmp_path, named("fc", gptq(layer, version)), config)
    check(records(tmp_path)["fc"], layer.W)


def test_layers_of_different_bits(tmp_path: Path) -> None:
    """GPTQModel's `dynamic` gives layers settings of their own; tensors say which."""
    four, eight = Layer(4, group_size=64), Layer(8, group_size=32)
    tensors = {**named("a", gptq(four)), **named("b", gptq(eight))}
    config = gptq_config(four, dynamic={"+:b": {"bits": 8, "group_size": 32}})
    found = records(write(tmp_path / "mixed", tensors, config))
    check(found["a"], four.W)
    check(found["b"], eight.W)
    with pytest.raises(
        ArtifactError, match=r"b: .*says bits=4, but qzeros I32 \[4, 8\] beside scales .* are of 8 bits"
    ):
        records(write(tmp_path / "plain", tensors, gptq_config(four)))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 6), st.sampled_from([-1, 8, 16, 40]),
    st.booleans(), st.sampled_from([1, 2]), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    bits: int,
    n: int,
    k: int,
    group: int,
    order: bool,
    version: int,
    seed: int,
) -> None:
    group = group if group == -1 or group <= 32 * k else -1
    layer = Layer(bits, 32 * n, 32 * k, group, order=order, seed=seed)
    folder = save(
        tmp_path_factory.mktemp("any"), layer, gptq(layer, version), checkpoint_format=["gptq", "gptq_v2"][version - 1]
    )
    check(records(folder)["fc"], layer.W)


# -- refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, r"'bits' is '5', it must be one of 2, 3, 4, 8"),
        ({"bits": "4"}, "'bits' is '4', it must be one of"),
        ({"bits": True}, "'bits' is 'True'"),
        ({"bits": 8}, r"says bits=8, but qzeros I32 \[4, 4\] beside scales F16 \[4, 32\] are of 4 bits"),
        ({"group_size": 0}, "'group_size' is '0', it must be -1 or above 0"),
        ({"group_size": 64}, "4 groups for K=128, .*says group_size=64, which gives 2"),
        ({"group_size": 10**30}, "4 groups for K=128"),
        ({"checkpoint_format": "gptq_p"}, r"'gptq_p' \(its codes are planar, not a bit stream\) is not read"),
        ({"checkpoint_format": "bitblas"}, "'bitblas' is not read; gptq, gptq_v2 and marlin are"),
        ({"checkpoint_format": 3}, "'checkpoint_format' is '3', it must be a string"),
        ({"checkpoint_format": "marlin"}, "says marlin, but no layer"),
        ({"quant_method": "aqlm"}, "'aqlm' is not a format that this lowbit reads"),
        ({"quant_method": "awq"}, "quant_method is 'awq', but the tensors say otherwise: fc has qweight .*gptq"),
    ],
)  # fmt: skip
def test_config_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    layer = Layer()
    with pytest.raises(ArtifactError, match=message):
        records(save(tmp_path, layer, **change))


def _tensors(layer: Layer, **change: Any) -> dict[str, Any]:
    return {k: v for k, v in {**gptq(layer), **change}.items() if v is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qzeros": None}, "fc: has g_idx, qweight, scales, but no qzeros|tensors say otherwise"),
        ({"qzeros": np.zeros((4, 5), np.int32)}, r"qzeros is I32 \[4, 5\]: for N=32 columns that is 5 bits each"),
        ({"qzeros": np.zeros((3, 4), np.int32)}, r"qzeros is I32 \[3, 4\], it must be I32 \[4, 4\]"),
        ({"scales": np.zeros((4, 31), np.float16)}, r"tensors say otherwise|GPTQ has N=32 in both"),
        ({"scales": np.zeros((4, 32), np.float64)}, r"scales is F64 \[4, 32\], it must be F16 or BF16 or F32"),
        ({"scales": np.full((4, 32), np.nan, np.float16)}, "scales: 128 values are not finite"),
        ({"g_idx": np.zeros(127, np.int32)}, r"g_idx is I32 \[127\], it must be I32 or I64 \[128\]"),
        ({"g_idx": np.full(128, 4, np.int32)}, "g_idx runs from 4 to 4; K=128 has 4 groups of 32"),
        ({"g_idx": np.full(128, -1, np.int32)}, "g_idx runs from -1 to -1"),
        ({"g_idx": np.arange(128, dtype=np.int32) // 43}, "g_idx gives group 0 43 columns of K=128; groups of 32 would have 32"),
        ({"bias": np.zeros(31, np.float16)}, r"bias is F16 \[31\], it must be .* \[32\]"),
        ({"bias": np.zeros(32, np.int32)}, "bias is I32"),
        ({"qweight": np.zeros((15, 32), np.int32)}, r"g_idx is I32 \[128\], it must be I32 or I64 \[120\]"),
        ({"qweight": np.zeros((0, 32), np.int32)}, "a weight of N=32, K=0"),
        ({"qweight": np.zeros((16, 32, 1), np.int32)}, r"tensors say otherwise|qweight is I32 \[16, 32, 1\]"),
        ({"lora_A": np.zeros(3, np.float32)}, r"has a tensor 'lora_A' \(F32 \[3\]\) that is not part of this format"),
    ],
)  # fmt: skip
def test_tensors_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    layer = Layer()
    with pytest.raises(ArtifactError, match=message):
        records(save(tmp_path, layer, _tensors(layer, **change)))


def test_codes_that_end_within_a_word(tmp_path: Path) -> None:
    layer = Layer(3)
    with pytest.raises(ArtifactError, match=r"qweight is I32 \[11, 32\]: no whole number of 3-bit codes"):
        records(save(tmp_path, layer, _tensors(layer, qweight=np.zeros((11, 32), np.int32), g_idx=None)))


def test_v2_that_calls_itself_v1(tmp_path: Path) -> None:
    layer = Layer(symmetric=True)
    with pytest.raises(ArtifactError, match="the config says v1 and sym, but all zeros are stored as 8, as v2 does"):
        records(save(tmp_path, layer, gptq(layer, version=2)))


def test_configs_that_disagree(tmp_path: Path) -> None:
    layer = Layer()
    save(tmp_path, layer)
    (tmp_path / "quantize_config.json").write_text(json.dumps({**gptq_config(layer), "sym": True}))
    with pytest.raises(
        ArtifactError, match=r"config.json: quantization_config says sym='False', but .*quantize_config.json"
    ):
        records(tmp_path)


def test_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="without a config, which would say whether zeros are v1 or v2"):
        records(write(tmp_path, named("fc", gptq(Layer()))))


def test_marlin_shapes(tmp_path: Path) -> None:
    layer = Layer(N=64, K=128, group_size=64, symmetric=True)
    words, scales = marlin(layer)
    for i, (change, message) in enumerate(
        [
            ({"s": scales[:, :48]}, "Marlin has"),
            ({"s": scales[:1]}, "the scales have 1 groups for K=128, the config says group_size=64"),
            ({"B": words[:, :-1]}, "Marlin has"),
            ({"B": words[:0]}, "a weight of N=64, K=0"),
        ]
    ):
        tensors = {"B": words, "s": scales, **change}
        with pytest.raises(ArtifactError, match=message):
            records(save(tmp_path / str(i), layer, tensors, is_marlin_format=True))
