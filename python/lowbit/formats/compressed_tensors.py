"""compressed-tensors checkpoints, as llm-compressor writes them.

    pack-quantized     weight_packed int32 [N, W], stream(b) of q + 2^(b-1) along K; weight_shape int64 [2]
                       weight_zero_point int32, packed in the same way along N: [ceil(N*b/32), G]; weight_g_idx int32 [K]
    int-quantized      weight int8 [N, K], weight_zero_point int8 in the shape of the scales
    float-quantized    weight fp8 [N, K]
    nvfp4-, mxfp4-pack-quantized    weight_packed uint8 [N, K/2], weight_scale e4m3 [N, K/16] or E8M0 [N, K/32]; of the former
                       weight_global_scale [1], which the scales are divided by
    mxfp8-quantized    weight e4m3 [N, K], weight_scale E8M0 [N, K/32]
    all                weight_scale [N, G], [N, 1], [1] or, of 128 x 128 blocks, [ceil(N/128), ceil(K/128)]
                       input_scale, input_zero_point [1] where inputs have a calibrated scale

W = (q - z) * s with signed q and z. Before 0.18 a word held floor(32/b) codes and left the rest of its bits empty, which is
another layout for 3, 5 and 6 bits; before 0.9.4 zero points were not packed.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from lowbit.errors import ArtifactError
from lowbit.formats._bits import byte_rows, clear_tail, pack_codes, permute_codes, row_bytes, unpack_codes
from lowbit.formats._codes import integer_weight, sort_by_group
from lowbit.formats._ct_config import Group, Targets, read_config
from lowbit.formats._float8 import FP8, check_float8, read_float8
from lowbit.formats._format import Format
from lowbit.formats._inputs import Inputs
from lowbit.formats._microscaling import KINDS, Microscaling, check_microscaling
from lowbit.formats._module import SCALE_DTYPES, Module, describe, modules, plan_experts
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, plain_tensors
from lowbit.formats._settings import Settings
from lowbit.formats._source import Source

__all__ = ["FORMAT"]

_SCALES: Final = tuple(SCALE_DTYPES)
_INPUTS: Final = ("input_scale", "input_zero_point")
_PACKED: Final = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_PLAIN: Final = ("weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_DENSE_SINCE: Final = (0, 18)


def _by_config(settings: Settings) -> str | None:
    method = settings.values.get("quant_method")
    if method == "compressed-tensors":
        return "quant_method is 'compressed-tensors'"
    if method is None and "config_groups" in settings and "quant_algo" not in settings:
        return "it has config_groups"
    return None


def _by_tensors(source: Source) -> str | None:
    for module in modules(source, "weight_packed", "weight_scale"):
        if "weight_packed" in module and "weight_scheme" not in module:  # that is lowbit's own
            return f"{module.path} has weight_packed {describe(module.info('weight_packed'))}"
        if found := module.scaled_weight((torch.int8, *FP8), "weight_scale"):
            return found
    return None


def _plan(source: Source, settings: list[Settings]) -> Plan:
    if not settings:
        raise ArtifactError(f"{source.path}: no config, which would say what compressed-tensors layers mean")
    config = next((one for one in settings if _by_config(one)), settings[0])
    targets = read_config(config)
    layers: dict[str, PlannedLinear] = {}
    kinds: dict[str, None] = {}  # what groups are in use, in order
    for module in modules(source, "weight_packed", "weight_scale"):
        group = _group_of(module, targets)
        weight = "weight_packed" if "weight_packed" in module else "weight"
        plan = functools.partial(_plan_layer, group=group, version=targets.version)
        layers[module.path] = plan_experts(module, weight, plan)
        kinds[group.about] = None
    if not layers:
        raise ArtifactError(
            f"{config.where}: says compressed-tensors, but no layer of {source.path} has a weight_scale"
        )
    return Plan(str(source.path), FORMAT.name, "; ".join(kinds), layers, plain_tensors(source, layers.values()))


def _group_of(module: Module, targets: Targets) -> Group:
    """The config group of a quantized layer."""
    stored = "weight_packed" if "weight_packed" in module else "weight_scale"
    if (pattern := targets.ignored(module.path)) is not None:
        raise module.fail(f"{targets.where} ignores it ({pattern[:200]!r}), but it has {stored}")
    group = targets.group_of(module.path)
    if group is None:
        raise module.fail(f"it has {stored}, but no group of {targets.where} that quantizes weights has it as a target")
    return group


def _plan_layer(module: Module, group: Group, version: str) -> PlannedLinear:
    if group.kind in KINDS:
        return _plan_microscaling(module, group)
    inputs = Inputs(module, group.activation, *_INPUTS)
    if group.kind == "float":
        module.only(("weight", "weight_scale", *inputs.leaves))
        return _plan_float(module, group, inputs)
    if "weight_packed" in module:
        module.only((*_PACKED, *inputs.leaves))
        return _plan_packed(module, group, inputs, version)
    module.only((*_PLAIN, *inputs.leaves))
    return _plan_int(module, group, inputs)


def _plan_microscaling(module: Module, group: Group) -> PlannedLinear:
    codes = "weight_packed" if "weight_packed" in module else "weight"
    above = "weight_global_scale" if group.kind == "nvfp4" else None
    store = Microscaling(group.kind, codes, "weight_scale", above, divides=True)
    inputs = Inputs(module, None)
    module.only((*store.leaves, "input_global_scale", *inputs.leaves))
    shape, weight = check_microscaling(module, store)
    inputs.check(*shape)
    return module.planned(
        shape, group.about, (*store.leaves, *inputs.leaves, "input_global_scale"), lambda: inputs.record(weight())
    )


def _plan_float(module: Module, group: Group, inputs: Inputs) -> PlannedLinear:
    block = group.strategy == "block"
    shape, about = check_float8(module, "weight", "weight_scale", block)
    inputs.check(*shape)

    def read() -> LinearRecord:
        return inputs.record(read_float8(module, "weight", "weight_scale", block, group.activation))

    return module.planned(shape, about, ("weight", "weight_scale", *inputs.leaves), read)


# -- integers --------------------------------------------------------------------------------------------------------------


def _groups(module: Module, group: Group, K: int) -> tuple[int, int]:
    """Group size (-1 for one group) and number of groups of a layer."""
    size = -1 if group.group_size == -1 or group.group_size >= K else group.group_size
    return size, 1 if size == -1 else -(-K // size)


def _scale_shapes(group: Group, N: int, G: int) -> list[tuple[int, ...]]:
    return [(), (1,), (1, 1)] if group.strategy == "tensor" else [(N, 1), (N,)] if G == 1 else [(N, G)]


def _per_group(tensor: Tensor, N: int, G: int) -> Tensor:
    """[N, G] from any of the shapes above."""
    return tensor.reshape(-1, G).expand(N, G).contiguous()


def _perm(module: Module, group_size: int, K: int) -> Tensor | None:
    """What sorts the columns by group; a g_idx of nothing but -1 was never set."""
    if "weight_g_idx" not in module:
        return None
    module.check("weight_g_idx", (torch.int32, torch.int64), (K,))
    g_idx = module.read("weight_g_idx")
    return None if bool((g_idx == -1).all()) else sort_by_group(g_idx, group_size)


def _plan_int(module: Module, group: Group, inputs: Inputs) -> PlannedLinear:
    """Codes of any width, each in a byte of its own."""
    N, K = module.check("weight", (torch.int8,), None).shape
    module.positive(N, K)
    group_size, G = _groups(module, group, K)
    shapes = _scale_shapes(group, N, G)
    module.check("weight_scale", _SCALES, *shapes)
    if "weight_zero_point" in module:
        module.check("weight_zero_point", (torch.int8,), *shapes)
    inputs.check(N, K)
    offset = 1 << (group.bits - 1)

    def read() -> LinearRecord:
        codes = module.read("weight").view(torch.uint8) + offset  # modulo 256: signed codes from 0 on
        if int(codes.max()) >= 2 * offset:
            raise ValueError(f"weight holds codes outside the {group.bits} bits that the config says")
        zeros = None
        if "weight_zero_point" in module:
            zeros = _per_group(_zeros(module.read("weight_zero_point"), group.bits), N, G)
        perm = _perm(module, group_size, K)
        if perm is not None:
            codes = codes[:, perm]
        scales = _per_group(module.read("weight_scale"), N, G)
        packed = pack_codes(codes, group.bits)
        perm = None if perm is None else perm.int()
        return inputs.record(
            integer_weight(group.bits, (N, K), group_size, packed, scales, zeros, perm, group.activation)
        )

    return module.planned((N, K), group.about, (*_PLAIN, *inputs.leaves), read)


def _zeros(stored: Tensor, bits: int) -> Tensor:
    """uint8 zeros from signed ones."""
    zeros = stored.view(torch.uint8) + (1 << (bits - 1))
    if int(zeros.max()) >= 1 << bits:
        raise ValueError(f"weight_zero_point holds values outside {bits} bits")
    return zeros


# -- packed ----------------------------------------------------------------------------------------------------------------


def _plan_packed(module: Module, group: Group, inputs: Inputs, version: str) -> PlannedLinear:
    bits = group.bits
    packed = module.info("weight_packed")
    module.check("weight_packed", (torch.int32,), None)
    module.check("weight_shape", (torch.int64, torch.int32), (2,))
    N, K = (int(size) for size in module.read("weight_shape").tolist())
    rows, words = packed.shape
    module.positive(N, K)
    if rows != N or words not in (_words(K, bits, True), _words(K, bits, False)):
        raise module.fail(
            f"weight_shape says N={N}, K={K}, which at {bits} bits is weight_packed "
            f"[{N}, {_words(K, bits, True)}], found {describe(packed)}"
        )
    dense = _is_dense(module, words, N, K, bits, version)
    group_size, G = _groups(module, group, K)
    shapes = _scale_shapes(group, N, G)
    module.check("weight_scale", _SCALES, *shapes)
    if "weight_zero_point" in module:
        zero = module.info("weight_zero_point")
        if zero.dtype == torch.int8:
            module.check("weight_zero_point", (torch.int8,), *shapes)
        else:
            module.check("weight_zero_point", (torch.int32,), (_words(N, bits, dense), G))
    inputs.check(N, K)

    def read() -> LinearRecord:
        codes = _rows(module.read("weight_packed"), bits, K, dense)
        zeros = _packed_zeros(module, bits, N, G, dense)
        perm = _perm(module, group_size, K)
        if perm is not None:
            codes = permute_codes(codes, bits, perm)
            perm = perm.int()
        scales = _per_group(module.read("weight_scale"), N, G)
        return inputs.record(integer_weight(bits, (N, K), group_size, codes, scales, zeros, perm, group.activation))

    about = group.about + (", act-order" if "weight_g_idx" in module else "")
    return module.planned((N, K), about, (*_PACKED, *inputs.leaves), read)


def _words(count: int, bits: int, dense: bool) -> int:
    """32-bit words of a row of codes."""
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))


def _is_dense(module: Module, words: int, N: int, K: int, bits: int, version: str) -> bool:
    """Whether codes run on across words. The width of a row tells, but for the few K that need as many words either way."""
    if 32 % bits == 0:
        return True
    dense, sparse = _words(K, bits, True), _words(K, bits, False)
    if dense != sparse:
        return words == dense
    zeros = module.info("weight_zero_point") if "weight_zero_point" in module else None
    packed_zeros = zeros is not None and zeros.dtype == torch.int32
    if dense == 1 and not packed_zeros:
        return True  # one word is filled in the same way
    if zeros is not None and packed_zeros and zeros.shape[:1] != (_words(N, bits, False),):
        return True  # zeros are packed along N as codes are along K: their width may tell
    if zeros is not None and packed_zeros and zeros.shape[:1] != (_words(N, bits, True),):
        return False
    try:
        numbers = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        numbers = ()
    if len(numbers) != 2:
        raise module.fail(
            f"K={K} at {bits} bits takes {words} words in the packing of 0.18 and in the one before; the config's version "
            f"would tell, but it is {version[:40]!r}"
        )
    return numbers >= _DENSE_SINCE


def _rows(words: Tensor, bits: int, count: int, dense: bool) -> Tensor:
    """uint8 [R, ceil(count*bits/8)], stream(bits), from int32 [R, W]."""
    if dense:
        return clear_tail(byte_rows(words)[:, : row_bytes(count, bits)].contiguous(), bits, count)
    rows, width = words.shape
    per = 32 // bits
    wide = byte_rows(words.reshape(rows * width, 1))
    return pack_codes(unpack_codes(wide, bits, per).view(rows, width * per)[:, :count], bits)


def _packed_zeros(module: Module, bits: int, N: int, G: int, dense: bool) -> Tensor | None:
    if "weight_zero_point" not in module:
        return None
    stored = module.read("weight_zero_point")
    if stored.dtype == torch.int8:
        return _per_group(_zeros(stored, bits), N, G)
    return unpack_codes(_rows(stored.t(), bits, N, dense), bits, N).t()


FORMAT: Final = Format(
    "compressed-tensors",
    "compressed-tensors (llm-compressor): integers, fp8, nvfp4, mxfp4, mxfp8",
    _by_config,
    _by_tensors,
    _plan,
)
