"""AWQ readers: all four layouts decode to the bit, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import Layer, awq_gemm, awq_gemv, awq_gemv_fast, check, marlin, named, peer_tensors, records, write
from lowbit import ArtifactError, formats


def awq_marlin(layer: Layer) -> dict[str, Any]:
    words, scales = marlin(layer)
    return {"qweight": words, "scales": scales}


ENCODERS = {"gemm": awq_gemm, "gemv": awq_gemv, "gemv_fast": awq_gemv_fast, "marlin": awq_marlin}


def awq_config(layer: Layer, version: str, **more: Any) -> dict[str, Any]:
    about = {"bits": 4, "group_size": layer.group_size, "zero_point": not layer.symmetric, "version": version}
    return {"quant_method": "awq", "modules_to_not_convert": None, **about, **more}


def save(folder: Path, layer: Layer, version: str, tensors: dict[str, Any] | None = None, **more: Any) -> Path:
    tensors = ENCODERS[version](layer) if tensors is None else tensors
    return write(folder, named("fc", tensors), awq_config(layer, version, **more))


def with_offsets(layer: Layer) -> np.ndarray:
    """gemv_fast keeps -s*z, rounded: q*s, rounded to fp32, plus that."""
    offsets = -(layer.scales.float() * torch.from_numpy(layer.zeros).float()).to(layer.scale).float().numpy()
    product = layer.codes.astype(np.float32) * layer.s[:, layer.g_idx]
    return product + offsets[:, layer.g_idx]


@pytest.mark.parametrize(
    ("version", "group"),
    [("gemm", 64), *((v, g) for v in ("gemv", "gemv_fast") for g in (128, 64, 32)), ("marlin", 64), ("marlin", 128)],
)
def test_what_autoawq_packs(tmp_path: Path, version: str, group: int) -> None:
    tensors, expected = peer_tensors(f"awq-{version}-{group}")
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": version,
        "zero_point": version != "marlin",
    }
    (record,) = records(write(tmp_path, named("fc", tensors), config)).values()
    g = torch.arange(128) // group
    scales, zeros = expected["scales"].float(), expected["zeros"].float()
    wanted = (expected["codes"].float() - zeros[:, g]) * scales[:, g]
    if version == "gemv_fast":
        wanted = expected["codes"].float() * scales[:, g] - (scales * zeros).half().float()[:, g]
    check(record, wanted.numpy())


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("version", ENCODERS)
def test_versions(tmp_path: Path, version: str, group_size: int) -> None:
    layer = Layer(N=64, K=384, group_size=group_size, symmetric=version == "marlin")
    (record,) = records(save(tmp_path, layer, version)).values()
    check(record, with_offsets(layer) if version == "gemv_fast" else layer.W)
    assert record.weight.scheme.zero_kind == {"gemv_fast": "offset", "marlin": "none"}.get(version, "int")
    assert formats.detect(tmp_path).variant.startswith(version)


def test_zero_point_false_beside_stored_zeros(tmp_path: Path) -> None:
    """auto-round says so and stores 8s: then there are none to keep. Where others are stored, they count."""
    for name, symmetric in (("eights", True), ("others", False)):
        layer = Layer(symmetric=symmetric)
        tensors = awq_gemm(layer)
        if symmetric:
            assert (tensors["qzeros"].view(np.uint32) == 0x88888888).all()
        (record,) = records(save(tmp_path / name, layer, "gemm", tensors, zero_point=False)).values()
        check(record, layer.W)
        assert record.weight.scheme.symmetric == symmetric


def test_auto_round_of_its_own_format(tmp_path: Path) -> None:
    layer = Layer()
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32}
    check(records(write(tmp_path, named("fc", awq_gemm(layer)), config))["fc"], layer.W)


def test_old_names_in_a_config_of_its_own(tmp_path: Path) -> None:
    layer = Layer()
    config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    check(records(write(tmp_path, named("fc", awq_gemm(layer)), None, quant_config=config))["fc"], layer.W)


def test_bias_and_scales_of_activations(tmp_path: Path) -> None:
    """`act.scales` belong to no layer: they are given as they are."""
    layer = Layer()
    bias, scales = torch.randn(layer.N).half(), torch.rand(8).half()
    tensors = {**named("mlp.fc", awq_gemm(layer)), "mlp.fc.bias": bias, "mlp.act.scales": scales}
    found = dict(formats.read(write(tmp_path, tensors, awq_config(layer, "gemm"))))
    assert torch.equal(found["mlp.fc"].bias, bias) and torch.equal(found["mlp.act.scales"], scales)


def test_an_odd_number_of_columns(tmp_path: Path) -> None:
    layer = Layer(K=33, group_size=-1)
    check(records(save(tmp_path, layer, "gemm"))["fc"], layer.W)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(list(ENCODERS)), st.integers(1, 2), st.integers(1, 3), st.sampled_from([-1, 32, 64]), st.integers(0, 99)
)  # fmt: skip
def test_any_shape(
    tmp_path_factory: pytest.TempPathFactory, version: str, n: int, k: int, group: int, seed: int
) -> None:
    layer = Layer(N=64 * n, K=64 * k, group_size=group, symmetric=version == "marlin", seed=seed)
    (record,) = records(save(tmp_path_factory.mktemp("any"), layer, version)).values()
    check(record, with_offsets(layer) if version == "gemv_fast" else layer.W)


@pytest.mark.parametrize(
    ("version", "config", "tensors", "message"),
    [
        ("gemm", {"bits": 8}, {}, "'bits' is '8', it must be one of 4"),
        ("gemm", {"group_size": -2}, {}, "'group_size' is '-2', it must be -1 or above 0"),
        ("gemm", {"group_size": 48}, {}, "K=128 is not a multiple of group_size=48"),
        ("gemm", {"group_size": 64}, {}, r"scales is F16 \[4, 32\], it must be .* \[2, 32\]"),
        ("gemm", {"version": "exllama"}, {}, "'version' is 'exllama', it must be one of gemm, gemv, gemv_fast, marlin"),
        ("gemm", {"version": "gemv"}, {}, r"says version 'gemv', but qweight I32 \[128, 4\] is gemm's"),
        ("gemm", {"quant_method": "gptq"}, {}, "quant_method is 'gptq', but the tensors say otherwise: fc has .*AWQ's gemm"),
        ("gemm", {}, {"qweight": np.zeros((128, 0), np.int32)}, "not a layout of AWQ|tensors say otherwise"),
        ("gemm", {}, {"qweight": np.zeros((0, 4), np.int32)}, "a weight of N=32, K=0"),
        ("gemm", {}, {"g_idx": np.zeros(128, np.int32)}, "has a tensor 'g_idx' .* not part of this format"),
        ("gemm", {}, {"bias": np.zeros(3, np.float16)}, r"bias is F16 \[3\]"),
        ("gemm", {}, {"scales": np.full((4, 32), np.inf, np.float16)}, "scales: 128 values are not finite"),
        ("gemv", {}, {"qzeros": np.zeros((32, 3), np.int32)}, "tensors say otherwise|not a layout"),
        ("gemv", {"group_size": 128}, {}, r"scales is F16 \[32, 32\], it must be .* \[32, 8\]"),
        ("gemv_fast", {}, {"qweight": np.zeros((8, 100), np.int16)}, "gemv_fast has a multiple of 64 columns"),
        ("gemv_fast", {}, {"qzeros": np.zeros((31, 32), np.float16)}, r"qzeros is F16 \[31, 32\]"),
        ("marlin", {}, {"scales": np.zeros((4, 40), np.float16)}, "tensors say otherwise|Marlin has"),
        ("marlin", {"group_size": 64}, {}, "the scales have 4 groups for K=128, the config says group_size=64"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, version: str, config: dict[str, Any], tensors: dict[str, Any], message: str) -> None:
    layer = Layer(N=64 if version == "marlin" else 32, symmetric=version == "marlin")
    made = named("fc", {**ENCODERS[version](layer), **tensors})
    folder = write(tmp_path, made, {**awq_config(layer, version), **config})
    with pytest.raises(ArtifactError, match=message):
        records(folder)


def test_some_layer_of_no_layout(tmp_path: Path) -> None:
    layer = Layer()
    tensors = {**named("a", awq_gemm(layer)), **named("b", {**awq_gemm(layer), "qweight": np.zeros((3, 3), np.int32)})}
    with pytest.raises(ArtifactError, match=r"b: qweight I32 \[3, 3\], qzeros .*: not a layout of AWQ"):
        records(write(tmp_path, tensors, awq_config(layer, "gemm")))


def test_without_layers(tmp_path: Path) -> None:
    folder = write(tmp_path, {"norm.weight": torch.ones(2)}, awq_config(Layer(), "gemm"))
    with pytest.raises(ArtifactError, match=r"says AWQ, but no tensor of .* is called qweight"):
        records(folder, "awq")


def test_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="without a config, which would say how large groups are"):
        records(write(tmp_path, named("fc", awq_gemm(Layer()))))
