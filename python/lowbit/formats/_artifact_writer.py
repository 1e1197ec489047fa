"""Writing lowbit's own artifacts: every scheme, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from torch import Tensor

from lowbit import _artifact
from lowbit._artifact import Item, Layer
from lowbit.formats._folder import plain_item, write_json
from lowbit.formats._writer import Contents, LayerSpec, PlannedLayer, WriteOptions, Writer
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["WRITER"]


def _target(spec: LayerSpec) -> Scheme:
    return spec.scheme


def _layer_items(name: str, layer: PlannedLayer, options: WriteOptions) -> list[Item]:
    spec = layer.spec
    kept: dict[str, Tensor] = {}  # what stands beside the weight is written right after it

    def produce() -> QuantizedWeight:
        record, reference = layer.read()
        for leaf in ("bias", *spec.inputs):
            if (value := getattr(record, leaf)) is not None:
                kept[leaf] = value
        options.written(name, record.weight, reference, record.weight.nbytes)
        options.advance(name, layer.nbytes)
        return record.weight

    def beside(leaf: str) -> Callable[[], dict[str, Tensor]]:
        return lambda: {f"{name}.{leaf}": kept.pop(leaf)}

    items = [_artifact.layer_item(name, Layer(spec.scheme, spec.shape, spec.has_perm), produce)]
    specs = layer.spec.beside()
    items += [Item({f"{name}.{leaf}": spec}, beside(leaf), "tensor") for leaf, spec in specs.items()]
    return items


def _check(contents: Contents) -> None:
    if not contents.layers:
        raise ValueError("there is no quantized layer to write")


def _write(contents: Contents, folder: Path, options: WriteOptions) -> None:
    items = [plain_item(name, tensor, options) for name, tensor in contents.tensors.items()]
    layers = {}
    for name, layer in contents.layers.items():
        items += _layer_items(name, layer, options)
        layers[name] = Layer(layer.spec.scheme, layer.spec.shape, layer.spec.has_perm)
    if contents.config:
        write_json(folder / "config.json", contents.config)
    _artifact.write_artifact(
        folder,
        items,
        layers,
        aliases=contents.aliases,
        layer_aliases=contents.layer_aliases,
        max_shard_bytes=options.max_shard_bytes,
    )


WRITER: Final = Writer(
    "artifact",
    "a folder of lowbit's own, for load_quantized: every scheme",
    False,
    None,
    frozenset({"embeddings"}),
    _target,
    _check,
    _write,
)
