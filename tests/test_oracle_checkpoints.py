"""The libraries whose checkpoints are read, run again: what is committed in data/checkpoints is what they write and decode.

Needs what data/checkpoints/make.py needs; skipped without. pytest -m oracle tests/test_oracle_checkpoints.py
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints import DATA, Layer, ct_config, named, records, write

pytestmark = pytest.mark.oracle
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoints", DATA / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _need(*packages: str, folder: str | None = None) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if folder is not None and folder not in os.environ:
        pytest.skip(f"{folder} is not set")


@pytest.mark.parametrize(
    ("cases", "package", "folder"),
    [
        ("gptq_cases", "auto_gptq", None),
        ("awq_cases", "awq", None),
        ("ct_cases", "compressed_tensors", "CT_OLD"),
        ("modelopt_cases", None, "MODELOPT"),
    ],
)
def test_packed_again(make: ModuleType, cases: str, package: str | None, folder: str | None) -> None:
    _need(*([package] if package else []), folder=folder)
    committed = load_file(DATA / "peers.safetensors")
    for name, tensor in getattr(make, cases)().items():
        assert torch.equal(tensor, committed[name]), name


@pytest.mark.parametrize(
    ("family", "package"),
    [("gptq", "auto_gptq"), ("awq", "awq"), ("ct", "compressed_tensors"), ("fp8", "transformers")],
)
def test_decoded_again(make: ModuleType, family: str, package: str) -> None:
    _need(package)
    committed = make.json.loads((DATA / "decoded.json").read_text())
    for name in (name for name in committed if name.partition("-")[0] == family):
        config = make.json.loads((DATA / name / "config.json").read_text())
        tensors = load_file(DATA / name / "model.safetensors")
        for layer, about in committed[name].items():
            parts = {k[len(layer) + 1 :]: v for k, v in tensors.items() if k.startswith(layer + ".")}
            assert make.sha256(make.DECODERS[family](name, parts, config)) == about["sha256"], layer


SCHEMES: list[dict[str, Any]] = [
    {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    for bits in (2, 3, 4, 5, 6, 8)
    for strategy in ("group", "channel")
    for symmetric in (True, False)
]


@pytest.mark.parametrize("weights", SCHEMES, ids=lambda w: "-".join(map(str, w.values())))
@pytest.mark.parametrize("shape", [(32, 128), (17, 72)])
def test_compressed_tensors_packs_and_decodes(tmp_path: Path, weights: dict[str, Any], shape: tuple[int, int]) -> None:
    """Its compressor writes a layer, its decompressor and lowbit read it: the same bits in bf16."""
    quantization = importlib.import_module("compressed_tensors.quantization")
    compressors = importlib.import_module("compressed_tensors.compressors")
    group = 8 if weights["strategy"] == "group" else None
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights={**weights, "group_size": group})
    bits, (N, K) = weights["num_bits"], shape
    G = K // 8 if group else 1
    rng = np.random.default_rng(bits)
    half = 1 << (bits - 1)
    zeros = torch.zeros(N, G, dtype=torch.int8)
    if not weights["symmetric"]:
        zeros = torch.from_numpy(rng.integers(-half, half, (N, G)).astype(np.int8))
    state = {"weight": torch.randn(N, K).bfloat16(), "weight_scale": (torch.rand(N, G) + 0.1).bfloat16()}
    peer = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    packed = peer.compress({**state, "weight_zero_point": zeros}, scheme)
    decoded = peer.decompress(packed, scheme)["weight"]
    config = ct_config(Layer(bits, group_size=8 if group else -1, symmetric=weights["symmetric"]))
    (record,) = records(write(tmp_path, named("fc", packed), config)).values()
    assert torch.equal(record.weight.dequantize(torch.bfloat16), decoded)
