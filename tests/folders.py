"""Checkpoint folders for the tests of readers: written from tensors and a config, changed, and mutated at random."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import lowbit.formats
from lowbit import ArtifactError
from lowbit._safetensors import SafetensorsFile, plan_file, tensor_bytes
from lowbit.formats import LinearRecord
from test_fuzz_files import _mutate_header, _mutate_json

DATA = Path(__file__).parent / "data" / "checkpoints"

Found = dict[str, Any]


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file}


def write_folder(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    folder.mkdir(exist_ok=True)
    head, placed = plan_file({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata)
    ordered = sorted(placed, key=lambda name: (placed[name].begin, placed[name].end))
    body = b"".join(bytes(tensor_bytes(tensors[name].contiguous())) for name in ordered)
    (folder / "model.safetensors").write_bytes(head + body)
    (folder / "config.json").unlink(missing_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path, format: str | None = None) -> Found:
    return dict(lowbit.formats.read(folder, format))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The fp32 weight of every quantized layer."""
    return {name: one.weight.dequantize() for name, one in read(folder).items() if isinstance(one, LinearRecord)}


def attack(folder: Path, cases: int, seed: str, format: str | None = None) -> dict[str, int]:
    """Mutate header, tensors' bytes and config at random: the reader refuses, or gives finite scales in little memory."""
    path, config = folder / "model.safetensors", folder / "config.json"
    data, settings = path.read_bytes(), json.loads(config.read_bytes())
    counts = {"refused": 0, "read": 0}
    for case in range(cases):
        rng = random.Random(f"{seed}/{case}")
        kind = rng.randrange(3)
        made = _mutate_header(data, rng) if kind == 0 else _flip(data, rng) if kind == 1 else data
        path.write_bytes(made)
        config.write_text(json.dumps(_mutate_json(settings, rng)) if kind == 2 else json.dumps(settings))
        try:
            found = read(folder, format)
        except ArtifactError:
            counts["refused"] += 1
            continue
        except BaseException as error:
            error.args = (f"case {seed}/{case}: {error}",)
            raise
        counts["read"] += 1
        records = [one for one in found.values() if isinstance(one, LinearRecord)]
        assert all(torch.isfinite(record.weight.scales).all() for record in records)
        assert sum(record.weight.nbytes for record in records) < 16 * len(made)
    path.write_bytes(data)
    config.write_text(json.dumps(settings))
    return counts


def _flip(data: bytes, rng: random.Random) -> bytes:
    """A few bytes of the tensors changed, the header as it is."""
    made = bytearray(data)
    start = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 4, 40))):
        made[rng.randrange(start, len(made))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(made)


def changed(folder: Path, base: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with its tensors and config changed by a function."""
    tensors, config = load_tensors(base / "model.safetensors"), json.loads((base / "config.json").read_bytes())
    change(tensors, config)
    return write_folder(folder, tensors, config)


def codes_of(raw: bytes, bits: int, count: int) -> list[int]:
    """Values of a little-endian bit stream."""
    number = int.from_bytes(raw[: math.ceil(count * bits / 8)], "little")
    return [number >> (bits * i) & ((1 << bits) - 1) for i in range(count)]
