"""PackedModule: one packed, frozen weight in a module. What QuantizedLinear and QuantizedExperts have in common.

What state_dict holds, whatever the layout of the weight in memory (prefix left out):

    weight_packed, weight_scales, weight_zeros or weight_offsets, weight_perm, and of scales of two levels
    weight_super_scales, weight_super_offsets or weight_scale_offset               the canonical tensors
    weight_scheme                           uint8, the scheme's string: a state_dict of another scheme is refused
    and the Parameters that a kind of module has beside its weight, by their names
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

import torch
from torch import Tensor, nn

from lowbit import _C
from lowbit._canonical import device_layout, preferred_layout, stored_tensors
from lowbit._experts import ExpertWeights
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["CANONICAL", "PackedModule", "frozen"]

Self = TypeVar("Self", bound="PackedModule")

#: The layout of a module that is not prepared.
CANONICAL: Final = 0
_WEIGHT_PARTS: Final = (
    "packed", "scales", "zeros", "offsets", "perm", "super_scales", "super_offsets", "scale_offset"
)  # fmt: skip


def frozen(tensor: Tensor) -> nn.Parameter:
    """A Parameter that does not require grad."""
    return nn.Parameter(tensor, requires_grad=False)


class PackedModule(nn.Module):
    """A module with one packed weight, [N, K] or one for each of E experts.

    Args:
        scheme: a Scheme or its string.
        shape: (N, K), or (E, N, K).
        device: where to make the (uninitialised) tensors; "meta" makes none.
        has_perm: the weight has a column permutation.
        batch_invariant: a row of the result has the same bits whatever other rows there are.

    Attributes:
        weight: uint8 [bytes], or [E, bytes]; does not require grad.
        layout: value of the layout enum; 0 (canonical) until the module is prepared.
    """

    #: Parameters beside the weight, in the order of state_dict.
    _beside: ClassVar[tuple[str, ...]] = ()
    #: Those of them that a state_dict must have where the module has them.
    _needed: ClassVar[tuple[str, ...]] = ()

    weight: nn.Parameter
    _tied: list[PackedModule]

    def __init__(
        self,
        scheme: Scheme | str,
        shape: Sequence[int],
        device: torch.device | str | None,
        has_perm: bool,
        batch_invariant: bool,
    ) -> None:
        super().__init__()
        self.scheme = Scheme.parse(scheme)
        self.scheme.check_shape(*shape[-2:])
        self.has_perm = has_perm
        self.flags = _C.enums()["flags"]["batch_invariant"] if batch_invariant else 0
        self._shape = tuple(shape)
        self.__dict__["_tied"] = []  # modules with the same weight; not submodules of this one
        self._empty_weight(torch.empty(0, device=device).device)  # follows `with torch.device(...)` too

    # -- the weight in memory -------------------------------------------------------------------------------------------

    def _set_layout(self, layout: int) -> None:
        self.layout = layout
        self._desc = self.scheme.desc(layout, self.has_perm)

    def _empty_weight(self, device: torch.device) -> None:
        self._set_layout(CANONICAL)
        layout = device_layout(device, self.scheme, self.has_perm)
        if layout is None:  # meta: as large as it will be on the CPU
            layout = preferred_layout(torch.device("cpu"), self.scheme, self.has_perm)
        *experts, N, K = self._shape
        size = _C.packed_size(N, K, self.scheme.desc(layout, self.has_perm))
        self.weight = frozen(torch.empty((*experts, size), dtype=torch.uint8, device=device))

    def _set_weight(self, weight: Any, device: torch.device) -> None:
        self._replace_weight(weight, device)
        self._share()

    def _share(self) -> None:
        """Give the modules that are tied to this one the very same Parameter, in the same layout."""
        for other in self._tied:
            other.has_perm = self.has_perm
            other._set_layout(self.layout)
            other.weight = self.weight

    def tie(self, other: PackedModule) -> None:
        """Share one weight with another module, now and wherever it is moved or repacked: an embedding and an output layer.

        Args:
            other: takes this module's weight; of the same scheme and shape.

        Raises:
            ValueError: scheme or shape differ.

        Example:
            >>> model.embed_tokens.tie(model.lm_head)
        """
        if not other.scheme.same_storage(self.scheme) or other._shape != self._shape:
            raise ValueError(
                f"cannot tie a weight {self.scheme} {list(self._shape)} to one of {other.scheme} {list(other._shape)}"
            )
        group = [*self._tied, self, other]
        for module in group:
            module.__dict__["_tied"] = [one for one in group if one is not module]
        self._share()

    def untie(self) -> None:
        """Stop sharing the weight: changing this module's leaves those that it was tied to as they are."""
        for other in self._tied:
            other.__dict__["_tied"] = [one for one in other._tied if one is not self]
        self.__dict__["_tied"] = []

    def _replace_weight(self, weight: Any, device: torch.device) -> None:
        if weight.is_meta:
            self.has_perm = weight.has_perm
            self._empty_weight(weight.device)
            return
        layout = preferred_layout(device, weight.scheme, weight.has_perm)
        packed = weight.pack(layout, device)
        self.has_perm = weight.has_perm
        self._set_layout(layout)
        self.weight = frozen(packed)

    def _canonical_weight(self) -> Any:
        self._need_weight("quantized_weight()")
        # Bytes in the layout of a device that they were moved away from are unpacked on the CPU.
        kind = QuantizedWeight if len(self._shape) == 2 else ExpertWeights
        return kind.unpack(self.weight.detach(), self.scheme, self._shape, self.layout, self.has_perm)

    def _need_weight(self, what: str) -> None:
        if self.weight.is_meta or self.layout == CANONICAL:
            where = "is on the meta device" if self.weight.is_meta else "was never loaded"
            raise RuntimeError(f"{what}: the weight of {self._label()} {where}: call load_state_dict")

    def _not_prepared(self) -> RuntimeError:
        """Why a layer cannot run yet; raise it."""
        return RuntimeError(f"the weight of {self._label()} is not prepared: load a state_dict, or call prepare()")

    def _label(self) -> str:
        raise NotImplementedError

    def _state(self) -> str:
        """The state of the weight, for `print(model)`."""
        layout = next(name for name, value in _C.enums()["layout"].items() if value == self.layout)
        return f"layout={layout}" if self.layout != CANONICAL else "not prepared"

    def prepare(self: Self) -> Self:
        """Bring the weight into the layout that kernels of its device read; nothing happens when it is in it already.

        Called by `quantize_`, by loading and by `.to()`; call it yourself after moving bytes between kinds of devices.

        Raises:
            RuntimeError: there is no weight yet (a fresh module, or one on the meta device).
            ValueError: this build has no kernels for the device.
        """
        self._need_weight("prepare()")
        device = self.weight.device
        if self.layout != preferred_layout(device, self.scheme, self.has_perm):
            self._set_weight(self._canonical_weight(), device)
        return self

    # -- moving ---------------------------------------------------------------------------------------------------------

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta, before = self.weight.is_meta, self.weight.device
        keep = {id(p) for name, p in self._parameters.items() if p is not None and name != "bias"}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in keep and moved.dtype != tensor.dtype:  # .half(), .type(): bytes and scales stay
                return tensor.to(moved.device)
            return moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.weight.is_meta:
            self._empty_weight(self.weight.device)  # to_empty(): the bytes mean nothing
        for other in self._tied:  # which may have been replaced, not changed in place
            other._parameters["weight"] = self._parameters["weight"]
        if was_meta and self.layout == CANONICAL:
            return self
        moved = self.layout != CANONICAL and self.weight.device.type != before.type
        # Without kernels there (or on the meta device) the bytes keep their layout, and are valid again when back.
        if moved and device_layout(self.weight.device, self.scheme, self.has_perm) is not None:
            self.prepare()
        return self

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Let the bias require grad, or not; the weight is frozen either way."""
        bias = self._parameters.get("bias")
        if bias is not None:
            bias.requires_grad_(requires_grad)
        return self

    # -- state_dict -------------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._canonical().items():
            destination[f"{prefix}weight_{name}"] = tensor
        text = str(self.scheme).encode()
        destination[prefix + "weight_scheme"] = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
        for name in self._beside:
            if (parameter := self._parameters[name]) is not None:
                destination[prefix + name] = parameter if keep_vars else parameter.detach()

    def _canonical(self) -> dict[str, Tensor]:
        if not self.weight.is_meta and self.layout != CANONICAL:
            found: dict[str, Tensor] = self._canonical_weight().tensors()
            return found
        # Nothing to unpack: tensors of the right shapes, which is what callers that fill a state_dict in place need.
        shapes = stored_tensors(self.scheme, self._shape, self.has_perm)
        device = self.weight.device
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, (dtype, shape) in shapes.items()}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        mine = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        known = {f"weight_{part}" for part in _WEIGHT_PARTS} | {"weight_scheme", *self._beside}
        if strict:
            unexpected_keys += [prefix + n for n in mine if n not in known and n.split(".")[0] not in self._modules]
        wanted = [f"weight_{part}" for part in stored_tensors(self.scheme, self._shape)]
        wanted += [name for name in self._needed if self._parameters[name] is not None]
        missing_keys += [prefix + name for name in wanted if name not in mine]
        present = {name: tensor for name, tensor in mine.items() if name in known}
        if not present:
            return
        try:
            self._load(present, bool(local_metadata.get("assign_to_params_buffers", False)))
        except (ValueError, RuntimeError) as error:
            error_msgs.append(f"{prefix or 'the module'}: {error}")

    def _load(self, tensors: dict[str, Tensor], assign: bool) -> None:
        """Everything is checked before anything changes; the missing is left as it is."""
        parts = {name[len("weight_") :]: t for name, t in tensors.items() if name.startswith("weight_")}
        stated = parts.pop("scheme", None)
        if stated is not None and not stated.is_meta:
            text = bytes(stated.tolist()).decode(errors="replace")
            if not Scheme.parse(text).same_storage(self.scheme):
                raise ValueError(f"the state_dict holds a weight of scheme {text}, the module is {self.scheme}")
        weight: QuantizedWeight | ExpertWeights | None = None
        if parts:
            kind = QuantizedWeight if len(self._shape) == 2 else ExpertWeights
            weight = kind.from_tensors(parts, self.scheme, self._shape)
        beside = self._check_beside({name: tensors[name] for name in self._beside if name in tensors})
        if self.weight.is_meta and not assign:
            raise ValueError("the module is on the meta device: pass assign=True, or call to_empty() first")
        if weight is not None:
            self._set_weight(weight, weight.device if assign else self.weight.device)
        self._set_beside(beside, assign)

    def _check_beside(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a state_dict holds beside the weight, as `_set_beside` takes it; ValueError where it does not fit."""
        return tensors

    def _set_beside(self, tensors: dict[str, Tensor], assign: bool) -> None:
        """Take what `_check_beside` gave; nothing can fail here."""
