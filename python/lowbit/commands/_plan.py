"""Which tensors of a checkpoint to quantize: what `quantize_` decides from modules, decided from names and shapes.

Where a name is ambiguous the tensor is left alone and listed, because a layer that is quantized but is not an nn.Linear
in the model could not be loaded. An override with the layer's exact name settles it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lowbit import convert
from lowbit._places import routes
from lowbit._safetensors import TensorInfo
from lowbit.errors import ArtifactError
from lowbit.report import SkippedParameter
from lowbit.scheme import Scheme

__all__ = ["Override", "Plan", "make_plan"]

#: A pattern, and the scheme of the layers whose name it matches (None: leave them alone).
Override = tuple[str, Scheme | None]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The last part of a module's name, in every family on the Hub that was looked at: embed_tokens, wte, wpe, embed_in,
# word_embeddings, tok_embeddings, embed_positions, shared (T5), relative_attention_bias (T5).
_EMBEDDING = re.compile(
    r"(?:.*_)?(?:emb|embd|embed|embedding|embeddings|wte|wpe)(?:_.*)?|shared|relative_attention_bias"
)
# Families whose linear layers are transformers' Conv1D: W is stored as [K, N], and no shape tells when it is square.
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
# T5 casts x to the dtype of this weight, Mamba multiplies by that one: quantize_ finds such layers in the models' source.
_DIRECT = re.compile(r".*\.(?:DenseReluDense\.wo|mixer\.dt_proj|mamba\.dt_proj)")
_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do: `schemes` by layer, in the checkpoint's order, and the large tensors that stay as they are."""

    schemes: dict[str, Scheme]
    skipped: tuple[SkippedParameter, ...]


def make_plan(
    tensors: Mapping[str, TensorInfo],
    scheme: Scheme,
    overrides: Sequence[Override],
    config: Mapping[str, Any],
    strict: bool = False,
) -> Plan:
    """Decide for every tensor; everything that headers can tell is checked here, before any data is read.

    Args:
        tensors: of the checkpoint.
        scheme: for every linear layer that no override matches.
        overrides: the first pattern that matches a layer's name decides, as in `quantize_`.
        config: the model's config.json, or {}.
        strict: refuse to leave a tensor of 1 MB or more unquantized that no override names.

    Raises:
        ValueError: an override matches nothing or asks for what cannot be done, a scheme does not fit a shape, or
            `strict` found something.
        ArtifactError: the checkpoint is quantized already, or nothing in it would be.
    """
    if config.get("quantization_config"):
        raise ArtifactError("the checkpoint is quantized already: config.json has a quantization_config")
    matchers = [(pattern, convert._matcher(pattern), chosen) for pattern, chosen in overrides]
    judge = _Judge(tensors, config)
    modules: dict[str, str | None] = {}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" or module not in modules:
            modules[module] = judge.unsuited(name)
    _check_matches(matchers, modules)
    schemes: dict[str, Scheme] = {}
    reasons: dict[str, tuple[str, bool]] = {}
    for module, unsuited in modules.items():
        pattern, chosen = next(((p, s) for p, match, s in matchers if match(module)), (None, None))
        if pattern is not None and chosen is None:
            reasons[module] = (f"override {pattern!r} is none", True)
        elif unsuited is not None and not (pattern == module and judge.is_guess(module)):
            if pattern == module:
                raise ValueError(f"override {pattern!r} asks for {chosen}, but {module}: {unsuited}")
            reasons[module] = (unsuited, False)
        elif chosen is None and (
            reason := judge.output_layer(module) or judge.router(module) or judge.used_directly(module)
        ):
            reasons[module] = (f"{reason}; name it in an override to quantize it", False)
        else:
            schemes[module] = _fitting(module, chosen or scheme, tensors[f"{module}.weight"])
    skipped = _skipped(tensors, schemes, reasons, strict)
    if not schemes:
        why = "; ".join(f"{module}: {reason}" for module, (reason, _) in list(reasons.items())[:3])
        raise ArtifactError(f"no layer would be quantized ({why or 'there are no tensors'})")
    return Plan(schemes, skipped)


class _Judge:
    """What a tensor is, from its name, its shape, its neighbours and config.json."""

    def __init__(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._conv1d = str(config.get("model_type")) in _CONV1D_MODELS
        embeddings = {t.shape for name, t in tensors.items() if len(t.shape) == 2 and self._is_embedding(name)}
        # The largest is the vocabulary's; others hold positions or token types.
        size = max((shape[0] for shape in embeddings), default=0)
        self._vocabularies = {shape for shape in embeddings if shape[0] == size}
        parts = [name.split(".") for name in tensors]
        self._mixtures = {".".join(p[:i]) for p in parts for i, one in enumerate(p) if one in ("experts", "switch_mlp")}

    @staticmethod
    def _is_embedding(name: str) -> bool:
        return bool(_EMBEDDING.fullmatch(name.removesuffix(".weight").rpartition(".")[2]))

    def is_guess(self, module: str) -> bool:
        """Whether only the name speaks against quantizing a weight."""
        weight = self._tensors.get(f"{module}.weight")
        return weight is not None and len(weight.shape) == 2 and self._is_embedding(module)

    def unsuited(self, name: str) -> str | None:
        """Why a tensor is not the weight of an nn.Linear, or None."""
        tensor = self._tensors[name]
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if leaf != "weight" or not module:
            return "not the weight of a linear layer"
        if len(tensor.shape) != 2:
            return f"{len(tensor.shape)}-D, not the weight of a linear layer"
        if tensor.dtype not in _FLOATS:
            return f"{tensor.dtype_name} is not fp32, bf16 or fp16"
        if 0 in tensor.shape:
            return "empty"
        if self._is_embedding(module):
            return "an embedding, by its name"
        bias = self._tensors.get(f"{module}.bias")
        if (self._conv1d and last in _CONV1D) or (bias is not None and bias.shape != tensor.shape[:1]):
            return "stored as [K, N]: a Conv1D, not an nn.Linear"
        if last == "out_proj" and f"{parent}.in_proj_weight" in self._tensors:
            return "part of nn.MultiheadAttention, which hands it to a fused kernel"
        return None

    def output_layer(self, module: str) -> str | None:
        """Why a linear layer is taken for an output layer, or None."""
        if module.rpartition(".")[2] in convert._OUTPUT_LAYERS:
            return "an output layer"
        if self._tensors[f"{module}.weight"].shape in self._vocabularies:
            return "an output layer, by its shape, which is that of the embedding"
        return None

    def used_directly(self, module: str) -> str | None:
        """Why a linear layer is taken for one whose weight the model uses without calling it, or None."""
        return "the model uses it directly, by its name" if _DIRECT.fullmatch(module) else None

    def router(self, module: str) -> str | None:
        """Why a linear layer is taken for one that chooses experts, or None."""
        return "routes to experts, by its name" if routes(module, self._mixtures.__contains__) else None


def _check_matches(matchers: Sequence[tuple[str, Any, Scheme | None]], modules: Mapping[str, str | None]) -> None:
    linear = [module for module, reason in modules.items() if reason is None]
    for pattern, match, chosen in matchers:
        # A scheme is for linear layers; none may name anything. An exact name gets its own answer later.
        if not any(match(module) for module in (modules if chosen is None or pattern in modules else linear)):
            raise ValueError(f"override {pattern!r} matches no layer; layers are called, for example, {_some(linear)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) or "nothing: this checkpoint has no linear layers"


def _fitting(module: str, scheme: Scheme, weight: TensorInfo) -> Scheme:
    if scheme.activation_static:
        raise ValueError(f"{module}: scheme {scheme} needs calibrated input scales, which a checkpoint does not have")
    try:
        scheme.check_shape(*weight.shape)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None
    return scheme


def _skipped(
    tensors: Mapping[str, TensorInfo],
    schemes: Mapping[str, Scheme],
    reasons: Mapping[str, tuple[str, bool]],
    strict: bool,
) -> tuple[SkippedParameter, ...]:
    found = []
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if tensor.nbytes < convert._WORTH_REPORTING or (module in schemes and leaf == "weight"):
            continue
        reason, chosen = reasons.get(module, ("not the weight of a linear layer", False))
        found.append(SkippedParameter(name, tensor.nbytes, reason, chosen))
    if strict:
        convert._refuse_surprises(found)
    return tuple(found)
