"""Operations in the language of Transformers' weight loading (core_model_loading), imported when a model is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import core_model_loading as _core
from transformers.conversion_mapping import get_model_conversion_mapping

from lowbit.integrations._layers import _TAKEN, Checkpoint, Dense

__all__ = ["Names", "Quantize", "converters", "is_ours", "without_conversions"]

# One pattern, which no name of a tensor matches: which tensors are meant is looked up in a dict.
_PATTERN: Final = "lowbit-layer"


class Quantize(_core.ConversionOps):
    """A dense weight to a quantized layer, in place of the nn.Linear in the model."""

    def __init__(self, work: Dense) -> None:
        self.work = work

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Name -> tensor (or a list of one), and back."""
        found: dict[str, Any] = {}
        missing = kwargs.get("missing_keys")
        for name, value in input_dict.items():
            if name not in self.work.names:
                found[name] = value
                continue
            if missing is not None:
                missing.discard(name)
            if self.work.failure is None:
                try:
                    found |= self.work.quantized(name, value[0] if isinstance(value, list) else value, missing)
                except Exception as error:
                    self.work.failure = error
        return found


class _Read(_core.ConversionOps):
    """A layer of a quantized checkpoint, when the turn of one of its tensors has come."""

    def __init__(self, work: Checkpoint) -> None:
        self.work = work

    def __deepcopy__(self, memo: Any) -> _Read:
        return self  # Transformers copies a converter for every parameter; the files are open once

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Ignores the tensors: the format's reader takes them from the file."""
        if self.work.failure is not None:
            return {}
        try:
            return dict(self.work.layer(kwargs["full_layer_name"], kwargs.get("missing_keys")))
        except Exception as error:
            self.work.failure = error
            return {}


class _LayerConverter(_core.WeightConverter):
    """A WeightConverter that looks names up instead of matching patterns.

    A model has thousands of tensors, and what belongs to a layer is known; a tensor that no parameter waits for gets a name
    that Transformers has been told to ignore, so that it is not read.
    """

    __slots__ = ()
    routes: Mapping[str, str | None] = {}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The parameter that a tensor belongs to."""
        if source_key not in self.routes:
            return source_key, None
        key = self.routes[source_key]
        return (_TAKEN + source_key, None) if key is None else (key, _PATTERN)


class _LayerRenaming(_core.WeightRenaming):
    """Gives our tensors names that no converter of the model's own matches ("experts.*.up_proj.weight" and weight_scale)."""

    __slots__ = ()
    routes: Mapping[str, str] = {}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Renamings are asked before converters."""
        return self.routes.get(source_key, source_key), None


def converters(work: Checkpoint, routes: Mapping[str, str | None], last: bool) -> list[Any]:
    """What makes Transformers ask for each layer: classes of their own, since instances are copied for each parameter.

    Args:
        work: reads the layers.
        routes: tensor -> the parameter whose turn it is, or None for a tensor that Transformers leaves to us.
        last: the model's own converters are asked before ours, as in Transformers 5.0.
    """
    found: list[Any] = []
    if last:
        hidden = {name: f"{_TAKEN}{i}" for i, name in enumerate(routes)}
        renaming = type("LayerRenaming", (_LayerRenaming,), {"__slots__": (), "routes": hidden})
        found.append(renaming(source_patterns=[_PATTERN], target_patterns=[_PATTERN]))
        routes = {hidden[name]: key for name, key in routes.items()}
    made = type("LayerConverter", (_LayerConverter,), {"__slots__": (), "routes": routes})
    return [*found, made(source_patterns=[_PATTERN], target_patterns=[_PATTERN], operations=[_Read(work)])]


def is_ours(conversion: Any) -> bool:
    """Whether it is one that `converters` made."""
    return isinstance(conversion, _LayerConverter | _LayerRenaming)


def without_conversions(model: Any, paths: Sequence[str]) -> list[Any]:
    """The conversions that save_pretrained reverts, without those that take apart what is at `paths`.

    The reverse of a conversion splits a Parameter of experts into the tensors that the hub's checkpoints have; quantized
    experts are saved as they are in memory, and loaded as that.
    """
    used = getattr(model, "_weight_conversions", None)
    if used is None:  # as save_pretrained finds them for a model that was not loaded
        used = [
            entry
            for entry in get_model_conversion_mapping(model, add_legacy=False)
            if type(entry).__name__ != "PrefixChange"
        ]

    def takes(entry: Any) -> bool:
        if not isinstance(entry, _core.WeightConverter):
            return False
        back = copy.deepcopy(entry)
        back.quantization_operation = None
        back = back.reverse_transform()
        return any(back.rename_source_key(f"{path}.weight_packed")[1] is not None for path in paths)

    return [entry for entry in used if not takes(entry)]


class Names:
    """What Transformers makes of a checkpoint's names.

    Args:
        model: on the meta device.
        known: its conversions, or None to ask Transformers for them.
    """

    def __init__(self, model: Any, known: Sequence[Any] | None) -> None:
        # Copies: a renaming remembers that it was used, and is then reverted when the model is saved.
        found = copy.deepcopy(list(get_model_conversion_mapping(model) if known is None else known))
        self._renamings = [entry for entry in found if isinstance(entry, _core.WeightRenaming)]
        self._converters = [entry for entry in found if isinstance(entry, _core.WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()

    def renamed(self, name: str) -> str:
        """A tensor's name when converters see it."""
        return str(_core.rename_source_key(name, self._renamings, [])[0])

    def final(self, name: str) -> str:
        """The parameter that a tensor of this name belongs to."""
        return str(_core.rename_source_key(name, self._renamings, [], self._prefix, self._state)[0])

    def merged(self, name: str) -> tuple[str, int, int] | None:
        """Where Transformers stacks a tensor of each expert: the Parameter, which part along N, and of how many; or None."""
        renamed = self.renamed(name)
        for entry in self._converters:
            target, pattern = entry.rename_source_key(renamed)
            if pattern is None:
                continue
            kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in entry.operations]
            if kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
                full = str(_core.rename_source_key(target, [], [], self._prefix, self._state)[0])
                return full, entry.source_patterns.index(pattern), len(entry.source_patterns)
            return None
        return None

    def changed_by(self, name: str) -> str | None:
        """The operations that Transformers puts a tensor through, or None where it is loaded as it is."""
        renamed = self.renamed(name)
        for entry in self._converters:
            if entry.rename_source_key(renamed)[1] is not None:
                return ", ".join(type(operation).__name__ for operation in entry.operations)
        return None
