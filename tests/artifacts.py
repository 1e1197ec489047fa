"""Small models and artifacts shared by the tests of saving and loading."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowbit


class Tiny(nn.Module):
    """Every kind of tensor an artifact can hold: quantized, dense, tied, buffers of both kinds, a layer at two paths."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.first = nn.Linear(width, 24)
        self.second = nn.Linear(24, width, bias=False)
        self.again = self.first
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.linspace(0, 1, width), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.table
        return self.head(self.norm(self.second(torch.relu(self.first(x) + self.again(x)))))


def quantized_tiny(scheme: str = "int4-g8", seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    model = Tiny().eval()
    lowbit.quantize_(model, scheme, overrides={"second": "int8-asym"})
    return model


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """state_dict and the buffers it leaves out."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same tensors, to the last bit (NaN equal to itself)."""
    left, right = tensors_of(a), tensors_of(b)
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and _bytes(left[n]) == _bytes(right[n]) for n in left
    )


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def seal(body: dict[str, Any]) -> bytes:
    """A manifest with the checksum it would have, had lowbit written it."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make its checksum right again, as an attacker would."""
    path = directory / "lowbit.json"
    body = json.loads(path.read_bytes())
    change(body)
    path.write_bytes(seal(body))


def replace_shard(directory: Path, data: bytes) -> None:
    """Put other bytes in place of the only shard, and correct the manifest's name, size and hash of it."""
    (old,) = directory.glob("*.safetensors")
    old.unlink()
    digest = hashlib.sha256(data).hexdigest()
    name = f"lowbit-{digest[:16]}.safetensors"
    (directory / name).write_bytes(data)

    def change(body: dict[str, Any]) -> None:
        body["files"] = {name: {"size": len(data), "sha256": digest}}
        for entry in body["tensors"].values():
            entry["file"] = name

    edit_manifest(directory, change)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {name: (directory / name).read_bytes() for name in os.listdir(directory)}
