"""load_checkpoint: a checkpoint that others wrote, into a model that runs on our kernels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from lowbit._packed import PackedModule
from lowbit._places import (
    embeds,
    experts_at,
    features,
    mixtures_in,
    replace_module,
    router_shape,
    routes,
    tied_linears,
)
from lowbit._progress import progress_bar
from lowbit.embedding import QuantizedEmbedding
from lowbit.errors import ArtifactError
from lowbit.formats._experts import experts_shape, with_experts
from lowbit.formats._record import KV_SCALES, ExpertsRecord, Plan
from lowbit.formats._registry import open_plan
from lowbit.integrations import announce
from lowbit.linear import QuantizedLinear
from lowbit.report import format_bytes, format_shape, format_table
from lowbit.serialize import _parameters_on_meta

__all__ = ["CheckpointReport", "LoadedLayer", "load_checkpoint"]

# Tensors that models compute themselves and some checkpoints hold all the same.
_COMPUTED: Final = ("rotary_emb.inv_freq", "attn.masked_bias", "rope_freqs.weight")


@dataclasses.dataclass(frozen=True)
class LoadedLayer:
    """One quantized layer that was loaded.

    Args:
        name: its path in the model.
        scheme: as a string; "dequantized" where the model's embedding is one that does more than to gather rows, or shares its
            weight with something else than an output layer, and where its router is no nn.Linear: that is stored dense.
        shape: (N, K), or (E, N, K) of experts.
        nbytes: of the weight in memory.
    """

    name: str
    scheme: str
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class CheckpointReport:
    """What load_checkpoint did. `print(report)` shows a table; `to_dict()` is JSON.

    Args:
        path, format, variant, why: what was read, and why it was read as that.
        layers: the quantized layers, in natural order of their names.
        tensors: how many tensors that are not quantized were loaded; tensor_bytes: their size.
        unused: tensors of the checkpoint that the model has no place for, with reasons.
        missing: tensors of the model that the checkpoint has nothing for (only with strict=False).
        model: the model; None when none was given.
        contents: without a model, everything by name: QuantizedLinear and Tensor.
    """

    path: str
    format: str
    variant: str
    why: str
    layers: tuple[LoadedLayer, ...]
    tensors: int
    tensor_bytes: int
    unused: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()
    model: nn.Module | None = dataclasses.field(default=None, repr=False)
    contents: Mapping[str, PackedModule | Tensor] = dataclasses.field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but model and contents, as plain JSON values."""
        plain = dataclasses.replace(self, model=None, contents={})
        found = dataclasses.asdict(plain)
        del found["model"], found["contents"]
        return found

    def __str__(self) -> str:
        rows = [
            (layer.name, layer.scheme, format_shape(layer.shape), format_bytes(layer.nbytes)) for layer in self.layers
        ]
        lines = [format_table(("layer", "scheme", "N x K", "size"), rows, left=2)]
        for head, listed in (("not used", [f"{n} ({why})" for n, why in self.unused]), ("missing", list(self.missing))):
            if listed:
                lines.append(f"{head}: {', '.join(listed)}")
        size = sum(layer.nbytes for layer in self.layers)
        lines.append(
            f"{self.path}: {self.format} ({self.variant}): {len(self.layers)} quantized layers, {format_bytes(size)}; "
            f"{self.tensors} other tensors, {format_bytes(self.tensor_bytes)}"
        )
        return "\n".join(lines)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    format: str | None = None,
    rename: Callable[[str], str | None] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    progress: bool | None = None,
) -> CheckpointReport:
    """Load a quantized checkpoint that another library wrote.

    Its quantized layers become `QuantizedLinear` in place of the model's nn.Linear, all other tensors go where their names
    say. Everything that headers and configs can tell is checked before a tensor is read, tensors are read and packed one
    layer at a time, and the model changes when the last one is ready: an exception leaves it as it was. With a model on
    the meta device, or a function that makes one, nothing is ever held twice.

    Args:
        path: a folder of safetensors files with its config.json, one such file, or a GGUF file.
        model: a model with the checkpoint's names, possibly on the meta device; or a function that makes one, called so
            that its parameters take no memory. None: the report's `contents` hold everything by name.
        format: a name from `lowbit.formats.FORMATS`, to skip the detection.
        rename: name in the checkpoint -> name in the model, or None to leave it out; for layers and tensors.
        device: where tensors go; by default where the model's are (from the meta device: to the CPU).
        dtype: of tensors that are not quantized; by default as stored. A bias of another dtype than the other tensors
            becomes fp32, which goes with any input.
        strict: raise when the model lacks a tensor of the checkpoint, or the checkpoint one of the model's.
        progress: show a progress bar; by default on a terminal, when there is much to read.

    Raises:
        ArtifactError: the format is not known for certain, the checkpoint contradicts itself or does not fit the model.
            The message names file, layer and value, and the model is unchanged.

    Example:
        >>> report = lowbit.load_checkpoint("Llama-3.1-8B-GPTQ", lambda: LlamaForCausalLM(config))
        >>> report.model(ids)
    """
    with open_plan(path, format) as (plan, why):
        names = _renamed(plan, rename)
        fit = None
        if model is not None:
            if not isinstance(model, nn.Module):
                with _parameters_on_meta():
                    model = model()
            plan, names = with_experts(plan, names, model)
            fit = _Fit(model, plan, names)
            fit.check(strict)
        contents = _Contents(plan, fit, None if device is None else torch.device(device), dtype)
        contents.read(names, progress)
        if fit is None:
            return contents.report(why, {}, [], None)
        fit.check_biases(contents.made)
        fit.attach(contents.made)  # nothing below can fail
        announce(fit.model)
        return contents.report(why, fit.unused, fit.missing, fit.model)


def _renamed(plan: Plan, rename: Callable[[str], str | None] | None) -> dict[str, str]:
    """Name in the checkpoint -> name in the model, without those that are left out."""
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in plan.names:
        new = name if rename is None else rename(name)
        if new is None:
            continue
        if new in taken:
            raise ValueError(f"rename gives {name!r} and {taken[new]!r} the same name {new!r}")
        found[name], taken[new] = new, name
    return found


def _common_dtype(plan: Plan) -> torch.dtype | None:
    """The floating dtype that most bytes of the tensors that are not quantized have."""
    sizes: dict[torch.dtype, int] = {}
    for planned in plan.tensors.values():
        if planned.dtype.is_floating_point:
            sizes[planned.dtype] = sizes.get(planned.dtype, 0) + planned.nbytes
    return max(sizes, key=lambda key: sizes[key], default=None)


class _Contents:
    """Layers and tensors as they are read.

    Attributes:
        made: name in the model -> what goes there.
    """

    def __init__(self, plan: Plan, fit: _Fit | None, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.plan, self.fit, self.device, self.dtype = plan, fit, device, dtype
        self.common = dtype or _common_dtype(plan)
        self.made: dict[str, PackedModule | Tensor] = {}
        self.layers: list[LoadedLayer] = []

    def read(self, names: Mapping[str, str], progress: bool | None) -> None:
        """Read what the model has a place for, or everything where there is none."""
        layers, tensors = self.plan.layers, self.plan.tensors
        total = sum(layer.nbytes for layer in layers.values()) + sum(tensor.nbytes for tensor in tensors.values())
        with progress_bar("loading", total, progress) as advance:
            for name, new in names.items():
                if self.fit is not None and new not in self.fit.used:
                    continue
                value = self._one(name, new)
                self.made[new] = value
                if name in layers:
                    nbytes = value.nbytes if isinstance(value, Tensor) else value.weight.nbytes
                    scheme = "dequantized" if isinstance(value, Tensor) else str(value.scheme)
                    self.layers.append(LoadedLayer(new, scheme, layers[name].shape, nbytes))
                advance(new, layers[name].nbytes if name in layers else tensors[name].nbytes)

    def _one(self, name: str, new: str) -> PackedModule | Tensor:
        """A layer as a module, or as a dense tensor where an embedding wants it; or a tensor."""
        device = self.device if self.fit is None else self.fit.device(new, self.device)
        record = self.plan.read(name)
        if isinstance(record, Tensor):
            return record.to(device=device, dtype=self.dtype if record.is_floating_point() else None)
        try:
            if isinstance(record, ExpertsRecord):
                experts = record.weight if device is None else record.weight.to(device)
                return ExpertsRecord(experts).experts()
            if self.fit is not None and new in self.fit.dense:
                if record.bias is not None:  # of a router
                    self.made[f"{new}.bias"] = record.bias.to(device=device, dtype=self.dtype)
                return record.weight.dequantize(self.common or torch.float32).to(device=device)
            if self.fit is not None and new in self.fit.embeddings:
                weight = record.weight if device is None else record.weight.to(device)
                padding = self.fit.embeddings[new].padding_idx
                return QuantizedEmbedding.from_weight(weight, dtype=self.common or torch.float32, padding_idx=padding)
            weight, bias = record.weight, record.bias
            if bias is not None and bias.dtype != self.common:
                bias = bias.to(self.dtype or torch.float32)
            if device is not None:
                weight, bias = weight.to(device), None if bias is None else bias.to(device)
            return dataclasses.replace(record, weight=weight, bias=bias).linear()
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(f"{self.plan.where}: {name[:200]}: {error}") from None

    def report(
        self, why: str, unused: Mapping[str, str], missing: list[str], model: nn.Module | None
    ) -> CheckpointReport:
        """What was done."""
        named = {layer.name for layer in self.layers}
        plain = [value for name, value in self.made.items() if name not in named and isinstance(value, Tensor)]
        return CheckpointReport(
            self.plan.where,
            self.plan.format,
            self.plan.variant,
            why,
            tuple(self.layers),
            len(plain),
            sum(tensor.nbytes for tensor in plain),
            tuple(unused.items()),
            tuple(missing),
            model,
            self.made if model is None else {},
        )


# -- fitting the model -----------------------------------------------------------------------------------------------------


class _Fit:
    """Which of a checkpoint's names go where in a model.

    Attributes:
        used: names (in the model) of layers and tensors that have a place.
        embeddings: layers whose place is an embedding; tied: path of an output layer that shares one's weight -> layer.
        dense: layers whose place is an embedding that cannot be quantized, or a router that is no nn.Linear.
        unused: name of a tensor or layer -> why nothing takes it.
        missing: tensors of the model that nothing is stored for.
    """

    def __init__(self, model: nn.Module, plan: Plan, names: Mapping[str, str]) -> None:
        self.model = model
        self.where = plan.where
        self.layers = {new: plan.layers[name] for name, new in names.items() if name in plan.layers}
        self.tensors = {new: plan.tensors[name] for name, new in names.items() if name in plan.tensors}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.used: set[str] = set()
        self.dense: set[str] = set()
        self.embeddings: dict[str, nn.Embedding | QuantizedEmbedding] = {}
        self.tied: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        self.missing: list[str] = []
        self.replaced: dict[str, str] = {}  # path in the model -> layer
        self.targets: list[tuple[str, str, str]] = []  # module path, tensor name, source
        self._fit_layers()
        self._fit_tensors()

    def fail(self, message: str) -> ArtifactError:
        return ArtifactError(f"{self.where}: {message}")

    def _fit_layers(self) -> None:
        paths: dict[int, list[str]] = {}
        mixtures = mixtures_in(self.model)
        for path, module in self.modules.items():
            paths.setdefault(id(module), []).append(path)
        for name, layer in self.layers.items():
            if len(layer.shape) == 3:
                self._fit_experts(name, layer.shape)
                continue
            module = self.modules.get(name)
            if module is None or not name:
                self.unused[name] = "the model has no such layer"
                continue
            shape = _linear_shape(module)
            if shape is None and routes(name, mixtures.__contains__) and (shape := router_shape(module)) is not None:
                self.dense.add(name)
            if shape is None:
                raise self.fail(f"layer {name!r} is quantized, the model has a {type(module).__name__} there")
            if shape != layer.shape:
                raise self.fail(f"layer {name!r} is {features(layer.shape)}, the model's is {features(shape)}")
            self.used.add(name)
            if isinstance(module, nn.Embedding | QuantizedEmbedding) and not self._fit_embedding(name, module):
                self.dense.add(name)
            if name in self.dense:
                continue
            for path in paths[id(module)]:  # a module at several paths stays one module
                self.replaced.setdefault(path, name)

    def _fit_embedding(self, name: str, module: nn.Embedding | QuantizedEmbedding) -> bool:
        """Whether a quantized embedding can stand there, and with it the output layers that share its weight."""
        if isinstance(module, nn.Embedding):
            linears = tied_linears(self.model, module) if embeds(module) else None
            if linears is None:
                return False
            self.tied |= {path: name for path in linears if path not in self.layers}
        self.embeddings[name] = module
        return True

    def _fit_experts(self, name: str, shape: tuple[int, ...]) -> None:
        found = experts_shape(self.model, name)
        if found is None:
            self.unused[name] = "the model has no such layer"
            return
        if found != shape:
            raise self.fail(f"layer {name!r} is {features(shape)}, the model's is {features(found)}")
        self.used.add(name)
        self.replaced[name] = name

    def _fit_tensors(self) -> None:
        stored = {name: tensor.shape for name, tensor in self.tensors.items()}
        for name in self.dense:
            stored[f"{name}.weight"] = self.layers[name].shape
            if any(source.rpartition(".")[2] == "bias" for source in self.layers[name].sources):
                stored[f"{name}.bias"] = self.layers[name].shape[:1]
        entries = [
            e
            for e in _tensors(self.model)
            if e[0] not in self.replaced
            and _join(e[0], e[1]) not in self.replaced
            and not (e[0] in self.tied and e[1] == "weight")
        ]
        by_tensor: dict[int, str] = {}  # a tensor of the model -> what is stored for it, under any of its names
        for path, name, tensor, _ in entries:
            if (full := _join(path, name)) in stored:
                by_tensor.setdefault(id(tensor), full)
        for path, name, tensor, kind in entries:
            full = _join(path, name)
            source = by_tensor.get(id(tensor))
            if kind == "transient" and not tensor.is_meta:
                if source is not None:
                    self.unused[full] = "the model computes it"
                continue
            if source is None:
                self.missing.append(full)
                continue
            if full in stored and full != source:
                self.unused[full] = f"tied to {source}"
            if tuple(tensor.shape) != stored[source]:
                raise self.fail(f"{full} is {list(stored[source])}, the model's is {list(tensor.shape)}")
            self.targets.append((path, name, source))
            self.used.add(source)
        for name in self.tensors:
            if name not in self.used and name not in self.unused:
                leaf = name.rpartition(".")[2]
                if leaf in KV_SCALES:
                    self.unused[name] = "the scale of a quantized KV cache"
                elif name.endswith(_COMPUTED):
                    self.unused[name] = "models compute it"
                else:
                    self.unused[name] = "the model has no such tensor"
        for path, module in self.modules.items():
            bias = getattr(module, "bias", None) if path in self.replaced else None
            if bias is not None and not any(s.rpartition(".")[2] == "bias" for s in self._sources(path)):
                self.missing.append(_join(path, "bias"))

    def _sources(self, path: str) -> Iterable[str]:
        return self.layers[self.replaced[path]].sources

    def check(self, strict: bool) -> None:
        """ArtifactError unless model and checkpoint have the same layers and tensors."""
        lost = [name for name, why in self.unused.items() if why.startswith("the model has no")]
        if strict and (lost or self.missing):
            sides = [f"the model has no {_some(lost)}"] if lost else []
            sides += [f"nothing is stored for the model's {_some(self.missing)}"] if self.missing else []
            raise self.fail("; ".join(sides) + " (rename= maps names, strict=False goes on without them)")
        if not self.replaced and not self.dense:
            raise self.fail(
                f"no quantized layer of the checkpoint ({_some(list(self.layers))}) is in the model "
                f"({_some([p for p, m in self.modules.items() if isinstance(m, nn.Linear)])})"
            )

    def device(self, name: str, wanted: torch.device | None) -> torch.device:
        """Where a layer or tensor goes."""
        if wanted is not None:
            return wanted
        if name in self.layers:
            experts = experts_at(self.model, name)
            old = self.modules[name].weight if experts is None else experts.parameter
        else:
            old = _tensor_at(self.model, name)
        return torch.device("cpu") if not isinstance(old, Tensor) or old.is_meta else old.device

    def check_biases(self, made: Mapping[str, PackedModule | Tensor]) -> None:
        """A layer without a bias may have a stored one of zeros, as some writers do; any other is refused."""
        for path, name in self.replaced.items():
            new = made[name]
            if not isinstance(new, QuantizedLinear):
                continue
            if new.bias is not None and getattr(self.modules[path], "bias", None) is None:
                if bool((new.bias != 0).any()):
                    raise self.fail(f"layer {name!r} has a bias, the model's has none")
                new.bias = None

    def attach(self, made: Mapping[str, PackedModule | Tensor]) -> None:
        """Put everything into the model."""
        for path, name in self.replaced.items():
            new = made[name]
            assert isinstance(new, PackedModule)
            old = self.modules.get(path) or self.modules[path.rpartition(".")[0]]
            if isinstance(old, PackedModule):
                new.flags = old.flags
            replace_module(self.model, path, new.train(old.training))
        for path, name in self.tied.items():
            embedding, old = made[name], self.modules[path]
            assert isinstance(embedding, QuantizedEmbedding) and isinstance(old, nn.Linear)
            replace_module(self.model, path, embedding.output_layer(old))
        values: dict[str, Tensor] = {}
        for path, name, source in self.targets:
            module = self.model.get_submodule(path)
            value = made[source] if source in made else made[source[: -len(".weight")]]
            assert isinstance(value, Tensor)
            if name in module._buffers:
                module._buffers[name] = value
                continue
            old_parameter = module._parameters[name]
            assert old_parameter is not None
            if source not in values:
                trainable = old_parameter.requires_grad and value.is_floating_point()
                values[source] = nn.Parameter(value, requires_grad=trainable)
            module._parameters[name] = values[source]  # type: ignore[assignment]


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(N, K) of a module that a quantized layer can stand in for."""
    # A subclass may use its weight in its own way; MultiheadAttention hands out_proj.weight to a fused kernel.
    if type(module) is nn.Linear or isinstance(module, QuantizedLinear):
        return module.out_features, module.in_features
    if isinstance(module, QuantizedEmbedding):
        return module.num_embeddings, module.embedding_dim
    if type(module) is nn.Embedding:
        return module.num_embeddings, module.embedding_dim
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[1], weight.shape[0]  # GPT-2's linear layer, which keeps W transposed
    return None


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor, str]]:
    """Module path, name, tensor and kind of everything a model holds, under all of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield path, name, parameter, "parameter"
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            yield path, name, buffer, "transient" if name in module._non_persistent_buffers_set else "buffer"


def _tensor_at(model: nn.Module, name: str) -> object:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:200] for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "nothing"
