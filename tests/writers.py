"""Models to write, in memory, and a way to write them: for the tests of the writers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints import Layer
from lowbit import QuantizedWeight, Scheme, formats
from lowbit.formats import LinearRecord
from lowbit.formats._bits import pack_codes
from lowbit.formats._record import PlannedTensor
from lowbit.formats._writer import Contents, LayerSpec, PlannedLayer, WriteOptions
from lowbit.formats._writers import writer

NAME = "model.layers.0.self_attn.o_proj"  # a layer whose rows GGUF leaves where they are

#: config.json of a Llama with one layer.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 320,
    "tie_word_embeddings": False,
}


def canonical(layer: Layer) -> QuantizedWeight:
    """The weight that a random layer of tests/checkpoints.py stands for."""
    packed = pack_codes(torch.from_numpy(layer.codes).to(torch.uint8), layer.bits)
    tensors: dict[str, Tensor] = {"packed": packed, "scales": layer.scales}
    if not layer.symmetric:
        tensors["zeros"] = torch.from_numpy(layer.zeros).to(torch.uint8)
    if layer.order:
        perm = torch.sort(torch.from_numpy(layer.g_idx), stable=True).indices
        tensors["packed"] = pack_codes(torch.from_numpy(layer.codes).to(torch.uint8)[:, perm], layer.bits)
        tensors["perm"] = perm.int()
    dtype = str(layer.scale).removeprefix("torch.")
    zeros = "none" if layer.symmetric else "int"
    scheme = Scheme(f"int{layer.bits}", layer.group_size, zeros, dtype)
    return QuantizedWeight.from_tensors(tensors, scheme, (layer.N, layer.K))


def contents(
    layers: Mapping[str, QuantizedWeight | LinearRecord],
    tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] = CONFIG,
) -> Contents:
    """What a writer is given."""
    records = {n: r if isinstance(r, LinearRecord) else LinearRecord(r) for n, r in layers.items()}
    planned = {
        name: PlannedLayer(LayerSpec.of(r), str(r.weight.scheme), r.weight.nbytes, lambda r=r: (r, r.weight))
        for name, r in records.items()
    }
    plain = {n: PlannedTensor(t.dtype, tuple(t.shape), lambda t=t: t) for n, t in (tensors or {}).items()}
    return Contents("memory", planned, plain, dict(config))


def write(to: str, made: Contents, path: Path, max_shard_bytes: int = 1 << 40) -> dict[str, QuantizedWeight]:
    """Write it; the weight that the writer says it has stored, by layer. Refuses as convert_checkpoint does."""
    row = writer(to)
    for layer in made.layers.values():
        row.target(layer.spec)
    row.check(made)
    stored: dict[str, QuantizedWeight] = {}

    def written(name: str, weight: QuantizedWeight, reference: object, nbytes: int) -> None:
        assert nbytes > 0 and str(weight.scheme) == str(row.target(made.layers[name].spec))
        stored[name] = weight

    if not row.is_file:
        path.mkdir()
    row.write(made, path, WriteOptions(max_shard_bytes, lambda *_: None, written, lambda _: None))
    return stored


def read(path: Path) -> dict[str, LinearRecord]:
    """The quantized layers of what was written, by our own reader."""
    return {name: one for name, one in formats.read(path) if isinstance(one, LinearRecord)}


def round_trip(to: str, weight: QuantizedWeight | LinearRecord, path: Path) -> tuple[QuantizedWeight, QuantizedWeight]:
    """What a writer says that it stored of one layer, and what the reader finds."""
    (stored,) = write(to, contents({NAME: weight}), path).values()
    (found,) = read(path).values()
    return stored, found.weight
