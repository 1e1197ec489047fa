"""Which columns of a weight matter: the mean square of each input channel over some calibration inputs.

The search for scales minimises sum over n, k of importance[k] * (W[n,k] - W'[n,k])^2. With importance[k] = mean of x[k]^2 that
is the expected squared error of the layer's output, for inputs whose channels are not correlated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit._artifact import write_single
from lowbit._safetensors import SafetensorsFile, TensorInfo
from lowbit.errors import ArtifactError
from lowbit.linear import QuantizedLinear

__all__ = ["collect_importance", "load_importance", "save_importance"]


class _Squares:
    """Sum of squares of each input channel of one layer, and how many inputs there were."""

    def __init__(self, K: int) -> None:
        self.total = torch.zeros(K, dtype=torch.float64)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        # Sums in fp32 over a batch, and in fp64 over batches: batches are short.
        self.total += flat.float().square().sum(0).double().cpu()
        self.rows += flat.shape[0]


def collect_importance(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, Tensor]:
    """Run a model on calibration inputs and measure the mean square of each input channel of its linear layers.

    A few dozen sequences of the kind of text that the model will see are enough. Padding counts like any token: leave it
    out, or keep batches of equal length. Runs without gradients, in eval mode, and leaves the model as it was.

    Args:
        model: with nn.Linear (or QuantizedLinear) layers.
        batches: inputs. A dict is passed as keyword arguments, a tuple or list as positional ones, anything else as the
            only one.
        forward: how to run the model on a batch instead.

    Returns:
        Layer name -> fp32 [K], of mean 1, for every linear layer that was reached by an input; for `quantize_` and
        `convert_checkpoint`.

    Raises:
        ValueError: there are no batches, no linear layers, or an input holds NaN or infinity (the message names the layer).

    Example:
        >>> importance = lowbit.collect_importance(model, [tokenizer(text, return_tensors="pt") for text in texts])
        >>> lowbit.quantize_(model, "int4-g128", importance=importance)
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | QuantizedLinear) and name}
    if not layers:
        raise ValueError("the model has no linear layers")
    found = {name: _Squares(layer.in_features) for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(_hook(found[name]), with_kwargs=True) for name, layer in layers.items()]
    training = {module: module.training for module in model.modules()}
    model.eval()
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                _run(model, batch) if forward is None else forward(model, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
    if count == 0:
        raise ValueError("there are no batches to calibrate with")
    return {name: _normalised(name, squares) for name, squares in found.items() if squares.rows}


def _hook(squares: _Squares) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        squares.add(args[0] if args else next(iter(kwargs.values())))

    return hook


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def _normalised(name: str, squares: _Squares) -> Tensor:
    """The mean square, divided by its own mean, so that layers and models compare; all ones for a layer of zeros."""
    mean = squares.total / squares.rows
    whole = float(mean.mean())
    if not torch.isfinite(mean).all():
        raise ValueError(f"an input of {name} holds NaN or infinity")
    return (mean / whole if whole > 0 else torch.ones_like(mean)).float()


def save_importance(path: str | os.PathLike[str], importance: Mapping[str, Tensor]) -> None:
    """Write what `collect_importance` gave to a safetensors file, for the command line.

    Example:
        >>> lowbit.save_importance("importance.safetensors", importance)
    """
    for name, values in importance.items():
        if values.dim() != 1:
            raise ValueError(f"importance of {name} is {list(values.shape)}, not [K]")
    write_single(path, {name: values.float() for name, values in importance.items()}, {"lowbit": "importance"})


def load_importance(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what `save_importance` wrote.

    Raises:
        ArtifactError: the file is not one of these.

    Example:
        >>> lowbit.load_importance("importance.safetensors")["layers.0.up"].shape
        torch.Size([384])
    """
    with SafetensorsFile(path) as file:
        if file.metadata.get("lowbit") != "importance":
            raise ArtifactError(f"{file.path}: not a file of importance: its metadata does not say so")
        for name, info in file.tensors.items():
            if info.dtype != torch.float32 or len(info.shape) != 1:
                raise ArtifactError(f"{file.path}: {name[:200]!r} is {info.dtype_name} {list(info.shape)}, not F32 [K]")
        return {name: file.read(name) for name in file}


def check_columns(
    importance: Mapping[str, Tensor], tensors: Mapping[str, TensorInfo], quantized: Collection[str]
) -> None:
    """Refuse importance for layers that a checkpoint does not have, or of another length than K."""
    if unknown := sorted(name for name in importance if f"{name}.weight" not in tensors):
        raise ValueError(f"importance names {', '.join(unknown[:5])}, which the model does not have")
    for name, values in importance.items():
        K = tensors[f"{name}.weight"].shape[-1]
        if name in quantized and tuple(values.shape) != (K,):
            raise ValueError(f"{name}: importance must be [K={K}], got {list(values.shape)}")
