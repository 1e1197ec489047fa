"""What happens to a Transformers model's linear layers while from_pretrained loads it: shared by both ways of loading.

    Dense         a model that is not quantized: each weight is quantized as it arrives, and its layer replaced
    Checkpoint    a quantized one, lowbit's or another library's: each layer is read by `lowbit.formats` and replaced

Transformers decides when: it goes through the checkpoint's tensors and asks an operation of ours for what they become.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from lowbit import convert
from lowbit._packed import PackedModule
from lowbit._places import (
    ExpertsParameter,
    embeds,
    experts_at,
    features,
    mixtures_in,
    replace_module,
    router_shape,
    routes,
)
from lowbit.embedding import QuantizedEmbedding
from lowbit.errors import ArtifactError
from lowbit.formats._experts import join, known_groups
from lowbit.formats._load import _linear_shape
from lowbit.formats._record import ExpertsRecord, LinearRecord
from lowbit.formats._registry import open_plan
from lowbit.report import LayerReport, QuantizeReport
from lowbit.scheme import Scheme

__all__ = ["Checkpoint", "Dense", "PendingLinear"]

#: What a tensor that a layer is made of is renamed to, where Transformers has nothing to do with it.
_TAKEN: Final = "lowbit-source:"
# The tensor of a layer whose turn makes us read the layer is read twice, so it should not be one of these.
_LARGE: Final = frozenset({"weight", "qweight", "weight_packed", "B"})


class PendingLinear(nn.Module):
    """Stands where a QuantizedLinear will be: as large, with a place for the bias, and nothing called weight."""

    def __init__(self, linear: nn.Module | None, *nbytes: int) -> None:
        super().__init__()
        self.out_features, self.in_features = getattr(linear, "out_features", 0), getattr(linear, "in_features", 0)
        self.lowbit_weight = nn.Parameter(torch.empty(nbytes, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = getattr(linear, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Not possible yet."""
        raise RuntimeError("this layer was not loaded")


class _Patterns(set[str]):
    """Transformers 5.0 adds lists to its patterns, later ones unite sets."""

    def __add__(self, other: Sequence[str]) -> list[str]:
        return [*self, *other]


class _Work:
    """What both ways have in common.

    Attributes:
        device_map: module name -> device, as Transformers inferred it; {} where everything is on the CPU.
        failure: the first error. Transformers would turn it into a line of a report, so it is raised at the end.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device_map: Mapping[str, Any] = {}
        self.failure: Exception | None = None
        self._paths = convert._paths(model)
        self._raw: list[PackedModule] = []
        self._outputs: dict[str, list[str]] = {}  # quantized embedding -> output layers that share its weight

    def place(self, path: str, old: object, new: PackedModule) -> dict[str, Tensor]:
        """Put a layer into the model; gives what Transformers shall store in it, or offload."""
        for alias in self._paths.get(id(old), [path]):
            replace_module(self.model, alias, new)
        new._is_hf_initialized = True  # type: ignore[assignment]
        stored = self.device(path, stored=True)
        mine = {name: p.detach() for name, p in new._parameters.items() if p is not None and name != "bias"}
        if stored in ("cpu", "disk"):  # in the layout of the device that the layer runs on, whatever that is
            mine = {name: tensor.to("cpu") for name, tensor in mine.items()}
        for name, tensor in mine.items():
            kept = tensor.to("meta") if stored == "disk" else tensor
            new._parameters[name] = nn.Parameter(kept, requires_grad=False)
        if self._offloaded(path):
            # accelerate takes the bytes that it will bring back from state_dict, by the names that they have in memory.
            new.__dict__["_save_to_state_dict"] = functools.partial(nn.Module._save_to_state_dict, new)
            self._raw.append(new)
        return {f"{path}.{name}": nn.Parameter(tensor, requires_grad=False) for name, tensor in mine.items()}

    def outputs_of(self, path: str, module: nn.Module) -> list[str] | None:
        """Output layers that are to share the weight of an embedding; None where it has to stay dense.

        Weights are tied after they are loaded, so that nothing but the model's own list says it.
        """
        tied = getattr(self.model, "all_tied_weights_keys", {})
        found = [target.removesuffix(".weight") for target, source in tied.items() if source == f"{path}.weight"]
        linear = all(type(self.model.get_submodule(one)) is nn.Linear for one in found)
        here = (
            not self.device_map or len({str(self.device(one, stored=True)) for one in (path, *found)} - {"disk"}) == 1
        )
        return found if embeds(module) and linear and here and not self._offloaded(path) else None

    def reserve_outputs(self, path: str, outputs: Sequence[str]) -> None:
        """Keep Transformers from initialising and tying what will share an embedding's weight."""
        self._outputs[path] = list(outputs)
        for one in outputs:
            self.model.all_tied_weights_keys.pop(f"{one}.weight")
            replace_module(self.model, one, PendingLinear(self.model.get_submodule(one), 1))

    def share(self, path: str, embedding: QuantizedEmbedding, missing: set[str] | None) -> None:
        """Put the output layers of an embedding into the model."""
        for one in self._outputs.get(path, ()):
            if missing is not None:
                missing.discard(f"{one}.lowbit_weight")
            pending = self.model.get_submodule(one)
            made = embedding.output_layer(pending)
            made._is_hf_initialized = True  # type: ignore[assignment]
            replace_module(self.model, one, made)

    def _offloaded(self, path: str) -> bool:
        """Whether a layer is stored on the CPU and runs on an accelerator."""
        return self.device(path, stored=True) == "cpu" and self._accelerator() is not None

    def device(self, path: str, stored: bool = False) -> Any:
        """Where a layer runs, or is stored: offloaded layers are brought to the first accelerator of the map."""
        if not self.device_map:
            return torch.device("cpu")
        from transformers.integrations.accelerate import get_device

        device = get_device(self.device_map, f"{path}.weight")
        if stored or device not in ("cpu", "disk"):
            return device
        return self._accelerator() or torch.device("cpu")

    def _accelerator(self) -> torch.device | None:
        """The device that accelerate brings offloaded layers to."""
        found = next((d for d in self.device_map.values() if d not in ("cpu", "disk")), None)
        return None if found is None else torch.device(found)

    def finish(self) -> QuantizeReport | None:
        """Raise what failed."""
        for path in self._outputs:  # Transformers has put a Parameter of its own into the embedding
            embedding = self.model.get_submodule(path)
            if isinstance(embedding, QuantizedEmbedding):
                embedding._share()
        for layer in self._raw:
            del layer.__dict__["_save_to_state_dict"]
        if self.failure is not None:
            raise self.failure
        return None


# -- quantize on load ------------------------------------------------------------------------------------------------------


class Dense(_Work):
    """Quantize the weights of a model that is not quantized as they are loaded.

    Args:
        model: on the meta device.
        scheme, overrides: as for `quantize_`.
        skip: modules_to_not_convert, as Transformers matches them.

    Attributes:
        names: parameter -> scheme.

    Raises:
        ValueError: as `quantize_`, for what can be known without values.
    """

    def __init__(
        self, model: Any, scheme: str, overrides: Mapping[str, Scheme | str | None], skip: Sequence[str]
    ) -> None:
        from transformers.quantizers.quantizers_utils import should_convert_module

        super().__init__(model)
        self._plan = convert._plan(
            model, Scheme.parse(scheme), lambda name, _: should_convert_module(name, list(skip)), dict(overrides)
        )
        self._leave_tied(overrides)
        if not self._plan.schemes:
            raise ValueError(f"{type(model).__name__} has no linear layer (nn.Linear) that LowbitConfig would quantize")
        self._targets = convert._targets(model, self._plan)
        for path, wanted in self._plan.schemes.items():
            target = self._targets[path]
            try:
                wanted.check_shape(*target.weight.shape[-2:])
                if wanted.activation_static:
                    raise ValueError(f"scheme {wanted} needs calibrated input scales")
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        # The Parameter's name -> the layer's.
        self.paths = {
            path if isinstance(target, ExpertsParameter) else f"{path}.weight": path
            for path, target in self._targets.items()
        }
        self.names = {name: self._plan.schemes[path] for name, path in self.paths.items()}
        self._reports: dict[str, LayerReport] = {}
        self._before = convert._nbytes(model)
        self._warn_of_experts()

    def _leave_tied(self, overrides: Mapping[str, Scheme | str | None]) -> None:
        """Weights are tied after they are loaded, so that quantize_'s look at Parameters does not see it yet."""
        ties = dict(getattr(self.model, "all_tied_weights_keys", {}))
        ties |= {source: target for target, source in ties.items()}
        for path in list(self._plan.schemes):
            module = self.model.get_submodule(path) if f"{path}.weight" in ties else None
            if isinstance(module, nn.Embedding):
                outputs = self.outputs_of(path, module)
                if outputs is None:
                    raise ValueError(
                        f"override {path!r} asks for {self._plan.schemes[path]}, but {path} cannot be shared"
                    )
                for one in outputs:
                    self._plan.schemes.pop(one, None)
                    self._plan.reasons[one] = (f"shares the weight of {path}", True)
                self.reserve_outputs(path, outputs)
                continue
            if path not in self._plan.schemes:
                continue
            if (other := ties.get(f"{path}.weight")) is not None:
                if overrides.get(path) is not None:
                    raise ValueError(f"override {path!r} asks for {overrides[path]}, but {path}: tied to {other}")
                del self._plan.schemes[path]
                self._plan.reasons[path] = (f"tied to {other}", False)

    def _warn_of_experts(self) -> None:
        """Parameters that hold a weight per expert are most of such a model, and no nn.Linear."""
        experts = [
            (full, p)
            for path, module in self.model.named_modules()
            for name, p in module.named_parameters(recurse=False)
            if p.dim() == 3 and p.is_floating_point() and not type(module).__module__.startswith("torch.")
            and (full := f"{path}.{name}") not in self.names
            and not any(self._plan.reasons.get(known, ("", False))[1] for known in (full, path))
        ]  # fmt: skip
        if experts:
            nbytes = sum(p.nbytes for _, p in experts)
            warnings.warn(
                f"{len(experts)} tensors of 3 dimensions ({experts[0][0]}, ...; {nbytes / 1e9:.2g} GB) are no weights of "
                "experts by Transformers' use_experts_implementation, and are not quantized",
                stacklevel=2,
            )

    def operation(self) -> Any:
        """What Transformers calls with each weight."""
        from lowbit.integrations._operations import Quantize

        return Quantize(self)

    def quantized(self, name: str, weight: Tensor, missing: set[str] | None = None) -> dict[str, Tensor]:
        """Replace the layer that `name` is the weight of."""
        path = self.paths[name]
        target = self._targets.pop(path)
        holder, leaf = (target.owner, target.name) if isinstance(target, ExpertsParameter) else (target, "weight")
        holder._parameters[leaf] = nn.Parameter(weight.to(self.device(path)), requires_grad=False)
        new, self._reports[path] = convert._convert(path, target, self.names[name], None)
        placed = self.place(path, target, new)
        if isinstance(new, QuantizedEmbedding):
            self.share(path, new, missing)
        return placed

    def finish(self) -> QuantizeReport:
        """Quantize also what was not in the checkpoint and has been initialised, and report."""
        super().finish()
        for name, path in self.paths.items():
            if path not in self._reports:
                target = self._targets[path]
                dense = target.parameter if isinstance(target, ExpertsParameter) else target.weight
                self.quantized(name, dense.detach())
        layers = tuple(self._reports[path] for path in self._plan.schemes)
        skipped = tuple(convert._skipped(self.model, self._plan))
        return QuantizeReport(layers, skipped, self._before, convert._nbytes(self.model))


# -- a quantized checkpoint ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a layer of the checkpoint goes: a path, and the module there."""

    name: str
    path: str
    module: nn.Module | ExpertsParameter
    dense: bool = False  # an embedding, or a router, that is dequantized

    @property
    def key(self) -> str:
        """The parameter that Transformers believes it loads."""
        return f"{self.path}.weight" if self.dense else f"{self.path}.lowbit_weight"


class Checkpoint(_Work):
    """Read the quantized layers of a checkpoint while Transformers loads everything else.

    Args:
        model: on the meta device.
        files: of the checkpoint, as Transformers found them.
        format: a row of FORMATS, or None to detect it.

    Raises:
        ArtifactError: as `load_checkpoint`.
    """

    def __init__(self, model: Any, files: Sequence[str], format: str | None) -> None:
        super().__init__(model)
        if not files[0].endswith(".safetensors"):
            raise ArtifactError(f"{files[0]}: not a safetensors file, and nothing else is read")
        self._files = contextlib.ExitStack()
        weakref.finalize(self, self._files.close)
        path = Path(files[0]) if len(files) == 1 else Path(files[0]).parent
        with torch.device("cpu"):  # Transformers makes models under torch.device("meta")
            self.plan, _ = self._files.enter_context(open_plan(path, format))
        self._places: dict[str, _Place] = {}  # key -> place
        self._mixtures = mixtures_in(model)
        self._read: set[str] = set()

    def conversions(self, known: Sequence[Any] | None) -> list[Any]:
        """Find every layer's place, and the converter that makes Transformers ask for it.

        Args:
            known: the conversions that the model itself needs; None where this version of Transformers does not say.
        """
        if self._places:
            return []
        from lowbit.integrations._operations import Names, converters

        names = Names(self.model, known)
        routes: dict[str, str | None] = {}
        joined = self._join_experts(names)
        for layer in self.plan.layers:
            place = self._place_of(layer, names, layer in joined)
            if place is not None:
                self._places[place.key] = place
                routes |= self._routes(place, names)
        if not self._places:
            some = list(self.plan.layers)[:3]
            raise ArtifactError(
                f"{self.plan.where}: the model has none of its quantized layers ({', '.join(some)}, ...)"
            )
        self._refuse_lost()
        for place in self._places.values():
            self._reserve(place)
        ignored = set(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())
        self.model._keys_to_ignore_on_load_unexpected = _Patterns(ignored | {f"^{_TAKEN}"})
        return converters(self, routes, last=known is None)

    def _join_experts(self, names: Any) -> set[str]:
        """Join the experts' layers that Transformers keeps in one Parameter; gives the names of the joined ones."""
        groups: dict[str, list[list[str]]] = {}
        for layer, planned in self.plan.layers.items():
            if len(planned.shape) == 2 and (found := names.merged(f"{layer}.weight")) is not None:
                target, part, count = found
                groups.setdefault(target, [[] for _ in range(count)])[part].append(layer)
        joined = {layer: names.final(layer) for layer, planned in self.plan.layers.items() if len(planned.shape) == 3}
        back = {new: layer for layer, new in joined.items()}
        for target, parts in known_groups(back, lambda path: experts_at(self.model, path) is not None).items():
            groups.setdefault(target, [[back[name] for name in part] for part in parts])
        self.plan = join(self.plan, groups)
        return set(groups)

    def _place_of(self, layer: str, names: Any, joined: bool) -> _Place | None:
        planned = self.plan.layers[layer]
        where = f"{self.plan.where}: layer {layer!r}"
        experts = len(planned.shape) == 3
        if not experts and (operations := names.changed_by(f"{layer}.weight")) is not None:
            raise ArtifactError(
                f"{where}: Transformers keeps it in another form ({operations}), which is not possible with a quantized "
                "weight"
            )
        path = layer if joined else names.final(layer if experts else f"{layer}.weight").removesuffix(".weight")
        module: nn.Module | ExpertsParameter | None = experts_at(self.model, path) if experts else None
        if module is None:
            try:
                module = self.model.get_submodule(path)
            except AttributeError:
                return None  # Transformers reports its tensors as unexpected
        shape = module.shape if isinstance(module, ExpertsParameter) else _linear_shape(module)
        dense = isinstance(module, nn.Embedding) and self.outputs_of(path, module) is None
        if shape is None and isinstance(module, nn.Module) and routes(path, self._mixtures.__contains__):
            shape, dense = router_shape(module), True
        if shape is None:
            raise ArtifactError(f"{where} is quantized, the model has a {type(module).__name__} there")
        if shape != planned.shape:
            raise ArtifactError(f"{where} is {features(planned.shape)}, the model's is {features(shape)}")
        return _Place(layer, path, module, dense)

    def _routes(self, place: _Place, names: Any) -> dict[str, str | None]:
        """Tensor -> the parameter whose turn it is, or None where Transformers shall leave it to us."""
        sources = [s for s in self.plan.layers[place.name].sources if not self._is_bias(s, place)]
        trigger = next((s for s in sources if s.rpartition(".")[2] not in _LARGE), sources[0])
        if place.dense and f"{place.name}.weight" in sources:
            trigger = f"{place.name}.weight"  # it has the name of what it becomes
        return {names.renamed(s): place.key if s == trigger else None for s in sources}

    def _is_bias(self, source: str, place: _Place) -> bool:
        return source == f"{place.name}.bias" and getattr(place.module, "bias", None) is not None

    def _refuse_lost(self) -> None:
        for name in self.plan.tensors:
            if name.endswith(".act.scales"):
                raise ArtifactError(
                    f"{self.plan.where}: {name} scales an activation, and the model has no place for it"
                )

    def _reserve(self, place: _Place) -> None:
        if place.dense:
            return
        if isinstance(place.module, nn.Embedding):
            taken = {one.path for one in self._places.values()}
            outputs = [one for one in self.outputs_of(place.path, place.module) or () if one not in taken]
            self.reserve_outputs(place.path, outputs)
        if isinstance(place.module, ExpertsParameter):
            E = self.plan.layers[place.name].shape[0]
            replace_module(self.model, place.path, PendingLinear(None, E, self.plan.layers[place.name].nbytes // E))
            return
        ties = getattr(self.model, "all_tied_weights_keys", {})
        if f"{place.path}.weight" in ties.values():
            raise ArtifactError(
                f"{self.plan.where}: {place.name} is quantized, and the model ties another weight to it"
            )
        ties.pop(f"{place.path}.weight", None)  # the checkpoint holds one of its own
        pending = PendingLinear(place.module, self.plan.layers[place.name].nbytes)
        paths = self._paths.pop(id(place.module), [place.path])
        self._paths[id(pending)] = paths
        for path in paths:
            replace_module(self.model, path, pending)

    def layer(self, key: str, missing: set[str] | None) -> dict[str, Tensor]:
        """Read the layer that a parameter stands for."""
        place = self._places[key]
        self._read.add(key)
        if missing is not None:
            missing.discard(key)
        record = self.plan.read(place.name)
        if isinstance(record, ExpertsRecord):
            experts = ExpertsRecord(record.weight.to(self.device(place.path))).experts()
            return self.place(place.path, place.module, experts.train(self.model.training))
        assert isinstance(record, LinearRecord)
        weight = place.module.weight
        assert isinstance(weight, Tensor)
        dtype, device = weight.dtype, self.device(place.path, stored=True)
        if place.dense:
            return {key: record.weight.dequantize(dtype).to("cpu" if device == "disk" else device)}
        if isinstance(place.module, nn.Embedding):
            padding = place.module.padding_idx
            new = QuantizedEmbedding.from_weight(record.weight.to(device), dtype=dtype, padding_idx=padding)
            placed = self.place(place.path, self.model.get_submodule(place.path), new.train(place.module.training))
            self.share(place.path, new, missing)
            return placed
        pending = self.model.get_submodule(place.path)
        if pending.bias is None and record.bias is not None and bool((record.bias != 0).any()):
            raise ArtifactError(f"{self.plan.where}: layer {place.name!r} has a bias, the model's has none")
        device = self.device(place.path)
        record = dataclasses.replace(record, weight=record.weight.to(device), bias=pending.bias)
        return self.place(place.path, pending, record.linear().train(pending.training))

    def finish(self) -> None:
        """Close the files and see that nothing was left out."""
        self._files.close()
        self.model.__dict__.pop("_keys_to_ignore_on_load_unexpected", None)
        if (used := getattr(self.model, "_weight_conversions", None)) is not None:
            from lowbit.integrations._operations import is_ours

            self.model._weight_conversions = [conversion for conversion in used if not is_ours(conversion)]
        super().finish()
        if left := [place.name for key, place in self._places.items() if key not in self._read]:
            raise ArtifactError(f"{self.plan.where}: Transformers did not ask for {', '.join(left[:5])}")
