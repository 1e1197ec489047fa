"""Where in a model a quantized layer can stand: nn.Linear, and Parameters that hold a weight for every expert."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ExpertsParameter",
    "beside_gathering",
    "embeds",
    "experts_at",
    "experts_parameters",
    "features",
    "mixtures_in",
    "replace_module",
    "router_shape",
    "routes",
    "tied_linears",
    "used_directly",
]

# What Transformers calls the weights of experts, in the order that they are applied.
_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
# What chooses or weighs experts, by its name beside them: gate, router (in which there may be a gate), shared_expert_gate.
_ROUTER = re.compile(r"(?:.*_)?(?:gate|router)")


@dataclasses.dataclass(frozen=True)
class ExpertsParameter:
    """A Parameter [E, N, K], or [E, K, N] where the model multiplies by it from the right.

    Args:
        owner: the module that it is a Parameter of.
        name: in that module.
        transposed: whether it is [E, K, N].
    """

    owner: nn.Module
    name: str
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The Parameter itself."""
        found = self.owner._parameters[self.name]
        assert found is not None
        return found

    @property
    def weight(self) -> Tensor:
        """W[E, N, K], a view."""
        dense = self.parameter.detach()
        return dense.transpose(1, 2) if self.transposed else dense

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        E, N, K = self.weight.shape
        return E, N, K

    def stand_in(self) -> nn.Linear:
        """An nn.Linear without values that has the features of one expert, for whoever asks about layers."""
        _, N, K = self.shape
        with torch.device("meta"):
            return nn.Linear(K, N, bias=False)


def experts_parameters(model: nn.Module) -> dict[str, ExpertsParameter]:
    """Path ("model.layers.0.mlp.experts.gate_up_proj") -> the weights of experts that Transformers keeps there.

    Known by what its decorator `use_experts_implementation` gives to a class: how the Parameters are multiplied by is not
    written in their shapes.
    """
    found = {}
    for path, module in model.named_modules():
        for name in _PROJECTIONS:
            if (one := _experts(module, name)) is not None:
                found[f"{path}.{name}" if path else name] = one
    return found


def experts_at(model: nn.Module, path: str) -> ExpertsParameter | None:
    """The weights of experts at a path, or None."""
    parent, _, name = path.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return None
    return _experts(module, name) if name in _PROJECTIONS else None


def _experts(module: nn.Module, name: str) -> ExpertsParameter | None:
    parameter = module._parameters.get(name)
    if parameter is None or parameter.dim() != 3 or not hasattr(type(module), "_apply_gate"):
        return None
    transposed = getattr(module, "is_transposed", None)
    return ExpertsParameter(module, name, transposed) if isinstance(transposed, bool) else None


def embeds(module: nn.Module) -> bool:
    """Whether a module is an nn.Embedding that does nothing but gather rows."""
    return isinstance(module, nn.Embedding) and beside_gathering(module) is None


def beside_gathering(embedding: nn.Embedding) -> str | None:
    """What an nn.Embedding does, or may do, but gather rows; None for a plain one."""
    if type(embedding) is not nn.Embedding:
        return f"{type(embedding).__name__} is a subclass of nn.Embedding"
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(embedding, option):
            return f"an nn.Embedding with {option} changes its weight as it runs, or while it is trained"
    return None


def tied_linears(model: nn.Module, embedding: nn.Embedding) -> list[str] | None:
    """Paths of the output layers (nn.Linear) that share an embedding's weight; None where something else shares it."""
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        if module is embedding or all(p is not embedding.weight for p in module._parameters.values()):
            continue
        if type(module) is not nn.Linear:
            return None
        found.append(path)
    return found


def routes(name: str, mixes: Callable[[str], bool]) -> bool:
    """Whether a layer chooses or weighs the experts of a mixture: it is, or is in, a router or gate beside them.

    Args:
        name: of the layer.
        mixes: whether there are experts in the module of a name.
    """
    parts = name.split(".")
    return any(_ROUTER.fullmatch(part) and mixes(".".join(parts[:i])) for i, part in enumerate(parts))


# self.wo.weight, but for what a packed weight can answer too, and slices, which are for weights cut by hand; and casts to its
# dtype.
_USE = re.compile(
    r"self\.(\w+)\.weight\b(?!\[|\.(?:device|dtype|shape|size|_))"
    r"|\b(?:to|type)\((?:dtype=)?self\.(\w+)\.weight\.dtype\)"
)
_SETUP = re.compile(r"__init__|_?(?:init|reset|tie|set|get)_.*")


def used_directly(model: nn.Module, path: str) -> bool:
    """Whether the module around a layer uses its weight without calling it, which is not possible with a packed one.

    T5 casts x to the dtype of `self.wo.weight`, Mamba multiplies by `self.dt_proj.weight`: what methods do stands in their
    source.
    """
    parent, _, name = path.rpartition(".")
    kind: Any = type(model.get_submodule(parent))  # Any: for mypy the class of a Module is not hashable
    return name in _uses(kind)


@functools.cache
def _uses(kind: type) -> frozenset[str]:
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, method in vars(base).items():
            if not inspect.isfunction(method) or _SETUP.fullmatch(name):
                continue
            try:
                source = inspect.getsource(method)
            except (OSError, TypeError):  # made without a file
                continue
            found.update(*(match.groups() for match in _USE.finditer(source)))
    return frozenset(found - {None})


def mixtures_in(model: nn.Module) -> set[str]:
    """Paths of the modules that have experts in them."""
    return {path for path, module in model.named_modules() if "experts" in module._modules}


def router_shape(module: nn.Module) -> tuple[int, int] | None:
    """(N, K) of the dense weight of a router that is a module of its own kind, as Transformers has them."""
    weight = module._parameters.get("weight")
    return (weight.shape[0], weight.shape[1]) if weight is not None and weight.dim() == 2 else None


def features(shape: tuple[int, ...]) -> str:
    """A weight's shape, for messages."""
    return ", ".join(f"{name}={size}" for name, size in zip("ENK"[-len(shape) :], shape, strict=True))


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` at `path`, where there is a module or a Parameter."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if isinstance(parent, nn.TransformerEncoderLayer):
        # In eval mode it hands the dense weights of its layers to one fused kernel. Zero means "an activation that this
        # kernel does not know", so that forward takes the ordinary path.
        parent.activation_relu_or_gelu = 0
    parent._parameters.pop(name, None)
    parent._modules[name] = new
