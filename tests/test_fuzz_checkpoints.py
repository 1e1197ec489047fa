"""Mutated checkpoints of every format: our exception, or layers of the shapes that the headers give; nothing else, and in time.

Where only a config was changed, what is still read is what was read before, or what another valid setting of the changed key
means.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints import (
    Layer,
    awq_gemm,
    awq_gemv,
    awq_gemv_fast,
    ct_config,
    ct_packed,
    gptq,
    gptq_config,
    marlin,
    named,
    write,
)
from lowbit import formats
from test_fuzz_files import _attack, _mutate_bytes, _mutate_header, _mutate_json


@dataclasses.dataclass(frozen=True)
class Subject:
    """A small checkpoint to attack: two layers of the format, a bias and a tensor that is not quantized."""

    name: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    file: str = "config.json"


def _subject(name: str, layer: Layer, tensors: dict[str, Any], config: dict[str, Any]) -> Subject:
    made = {**named("layers.0.fc", tensors), **named("layers.10.fc", tensors), "norm.weight": torch.ones(4)}
    made["layers.0.fc.bias"] = torch.zeros(layer.N)
    return Subject(name, made, config)


def _subjects() -> list[Subject]:
    plain, order = Layer(N=32, K=64), Layer(N=32, K=64, order=True)
    three, even = Layer(3, N=8, K=24, group_size=8, order=True), Layer(N=64, K=64, symmetric=True)
    eight = Layer(8, N=8, K=24, group_size=-1, symmetric=True)
    words, scales = marlin(even)
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": False}
    int8 = {"weight": (eight.codes - 128).astype(np.int8), "weight_scale": eight.scales}
    static = {"input_scale": np.ones(1, np.float32), "input_zero_point": np.array([3], np.int8)}
    fp8 = torch.zeros(130, 20).to(torch.float8_e4m3fn)
    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    nibbles = {"weight": np.zeros((4, 16), np.uint8), "weight_scale": np.ones((8, 2), np.float32)}
    smooth = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 8}
    return [
        _subject("gptq", order, gptq(order), gptq_config(order, dynamic={}, checkpoint_format="gptq")),
        _subject("gptq-marlin", even, {"B": words, "s": scales}, gptq_config(even, is_marlin_format=True)),
        _subject("awq-gemm", plain, awq_gemm(plain), {**awq, "version": "gemm"}),
        _subject("awq-gemv", plain, awq_gemv(plain), {**awq, "version": "gemv"}),
        _subject("awq-gemv_fast", plain, awq_gemv_fast(plain), {**awq, "version": "gemv_fast"}),
        _subject("ct-packed", three, ct_packed(three), ct_config(three, ignore=["re:.*head$", "x"])),
        _subject("ct-int", eight, {**int8, **static}, ct_config(eight, inputs, format="int-quantized")),
        _subject("fp8", Layer(N=130), {"weight": fp8, "weight_scale_inv": torch.ones(2, 1)}, block),
        _subject("modelopt", Layer(N=8), {**nibbles, "pre_quant_scale": np.ones(16, np.float32)}, smooth),
    ]


SUBJECTS = _subjects()


# How many times the cases of an ordinary run.
FACTORS = [1, pytest.param(25, marks=pytest.mark.slow)]


def _read(folder: Path) -> dict[str, np.ndarray]:
    """Every layer decoded; what holds for any answer is asserted on the way."""
    found = {}
    with formats.plan(folder) as plan:
        for name in plan.names:
            record = plan.read(name)
            if isinstance(record, Tensor):
                assert record.shape == plan.tensors[name].shape and record.dtype == plan.tensors[name].dtype
                continue
            assert tuple(record.weight.shape) == plan.layers[name].shape
            assert bool(torch.isfinite(record.weight.scales).all())
            weight = record.weight.dequantize()
            assert record.linear().quantized_weight() == record.weight
            found[name] = weight.numpy()
    return found


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    made: Subject = request.param
    return made


@pytest.mark.parametrize("factor", FACTORS)
def test_config(subject: Subject, tmp_path: Path, factor: int) -> None:
    """One to three values of the config changed."""
    folder = write(tmp_path, subject.tensors, subject.config)
    original = _read(folder)
    path = folder / "config.json"
    body = json.loads(path.read_bytes())
    answers: dict[str, set[bytes]] = {name: set() for name in original}

    def load(rng: random.Random) -> None:
        path.write_text(json.dumps(_mutate_json(body, rng)))
        for name, weight in _read(folder).items():
            assert weight.shape == original[name].shape
            answers[name].add(weight.tobytes())

    counts = _attack(80 * factor, 1, load)
    assert counts["refused"] > 20 * factor
    for name, found in answers.items():
        assert original[name].tobytes() in found
        # Another packing or version, and zeros that are one apart, are what a config can still choose between.
        assert len(found) <= (2 if subject.name in ("gptq", "ct-packed") else 1), name


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("mutate", [_mutate_header, _mutate_bytes])
def test_tensors(
    subject: Subject, tmp_path: Path, mutate: Callable[[bytes, random.Random], bytes], factor: int
) -> None:
    """Names, dtypes, shapes and offsets in the header; bits, cuts and insertions anywhere."""
    folder = write(tmp_path, subject.tensors, subject.config)
    path = folder / "model.safetensors"
    data = path.read_bytes()

    def load(rng: random.Random) -> None:
        path.write_bytes(mutate(data, rng))
        _read(folder)

    assert _attack(60 * factor, 2, load)["refused"] > 10 * factor


@pytest.mark.parametrize("factor", FACTORS)
def test_index(tmp_path: Path, factor: int) -> None:
    """An index that says anything: never a file outside the folder."""
    subject = SUBJECTS[0]
    folder = write(tmp_path / "model", subject.tensors, subject.config)
    write(tmp_path / "outside", {"layers.0.fc.secret": torch.zeros(1)})
    original = _read(folder)
    path = folder / "model.safetensors.index.json"
    body = {"metadata": {"total_size": 3}, "weight_map": dict.fromkeys(subject.tensors, "model.safetensors")}

    def load(rng: random.Random) -> None:
        made = _mutate_json(body, rng)
        if rng.random() < 0.3 and isinstance(made, dict) and isinstance(made.get("weight_map"), dict):
            names = [
                "../outside/model.safetensors",
                str(tmp_path / "outside/model.safetensors"),
                "model.safetensors/.",
                "..",
            ]
            made["weight_map"]["layers.0.fc.secret"] = rng.choice(names)
        path.write_text(json.dumps(made))
        found = _read(folder)
        assert found.keys() == original.keys()
        assert all(np.array_equal(found[name], original[name]) for name in found)

    assert _attack(150 * factor, 3, load)["refused"] > 50 * factor


@pytest.mark.parametrize("factor", FACTORS)
def test_values(subject: Subject, tmp_path: Path, factor: int) -> None:
    """Tensors of the right dtype and shape that hold anything: extreme scales, group indexes, shapes."""
    original = subject.tensors

    def load(rng: random.Random) -> None:
        made = dict(original)
        for name in rng.sample(sorted(made), 2):
            tensor = made[name].contiguous()
            raw = torch.from_numpy(np.frombuffer(rng.randbytes(tensor.nbytes), np.uint8).copy())
            made[name] = raw.view(tensor.dtype).view(tensor.shape) if rng.random() < 0.7 else torch.zeros_like(tensor)
        _read(write(tmp_path, made, subject.config))

    counts = _attack(40 * factor, 4, load)
    assert counts["loaded"] > 0
