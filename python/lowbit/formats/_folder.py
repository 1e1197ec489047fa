"""Writing a folder of safetensors files with a config.json, tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit import _artifact, _safetensors
from lowbit._artifact import Item
from lowbit.formats._bits import permute_codes
from lowbit.formats._record import LinearRecord, PlannedTensor
from lowbit.formats._source import natural
from lowbit.formats._writer import Contents, FolderWriter, PlannedLayer, WriteOptions
from lowbit.weight import QuantizedWeight

__all__ = ["encoded_specs", "in_order", "plain_item", "unquantized_linears", "words", "write_folder", "write_json"]

_METADATA: Final = {"format": "pt"}  # Transformers refuses a file without it


def write_folder(how: FolderWriter, contents: Contents, folder: Path, options: WriteOptions) -> None:
    """Shards, index, config.json and what else the format asks for."""
    items = _items(how, contents, options)
    groups = list(_artifact._shards(items, options.max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups):
        file = "model.safetensors"
        if len(groups) > 1:
            file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        _write_shard(folder / file, group)
        weight_map |= {name: file for item in group for name in item.specs}
    if len(groups) > 1:
        total = sum(item.nbytes for item in items)
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    write_json(folder / "config.json", {**contents.config, "quantization_config": how.config(contents)})
    for name, content in how.more(contents).items():
        write_json(folder / name, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file, on disk when this returns."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_shard(path: Path, group: Sequence[Item]) -> None:
    specs = {name: spec for item in group for name, spec in item.specs.items()}
    head, placed = _safetensors.plan_file(specs, _METADATA)
    with open(path, "xb", buffering=0) as file:
        _artifact._write_at(file.fileno(), memoryview(head), 0)
        for item in group:
            for name, tensor in item.produce().items():
                made = tensor.detach().cpu().contiguous()
                if (made.dtype, tuple(made.shape)) != item.specs[name]:
                    raise ValueError(f"{name} was announced as {item.specs[name]}, got {made.dtype} {list(made.shape)}")
                at = len(head) + placed[name].begin
                _artifact._write_at(file.fileno(), _safetensors.tensor_bytes(made), at)
        os.fsync(file.fileno())


def _items(how: FolderWriter, contents: Contents, options: WriteOptions) -> list[Item]:
    """In the natural order of names, so that a shard holds layers that belong together."""
    items = [plain_item(name, tensor, options) for name, tensor in contents.tensors.items()]
    items += [_layer_item(how, name, layer, options) for name, layer in contents.layers.items()]
    return sorted(items, key=lambda item: natural(next(iter(item.specs))))


def plain_item(name: str, planned: PlannedTensor, options: WriteOptions) -> Item:
    """A tensor that is written as it is."""

    def produce() -> dict[str, Tensor]:
        tensor = planned.read()
        options.advance(name, tensor.nbytes)
        return {name: tensor}

    return Item({name: (planned.dtype, planned.shape)}, produce, "tensor")


def encoded_specs(how: FolderWriter, layer: PlannedLayer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a layer: what encoding gives for tensors without values."""
    record = layer.spec.tensors()
    adapted = LinearRecord(how.adapt(record.weight), record.bias, record.input_scale, record.input_zero)
    return {leaf: (tensor.dtype, tuple(tensor.shape)) for leaf, tensor in how.encode(adapted).items()}


def _layer_item(how: FolderWriter, name: str, layer: PlannedLayer, options: WriteOptions) -> Item:
    specs = {f"{name}.{leaf}": spec for leaf, spec in encoded_specs(how, layer).items()}

    def produce() -> dict[str, Tensor]:
        try:
            record, reference = layer.read()
            weight = how.adapt(record.weight)
            made = how.encode(LinearRecord(weight, record.bias, record.input_scale, record.input_zero))
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{name}: {error}") from None
        nbytes = sum(tensor.nbytes for leaf, tensor in made.items() if leaf != "bias")
        options.written(name, weight, reference, nbytes)
        options.advance(name, layer.nbytes)
        return {f"{name}.{leaf}": tensor for leaf, tensor in made.items()}

    return Item(specs, produce, "quantized")


# -- what formats share ------------------------------------------------------------------------------------------------------


def in_order(weight: QuantizedWeight) -> Tensor:
    """packed uint8 [N, ceil(K*b/8)] with the columns where they are in W, whatever the permutation."""
    if weight.perm is None:
        return weight.packed
    return permute_codes(weight.packed, weight.scheme.bits, torch.argsort(weight.perm.long()))


def words(rows: Tensor) -> Tensor:
    """Rows of bytes [R, B] as rows of 32-bit words [R, ceil(B/4)], filled up with 0."""
    count, size = rows.shape
    padded = rows.new_zeros(count, -(-size // 4) * 4)  # memory of its own: no stride is in the way of another dtype
    padded[:, :size] = rows
    return padded.view(torch.int32)


def unquantized_linears(contents: Contents) -> list[str]:
    """Modules with a 2-D weight that stays as it is: linear layers, and embeddings, of which nothing says that they are none.

    The output layer is among them also where it has no tensor of its own, being tied to the embedding.
    """
    found = [
        name.removesuffix(".weight")
        for name, tensor in contents.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    ]
    if "lm_head" not in found and "lm_head" not in contents.layers:
        found.append("lm_head")
    return found
