"""save_quantized and load_quantized: a model as an artifact on disk, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lowbit import _artifact
from lowbit._artifact import Item, Layer, Manifest
from lowbit._packed import CANONICAL, PackedModule
from lowbit._places import ExpertsParameter, embeds, experts_at, experts_parameters, features, replace_module
from lowbit._progress import progress_bar
from lowbit._safetensors import dtype_name
from lowbit.embedding import QuantizedEmbedding
from lowbit.errors import ArtifactError
from lowbit.experts import ExpertWeights, QuantizedExperts
from lowbit.integrations import announce
from lowbit.linear import QuantizedLinear
from lowbit.weight import QuantizedWeight

__all__ = ["load_quantized", "save_quantized"]

Model = TypeVar("Model", bound=nn.Module)

# What a quantized layer holds beside its weight.
_LAYER_TENSORS = ("bias", "input_scale", "input_zero", "input_pre_scale")


# -- saving ----------------------------------------------------------------------------------------------------------------


def save_quantized(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_bytes: int = _artifact.MAX_SHARD_BYTES,
    progress: bool | None = None,
) -> str:
    """Save a model with its quantized layers: safetensors shards and a manifest, `lowbit.json`.

    All parameters and buffers are stored, tied ones once. Equal models give equal bytes. Writing is atomic: killed at
    any moment, the folder holds the old artifact or the new one. Nothing but tensors and JSON is written.

    Args:
        model: usually after `quantize_`.
        directory: made if needed; an artifact in it is replaced, other files are left alone.
        max_shard_bytes: size above which tensors go to another file.
        progress: show a progress bar; by default on a terminal, when there is much to write.

    Returns:
        The SHA-256 that identifies the artifact.

    Raises:
        ValueError: a tensor is on the meta device or of a dtype that safetensors cannot hold, or a module keeps state
            that is not a tensor (get_extra_state).
        ArtifactError: another process is saving to the same folder.
        OSError: from the file system; the old artifact is untouched.

    Example:
        >>> lowbit.quantize_(model, "int4-g128")
        >>> lowbit.save_quantized(model, "model-int4")
        '5c5f0d…'
    """
    items, layers, aliases, layer_aliases = _collect(model)
    total = sum(item.nbytes for item in items)
    with progress_bar("saving", total, progress) as advance:
        return _artifact.write_artifact(
            directory,
            items,
            layers,
            aliases=aliases,
            layer_aliases=layer_aliases,
            max_shard_bytes=max_shard_bytes,
            advance=advance,
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """A module's own tensors, but for a packed weight: name, tensor, kind."""
    skip = {"weight"} if isinstance(module, PackedModule) else set()
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if name not in skip:
            yield name, parameter, "parameter"
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        yield name, buffer, "transient" if name in module._non_persistent_buffers_set else "buffer"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _collect(model: nn.Module) -> tuple[list[Item], dict[str, Layer], dict[str, str], dict[str, str]]:
    items: list[Item] = []
    layers: dict[str, Layer] = {}
    aliases: dict[str, str] = {}
    layer_aliases: dict[str, str] = {}
    first_layer: dict[int, str] = {}
    first_tensor: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{path or 'the model'}: {type(module).__name__} keeps state that is not a tensor")
        if isinstance(module, PackedModule):
            # By the weight: an output layer may share that of an embedding.
            if id(module.weight) in first_layer:
                layer_aliases[path] = first_layer[id(module.weight)]
            else:
                first_layer[id(module.weight)] = path
                items.append(_collect_layer(path, module, layers))
        for name, tensor, kind in _tensors(module):
            full = _join(path, name)
            if id(tensor) in first_tensor:
                aliases[full] = first_tensor[id(tensor)]
                continue
            if tensor.is_meta:
                raise ValueError(f"{full} is on the meta device and has no values to save")
            dtype_name(tensor.dtype)
            first_tensor[id(tensor)] = full
            items.append(_artifact.tensor_item(full, tensor, kind))
    return items, layers, aliases, layer_aliases


def _collect_layer(path: str, module: PackedModule, layers: dict[str, Layer]) -> Item:
    if not path:
        raise ValueError(
            f"the model is itself a {type(module).__name__}: save its quantized_weight() with QuantizedWeight.save, or put "
            "it into a module"
        )
    if module.weight.is_meta or module.layout == CANONICAL:
        raise ValueError(f"{path}: the quantized weight was never loaded")
    layer = Layer(module.scheme, module._shape, module.has_perm)
    layers[path] = layer
    return _artifact.layer_item(path, layer, module._canonical_weight)


# -- loading ---------------------------------------------------------------------------------------------------------------


def load_quantized(
    model_or_factory: Model | Callable[[], Model],
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Model:
    """Load an artifact into a model; verify everything first.

    Args:
        model_or_factory: a model with the module names of the saved one, quantized or not, possibly on the meta
            device; or a function that makes one, which is called on the meta device so that nothing is allocated
            twice.
        directory: what `save_quantized` wrote.
        device: where tensors go; by default where the model's are (from the meta device: to the CPU).
        progress: show a progress bar; by default on a terminal, when there is much to read.

    Returns:
        The model: the one given, changed in place, or the one made.

    Raises:
        ArtifactError: a file is missing, truncated, renamed, extra or altered, or does not fit the model. The message
            names the file or tensor, and the model is untouched.
        FormatError: a file is not what it should be.

    Example:
        >>> model = lowbit.load_quantized(lambda: Encoder(config), "encoder-int4")
    """
    manifest = _artifact.read_manifest(directory)
    model = _make_model(model_or_factory, manifest)
    stored, groups = manifest.layers, _expert_groups(model, manifest)
    manifest = _join_experts(manifest, groups)
    replaced = _fit_layers(model, manifest)
    targets = _fit_tensors(model, manifest, replaced)
    with progress_bar("loading", sum(size for size, _ in manifest.files.values()), progress) as advance:
        tensors = _artifact.read_tensors(manifest, advance)
    wanted = None if device is None else torch.device(device)
    for path, parts in groups.items():
        joined = _joined_tensors(manifest, path, parts, stored, tensors)
        tensors.update({f"{path}.weight_{name}": tensor for name, tensor in joined.tensors().items()})
    layers = {path: _make_layer(model, path, manifest, tensors, wanted) for path in manifest.layers}
    twins = _make_twins(model, replaced, layers)
    values = _make_values(model, targets, tensors, wanted)
    # Nothing below can fail.
    for path, target in replaced.items():
        replace_module(model, path, twins.get(path) or layers[target])
    for path, name, source in targets:
        module, value = model.get_submodule(path), values[source]
        if isinstance(value, nn.Parameter):
            module._parameters[name] = value
        else:
            module._buffers[name] = value
    announce(model)
    return model


def _make_model(model_or_factory: Model | Callable[[], Model], manifest: Manifest) -> Model:
    if isinstance(model_or_factory, nn.Module):
        return cast(Model, model_or_factory)
    with torch.device("meta"):
        model = model_or_factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory must return an nn.Module, got {type(model).__name__}")
    if _lacks_transients(model, manifest):
        # An artifact made from a checkpoint, which leaves out what a module computes when it is made (rotary tables).
        with _parameters_on_meta():
            model = model_or_factory()
    return model


def _lacks_transients(model: nn.Module, manifest: Manifest) -> bool:
    """Whether a non-persistent buffer is on the meta device and nothing is stored for it."""
    return any(
        kind == "transient" and tensor.is_meta and _resolve(manifest, _join(path, name)) is None
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor, kind in _tensors(module)
    )


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made in here compute their buffers, but hold no parameters longer than it takes to make one."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is: a tied one stays tied
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # annotated as returning None
    try:
        yield
    finally:
        hook.remove()


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _expert_groups(model: nn.Module, manifest: Manifest) -> dict[str, list[list[str]]]:
    """Layers of single experts that the model keeps in one Parameter, as `lowbit quantize` of a checkpoint leaves them."""
    from lowbit.formats._experts import known_groups  # imports this module

    places = experts_parameters(model).keys() | {
        path for path, module in model.named_modules() if isinstance(module, QuantizedExperts)
    }
    return known_groups(manifest.layers, lambda path: path in places and path not in manifest.layers)


def _join_experts(manifest: Manifest, groups: Mapping[str, list[list[str]]]) -> Manifest:
    """The manifest with such layers as one; ArtifactError where they differ."""
    layers = dict(manifest.layers)
    for path, parts in groups.items():
        members = [[layers.pop(name) for name in part] for part in parts]
        first, rows = members[0][0], 0
        for part in members:
            for one in part:
                alike = one.scheme.same_storage(first.scheme) and one.has_perm == first.has_perm
                if len(one.shape) != 2 or not alike or one.shape != (part[0].shape[0], first.shape[1]):
                    raise ArtifactError(
                        f"{manifest.directory}: {path!r}: its experts are {first.scheme} {list(first.shape)} and "
                        f"{one.scheme} {list(one.shape)}, and the model keeps them in one weight"
                    )
            rows += part[0].shape[0]
        layers[path] = Layer(first.scheme, (len(parts[0]), rows, first.shape[1]), first.has_perm)
    return dataclasses.replace(manifest, layers=layers)


def _joined_tensors(
    manifest: Manifest, path: str, parts: list[list[str]], stored: Mapping[str, Layer], tensors: dict[str, Tensor]
) -> ExpertWeights:
    """The weights of experts, whose tensors are taken out of `tensors`."""

    def one(name: str) -> QuantizedWeight:
        layer, start = stored[name], len(f"{name}.weight_")
        found = {full[start:]: tensors.pop(full) for full in layer.specs(name)}
        return QuantizedWeight.from_tensors(found, layer.scheme, layer.shape)

    try:
        return ExpertWeights.stack(
            (QuantizedWeight.cat([one(name) for name in expert]) for expert in zip(*parts, strict=True)), len(parts[0])
        )
    except ValueError as error:
        raise ArtifactError(f"{manifest.directory}: {path!r}: {error}") from None


def _fit_layers(model: nn.Module, manifest: Manifest) -> dict[str, str]:
    """Path in the model -> layer of the manifest that goes there; ArtifactError where it cannot."""
    where = manifest.directory / _artifact.MANIFEST
    wanted = {path: path for path in manifest.layers} | dict(manifest.layer_aliases)
    modules: dict[str, nn.Module | ExpertsParameter] = dict(model.named_modules(remove_duplicate=False))
    modules |= experts_parameters(model)
    if missing := wanted.keys() - modules.keys():
        raise ArtifactError(f"{where}: the model has no layer called {_some(missing)}")
    if extra := {p for p, m in modules.items() if isinstance(m, PackedModule)} - wanted.keys():
        raise ArtifactError(f"{where}: the model's quantized layers {_some(extra)} are not in the artifact")
    for path, source in wanted.items():
        module, layer = modules[path], manifest.layers[source]
        shape = _shape(module)
        if not path or shape is None:
            raise ArtifactError(f"{where}: layer {path!r} is quantized, the model has a {type(module).__name__} there")
        if shape != layer.shape:
            raise ArtifactError(f"{where}: layer {path!r} is {features(layer.shape)}, the model's is {features(shape)}")
    return wanted


def _shape(module: nn.Module | ExpertsParameter) -> tuple[int, ...] | None:
    """The shape of the weight that a quantized layer would stand in for, or None."""
    if isinstance(module, ExpertsParameter):
        return module.shape
    if isinstance(module, nn.Linear | QuantizedLinear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return (module.num_embeddings, module.embedding_dim) if embeds(module) else None
    return module._shape if isinstance(module, PackedModule) else None


def _resolve(manifest: Manifest, name: str) -> str | None:
    """The stored tensor behind a name: itself, the one it is an alias of, or None."""
    return name if name in manifest.tensors else manifest.aliases.get(name)


def _fit_tensors(model: nn.Module, manifest: Manifest, replaced: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(module path, name, stored tensor) for everything outside quantized layers; ArtifactError where it cannot be."""
    where = manifest.directory / _artifact.MANIFEST
    in_layers = {_join(path, name) for path in replaced for name in _LAYER_TENSORS}
    plain = {name for name, entry in manifest.tensors.items() if entry[3] != "quantized"} | manifest.aliases.keys()
    stored = {name: str(_resolve(manifest, name)) for name in plain - in_layers}
    entries = []
    by_tensor: dict[int, str] = {}  # a tensor of the model -> what is stored for it, under any of its names
    for path, module in model.named_modules(remove_duplicate=False):
        if path in replaced:
            if not isinstance(module, nn.Linear | QuantizedLinear):
                continue
            if (_resolve(manifest, _join(replaced[path], "bias")) is None) != (module.bias is None):
                raise ArtifactError(f"{where}: layer {path!r} is stored {'with' if module.bias is None else 'without'} a "
                                    "bias, unlike the model's")  # fmt: skip
            continue
        for name, tensor, kind in _tensors(module):
            if _join(path, name) in replaced:
                continue
            entries.append((path, name, tensor, kind))
            if (source := stored.get(_join(path, name))) is not None:
                by_tensor.setdefault(id(tensor), source)
    found: list[tuple[str, str, str]] = []
    missing: set[str] = set()
    for path, name, tensor, kind in entries:
        full = _join(path, name)
        source = stored.pop(full, None) or by_tensor.get(id(tensor))
        if kind == "transient" and not tensor.is_meta:
            continue  # the model has computed it
        if source is None:
            missing.add(full)
            continue
        _, _, shape, stored_kind = manifest.tensors[source]
        if tuple(tensor.shape) != shape:
            raise ArtifactError(f"{where}: {full} is {list(shape)}, the model's is {list(tensor.shape)}")
        if stored_kind != "tensor" and (kind == "parameter") != (stored_kind == "parameter"):
            raise ArtifactError(f"{where}: {full} is stored as a {stored_kind}, the model's is a {kind}")
        found.append((path, name, source))
    if missing:
        raise ArtifactError(f"{where}: nothing is stored for the model's {_some(missing)}")
    if extra := {name for name, source in stored.items() if manifest.tensors[source][3] != "transient"}:
        raise ArtifactError(f"{where}: the model has no {_some(extra)}")
    return found


def _device(tensor: Tensor, device: torch.device | None) -> torch.device:
    if device is not None:
        return device
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _make_layer(
    model: nn.Module, path: str, manifest: Manifest, tensors: dict[str, Tensor], device: torch.device | None
) -> PackedModule:
    layer = manifest.layers[path]
    old = experts_at(model, path) or model.get_submodule(path)
    weight = old.parameter if isinstance(old, ExpertsParameter) else old.weight
    assert isinstance(weight, Tensor)
    device = _device(weight, device)
    prefix = _join(path, "weight_")
    # Popped, so that canonical tensors are freed as layers are packed.
    parts = {name[len(prefix) :]: tensors.pop(name) for name in layer.specs(path)}
    sources = {name: _resolve(manifest, _join(path, name)) for name in _LAYER_TENSORS}
    rest = {name: tensors[source].to(device) for name, source in sources.items() if source is not None}
    invariant = isinstance(old, PackedModule) and bool(old.flags)
    made: PackedModule
    try:
        if len(layer.shape) == 3:
            experts = ExpertWeights.from_tensors(parts, layer.scheme, layer.shape).to(device)
            made = QuantizedExperts.from_weight(experts, batch_invariant=invariant)
        else:
            linear = QuantizedWeight.from_tensors(parts, layer.scheme, layer.shape).to(device)
            if isinstance(old, nn.Embedding | QuantizedEmbedding):
                dtype = old.weight.dtype if isinstance(old, nn.Embedding) else old.dtype
                made = QuantizedEmbedding.from_weight(linear, dtype=dtype, padding_idx=old.padding_idx)
            else:
                made = QuantizedLinear.from_weight(linear, batch_invariant=invariant, **rest)
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"{manifest.directory}: layer {path!r}: {error}") from None
    return made.train((old.owner if isinstance(old, ExpertsParameter) else old).training)


def _make_twins(
    model: nn.Module, replaced: Mapping[str, str], layers: Mapping[str, PackedModule]
) -> dict[str, PackedModule]:
    """Output layers that share the weight of an embedding, where the model has one of each."""
    twins: dict[str, PackedModule] = {}
    for path, target in replaced.items():
        made = layers[target]
        old = None if path == target else model.get_submodule(path)
        if isinstance(made, QuantizedEmbedding) and isinstance(old, nn.Linear | QuantizedLinear):
            twins[path] = made.output_layer(old)
    return twins


def _make_values(
    model: nn.Module,
    targets: list[tuple[str, str, str]],
    tensors: Mapping[str, Tensor],
    device: torch.device | None,
) -> dict[str, Tensor]:
    """The Parameter or buffer for each stored tensor that the model takes; tied names share one."""
    values: dict[str, Tensor] = {}
    for path, name, source in targets:
        old = getattr(model.get_submodule(path), name)
        if source in values:
            continue
        value = tensors[source].to(_device(old, device))
        if isinstance(old, nn.Parameter):
            trainable = old.requires_grad and (value.is_floating_point() or value.is_complex())
            value = nn.Parameter(value, requires_grad=trainable)
        values[source] = value
    return values
