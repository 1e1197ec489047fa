"""The keys of a GGUF file, made from the config.json of a model of the Llama family.

Written: the architecture and every number that llama.cpp needs to build the graph. What a config says that has no key here
(a kind of rotary scaling that is not known) is refused, because the file would compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.formats._gguf_write import number, text

__all__ = ["architecture_of", "metadata_of", "rope_factors"]

#: model_type of config.json -> general.architecture.
_ARCHITECTURES: Final = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def architecture_of(config: Mapping[str, Any]) -> str:
    """general.architecture for a config.json.

    Raises:
        ValueError: it is not known how llama.cpp calls this model.
    """
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(
            f"model_type {str(kind)[:80]!r} of config.json is not one of {known}: take names and keys from a GGUF file of "
            "the same model (--metadata-from)"
        )
    return _ARCHITECTURES[kind]


def metadata_of(config: Mapping[str, Any], name: str) -> dict[str, bytes]:
    """Keys and values for a config.json.

    Raises:
        ValueError: a number that the graph needs is missing or is none, or the rotary embedding is of an unknown kind.
    """
    architecture = architecture_of(config)
    heads = _count(config, "num_attention_heads")
    head_dim = config.get("head_dim") or _count(config, "hidden_size") // heads
    keys = {
        "block_count": _count(config, "num_hidden_layers"),
        "context_length": _count(config, "max_position_embeddings"),
        "embedding_length": _count(config, "hidden_size"),
        "feed_forward_length": _count(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": _count(config, "vocab_size"),
    }
    found = {"general.architecture": text(architecture), "general.type": text("model"), "general.name": text(name)}
    found |= {f"{architecture}.{key}": number("u32", value) for key, value in keys.items()}
    epsilon = config.get("rms_norm_eps")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ValueError(f"rms_norm_eps of config.json is {str(epsilon)[:80]}")
    found[f"{architecture}.attention.layer_norm_rms_epsilon"] = number("f32", epsilon)
    return found | _rope(config, architecture)


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise ValueError(f"{key} of config.json is {str(value)[:80]}, a whole number is needed")
    return value


def _rope_settings(config: Mapping[str, Any]) -> tuple[float, str, Mapping[str, Any]]:
    """Base, kind of scaling, and its parameters, in the spelling of Transformers 5 or of 4."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"the rotary embedding of config.json is {str(parameters)[:80]}")
    base = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if isinstance(base, bool) or not isinstance(base, (int, float)) or not base > 0:
        raise ValueError(f"rope_theta of config.json is {str(base)[:80]}")
    return float(base), kind, parameters


def _rope(config: Mapping[str, Any], architecture: str) -> dict[str, bytes]:
    base, kind, parameters = _rope_settings(config)
    found = {f"{architecture}.rope.freq_base": number("f32", base)}
    if kind in ("default", "llama3"):  # llama3's factors are a tensor
        return found
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rotary scaling of kind {kind[:80]!r} is not written; default, linear, yarn and llama3 are")
    scaling = f"{architecture}.rope.scaling."
    found[scaling + "type"] = text(kind)
    found[scaling + "factor"] = number("f32", _parameter(parameters, "factor"))
    if kind == "yarn":
        original = parameters.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        found[scaling + "original_context_length"] = number("u32", int(original))
    return found


def _parameter(parameters: Mapping[str, Any], key: str) -> float:
    value = parameters.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{key} of the rotary scaling is {str(value)[:80]}")
    return float(value)


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """rope_freqs.weight fp32 [head_dim / 2], by which Llama 3 divides its rotary frequencies; None for other models.

    Wave lengths above the old context / low_freq_factor are stretched by `factor`, those below the old context /
    high_freq_factor are left alone, and between the two the share grows with old context / wave length.
    """
    base, kind, parameters = _rope_settings(config)
    if kind != "llama3":
        return None
    head_dim = config.get("head_dim") or _count(config, "hidden_size") // _count(config, "num_attention_heads")
    factor, low, high, old = (
        _parameter(parameters, key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    found = []
    for i in range(0, head_dim, 2):
        waves = old / (2 * math.pi * base ** (i / head_dim))  # in the old context
        share = min(max((waves - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - share) / factor + share))
    return torch.tensor(found, dtype=torch.float32)
