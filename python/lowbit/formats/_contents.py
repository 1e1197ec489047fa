"""What is converted or compared: any checkpoint, artifact or dense model as layers and tensors by name, nothing read yet."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from lowbit import _artifact, _safetensors, convert
from lowbit._progress import Advance
from lowbit._safetensors import SafetensorsFile
from lowbit.commands._plan import Override, make_plan
from lowbit.errors import ArtifactError
from lowbit.experts import ExpertWeights
from lowbit.formats._experts import ExpertRows, expert_rows, take_apart
from lowbit.formats._record import LinearRecord, Plan, PlannedTensor
from lowbit.formats._registry import FORMATS, _container, open_plan
from lowbit.formats._settings import quantization_settings
from lowbit.formats._source import Source, natural, open_source, read_json
from lowbit.formats._writer import Contents, LayerSpec, PlannedLayer
from lowbit.importance import check_columns
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["Choice", "open_artifact", "open_contents", "open_dense", "source_kind"]

#: What a config says of how the source is quantized, and what is therefore not part of the model's own config.
_QUANTIZATION_KEYS: Final = ("quantization_config", "compression_config", "quantization")
_INPUTS: Final = ("bias", "input_scale", "input_zero", "input_pre_scale")


@dataclasses.dataclass(frozen=True)
class Choice:
    """How weights are to be quantized: as `lowbit quantize` has it.

    Args:
        scheme: for every layer that no override names; None leaves quantized layers as they are.
        overrides: the first pattern that matches a layer's name decides; None leaves the layer alone.
        importance: layer -> [K], the weight of each column's squared error.
        scale_dtype: of scales where the format that is written has only one, so that codes are found for those scales.
    """

    scheme: Scheme | None = None
    overrides: Sequence[Override] = ()
    importance: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    scale_dtype: str | None = None

    def stored(self, scheme: Scheme) -> Scheme:
        """The scheme with the scales that will be written."""
        return scheme if self.scale_dtype is None else dataclasses.replace(scheme, scale_dtype=self.scale_dtype)


def source_kind(path: Path) -> str:
    """ "artifact", "checkpoint" (quantized by another library, GGUF included) or "dense"."""
    if (path / _artifact.MANIFEST).exists():
        return "artifact"
    if path.is_file() and _container(path) is not None:
        return "checkpoint"
    with open_source(path) as source:
        return "checkpoint" if quantization_settings(source) or any(f.by_tensors(source) for f in FORMATS) else "dense"


@contextlib.contextmanager
def open_contents(path: Path, choice: Choice, advance: Advance, *, verify: bool = True) -> Iterator[Contents]:
    """The contents of a source, usable inside the context.

    A checkpoint is read once here, layer by layer, because only its values say whether zeros may be left out and whether
    scales are finite; an artifact's hashes are checked.

    Args:
        path: an artifact, a checkpoint that another library quantized, or a folder of dense safetensors files.
        choice: how a dense model is quantized, or a quantized one is quantized again.
        advance: told of the bytes read.
        verify: check the hashes of an artifact.

    Raises:
        ArtifactError: the source cannot be read, or is dense and `choice` has no scheme.
    """
    kind = source_kind(path)
    with contextlib.ExitStack() as stack:
        if kind == "dense":
            source = stack.enter_context(open_source(path))
            if choice.scheme is None:
                raise ArtifactError(f"{path}: the model is not quantized: say how with a scheme, such as int4-g128")
            yield _dense(source, choice)
            return
        if kind == "artifact":
            contents = stack.enter_context(_artifact_contents(path, advance, verify))
        else:
            plan, _ = stack.enter_context(open_plan(path))
            contents = _survey(plan, path, advance)
        yield contents if choice.scheme is None else _requantized(contents, choice)


@contextlib.contextmanager
def open_dense(path: Path) -> Iterator[Contents]:
    """The contents of a dense model: no layers, only tensors."""
    with open_source(path) as source:
        tensors = {name: PlannedTensor(i.dtype, i.shape, _reader(source, name)) for name, i in source.tensors.items()}
        yield Contents(str(path), {}, tensors, own_config(source.config), source.root)


def own_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what says how weights are quantized."""
    return {key: value for key, value in config.items() if key not in _QUANTIZATION_KEYS}


def _reader(source: Source, name: str) -> Callable[[], Tensor]:
    return lambda: source.read(name)


# -- checkpoints of other libraries ----------------------------------------------------------------------------------------


def _survey(plan: Plan, path: Path, advance: Advance) -> Contents:
    plan, layers = take_apart(plan), {}
    for name, planned in plan.layers.items():
        record = plan.read(name)
        assert isinstance(record, LinearRecord)
        read = functools.partial(_read_again, plan, name)
        layers[name] = PlannedLayer(LayerSpec.of(record), str(record.weight.scheme), planned.nbytes, read)
        advance(name, planned.nbytes)
    root = path if path.is_dir() else path.parent
    config = own_config(read_json(root / "config.json")) if path.suffix != ".gguf" else {}
    metadata = getattr(plan, "metadata", {})
    gguf = path if metadata else None
    return Contents(plan.where, layers, plan.tensors, config, root if config else None, gguf=gguf, metadata=metadata)


def _read_again(plan: Plan, name: str) -> tuple[LinearRecord, QuantizedWeight]:
    record = plan.read(name)
    assert isinstance(record, LinearRecord)
    return record, record.weight


# -- artifacts -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_artifact(path: Path) -> Iterator[Contents]:
    """The contents of an artifact whose hashes are not checked."""
    with _artifact_contents(path, lambda *_: None, False) as contents:
        yield contents


@contextlib.contextmanager
def _artifact_contents(root: Path, advance: Advance, verify: bool) -> Iterator[Contents]:
    manifest = _artifact.read_manifest(root)
    _artifact.check_files(manifest)
    with contextlib.ExitStack() as stack:
        files = {}
        for shard in manifest.files:
            if verify:
                _artifact.verify_file(manifest, shard, advance)
            files[shard] = stack.enter_context(SafetensorsFile(root / shard))

        def read(name: str) -> Tensor:
            return files[manifest.tensors[name][0]].read(name)

        @functools.lru_cache(maxsize=3)  # of one module: layers are read in the order of their names
        def experts(name: str) -> ExpertWeights:
            layer = manifest.layers[name]
            parts = {full.rpartition("weight_")[2]: read(full) for full in layer.specs(name)}
            return ExpertWeights.from_tensors(parts, layer.scheme, layer.shape)

        layers: dict[str, PlannedLayer] = {}
        for name, layer in manifest.layers.items():
            if len(layer.shape) == 3:
                layers |= _artifact_experts(manifest, name, experts)
            else:
                layers[name] = _artifact_layer(manifest, name, read)
        beside = {f"{name}.{leaf}" for name in layers for leaf in _INPUTS}
        tensors = {
            name: PlannedTensor(_safetensors._DTYPES[dtype], shape, functools.partial(read, name))
            for name, (_, dtype, shape, kind) in manifest.tensors.items()
            # Transient ones are computed when a model is made.
            if kind not in ("quantized", "transient") and name not in beside
        }
        config = own_config(read_json(root / "config.json"))
        has_root = root if (root / "config.json").exists() else None
        yield Contents(str(root), layers, tensors, config, has_root, manifest.aliases, manifest.layer_aliases)


def _artifact_experts(
    manifest: _artifact.Manifest, name: str, experts: Callable[[str], ExpertWeights]
) -> dict[str, PlannedLayer]:
    """A layer for each expert."""
    layer = manifest.layers[name]
    try:
        parts = expert_rows(name, layer.shape, manifest.tensors)
    except ValueError as error:
        raise ArtifactError(f"{manifest.directory}: {name}: {error}") from None
    nbytes = sum(_safetensors.TensorInfo(*want).nbytes for want in layer.specs(name).values()) // len(parts)

    def read(part: ExpertRows) -> tuple[LinearRecord, QuantizedWeight]:
        weight = part.of(experts(name))
        return LinearRecord(weight), weight

    def planned(part: ExpertRows) -> PlannedLayer:
        spec = LayerSpec(layer.scheme, (part.end - part.begin, layer.shape[-1]), layer.has_perm)
        return PlannedLayer(spec, str(layer.scheme), nbytes, functools.partial(read, part))

    return {part.name: planned(part) for part in sorted(parts, key=lambda part: natural(part.name))}


def _artifact_layer(manifest: _artifact.Manifest, name: str, read: Callable[[str], Tensor]) -> PlannedLayer:
    layer = manifest.layers[name]
    beside = {}
    for leaf in _INPUTS:
        full = f"{name}.{leaf}"
        full = manifest.aliases.get(full, full)
        if full in manifest.tensors:
            beside[leaf] = full
    bias = None if "bias" not in beside else _safetensors._DTYPES[manifest.tensors[beside["bias"]][1]]
    N, K = layer.shape
    spec = LayerSpec(layer.scheme, (N, K), layer.has_perm, bias, tuple(k for k in beside if k != "bias"))
    names = {full.rpartition("weight_")[2]: full for full in layer.specs(name)}

    def make() -> tuple[LinearRecord, QuantizedWeight]:
        parts = {part: read(full) for part, full in names.items()}
        weight = QuantizedWeight.from_tensors(parts, layer.scheme, layer.shape)
        return LinearRecord(weight, **{leaf: read(full) for leaf, full in beside.items()}), weight

    nbytes = sum(_safetensors.TensorInfo(*want).nbytes for want in layer.specs(name).values())
    return PlannedLayer(spec, str(layer.scheme), nbytes, make)


# -- quantizing ------------------------------------------------------------------------------------------------------------


def _dense(source: Source, choice: Choice) -> Contents:
    assert choice.scheme is not None
    plan = make_plan(source.tensors, choice.scheme, choice.overrides, source.config)
    layers, biases = {}, set()
    for name, asked in plan.schemes.items():
        scheme = choice.stored(asked)
        info = source.tensors[f"{name}.weight"]
        bias = source.tensors.get(f"{name}.bias")
        if bias is not None:
            biases.add(f"{name}.bias")
        spec = LayerSpec(scheme, (info.shape[0], info.shape[1]), False, None if bias is None else bias.dtype)
        read = functools.partial(_quantize_dense, source, name, scheme, bias is not None, choice.importance.get(name))
        layers[name] = PlannedLayer(spec, str(info.dtype).removeprefix("torch."), info.nbytes, read)
    check_columns(choice.importance, source.tensors, layers)
    tensors = {
        name: PlannedTensor(info.dtype, info.shape, _reader(source, name))
        for name, info in source.tensors.items()
        if name not in biases and not (name.endswith(".weight") and name.removesuffix(".weight") in layers)
    }
    has_root = source.root if source.path == source.root or (source.root / "config.json").exists() else None
    return Contents(str(source.path), layers, tensors, own_config(source.config), has_root)


def _quantize_dense(
    source: Source, name: str, scheme: Scheme, has_bias: bool, importance: Tensor | None
) -> tuple[LinearRecord, Tensor]:
    dense = source.read(f"{name}.weight")
    weight = QuantizedWeight.quantize(dense, scheme, importance)
    return LinearRecord(weight, source.read(f"{name}.bias") if has_bias else None), dense


def _requantized(contents: Contents, choice: Choice) -> Contents:
    """Layers decoded and quantized again; those that have the scheme already keep their codes."""
    assert choice.scheme is not None
    matchers = [(pattern, convert._matcher(pattern), scheme) for pattern, scheme in choice.overrides]
    for pattern, match, _ in matchers:
        if not any(match(name) for name in contents.layers):
            raise ValueError(f"override {pattern!r} matches no quantized layer")
    layers = {}
    for name, layer in contents.layers.items():
        matched = next(((p, scheme) for p, match, scheme in matchers if match(name)), None)
        wanted = choice.scheme if matched is None else matched[1]
        layers[name] = layer if wanted is None else _requantize(name, layer, wanted, choice)
    if unknown := sorted(choice.importance.keys() - layers.keys()):
        raise ValueError(f"importance names {', '.join(unknown[:5])}, which are not quantized layers of the source")
    return dataclasses.replace(contents, layers=layers)


def _requantize(name: str, layer: PlannedLayer, wanted: Scheme, choice: Choice) -> PlannedLayer:
    spec = layer.spec
    same = wanted.same_storage(spec.scheme)
    scheme = wanted if same else choice.stored(wanted)
    if scheme.activation_static:
        raise ValueError(f"{name}: scheme {scheme} needs calibrated input scales")
    if "input_pre_scale" in spec.inputs:
        raise ValueError(
            f"{name}: its inputs are scaled by column (input_pre_scale), which quantizing again would lose"
        )
    try:
        scheme.check_shape(*spec.shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None

    def read() -> tuple[LinearRecord, QuantizedWeight]:
        record, _ = layer.read()
        old = record.weight
        if same:
            tensors = old.tensors()
            weight = QuantizedWeight.from_tensors(tensors, scheme, old.shape)
        else:
            weight = QuantizedWeight.quantize(old.dequantize(), scheme, choice.importance.get(name))
        return LinearRecord(weight, record.bias), old

    new = dataclasses.replace(spec, scheme=scheme, has_perm=spec.has_perm and same, inputs=())
    return dataclasses.replace(layer, spec=new, read=read)
