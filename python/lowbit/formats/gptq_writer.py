"""Writing GPTQ checkpoints, version 2: what GPTQModel, vLLM and Transformers load.

The layout is drawn in gptq.py. Zeros are always stored, as they are (v2): all 2^(b-1) where the weight has none. A
permutation becomes an unsorted g_idx, and codes stand where their columns are in W.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.formats._bits import pack_codes
from lowbit.formats._folder import in_order, unquantized_linears, words, write_folder
from lowbit.formats._record import LinearRecord
from lowbit.formats._writer import Contents, FolderWriter, LayerSpec, WriteOptions, Writer, to_half
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["WRITER", "integer_target"]

_BITS: Final = (2, 3, 4, 8)


def integer_target(spec: LayerSpec, format: str, bits: tuple[int, ...]) -> Scheme:
    """The scheme with fp16 scales of an integer layer; ValueError where a format of integers and zeros cannot hold it."""
    scheme, K = spec.scheme, spec.shape[1]
    if not scheme.format.startswith("int") or scheme.bits not in bits:
        raise ValueError(f"{scheme}: {format} holds integers of {', '.join(map(str, bits))} bits")
    if scheme.zero_kind not in ("none", "int") or scheme.scaling != "group":
        raise ValueError(f"{scheme}: {format} has scales and integer zeros")
    if scheme.activation is not None or spec.inputs:
        raise ValueError(f"{scheme}: {format} does not say how inputs are quantized; compressed-tensors does")
    if scheme.group_size != -1 and K % scheme.group_size:
        raise ValueError(f"{scheme}: {format} needs K={K} to be a multiple of the group size")
    return Scheme(scheme.format, scheme.group_size, scheme.zero_kind, "float16", search=scheme.search)


def _target(spec: LayerSpec) -> Scheme:
    scheme = integer_target(spec, "gptq", _BITS)
    (N, K), bits = spec.shape, scheme.bits
    for name, size in (("N", N), ("K", K)):
        if size * bits % 32:
            raise ValueError(
                f"{scheme}: gptq packs {name}={size} codes of {bits} bits into words of 32, and this has a rest"
            )
    return scheme


def _encode(record: LinearRecord) -> dict[str, Tensor]:
    weight = record.weight
    bits, N, G = weight.scheme.bits, weight.N, weight.scales.shape[1]
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full((N, G), 1 << (bits - 1), dtype=torch.uint8, device=weight.device)
    made = {
        "qweight": words(in_order(weight)).t().contiguous(),
        "qzeros": words(pack_codes(zeros.t().contiguous(), bits)),
        "scales": weight.scales.t().contiguous(),
        "g_idx": _g_idx(weight),
    }
    return made if record.bias is None else {**made, "bias": record.bias}


def _g_idx(weight: QuantizedWeight) -> Tensor:
    K, group = weight.K, weight.scheme.group_size
    groups = torch.arange(K, dtype=torch.int32) // (K if group == -1 else group)
    if weight.perm is None or weight.perm.is_meta:
        return groups
    found = torch.empty_like(groups)
    found[weight.perm.long()] = groups
    return found


def _config(contents: Contents) -> dict[str, Any]:
    """The setting that most layers have; `dynamic` says which layers have another one, or none."""
    settings = {name: _setting(_target(layer.spec)) for name, layer in contents.layers.items()}
    ((bits, group_size), _), *_ = Counter(settings.values()).most_common(1)
    dynamic: dict[str, Any] = {}
    for name, (b, g) in settings.items():
        if (b, g) != (bits, group_size):
            dynamic[f"+:^{re.escape(name)}$"] = {"bits": b, "group_size": g}
    head = "lm_head" in contents.layers
    for name in unquantized_linears(contents):
        if name != "lm_head" and not _outside(name):
            dynamic[f"-:^{re.escape(name)}$"] = {}
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "format": "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "desc_act": any(
            layer.spec.has_perm and layer.spec.scheme.group_size != -1 for layer in contents.layers.values()
        ),
        "sym": all(layer.spec.scheme.symmetric for layer in contents.layers.values()),
        "lm_head": head,
        "pack_dtype": "int32",
        "true_sequential": True,
        "meta": {"quantizer": ["lowbit"]},
    }
    return {**config, "dynamic": dynamic} if dynamic else config


def _outside(name: str) -> bool:
    """Whether a module is outside the numbered blocks, where GPTQ's loaders leave everything alone."""
    return not any(part.isdecimal() for part in name.split("."))


def _setting(scheme: Scheme) -> tuple[int, int]:
    return scheme.bits, scheme.group_size


def _check(contents: Contents) -> None:
    if not contents.layers:
        raise ValueError("there is no quantized layer to write")


def _write(contents: Contents, folder: Path, options: WriteOptions) -> None:
    write_folder(_HOW, contents, folder, options)


# Older loaders look for the same settings in a file of their own.
_HOW: Final = FolderWriter(to_half, _encode, _config, lambda contents: {"quantize_config.json": _config(contents)})
WRITER: Final = Writer(
    "gptq",
    "a folder in GPTQ's version 2, as GPTQModel has it: integers of 2, 3, 4 and 8 bits, act-order",
    False,
    "float16",
    frozenset({"embeddings"}),
    _target,
    _check,
    _write,
)
