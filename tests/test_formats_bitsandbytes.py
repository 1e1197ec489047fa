"""bitsandbytes: what it wrote decodes to what it says, and what does not fit is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit.formats
from folders import DATA, attack, changed, load_tensors, read, weights, write_folder
from lowbit import ArtifactError

WRITTEN = DATA / "bitsandbytes"
NF4, INT8 = DATA / "bitsandbytes-nf4", DATA / "bitsandbytes-int8"
BOOKS = {
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    "fp4": [0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4],
}  # fmt: skip
BOOKS["fp4"] += [-value for value in BOOKS["fp4"]]
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, dict[str, Any]], None]
K_PROJ = "model.layers.0.self_attn.k_proj"


def reference(tensors: Tensors, layer: str) -> np.ndarray:
    """One value at a time, as the format is described; in fp32."""
    (key,) = [name for name in tensors if name.startswith(f"{layer}.weight.quant_state.bitsandbytes__")]
    state = json.loads(bytes(tensors[key].tolist()))
    book = np.array(BOOKS[key[-3:]], np.float32)
    raw = tensors[f"{layer}.weight"].view(torch.uint8).flatten().tolist()
    absmax = tensors[f"{layer}.weight.absmax"].numpy()
    if "nested_blocksize" in state:
        nested = tensors[f"{layer}.weight.nested_absmax"].numpy()
        table = tensors[f"{layer}.weight.nested_quant_map"].numpy()
        absmax = np.array(
            [
                table[q] * nested[i // state["nested_blocksize"]] + np.float32(state["nested_offset"])
                for i, q in enumerate(absmax)
            ]
        )
    N, K = state["shape"]
    codes = [raw[i // 2] >> 4 if i % 2 == 0 else raw[i // 2] & 15 for i in range(N * K)]
    made = [book[code] * absmax[i // state["blocksize"]] for i, code in enumerate(codes)]
    return np.array(made, np.float32).reshape(N, K)


def close(found: torch.Tensor, want: np.ndarray) -> bool:
    """To 2^-23 of each value."""
    wide = want.astype(np.float64)
    return bool((np.abs(found.double().numpy() - wide) <= 2.0**-23 * np.abs(wide)).all())


def test_what_bitsandbytes_wrote() -> None:
    tensors, decoded = load_tensors(WRITTEN / "model.safetensors"), load_tensors(WRITTEN / "decoded.safetensors")
    found = read(WRITTEN)
    assert found.keys() == decoded.keys() and len(found) == 11
    for name, record in found.items():
        weight = record.weight.dequantize()
        if record.weight.scheme.bits == 4:
            assert torch.equal(weight, decoded[name]), name
            assert np.array_equal(weight.numpy(), reference(tensors, name)), name
        else:
            assert close(weight, decoded[name].numpy()), name
            assert torch.equal(weight.bfloat16(), decoded[name].bfloat16()), name
    schemes = [str(found[f"layers.{i}.proj"].weight.scheme) for i in (0, 2, 4, 6, 8, 99)]
    # K = 96 in blocks of 128, K = 40 in blocks of 64, K = 64 in blocks of 256: blocks run over the ends of rows.
    assert schemes == ["nf4-g64-fp32", "bnb_fp4-g64-fp32", "nf4-g128-flat", "bnb_fp4-g64-flat", "nf4-g256-flat", "int8"]
    nested = {str(record.weight.scheme) for record in found.values() if record.weight.scheme.super_groups}
    assert len({name.split("-")[0] for name in nested}) == 2
    assert nested <= {f"{kind}-g{size}-flat-dyn8-x256fp32" for kind in ("nf4", "bnb_fp4") for size in (64, 128, 256)}


def test_what_transformers_wrote() -> None:
    assert lowbit.formats.detect(NF4).variant == "nf4, blocks of 64, absmax quantized"
    tensors = load_tensors(NF4 / "model.safetensors")
    for name, weight in weights(NF4).items():
        assert np.array_equal(weight.numpy(), reference(tensors, name))
        assert 0.015 < float(weight.std()) < 0.025  # as the model was initialised
    assert lowbit.formats.detect(INT8).variant == "LLM.int8"
    tensors = load_tensors(INT8 / "model.safetensors")
    for name, weight in weights(INT8).items():
        codes, scb = tensors[f"{name}.weight"].double().numpy(), tensors[f"{name}.SCB"].double().numpy()
        exact = codes * scb[:, None] / 127
        assert np.abs(weight.numpy() - exact).max() <= 2.0**-23 * np.abs(exact).max()
        assert 0.015 < float(weight.std()) < 0.025


def test_the_two_are_of_one_model() -> None:
    four, eight = weights(NF4), weights(INT8)
    for name in four:
        error = (four[name] - eight[name]).norm() / eight[name].norm()
        assert 0.08 < float(error) < 0.11  # what NF4 in blocks of 64 loses of a normal distribution


def packed_state(kind: str, block: int, shape: tuple[int, int], nested: dict[str, Any] | None = None) -> torch.Tensor:
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(shape), **(nested or {})}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(("nf4", "fp4")),
    block=st.sampled_from((32, 64, 256)),
    N=st.integers(1, 9),
    K=st.sampled_from((2, 4, 8, 40, 64, 96, 136, 256)),
    nested=st.booleans(),
    storage=st.sampled_from((torch.uint8, torch.bfloat16, torch.float32)),
    seed=st.integers(0, 2**31),
)
def test_any_weight(
    kind: str, block: int, N: int, K: int, nested: bool, storage: torch.dtype, seed: int, tmp_path_factory: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (N * K // 2, 1), dtype=torch.uint8, generator=generator)
    whole = raw.numel() % storage.itemsize == 0
    blocks = math.ceil(N * K / block)
    tensors = {
        "p.weight": raw.view(-1).view(storage).unsqueeze(1) if whole else raw,
        "p.weight.quant_map": torch.tensor(BOOKS[kind], dtype=torch.float32),
        "p.bias": torch.randn(N, generator=generator),
    }
    extra = None
    if nested:
        extra = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0378}
        tensors["p.weight.absmax"] = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        tensors["p.weight.nested_absmax"] = torch.rand(math.ceil(blocks / 256), generator=generator)
        tensors["p.weight.nested_quant_map"] = torch.randn(256, generator=generator)
    else:
        tensors["p.weight.absmax"] = torch.rand(blocks, generator=generator)
    tensors[f"p.weight.quant_state.bitsandbytes__{kind}"] = packed_state(kind, block, (N, K), extra)
    folder = write_folder(tmp_path_factory.getbasetemp() / "any_bnb", tensors, None)
    record = read(folder)["p"]
    weight, want = record.weight.dequantize(), reference(tensors, "p")
    assert np.array_equal(weight.numpy(), want)
    assert record.weight.scheme.bits == 4
    assert torch.equal(record.bias, tensors["p.bias"])


def owners_decode(q: torch.Tensor, state: Any) -> torch.Tensor:
    """By bitsandbytes' portable code: its CPU kernel takes a wrong absmax where a block crosses the end of a row."""
    import bitsandbytes.functional as F
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return _dequantize_4bit_compute(q.reshape(-1), absmax, state.code, state.blocksize, state.shape, torch.float32)


@pytest.mark.oracle
def test_with_bitsandbytes_itself(tmp_path: Path) -> None:
    F = pytest.importorskip("bitsandbytes.functional")
    for kind in ("nf4", "fp4"):
        for block, nested, shape in ((64, True, (128, 512)), (128, False, (33, 320)), (4096, True, (64, 96))):
            q, state = F.quantize_4bit(torch.randn(shape), blocksize=block, compress_statistics=nested, quant_type=kind)
            tensors = {"p.weight": q, **{f"p.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
            weight = weights(write_folder(tmp_path / "x", tensors, None))["p"]
            want = owners_decode(q, state)
            assert torch.equal(weight, want)
    codes, scb, _ = F.int8_vectorwise_quant(torch.randn(40, 100, dtype=torch.float16))
    weight = weights(write_folder(tmp_path / "x", {"p.weight": codes, "p.SCB": scb}, None))["p"]
    assert close(weight, F.int8_vectorwise_dequant(codes, scb).numpy())


# -- what does not fit -------------------------------------------------------------------------------------------------------


def _set(name: str, value: torch.Tensor | None) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors.pop(f"{K_PROJ}.{name}", None)
        if value is not None:
            tensors[f"{K_PROJ}.{name}"] = value

    return change


def _state(**values: Any) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        name = f"{K_PROJ}.weight.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(tensors[name].tolist())), **values}
        state = {key: value for key, value in state.items() if value is not None}
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _settings(**values: Any) -> Change:
    return lambda tensors, config: config["quantization_config"].update(values)


_NAME = "weight.quant_state.bitsandbytes__nf4"
_INFINITE = torch.tensor(list(b'{"quant_type": "nf4", "blocksize": 64, "shape": [128, 256], "nested_blocksize": 256, '
                              b'"nested_offset": 1e999}'), dtype=torch.uint8)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_state(shape=[128, 255]), "K=255 is odd: a byte would hold weights of two rows"),
        (_state(shape=[32768, 1]), "K=1 is odd"),
        (_state(shape=[128, 512]), r"weight is U8 \[16384, 1\], 16384 bytes; N=128, K=512 takes 32768"),
        (_state(shape=[-128, 256]), r"'shape' is '\[-128, 256\]', it must be \[N, K\]"),
        (_state(shape=[2**62, 4]), "'shape' is"),
        (_state(shape="x"), "'shape' is 'x'"),
        (_state(shape=[8, 16, 256]), "'shape' is"),
        (_state(blocksize=63), "'blocksize' is '63'"),
        (_state(blocksize=128), r"weight.absmax is U8 \[512\], it must be U8 \[256\]"),
        (_state(nested_blocksize=None), "nested_blocksize and nested_absmax have to be there together"),
        (_state(nested_blocksize=128), r"nested_absmax is F32 \[2\], it must be F32 \[4\]"),
        (_state(nested_offset="x"), "'nested_offset' is 'x', it must be a finite number"),
        (_state(nested_offset=True), "'nested_offset' is 'True'"),
        (_state(nested_dtype="float16"), "'nested_dtype' is 'float16'"),
        (_state(quant_type="fp4"), "'quant_type' is 'fp4', it must be 'nf4'"),
        (_set(_NAME, _INFINITE), "'nested_offset' is 'inf'"),
        (_set(_NAME, torch.tensor([0xFF], dtype=torch.uint8)), "bitsandbytes__nf4: not valid JSON"),
        (_set(_NAME, torch.zeros(3)), "it must be the U8 bytes of a JSON text"),
        (_set(_NAME, torch.zeros(1 << 17, dtype=torch.uint8)), "it must be the U8 bytes of a JSON text"),
        (_set(_NAME, None), "it must have one quant_state, not 0"),
        (_set("weight.quant_state.bitsandbytes__fp4", torch.zeros(2, dtype=torch.uint8)), "one quant_state, not 2"),
        (_set("weight.quant_state.other", torch.zeros(2)), "'weight.quant_state.other' .* not part of this format"),
        (_set("weight.quant_map", torch.linspace(-1, 1, 16)), "not the code book of nf4"),
        (_set("weight.quant_map", torch.zeros(8)), r"weight.quant_map is F32 \[8\]"),
        (_set("weight.absmax", None), "but no weight.absmax"),
        (_set("weight.nested_absmax", torch.full((2,), float("inf"))), "values are not finite"),
        (_set("weight", None), "but no weight"),
        (_set("weight.extra", torch.zeros(1)), "'weight.extra' .* not part of this format"),
        (_set("extra", torch.zeros(1)), "'extra' .* not part of this format"),
        (_set("bias", torch.zeros(2)), r"bias is F32 \[2\]"),
        (_settings(load_in_8bit=True), "holds 4 bits, but .* says load_in_8bit"),
        (_settings(load_in_8bit="x"), "'load_in_8bit' is 'x', it must be true or false"),
    ],
)
def test_refused_4bit(change: Change, message: str, tmp_path: Path) -> None:
    folder = changed(tmp_path / "bad", NF4, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        read(folder)
    assert str(folder) in str(caught.value)


def test_another_kind_of_quant_state(tmp_path: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{K_PROJ}.weight.quant_state.bitsandbytes__af4"] = tensors.pop(f"{K_PROJ}.{_NAME}")

    with pytest.raises(ArtifactError, match="quantized to 'af4', which is not read"):
        read(changed(tmp_path / "bad", NF4, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("SCB", torch.zeros(127)), r"SCB is F32 \[127\], it must be F32 \[128\]"),
        (_set("SCB", torch.zeros(128, dtype=torch.float16)), "SCB is F16"),
        (_set("SCB", torch.full((128,), float("nan"))), "128 values are not finite"),
        (_set("weight", torch.zeros(128, 256)), r"weight is F32 \[128, 256\], it must be I8"),
        (_set("weight", torch.zeros(128, dtype=torch.int8)), r"weight is I8 \[128\]"),
        (_set("weight", torch.zeros(0, 4, dtype=torch.int8)), "a weight of N=0, K=4"),
        (_set("weight_format", torch.tensor(1, dtype=torch.uint8)), "weight_format is 1"),
        (_set("weight_format", torch.tensor([0, 0], dtype=torch.uint8)), r"weight_format is U8 \[2\]"),
        (_set("other", torch.zeros(1)), "'other' .* not part of this format"),
        (_settings(load_in_4bit=True), "holds 8 bits, but .* says load_in_4bit"),
    ],
)
def test_refused_8bit(change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(changed(tmp_path / "bad", INT8, change))


def test_a_config_for_weights_that_are_not_quantized_yet(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.raises(ArtifactError, match="but the tensors say otherwise"):
        read(write_folder(tmp_path / "dense", {"p.weight": torch.zeros(8, 8)}, config))


@pytest.mark.parametrize("layer", ["layers.1.proj", "layers.6.proj", "layers.99.proj"])
def test_mutated_checkpoints(layer: str, tmp_path: Path) -> None:
    def keep(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [name for name in tensors if not name.startswith(layer)]:
            del tensors[name]

    counts = attack(changed(tmp_path / "fuzz", WRITTEN, keep), 250, layer)
    assert counts["refused"] > 75 and counts["read"] > 25
