"""Checkpoints for the tests of the readers: written here from the layouts' descriptions, in numpy, without lowbit's code.

A second writing on purpose, by other means than the readers': bits are spread out one by one, words put together with
shifts, loops where the readers permute. What other libraries wrote themselves is in data/checkpoints/.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit import formats

DATA = Path(__file__).parent / "data" / "checkpoints"


def write(
    folder: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None = None, **files: Any
) -> Path:
    """A checkpoint folder: model.safetensors, config.json with a quantization_config, and other JSON files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    owned = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(owned, folder / "model.safetensors")
    if quantization is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def named(layer: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a layer under its name; numpy arrays become tensors."""
    return {
        f"{layer}.{k}": v if isinstance(v, Tensor) else torch.from_numpy(np.ascontiguousarray(v))
        for k, v in tensors.items()
    }


def records(folder: Path, format: str | None = None) -> dict[str, formats.LinearRecord]:
    """The quantized layers of a checkpoint."""
    return {n: r for n, r in formats.read(folder, format) if isinstance(r, formats.LinearRecord)}


def peer_tensors(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer that another library packed, and what it was made of (codes, zeros, scales)."""
    found = load_file(DATA / "peers.safetensors")
    parts = {name[len(case) + 1 :]: tensor for name, tensor in found.items() if name.startswith(case + ".")}
    expected = {n[len("expected.") :]: t for n, t in parts.items() if n.startswith("expected.")}
    return {n: t for n, t in parts.items() if not n.startswith("expected.")}, expected


# -- the bit stream ------------------------------------------------------------------------------------------------------


def stream(codes: np.ndarray, bits: int, word: int = 32) -> np.ndarray:
    """Rows of codes [R, C] as rows of words [R, ceil(C*bits/word)]."""
    codes = np.asarray(codes).astype(np.int64)
    rows, count = codes.shape
    words = math.ceil(count * bits / word)
    spread = np.zeros((rows, words * word), np.uint8)
    for i in range(bits):
        spread[:, np.arange(count) * bits + i] = codes >> i & 1
    packed = np.packbits(spread, axis=1, bitorder="little")
    return packed.view({8: np.uint8, 16: np.int16, 32: np.int32}[word])


def unstream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row of words."""
    spread = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little").astype(np.int64)
    places = np.arange(count)[:, None] * bits + np.arange(bits)
    return (spread[:, places] << np.arange(bits)).sum(-1)


# -- a layer -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Layer:
    """Random codes, zeros and scales of W[N, K]; `W` is what every reader must give, to the bit."""

    bits: int = 4
    N: int = 32
    K: int = 128
    group_size: int = 32
    symmetric: bool = False
    order: bool = False  # columns belong to groups in random order
    scale: torch.dtype = torch.float16
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        size = self.K if self.group_size == -1 else self.group_size
        self.G = math.ceil(self.K / size)
        top = 1 << self.bits
        self.codes = rng.integers(0, top, (self.N, self.K))
        middle = np.full((self.N, self.G), top // 2)
        self.zeros = middle if self.symmetric else rng.integers(0, top, (self.N, self.G))
        self.scales = torch.tensor(rng.uniform(0.001, 0.1, (self.N, self.G))).to(self.scale)
        self.g_idx = np.arange(self.K) // size
        if self.order:
            self.g_idx = rng.permutation(self.g_idx)

    @property
    def s(self) -> np.ndarray:
        return self.scales.float().numpy()

    @property
    def W(self) -> np.ndarray:
        """(q - z) * s, rounded to fp32 once."""
        difference = (self.codes - self.zeros[:, self.g_idx]).astype(np.float32)
        return difference * self.s[:, self.g_idx]


def check(record: formats.LinearRecord, W: np.ndarray) -> None:
    """The record decodes to W, bit by bit."""
    got = record.weight.dequantize().numpy()
    assert got.shape == W.shape
    np.testing.assert_array_equal(got.view(np.int32), W.astype(np.float32).view(np.int32))


# -- GPTQ ----------------------------------------------------------------------------------------------------------------


def gptq(layer: Layer, version: int = 1, word: int = 32, g_idx: bool = True) -> dict[str, Any]:
    """Tensors of a GPTQ layer."""
    stored = (layer.zeros - (version == 1)) % (1 << layer.bits)
    made = {
        "qweight": stream(layer.codes, layer.bits, word).T,
        "qzeros": stream(stored.T, layer.bits, word),
        "scales": layer.scales.t(),
    }
    return {**made, "g_idx": layer.g_idx.astype(np.int32)} if g_idx else made


def gptq_config(layer: Layer, **more: Any) -> dict[str, Any]:
    """Its quantization_config."""
    about = {"bits": layer.bits, "group_size": layer.group_size, "desc_act": layer.order, "sym": layer.symmetric}
    return {"quant_method": "gptq", **about, **more}


# -- AWQ -----------------------------------------------------------------------------------------------------------------


def awq_gemm(layer: Layer) -> dict[str, Any]:
    """Nibble i of word c is column 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]."""

    def words(codes: np.ndarray) -> np.ndarray:
        grouped = codes.reshape(codes.shape[0], -1, 8)
        packed = np.zeros(grouped.shape[:2], np.uint32)
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            packed |= grouped[:, :, column].astype(np.uint32) << np.uint32(4 * i)
        return packed.view(np.int32)

    return {"qweight": words(layer.codes.T), "qzeros": words(layer.zeros.T), "scales": layer.scales.t()}


def _gemv_width(layer: Layer) -> int:
    size = layer.K if layer.group_size == -1 else layer.group_size
    multiple = {32: 4, 64: 2}.get(size, 1)
    return math.ceil(math.ceil(layer.G / 8) / multiple) * multiple


def awq_gemv(layer: Layer) -> dict[str, Any]:
    """Natural order along K; zeros and scales padded."""
    width = _gemv_width(layer)
    zeros = np.zeros((layer.N, 8 * width), np.int64)
    zeros[:, : layer.G] = layer.zeros
    scales = torch.zeros(layer.N, 8 * width, dtype=layer.scale)
    scales[:, : layer.G] = layer.scales
    return {"qweight": stream(layer.codes, 4), "qzeros": stream(zeros, 4), "scales": scales}


def awq_gemv_fast(layer: Layer) -> dict[str, Any]:
    """Four rows to a row of words; each 32 codes dealt out in pairs, each eight split into even and odd."""
    width = _gemv_width(layer)
    words = np.zeros((layer.N // 4, layer.K), np.uint16)
    for n in range(layer.N):
        for base in range(0, layer.K, 64):
            for i in range(64):
                half, place = divmod(i, 32)
                eight, inner = divmod(place, 8)
                dealt = 8 * eight + (0, 2, 4, 6, 1, 3, 5, 7)[inner]
                thread, rest = divmod(dealt, 8)
                pair, one = divmod(rest, 2)
                column = base + 32 * half + 8 * pair + 2 * thread + one
                at, nibble = divmod((n % 4) * 64 + i, 4)
                words[n // 4, base + at] |= layer.codes[n, column] << (4 * nibble)
    scales = torch.zeros(8 * width, layer.N, dtype=layer.scale)
    scales[: layer.G] = layer.scales.t()
    offsets = torch.zeros_like(scales)
    offsets[: layer.G] = -(scales[: layer.G].float() * torch.from_numpy(layer.zeros.T).float()).to(layer.scale)
    return {"qweight": words.view(np.int16), "qzeros": offsets, "scales": scales}


def marlin(layer: Layer) -> tuple[np.ndarray, Tensor]:
    """Words [K/16, 2N] and scales [G, N] in Marlin's order, thread by thread.

    In a 16 x 8 fragment of the second operand of a tensor-core product, thread t holds column t // 4 and rows
    2(t % 4), 2(t % 4) + 1, 2(t % 4) + 8, 2(t % 4) + 9. A thread's codes for two fragments beside each other make a word.
    """
    words = np.zeros((layer.K // 16, 2 * layer.N), np.uint32)
    for tile_k in range(layer.K // 16):
        for tile_n in range(layer.N // 16):
            block, inner = divmod(tile_n, 4)  # four tiles to a block of 1024 codes, which are 128 words
            for thread in range(32):
                rows = [2 * (thread % 4) + r for r in (0, 1, 8, 9)]
                held = [(16 * tile_n + 8 * c + thread // 4, 16 * tile_k + row) for c in (0, 1) for row in rows]
                word = 0
                for nibble, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    n, k = held[place]
                    word |= int(layer.codes[n, k]) << (4 * nibble)
                words[tile_k, 128 * block + 4 * thread + inner] = word
    single = layer.G == 1
    length = 32 if single else 64
    scales = torch.empty_like(layer.scales.t())
    for n in range(layer.N):
        block, i = divmod(n, length)
        if single:  # eight columns to a row of threads: pairs, then the next fragment
            fragment, column = divmod(i, 8)
            pair, one = divmod(column, 2)
            place = pair * 8 + fragment * 2 + one
        else:
            fragment, column = divmod(i, 8)
            place = column * 8 + fragment
        scales[:, length * block + place] = layer.scales[n]
    return words.view(np.int32), scales


# -- compressed-tensors ----------------------------------------------------------------------------------------------------


def ct_words(codes: np.ndarray, bits: int, dense: bool) -> np.ndarray:
    """stream(bits), or floor(32 / bits) codes to a word as before 0.18."""
    if dense:
        return stream(codes, bits)
    per = 32 // bits
    width = math.ceil(codes.shape[1] / per)
    words = np.zeros((codes.shape[0], width), np.uint32)
    for k in range(codes.shape[1]):
        words[:, k // per] |= codes[:, k].astype(np.uint32) << np.uint32(bits * (k % per))
    return words.view(np.int32)


def ct_packed(layer: Layer, dense: bool = True, int8_zeros: bool = False) -> dict[str, Any]:
    """Tensors of a pack-quantized layer."""
    made: dict[str, Any] = {
        "weight_packed": ct_words(layer.codes, layer.bits, dense),
        "weight_scale": layer.scales,
        "weight_shape": np.array([layer.N, layer.K], np.int64),
    }
    if not layer.symmetric:
        signed = (layer.zeros - (1 << (layer.bits - 1))).astype(np.int8)
        made["weight_zero_point"] = signed if int8_zeros else ct_words(layer.zeros.T, layer.bits, dense).T
    if layer.order:
        made["weight_g_idx"] = layer.g_idx.astype(np.int32)
    return made


def ct_config(layer: Layer | None = None, inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Its quantization_config, one group for every Linear."""
    layer = layer or Layer()
    strategy = "channel" if layer.group_size == -1 else "group"
    weights = {"num_bits": layer.bits, "type": "int", "strategy": strategy, "symmetric": layer.symmetric}
    if strategy == "group":
        weights["group_size"] = layer.group_size
    weights |= more.pop("weights", {})
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "version": "0.20.0"}
    return {**config, "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}
