"""PEFT: LoRA on QuantizedLinear. get_peft_model, PeftModel.from_pretrained and add_adapter find it by themselves.

    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))      # train, save_pretrained, from_pretrained
    model = model.merge_and_unload()                                            # quantized to each layer's scheme again

The adapter is trained on top of the quantized product; gradients flow through it to x, and the weight stays as it is.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Final

import torch
from torch import Tensor

from lowbit._packed import PackedModule
from lowbit.linear import QuantizedLinear
from lowbit.weight import QuantizedWeight

try:
    from peft.tuners import tuners_utils as _utils
    from peft.tuners.lora import layer as _layer
    from peft.tuners.lora import model as _model
    from peft.utils import other as _other
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] != "peft":
        raise
    raise ModuleNotFoundError("lowbit.integrations.peft needs PEFT: pip install 'lowbit[hf]'", name="peft") from None

__all__ = ["LoraQuantizedLinear", "register"]

_PATCHED: Final = "_lowbit_original"
# Ways to initialise an adapter that leave the base weight alone.
_INITS: Final = (True, False, "gaussian", "orthogonal", "eva")
# Options of LoraConfig that PEFT has for its own layers; some of its versions would ignore them here.
_UNSUITED: Final = ("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora", "velora_config")


class LoraQuantizedLinear(_layer.Linear):
    """LoRA around a QuantizedLinear.

    `merge` dequantizes W, adds the adapters and quantizes to the layer's scheme again, act-order kept; that rounds, so the
    result is near to the sum and not equal to it. `unmerge` puts back the weight from before the merge, bit by bit, which
    is kept until then. To merge without rounding, `model.dequantize()` first.
    """

    def __init__(self, base_layer: Any, adapter_name: str, **kwargs: Any) -> None:
        self._original: tuple[QuantizedWeight, Tensor | None, list[PackedModule]] | None = None
        super().__init__(base_layer, adapter_name, **kwargs)
        if getattr(self, "fan_in_fan_out", False):
            warnings.warn(f"fan_in_fan_out=True is ignored: {self._about()} keeps [N, K]", stacklevel=2)
            self.fan_in_fan_out = False

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Variants of LoRA that need nothing of the base layer but its output."""
        found: dict[tuple[str, ...], Any] = super().lora_variants
        return {key: found[key] for key in ((), ("alora_invocation_tokens",)) if key in found}

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; ValueError for one that would change or look at the dense weight."""
        config = kwargs.get("config")

        def option(name: str, default: Any) -> Any:
            return kwargs.get(name, default) if config is None else getattr(config, name, default)

        if option("use_dora", False):
            raise ValueError(f"use_dora=True needs the norms of a dense weight; {self._about()} has none")
        if unsuited := [name for name in _UNSUITED if option(name, None)]:
            raise ValueError(f"{', '.join(unsuited)}: not supported on {self._about()}")
        if (init := option("init_lora_weights", True)) not in _INITS:
            raise ValueError(
                f"init_lora_weights={init!r} changes the base weight, which is quantized ({self._about()}); "
                f"possible are {', '.join(map(repr, _INITS))}"
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def _about(self) -> str:
        return f"a QuantizedLinear of scheme {self.get_base_layer().scheme}"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight and quantize it again.

        Args:
            safe_merge: check the sum for values that are not finite before anything changes.
            adapter_names: which; by default the active ones.

        Raises:
            ValueError: the sum is not finite, a scale overflows its dtype, or an adapter is one that cannot be merged;
                nothing has changed.
        """
        names = [name for name in _utils.check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base: QuantizedLinear = self.get_base_layer()
        original, bias, tied = self._original or (
            base.quantized_weight(),
            None if base.bias is None else base.bias.detach().clone(),
            list(base._tied),
        )
        merged = [*self.merged_adapters, *names]
        if fixed := [name for name in merged if name in getattr(self, "lora_variant", ())]:
            raise ValueError(f"{', '.join(fixed)}: an adapter that is active for some tokens only cannot be merged")
        delta, shift = self._sum(merged)
        if safe_merge and not (bool(torch.isfinite(delta).all()) and bool(torch.isfinite(shift).all())):
            raise ValueError(f"the adapters {', '.join(merged)} hold values that are not finite")
        if bias is None and bool(shift.any()):
            raise ValueError(f"lora_bias=True cannot be merged: {self._about()} has no bias")
        weight = _requantized(original, delta if base.input_pre_scale is None else delta / base.input_pre_scale)
        self._original = original, bias, tied
        base.untie()  # an embedding that shares the weight keeps it as it is
        base._set_weight(weight, base.weight.device)
        if bias is not None and base.bias is not None and bool(shift.any()):
            base.bias.data.copy_(bias + shift)
        self.merged_adapters.extend(names)
        warnings.warn(
            "merging into a quantized weight rounds to its scheme again; unmerge undoes it exactly", stacklevel=2
        )

    def _sum(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """What adapters add to the weight, and to the bias (lora_bias), in fp32."""
        device = self.get_base_layer().weight.device
        delta = torch.zeros(self.out_features, self.in_features, device=device)
        shift = torch.zeros(self.out_features, device=device)
        for name in names:
            delta += self.get_delta_weight(name).detach().float().to(device)
            if self.lora_bias.get(name):
                shift += self.lora_B[name].bias.detach().float().to(device) * self.scaling[name]
        return delta, shift

    def unmerge(self) -> None:
        """Put back the weight from before the first merge, bit by bit."""
        if self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: QuantizedLinear = self.get_base_layer()
        (weight, bias, tied), self._original = self._original, None
        if tied:
            tied[0].tie(base)
        else:
            base._set_weight(weight.to(base.weight.device), base.weight.device)
        if bias is not None and base.bias is not None:
            base.bias.data.copy_(bias)
        self.merged_adapters.clear()


def _requantized(weight: QuantizedWeight, delta: Tensor) -> QuantizedWeight:
    """The scheme's nearest weight to `weight` + `delta`; columns stay in the order that they are stored in."""
    if not bool(delta.any()):
        return weight
    dense = weight.dequantize() + delta
    if weight.perm is None:
        return QuantizedWeight.quantize(dense, weight.scheme)
    # Groups of an act-order weight are groups of its stored columns.
    stored = QuantizedWeight.quantize(dense[:, weight.perm.long()], weight.scheme)
    tensors = {**stored.tensors(), "perm": weight.perm}
    return QuantizedWeight.from_tensors(tensors, weight.scheme, weight.shape)


# -- registration ----------------------------------------------------------------------------------------------------------


def register() -> None:
    """Make LoraModel use LoraQuantizedLinear, and "all-linear" mean QuantizedLinear too; again after a reload.

    PEFT's extension point is a method of each LoraConfig (`_register_custom_module`), which a saved config does not keep: it
    is called here for every config on its way to LoraModel.
    """
    create = _model.LoraModel._create_new_module
    create = getattr(create, _PATCHED, create)

    @functools.wraps(create)
    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, _utils.BaseTunerLayer) else target
        if isinstance(base, QuantizedLinear):
            lora_config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
        return create(lora_config, adapter_name, target, **kwargs)

    setattr(create_new_module, _PATCHED, create)
    _model.LoraModel._create_new_module = staticmethod(create_new_module)

    _refuse_copies()
    include = getattr(_utils, "_maybe_include_all_linear_layers", None)
    if include is None:
        return
    include = getattr(include, _PATCHED, include)

    @functools.wraps(include)
    def include_all_linear_layers(peft_config: Any, model: Any) -> Any:
        before = getattr(peft_config, "target_modules", None)
        found = include(peft_config, model)
        lora = getattr(peft_config, "peft_type", None) == "LORA"  # other tuners do not know the layer
        if lora and isinstance(before, str) and before.lower() == "all-linear":
            output = getattr(model, "get_output_embeddings", lambda: None)()
            found.target_modules = set(found.target_modules) | {
                name for name, m in model.named_modules()
                if isinstance(m, QuantizedLinear) and m is not output and not name.endswith(".base_layer")
            }  # fmt: skip
        return found

    setattr(include_all_linear_layers, _PATCHED, include)
    _utils._maybe_include_all_linear_layers = include_all_linear_layers


def _refuse_copies() -> None:
    """Say what is wrong with `modules_to_save` and `trainable_token_indices` that name a quantized layer.

    PEFT copies such a layer and trains the copy, which packed weights do not allow; torch's message names no layer.
    """
    wrapper = _other.AuxiliaryTrainingWrapper
    create = getattr(wrapper.__init__, _PATCHED, wrapper.__init__)

    @functools.wraps(create)
    def __init__(self: Any, module_to_save: Any, *args: Any, **kwargs: Any) -> None:
        found = next((m for m in module_to_save.modules() if isinstance(m, PackedModule)), None)
        if found is not None:
            raise TypeError(
                f"{self._error_message_name()} cannot be applied to {type(module_to_save).__name__} of scheme "
                f"{found.scheme}: a quantized weight is not trained; leave it dense with overrides={{...: None}}"
            )
        create(self, module_to_save, *args, **kwargs)

    setattr(__init__, _PATCHED, create)
    wrapper.__init__ = __init__


HOST: Final = _model  # last, so that whoever sees it sees a complete module
register()
