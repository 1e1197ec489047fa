"""Checkpoints that the libraries themselves saved: decoded to the bit as the layouts say, as their owners decode them, and close
to the weights they were made from. What they are and how they were cut: data/checkpoints/make.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import DATA, check, records, unstream
from lowbit import ArtifactError, formats
from reference import CODES

# Root mean square error over root mean square weight: round-to-nearest on normally distributed weights has about 0.11 with 4
# bits in groups of 64 to 128, 0.008 with 8 bits a row, 0.026 with E4M3. GPTQ and AWQ trade some of it for smaller outputs.
ERRORS = {
    "gptq-v1-sym": 0.16,
    "gptq-v2-asym-act-order": 0.13,
    "awq-gemm": 0.13,
    "ct-w4a16": 0.12,
    "ct-w4a16-asym": 0.11,
    "ct-w8a8": 0.009,
    "ct-fp8-dynamic": 0.028,
    "fp8-block128": 0.028,
    "ct-nvfp4": 0.11,
}
SCHEMES = {
    "gptq-v1-sym": "int4-g128-fp16",
    "gptq-v2-asym-act-order": "int4-g64-asym-fp16",
    "awq-gemm": "int4-g64-asym-fp16",
    "ct-w4a16": "int4-g128",
    "ct-w4a16-asym": "int4-g128-asym",
    "ct-w8a8": "int8-bf16-a8",
    "ct-fp8-dynamic": "fp8-bf16-a8",
    "fp8-block128": "fp8-b128-a8",
    "ct-nvfp4": "nvfp4",
}


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def _grouped(
    codes: np.ndarray, zeros: np.ndarray | int, scales: np.ndarray, g_idx: np.ndarray | None = None
) -> np.ndarray:
    """(q - z) * s with [N, G] zeros and scales, in fp32."""
    g = np.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1]) if g_idx is None else g_idx
    zero = zeros if isinstance(zeros, int) else zeros[:, g]
    return (codes - zero).astype(np.float32) * scales[:, g].astype(np.float32)


def _gptq(t: dict[str, Tensor], plus: int) -> np.ndarray:
    K, N = t["qweight"].shape[0] * 8, t["qweight"].shape[1]
    codes = unstream(t["qweight"].numpy().T, 4, K)
    zeros = unstream(t["qzeros"].numpy(), 4, N).T + plus
    return _grouped(codes, zeros, _numpy(t["scales"]).T, t["g_idx"].numpy())


def _awq(t: dict[str, Tensor]) -> np.ndarray:
    def columns(words: Tensor) -> np.ndarray:
        nibbles = unstream(words.numpy(), 4, words.shape[1] * 8).reshape(words.shape[0], -1, 8)
        return nibbles[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(words.shape[0], -1).T

    return _grouped(columns(t["qweight"]), columns(t["qzeros"]), _numpy(t["scales"]).T)


def _ct_packed(t: dict[str, Tensor]) -> np.ndarray:
    N, K = t["weight_shape"].tolist()
    codes = unstream(t["weight_packed"].numpy(), 4, K)
    zeros: np.ndarray | int = 8
    if "weight_zero_point" in t:
        zeros = unstream(t["weight_zero_point"].numpy().T, 4, N).T
    return _grouped(codes, zeros, _numpy(t["weight_scale"]))


def _per_row(t: dict[str, Tensor]) -> np.ndarray:
    return _numpy(t["weight"]).astype(np.float32) * _numpy(t["weight_scale"])


def _blocks(t: dict[str, Tensor]) -> np.ndarray:
    return _numpy(t["weight"]) * _numpy(t["weight_scale_inv"]).repeat(128, 0).repeat(128, 1)


def _nvfp4(t: dict[str, Tensor]) -> np.ndarray:
    codes = unstream(t["weight_packed"].numpy(), 4, 2 * t["weight_packed"].shape[1])
    above = np.float32(1) / t["weight_global_scale"].numpy()  # what is stored is a divisor
    return CODES["fp4_e2m1"][codes] * (_numpy(t["weight_scale"]) * above).repeat(16, 1)


DECODERS: dict[str, Callable[[dict[str, Tensor]], np.ndarray]] = {
    "gptq-v1-sym": lambda t: _gptq(t, 1),
    "gptq-v2-asym-act-order": lambda t: _gptq(t, 0),
    "awq-gemm": _awq,
    "ct-w4a16": _ct_packed,
    "ct-w4a16-asym": _ct_packed,
    "ct-w8a8": _per_row,
    "ct-fp8-dynamic": _per_row,
    "fp8-block128": _blocks,
    "ct-nvfp4": _nvfp4,
}


def _tensors(name: str, layer: str) -> dict[str, Tensor]:
    found = load_file(DATA / name / "model.safetensors")
    return {key[len(layer) + 1 :]: tensor for key, tensor in found.items() if key.startswith(layer + ".")}


@pytest.mark.parametrize("name", DECODERS)
def test_decodes_as_the_layout_says(name: str) -> None:
    found = records(DATA / name)
    assert found
    for layer, record in found.items():
        check(record, DECODERS[name](_tensors(name, layer)))
        assert str(record.weight.scheme) == SCHEMES[name]
        assert (record.weight.perm is not None) == ("act-order" in name)


@pytest.mark.parametrize("name", DECODERS)
def test_decodes_as_its_owner_does(name: str) -> None:
    """The bits that auto-gptq, AutoAWQ, compressed-tensors and transformers compute, in the dtype in which they do."""
    wanted = json.loads((DATA / "decoded.json").read_text())[name]
    found = records(DATA / name)
    assert found.keys() == wanted.keys()
    for layer, record in found.items():
        weight = record.weight.dequantize(getattr(torch, wanted[layer]["dtype"]))
        assert hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest() == wanted[layer]["sha256"]


@pytest.mark.parametrize("name", DECODERS)
def test_close_to_what_was_quantized(name: str) -> None:
    dense = load_file(DATA / "dense" / "model.safetensors")
    for layer, record in records(DATA / name).items():
        source = dense[layer + ".weight"].float()
        error = float((record.weight.dequantize() - source).norm() / source.norm())
        assert 0.5 * ERRORS[name] < error < ERRORS[name], layer


@pytest.mark.parametrize("name", DECODERS)
def test_everything_else_is_as_it_was(name: str) -> None:
    wanted = load_file(DATA / name / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    tensors = {key: value for key, value in formats.read(DATA / name) if isinstance(value, Tensor)}
    assert list(tensors) == ["model.layers.0.input_layernorm.weight"]
    assert torch.equal(*tensors.values(), wanted) and next(iter(tensors.values())).dtype == wanted.dtype


def test_a_model_that_is_not_quantized() -> None:
    with pytest.raises(ArtifactError, match="nothing in it is quantized in a format that lowbit reads"):
        records(DATA / "dense")
