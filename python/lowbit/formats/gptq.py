"""GPTQ checkpoints: auto-gptq, GPTQModel, optimum, auto-round.

    qweight  int32 [K*b/32, N]     each column is stream(b) along K      (pack_dtype: words of 8 or 16 bits, same stream)
    qzeros   int32 [G, N*b/32]     each row is stream(b) along N
    scales   [G, N]                W[n,k] = scales[g,n] * (q[k,n] - z[g,n]),  g = g_idx[k]
    g_idx    int32 [K]             absent: k // group_size

v1 stores z - 1, in b bits: a stored 2^b - 1 is z = 0, as no quantizer makes a z above 2^b - 1. v2 stores z.
With act-order g_idx is not sorted: columns are brought together by group, and perm remembers where they were.

The Marlin serialisation has B and s instead, no zeros and no g_idx: see _marlin.py.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from lowbit._safetensors import TensorInfo
from lowbit.errors import ArtifactError
from lowbit.formats._bits import byte_rows, permute_codes, row_bytes, unpack_codes
from lowbit.formats._codes import group_about, integer_weight, sort_by_group
from lowbit.formats._format import Format
from lowbit.formats._marlin import marlin_codes, marlin_scales
from lowbit.formats._module import SCALE_DTYPES, Module, describe, modules
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, plain_tensors
from lowbit.formats._settings import Settings, agreed
from lowbit.formats._source import Source

__all__ = ["FORMAT"]

_WORDS: Final = (torch.int32, torch.int16, torch.uint8, torch.int8)
_BITS: Final = (2, 3, 4, 8)
_LEAVES: Final = ("qweight", "qzeros", "scales", "g_idx", "bias")
_MARLIN: Final = ("B", "s", "bias")
# What two configs of one checkpoint must not disagree about.
_KEYS: Final = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method", "pack_dtype")
# auto-round's names for v1 and v2.
_AUTO_ROUND: Final = {"auto_round:auto_gptq": "gptq", "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2"}


def _by_config(settings: Settings) -> str | None:
    method = settings.values.get("quant_method")
    if method in ("gptq", "marlin"):
        return f"quant_method is {method!r}"
    if method == "auto-round" and settings.values.get("packing_format") in _AUTO_ROUND:
        return f"quant_method is 'auto-round', packing_format {settings.values['packing_format']!r}"
    if method is None and "bits" in settings and "desc_act" in settings:
        return "it has bits and desc_act, as auto-gptq's quantize_config.json"
    return None


def _by_tensors(source: Source) -> str | None:
    for module in modules(source, "qweight", "B"):
        if "B" in module and "s" in module:
            return f"{module.path} has B {describe(module.info('B'))} and s, which is GPTQ's Marlin serialisation"
        if not {"qweight", "qzeros", "scales"} <= module.names.keys():
            continue
        qweight, qzeros, scales = (module.info(leaf) for leaf in ("qweight", "qzeros", "scales"))
        words = qzeros.dtype == qweight.dtype and qweight.dtype in _WORDS
        if words and len(qweight.shape) == len(scales.shape) == 2 and qweight.shape[1] == scales.shape[1] > 0:
            return f"{module.path} has qweight {describe(qweight)} packed along K beside scales {describe(scales)}"
    return None


def _plan(source: Source, settings: list[Settings]) -> Plan:
    config = agreed(settings, _KEYS)
    if not settings:
        raise ArtifactError(f"{source.path}: GPTQ layers without a config, which would say whether zeros are v1 or v2")
    bits = config.integer("bits", _BITS)
    group_size = config.integer("group_size", default=-1)
    if group_size < -1 or group_size == 0:
        raise config.fail("group_size", "-1 or above 0")
    version = _version(config)
    layers: dict[str, PlannedLinear] = {}
    if version == "marlin":
        for module in modules(source, "B"):
            layers[module.path] = _plan_marlin(module, group_size)
    else:
        mixed = any(key in config for key in ("dynamic", "extra_config"))
        for module in modules(source, "qweight"):
            layers[module.path] = _plan_layer(module, bits, group_size, version, mixed, config)
    if not layers:
        raise ArtifactError(f"{config.where}: says {version}, but no layer of {source.path} is stored that way")
    perms = any("act-order" in layer.about for layer in layers.values())
    name = {"gptq": "v1", "gptq_v2": "v2"}.get(version, version)
    variant = f"{name}, {group_about(bits, group_size)}" + (", act-order" if perms else "")
    return Plan(str(source.path), FORMAT.name, variant, layers, plain_tensors(source, layers.values()))


def _version(config: Settings) -> str:
    """ "gptq" (v1), "gptq_v2" or "marlin"."""
    if config.values.get("quant_method") == "auto-round":
        return _AUTO_ROUND[config.text("packing_format")]
    if config.values.get("quant_method") == "marlin" or config.boolean("is_marlin_format", False):
        return "marlin"
    key = "checkpoint_format" if "checkpoint_format" in config else "format"
    version = config.text(key, "gptq")
    if version not in ("gptq", "gptq_v2", "marlin"):
        what = " (its codes are planar, not a bit stream)" if version == "gptq_p" else ""
        raise ArtifactError(f"{config.where}: {key} {version[:80]!r}{what} is not read; gptq, gptq_v2 and marlin are")
    return version


# -- the usual layout ------------------------------------------------------------------------------------------------------


def _plan_layer(
    module: Module, bits: int, group_size: int, version: str, mixed: bool, config: Settings
) -> PlannedLinear:
    module.only(_LEAVES)
    qweight = module.check("qweight", _WORDS, None)
    scales = module.check("scales", tuple(SCALE_DTYPES), None)
    word = 8 * qweight.dtype.itemsize
    (G, N), rows = scales.shape, qweight.shape[0]
    module.positive(N, rows)
    if qweight.shape[1] != N:
        raise module.fail(f"qweight is {describe(qweight)} and scales {describe(scales)}: GPTQ has N={N} in both")
    found = _bits_of(module, word, N)
    if found != bits and not mixed:
        raise module.fail(
            f"{config.where} says bits={bits}, but qzeros {describe(module.info('qzeros'))} beside scales "
            f"{describe(scales)} are of {found} bits"
        )
    if rows * word % found or (found == 3 and word != 32):
        raise module.fail(f"qweight is {describe(qweight)}: no whole number of {found}-bit codes")
    K = rows * word // found
    module.check("qzeros", (qweight.dtype,), (G, N * found // word))
    if "g_idx" in module:
        module.check("g_idx", (torch.int32, torch.int64), (K,))
    module.check_bias(N)
    group_size = _group_size(module, K, G, group_size, mixed, config)
    about = group_about(found, group_size)
    sym = config.boolean("sym", False)
    perm = _perm(module, group_size)  # K numbers, read here so that the plan knows of the permutation
    return module.planned(
        (N, K),
        about + (", act-order" if perm is not None else ""),
        _LEAVES,
        functools.partial(_read_layer, module, (N, K), found, group_size, version, sym),
    )


def _bits_of(module: Module, word: int, N: int) -> int:
    """Bits of a code, which the width of qzeros gives: N zeros in rows of words."""
    qzeros = module.check("qzeros", _WORDS, None)
    bits, rest = divmod(qzeros.shape[1] * word, N)
    if rest or bits not in _BITS:
        raise module.fail(
            f"qzeros is {describe(qzeros)}: for N={N} columns that is {qzeros.shape[1] * word / N:g} bits each, "
            f"not one of {', '.join(map(str, _BITS))}"
        )
    return bits


def _group_size(module: Module, K: int, G: int, group_size: int, mixed: bool, config: Settings) -> int:
    """The config's group size where it gives G groups; one that the shapes give where layers may differ."""
    if G == 1:
        if group_size == -1 or group_size >= K or mixed:
            return -1
    elif group_size != -1 and -(-K // group_size) == G:
        return group_size
    elif mixed and K % G == 0:
        return K // G
    raise module.fail(
        f"scales has {G} groups for K={K}, {config.where} says group_size={group_size}, which gives "
        f"{1 if group_size == -1 else -(-K // group_size)}"
    )


def _perm(module: Module, group_size: int) -> Tensor | None:
    if "g_idx" not in module:
        return None
    try:
        return sort_by_group(module.read("g_idx"), group_size)
    except ValueError as error:
        raise module.fail(str(error)) from None


def _read_layer(
    module: Module, shape: tuple[int, int], bits: int, group_size: int, version: str, sym: bool
) -> LinearRecord:
    N, K = shape
    packed = byte_rows(module.read("qweight").t())  # [N, K*b/8]: the bytes of the bit stream
    packed = packed[:, : row_bytes(K, bits)].contiguous()
    perm = _perm(module, group_size)
    if perm is not None:
        packed = permute_codes(packed, bits, perm)
        perm = perm.int()
    zeros = unpack_codes(byte_rows(module.read("qzeros")), bits, N).t()
    if version == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)
        if sym and bool((zeros == (1 << (bits - 1)) + 1).all()):
            raise ValueError(
                f"the config says v1 and sym, but all zeros are stored as {1 << (bits - 1)}, as v2 does; "
                "a v1 file would hold one less"
            )
    scales = module.read("scales").t()
    weight = integer_weight(bits, (N, K), group_size, packed, scales, zeros, perm)
    return LinearRecord(weight, module.bias())


# -- Marlin ----------------------------------------------------------------------------------------------------------------


def _plan_marlin(module: Module, group_size: int) -> PlannedLinear:
    module.only((*_MARLIN, "workspace"))
    words, scales = module.check("B", (torch.int32,), None), module.check("s", tuple(SCALE_DTYPES), None)
    N, K = marlin_shape(module, words, scales)
    module.check_bias(N)
    group = marlin_group(module, K, scales.shape[0], group_size)
    return module.planned(
        (N, K), group_about(4, group), (*_MARLIN, "workspace"), lambda: read_marlin(module, "B", "s", (N, K), group)
    )


def marlin_shape(module: Module, words: TensorInfo, scales: TensorInfo) -> tuple[int, int]:
    """(N, K) of a layer in Marlin's layout, whose tensors must fit each other."""
    N, K = words.shape[1] // 2, words.shape[0] * 16
    module.positive(N, K)
    if N % 64 or words.shape[1] % 2 or scales.shape[1] != N:
        raise module.fail(
            f"codes {describe(words)} and scales {describe(scales)}: Marlin has [K/16, 2N] and [G, N], N a multiple of 64"
        )
    return N, K


def marlin_group(module: Module, K: int, G: int, group_size: int) -> int:
    """The group size, which must give G groups of equal size."""
    if group_size == -1 or group_size >= K:
        group_size = -1
    if (K if group_size == -1 else group_size) * G != K:
        raise module.fail(f"the scales have {G} groups for K={K}, the config says group_size={group_size}")
    return group_size


def read_marlin(module: Module, words: str, scales: str, shape: tuple[int, int], group_size: int) -> LinearRecord:
    """The record of a layer in Marlin's layout."""
    packed = marlin_codes(module.read(words))
    weight = integer_weight(4, shape, group_size, packed, marlin_scales(module.read(scales)))
    return LinearRecord(weight, module.bias())


FORMAT: Final = Format(
    "gptq",
    "GPTQ: auto-gptq, GPTQModel, optimum, auto-round; v1, v2 and the Marlin serialisation",
    _by_config,
    _by_tensors,
    _plan,
)
