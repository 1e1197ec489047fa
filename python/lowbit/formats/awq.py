"""AWQ checkpoints: AutoAWQ, llm-awq, auto-round. Always 4 bits, W = (q - z) * s.

    gemm       qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]. The columns of a word are interleaved.
    gemv       qweight int32 [N, K/8] in natural order, qzeros int32 [N, Z], scales [N, 8Z]; the groups are padded to 8Z
    gemv_fast  qweight int16 [N/4, K], scales and qzeros fp16 [8Z, N]; W = q*s + qzeros, so its zeros are offsets
    marlin     qweight int32 [K/16, 2N], scales [G, N], symmetric: see _marlin.py

Z = ceil(ceil(G / 8) / m) * m with m = 1, 2 or 4 for groups of 128 and more, 64 and 32. The tensors say which of the four a
layer is and whether it has zeros: configs that claim zero_point=false beside stored zeros exist.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from lowbit.errors import ArtifactError
from lowbit.formats._bits import byte_rows, pack_codes, unpack_codes
from lowbit.formats._codes import group_about, integer_weight
from lowbit.formats._format import Format
from lowbit.formats._module import SCALE_DTYPES, Module, describe, modules
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, plain_tensors
from lowbit.formats._settings import Settings, agreed
from lowbit.formats._source import Source
from lowbit.formats.gptq import marlin_group, marlin_shape, read_marlin
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["FORMAT"]

_LEAVES: Final = ("qweight", "qzeros", "scales", "bias")
_KEYS: Final = ("bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "quant_method")
_VERSIONS: Final = ("gemm", "gemv", "gemv_fast", "marlin")
_SCALES: Final = tuple(SCALE_DTYPES)
# Nibble of a word that holds column 8c + j.
_NIBBLE: Final = (0, 4, 1, 5, 2, 6, 3, 7)


def _by_config(settings: Settings) -> str | None:
    values = settings.values
    if values.get("quant_method") == "awq":
        return "quant_method is 'awq'"
    if values.get("quant_method") == "auto-round" and values.get("packing_format") == "auto_round:auto_awq":
        return "quant_method is 'auto-round', packing_format 'auto_round:auto_awq'"
    if values.get("quant_method") is None and "zero_point" in settings and ("w_bit" in settings or "bits" in settings):
        return "it has zero_point and bits, as AutoAWQ's quant_config.json"
    return None


def _by_tensors(source: Source) -> str | None:
    for module in modules(source, "qweight"):
        version = _version_of(module)
        if version is not None:
            qweight, scales = module.info("qweight"), module.info("scales")
            return f"{module.path} has qweight {describe(qweight)} beside scales {describe(scales)}, as AWQ's {version}"
    return None


def _version_of(module: Module) -> str | None:
    """The version that dtypes and shapes of a layer are of; None when they are of none."""
    if "scales" not in module:
        return None
    qweight, scales = module.info("qweight"), module.info("scales")
    if len(qweight.shape) != 2 or len(scales.shape) != 2:
        return None
    (rows, words), (first, second) = qweight.shape, scales.shape
    if qweight.dtype == torch.int16:
        return "gemv_fast" if rows * 4 == second > 0 else None
    if qweight.dtype != torch.int32:
        return None
    if "qzeros" not in module:
        return "marlin" if words == 2 * second > 0 else None
    zeros = module.info("qzeros").shape
    if words * 8 == second > 0 and zeros == (first, words):
        return "gemm"
    return "gemv" if rows == first > 0 and zeros == (rows, second // 8) else None


def _plan(source: Source, settings: list[Settings]) -> Plan:
    config = agreed(settings, _KEYS)
    if not settings:
        raise ArtifactError(f"{source.path}: AWQ layers without a config, which would say how large groups are")
    bits = config.integer("w_bit" if "w_bit" in config else "bits", (4,), default=4)
    key = "q_group_size" if "q_group_size" in config else "group_size"
    group_size = config.integer(key, default=-1)
    if group_size < -1 or group_size == 0:
        raise config.fail(key, "-1 or above 0")
    stated = None
    if "version" in config:
        stated = config.text("version").lower()
        if stated not in _VERSIONS:
            raise config.fail("version", "one of " + ", ".join(_VERSIONS))
    layers: dict[str, PlannedLinear] = {}
    for module in modules(source, "qweight"):
        version = _version_of(module)
        if version is None:
            shapes = ", ".join(f"{leaf} {describe(module.info(leaf))}" for leaf in sorted(module.names))
            raise module.fail(f"{shapes[:300]}: not a layout of AWQ")
        if stated is not None and version != stated:
            qweight = describe(module.info("qweight"))
            raise module.fail(f"{config.where} says version {stated!r}, but qweight {qweight} is {version}'s")
        layers[module.path] = _LAYOUTS[version](module, group_size)
    if not layers:
        raise ArtifactError(f"{config.where}: says AWQ, but no tensor of {source.path} is called qweight")
    versions = sorted({layer.about.partition(":")[0] for layer in layers.values()})
    variant = f"{', '.join(versions)}, {group_about(bits, group_size)}"
    return Plan(str(source.path), FORMAT.name, variant, layers, plain_tensors(source, layers.values()))


def _groups(module: Module, K: int, group_size: int) -> tuple[int, int]:
    """Group size (-1 for one group) and number of groups."""
    if group_size == -1 or group_size >= K:
        return -1, 1
    if K % group_size:
        raise module.fail(f"K={K} is not a multiple of group_size={group_size}")
    return group_size, K // group_size


# -- gemm ------------------------------------------------------------------------------------------------------------------


def _plan_gemm(module: Module, group_size: int) -> PlannedLinear:
    module.only(_LEAVES)
    qweight = module.check("qweight", (torch.int32,), None)
    K, N = qweight.shape[0], qweight.shape[1] * 8
    module.positive(N, K)
    group, G = _groups(module, K, group_size)
    module.check("scales", _SCALES, (G, N))
    module.check("qzeros", (torch.int32,), (G, N // 8))
    module.check_bias(N)
    about = f"gemm: {group_about(4, group)}"
    return module.planned((N, K), about, _LEAVES, functools.partial(_read_gemm, module, (N, K), group))


def _read_gemm(module: Module, shape: tuple[int, int], group_size: int) -> LinearRecord:
    N, K = shape
    words = module.read("qweight")
    if K % 2:
        words = torch.cat([words, words.new_zeros(1, words.shape[1])])
    even, odd = words[0::2], words[1::2]
    packed = torch.empty(N, (K + 1) // 2, dtype=torch.uint8)
    for column, nibble in enumerate(_NIBBLE):  # bytes of two k at once, for every eighth row of W
        low, high = (even >> 4 * nibble) & 15, (odd >> 4 * nibble) & 15
        packed[column::8] = (low | high << 4).to(torch.uint8).t()
    zeros = _columns(module.read("qzeros")).t()
    weight = integer_weight(4, shape, group_size, packed, module.read("scales").t(), zeros)
    return LinearRecord(weight, module.bias())


def _columns(words: Tensor) -> Tensor:
    """Codes uint8 [R, 8C] in natural order from int32 [R, C] with interleaved nibbles."""
    rows, count = words.shape
    codes = unpack_codes(byte_rows(words), 4, 8 * count).view(rows, count, 8)
    return codes[:, :, list(_NIBBLE)].view(rows, 8 * count)


# -- gemv ------------------------------------------------------------------------------------------------------------------


def _padded_groups(group_size: int, K: int, G: int) -> int:
    """The number of words that a row of zeros takes: rounded up for kernels that load several at once."""
    size = K if group_size == -1 else group_size
    multiple = 1 if size >= 128 else 2 if size >= 64 else 4
    words = -(-G // 8)
    return -(-words // multiple) * multiple


def _plan_gemv(module: Module, group_size: int) -> PlannedLinear:
    module.only(_LEAVES)
    qweight = module.check("qweight", (torch.int32,), None)
    N, K = qweight.shape[0], qweight.shape[1] * 8
    module.positive(N, K)
    group, G = _groups(module, K, group_size)
    width = _padded_groups(group, K, G)
    module.check("scales", _SCALES, (N, 8 * width))
    module.check("qzeros", (torch.int32,), (N, width))
    module.check_bias(N)

    def read() -> LinearRecord:
        packed = byte_rows(module.read("qweight"))
        zeros = unpack_codes(byte_rows(module.read("qzeros")), 4, G)
        weight = integer_weight(4, (N, K), group, packed, module.read("scales")[:, :G], zeros)
        return LinearRecord(weight, module.bias())

    return module.planned((N, K), f"gemv: {group_about(4, group)}", _LEAVES, read)


# -- gemv_fast -------------------------------------------------------------------------------------------------------------


def _plan_gemv_fast(module: Module, group_size: int) -> PlannedLinear:
    module.only(_LEAVES)
    qweight = module.check("qweight", (torch.int16,), None)
    N, K = qweight.shape[0] * 4, qweight.shape[1]
    module.positive(N, K)
    if K % 64:
        raise module.fail(f"qweight is {describe(qweight)}: gemv_fast has a multiple of 64 columns")
    group, G = _groups(module, K, group_size)
    rows = 8 * _padded_groups(group, K, G)
    scales = module.check("scales", _SCALES, (rows, N))
    module.check("qzeros", (scales.dtype,), (rows, N))
    module.check_bias(N)

    def read() -> LinearRecord:
        words = module.read("qweight")
        stored = module.read("scales")
        scheme = Scheme("int4", group, "offset", str(stored.dtype).removeprefix("torch."))
        tensors = {
            "packed": _fast_codes(words),
            "scales": stored[:G].t().contiguous(),
            "offsets": module.read("qzeros")[:G].t().contiguous(),
        }
        return LinearRecord(QuantizedWeight.from_tensors(tensors, scheme, (N, K)), module.bias())

    return module.planned((N, K), f"gemv_fast: {group_about(4, group)}, offsets", _LEAVES, read)


@functools.cache
def _fast_order() -> Tensor:
    """Place among 32 stored codes -> column. Pairs are dealt to four threads, and a thread's eight codes split even, odd."""
    dealt = [8 * pair + 2 * thread + one for thread in range(4) for pair in range(4) for one in (0, 1)]
    split = [8 * thread + i for thread in range(4) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return torch.tensor([dealt[place] for place in split])


def _fast_codes(words: Tensor) -> Tensor:
    """packed uint8 [N, K/2] from int16 [N/4, K].

    A row of words holds four rows of W. Each of its pieces of 64 words holds, one row of W after the other, 64 codes of
    each, four consecutive codes of the same row in one word.
    """
    quads, K = words.shape
    codes = unpack_codes(byte_rows(words), 4, 4 * K)
    rows = codes.view(quads, K // 64, 4, 2, 32)  # [quad, piece, row of W, half, place]
    plain = torch.empty_like(rows)
    plain[..., _fast_order()] = rows
    return pack_codes(plain.permute(0, 2, 1, 3, 4).reshape(4 * quads, K), 4)


# -- marlin ----------------------------------------------------------------------------------------------------------------


def _plan_marlin(module: Module, group_size: int) -> PlannedLinear:
    module.only((*_LEAVES, "workspace"))
    words, scales = module.check("qweight", (torch.int32,), None), module.check("scales", _SCALES, None)
    shape = marlin_shape(module, words, scales)
    module.check_bias(shape[0])
    group = marlin_group(module, shape[1], scales.shape[0], group_size)
    return module.planned(
        shape,
        f"marlin: {group_about(4, group)}",
        (*_LEAVES, "workspace"),
        lambda: read_marlin(module, "qweight", "scales", shape, group),
    )


_LAYOUTS: Final = {"gemm": _plan_gemm, "gemv": _plan_gemv, "gemv_fast": _plan_gemv_fast, "marlin": _plan_marlin}

FORMAT: Final = Format(
    "awq", "AWQ: AutoAWQ, llm-awq, auto-round; gemm, gemv, gemv_fast and marlin", _by_config, _by_tensors, _plan
)
