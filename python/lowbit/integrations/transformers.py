"""Transformers: quantize while from_pretrained loads, save_pretrained and back, checkpoints of other libraries.

    config = lowbit.LowbitConfig("int4-g128", overrides={"*.down_proj": "int6-g64"})
    model = AutoModelForCausalLM.from_pretrained("Llama-3.1-8B", quantization_config=config)
    model.save_pretrained("Llama-3.1-8B-int4")
    model = AutoModelForCausalLM.from_pretrained("Llama-3.1-8B-int4")

    config = lowbit.LowbitConfig(from_checkpoint=True)
    model = AutoModelForCausalLM.from_pretrained("Llama-3.1-8B-GPTQ", quantization_config=config)

`register` enters the two classes below into Transformers' tables; `lowbit.integrations._imports` calls it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from lowbit._packed import PackedModule
from lowbit._places import replace_module
from lowbit.embedding import QuantizedEmbedding
from lowbit.experts import QuantizedExperts
from lowbit.formats.native import METHOD, VERSION
from lowbit.integrations._dense import dequantize_experts, dequantized_embedding, dequantized_linear
from lowbit.integrations._experts import restore, switch
from lowbit.integrations._layers import Checkpoint, Dense
from lowbit.linear import QuantizedLinear
from lowbit.report import QuantizeReport
from lowbit.scheme import Scheme

try:
    from transformers.quantizers import auto as _auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] != "transformers":
        raise
    raise ModuleNotFoundError(
        "lowbit.LowbitConfig needs Transformers 5: pip install 'lowbit[hf]'", name="transformers"
    ) from None

if not hasattr(_auto, "register_quantizer") or not hasattr(HfQuantizer, "get_weight_conversions"):
    raise ImportError(
        f"lowbit.LowbitConfig needs Transformers 5, this is {sys.modules['transformers'].__version__}: "
        "pip install 'lowbit[hf]'"
    )

__all__ = ["LowbitConfig", "LowbitQuantizer", "attach", "register"]

_PATCHED: Final = "_lowbit_original"


class LowbitConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=)` does about lowbit.

    Args:
        scheme: a Scheme or its string, for every linear layer that nothing below names. None only with from_checkpoint.
        overrides: pattern -> scheme, or None to leave alone; as in `lowbit.quantize_`. An override with a scheme also
            quantizes an output layer, unless it is tied to an embedding; one that names the embedding quantizes both.
        modules_to_not_convert: names, or parts that names begin or end with, of modules to leave alone, as in the other
            configs of Transformers; in place of the output layer and the last module, which are left alone by default.
        from_checkpoint: the folder holds a checkpoint that another library quantized; run it on lowbit's kernels.

    Attributes:
        layers: path -> scheme of what is quantized, once a model has been loaded.

    Raises:
        ValueError: a scheme is not one, or neither a scheme nor from_checkpoint is given.

    Example:
        >>> config = LowbitConfig("int4-g128", overrides={"*.down_proj": "int6-g64", "lm_head": "int8"})
        >>> AutoModelForCausalLM.from_pretrained("Llama-3.1-8B", quantization_config=config)
    """

    def __init__(
        self,
        scheme: Scheme | str | None = None,
        *,
        overrides: Mapping[str, Scheme | str | None] | None = None,
        modules_to_not_convert: list[str] | None = None,
        from_checkpoint: bool = False,
        layers: Mapping[str, str] | None = None,
    ) -> None:
        if scheme is None and not from_checkpoint and layers is None:
            raise ValueError("LowbitConfig needs a scheme, such as 'int4-g128', or from_checkpoint=True")
        if from_checkpoint and (scheme is not None or overrides or modules_to_not_convert):
            raise ValueError(
                "from_checkpoint=True runs a checkpoint as it is: a scheme and overrides do not go with it"
            )
        if isinstance(modules_to_not_convert, str):
            raise ValueError(f"modules_to_not_convert is a list of names, got {modules_to_not_convert!r}")
        # Everything in __dict__ is JSON: Transformers copies, prints and writes it.
        self.quant_method = METHOD
        self.scheme = None if scheme is None else str(Scheme.parse(scheme))
        self.overrides = {p: None if s is None else str(Scheme.parse(s)) for p, s in (overrides or {}).items()}
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.from_checkpoint = from_checkpoint
        self.layers = dict(layers or {})

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        found: dict[str, Any] = {"quant_method": METHOD, "version": VERSION}
        for key in ("scheme", "overrides", "modules_to_not_convert", "from_checkpoint", "layers"):
            if value := getattr(self, key):
                found[key] = value
        return found

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that to_dict wrote; ValueError for a version or a key of a later lowbit."""
        values = dict(config_dict)
        values.pop("quant_method", None)
        version = values.pop("version", VERSION)
        known = {"scheme", "overrides", "modules_to_not_convert", "from_checkpoint", "layers"}
        if version != VERSION or (unknown := sorted(values.keys() - known)):
            what = f"version {version!r}" if version != VERSION else f"{', '.join(map(str, unknown))}"
            raise ValueError(f"quantization_config of lowbit has {what[:200]}; this lowbit reads version {VERSION}")
        values.setdefault("layers", {})
        made = cls(**values)
        return (made, kwargs) if return_unused_kwargs else made


class LowbitQuantizer(HfQuantizer):
    """What Transformers calls while it loads and saves a model with a LowbitConfig.

    Attributes:
        report: after quantizing on load, what `quantize_` reports.
    """

    requires_calibration = False
    quantization_config: LowbitConfig

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.from_checkpoint:
            self.pre_quantized = True  # Transformers was not shown the other library's config
        elif self.pre_quantized is False and quantization_config.scheme is None:
            raise ValueError("LowbitConfig has no scheme, and the model is not quantized")
        self.report: QuantizeReport | None = None
        self._work: Checkpoint | Dense | None = None
        self._device_map: dict[str, Any] = {}

    # -- loading --------------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """See the device map, as given and again as inferred."""
        if not isinstance(device_map, dict):
            return
        if "disk" in device_map.values() and not self.pre_quantized:
            raise ValueError(
                "a model that is quantized while it loads cannot be offloaded to disk: quantize it on a larger machine, "
                "save_pretrained, and load that"
            )
        self._device_map = device_map
        if self._work is not None:
            self._work.device_map = device_map

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            if not checkpoint_files:
                raise ValueError("a quantized checkpoint is read from files: state_dict= does not go with lowbit")
            self._work = Checkpoint(model, list(checkpoint_files), None if config.from_checkpoint else METHOD)
        else:
            skip = self.get_modules_to_not_convert(
                model, config.modules_to_not_convert, getattr(model, "_keep_in_fp32_modules", None)
            )
            self._work = Dense(model, str(config.scheme), config.overrides, skip)
        self._work.device_map = self._device_map

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a dense parameter becomes a quantized layer."""
        return isinstance(self._work, Dense) and param_name in self._work.names

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes per element that a parameter will have; device maps are inferred from it."""
        if isinstance(self._work, Dense) and (scheme := self._work.names.get(param_name)) is not None:
            return scheme.nbytes(*param.shape) / param.numel()
        return param.element_size()

    def get_quantize_ops(self) -> Any:
        """The operation that a dense parameter goes through."""
        assert isinstance(self._work, Dense)
        return self._work.operation()

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Ours before the model's own."""
        if not isinstance(self._work, Checkpoint):
            return weight_conversions
        return [*self._work.conversions(weight_conversions), *weight_conversions]

    def get_weight_conversions(self) -> list[Any]:
        """Ours, in versions of Transformers that do not call update_weight_conversions."""
        return self._work.conversions(None) if isinstance(self._work, Checkpoint) else []

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        work, self._work = self._work, None
        assert work is not None
        self.report = work.finish()
        _describe(model, self)
        return model

    # -- afterwards -----------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes: state_dict, with the shape of every quantized weight."""
        _describe(model, self)
        state: dict[str, Tensor] = model.state_dict()
        seen: set[int] = set()
        for path, module in _quantized(model):
            if id(module.weight) in seen:  # an output layer tied to the embedding: the config says so
                for name in [name for name in state if name.startswith(f"{path}.weight_")]:
                    del state[name]
                continue
            seen.add(id(module.weight))
            with _onloaded(module):
                tensors = module._canonical()
            state.update({f"{path}.weight_{part}": tensor for part, tensor in tensors.items()})
            state[f"{path}.weight_shape"] = torch.tensor(module._shape, device="cpu")
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        # A string is what the config of a model has that was not loaded.
        to: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        restore(model)
        made: dict[int, nn.Parameter] = {}  # of embeddings, by the weight that an output layer may share
        for path, module in list(_quantized(model)):
            if isinstance(module, QuantizedEmbedding):
                embedding = dequantized_embedding(module, to)
                replace_module(model, path, embedding)
                assert isinstance(embedding.weight, nn.Parameter)
                made[id(module.weight)] = embedding.weight
            elif isinstance(module, QuantizedLinear) and id(module.weight) in made:
                replace_module(model, path, dequantized_linear(module, to, made[id(module.weight)]))
            elif isinstance(module, QuantizedExperts):
                dequantize_experts(model, path, module, to)
            elif isinstance(module, QuantizedLinear):
                replace_module(model, path, dequantized_linear(module, to))
        return model

    def is_serializable(self) -> bool:
        """save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained; the weights themselves are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile traces through the ops."""
        return True


def attach(model: Any) -> None:
    """Make save_pretrained write a Transformers model that quantize_ or load_checkpoint changed, as one of lowbit's.

    A model that another library quantized before is left alone: that library's quantizer decides what is saved.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        quantizer = model.hf_quantizer = LowbitQuantizer(LowbitConfig(layers={}), pre_quantized=True)
    if getattr(quantizer.quantization_config, "quant_method", None) == METHOD:
        _describe(model, quantizer)


def _describe(model: Any, quantizer: LowbitQuantizer) -> None:
    """Write what the model holds now into its config."""
    config = quantizer.quantization_config
    config.from_checkpoint = False
    config.layers = {path: str(module.scheme) for path, module in _quantized(model)}
    model.config.quantization_config = config
    switch(model)
    experts = [path for path, module in _quantized(model) if isinstance(module, QuantizedExperts)]
    if experts:
        from lowbit.integrations._operations import without_conversions

        model._weight_conversions = without_conversions(model, experts)


def _quantized(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield path, module


def _onloaded(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """With the weight in memory, where accelerate keeps it elsewhere."""
    if not module.weight.is_meta or not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    aligned: contextlib.AbstractContextManager[None] = align_module_device(module, torch.device("cpu"))
    return aligned


# -- registration ----------------------------------------------------------------------------------------------------------


def register() -> None:
    """Enter LowbitConfig and LowbitQuantizer into Transformers' tables; again, after a reload, in place of the old ones."""
    # torch notes which functions a device context redirects when it first meets one. Transformers replaces some of them
    # while it builds a model: noted then, `with torch.device("meta")` would never again mean the real torch.linspace.
    with torch.device("cpu"):
        torch.empty(0)
    _enter(_auto.AUTO_QUANTIZATION_CONFIG_MAPPING, LowbitConfig, _auto.register_quantization_config)
    _enter(_auto.AUTO_QUANTIZER_MAPPING, LowbitQuantizer, _auto.register_quantizer)
    _patch(_auto)
    if (modeling := sys.modules.get("transformers.modeling_utils")) is not None:
        _patch(modeling)  # which has imported the function by name


def _enter(table: dict[str, Any], ours: type, through: Any) -> None:
    there = table.get(METHOD)
    if there is None:
        through(METHOD)(ours)
    elif (there.__module__, there.__qualname__) == (ours.__module__, ours.__qualname__):
        table[METHOD] = ours
    else:
        raise RuntimeError(f"{there.__module__}.{there.__qualname__} is registered as {METHOD!r} already")


def _patch(module: Any) -> None:
    """Put _choose before get_hf_quantizer.

    Where a folder's config names another library, Transformers constructs that library's config, which may need its
    package, and then refuses ours. There is no extension point before that.
    """
    current = getattr(module, "get_hf_quantizer", None)
    if current is None:
        return
    original = getattr(current, _PATCHED, current)

    @functools.wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        quantization_config = _asked(quantization_config)
        _choose(config, quantization_config)
        return original(config, quantization_config, *args, **kwargs)

    setattr(get_hf_quantizer, _PATCHED, original)
    module.get_hf_quantizer = get_hf_quantizer


def _choose(config: Any, asked: Any) -> None:
    """Where from_checkpoint was asked for, hide the other library's config; where a scheme was, refuse to quantize twice."""
    if getattr(asked, "quant_method", None) != METHOD or not hasattr(asked, "from_checkpoint"):
        return
    for part in (config, config.get_text_config(decoder=True)):
        other = getattr(part, "quantization_config", None)
        if other is None:
            continue
        method = other.get("quant_method") if isinstance(other, dict) else getattr(other, "quant_method", None)
        if asked.from_checkpoint:
            del part.quantization_config
        elif method != METHOD:
            raise ValueError(
                f"the checkpoint is quantized already, with {getattr(method, 'value', method)!r}: pass "
                "LowbitConfig(from_checkpoint=True) to run it as it is"
            )


def _asked(quantization_config: Any) -> Any:
    """The config that was passed, which may be a dict."""
    if isinstance(quantization_config, dict) and quantization_config.get("quant_method") == METHOD:
        return LowbitConfig.from_dict(quantization_config)
    return quantization_config


HOST: Final = _auto  # the module that holds the tables; last, so that whoever sees it sees a complete module
register()
