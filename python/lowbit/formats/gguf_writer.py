"""Writing GGUF files: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, under the names that llama.cpp has for the Llama family.

A block is 32 weights. Larger groups become several blocks with the same scale; integer zeros z become the minimum -z * s of
Q4_1 and Q5_1, rounded to fp16. Norms and biases are F32, other tensors as they are.

Where keys and names come from: a GGUF file (the source itself, or one of the same model), whose keys are copied to the byte, or
config.json and the tokenizer's files.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.formats._bits import pack_codes, unpack_codes
from lowbit.formats._folder import in_order
from lowbit.formats._gguf_metadata import architecture_of, metadata_of, rope_factors
from lowbit.formats._gguf_names import FAMILIES, gguf_name
from lowbit.formats._gguf_tokenizer import TokenizerLeftOut, tokenizer_metadata
from lowbit.formats._gguf_write import PlannedBlock, number, raw_metadata, write_gguf
from lowbit.formats._record import PlannedTensor
from lowbit.formats._source import natural
from lowbit.formats._writer import Contents, LayerSpec, PlannedLayer, WriteOptions, Writer, to_half
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["WRITER"]

_BLOCK: Final = 32
#: (bits, zeros) -> number of the type, its name, its number in general.file_type.
_TYPES: Final = {
    (4, False): (2, "Q4_0", 2),
    (4, True): (3, "Q4_1", 3),
    (5, False): (6, "Q5_0", 8),
    (5, True): (7, "Q5_1", 9),
    (8, False): (8, "Q8_0", 7),
}
_PLAIN: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
#: Keys that are about one file, and not copied from another.
_OWN_KEYS: Final = ("general.file_type", "general.quantization_version", "general.alignment", "split.", "quantize.")
#: Tensors that models compute themselves.
_COMPUTED: Final = ("rotary_emb.inv_freq",)


def _target(spec: LayerSpec) -> Scheme:
    scheme, K = spec.scheme, spec.shape[1]
    zeros = scheme.zero_kind in ("int", "offset")
    if not scheme.format.startswith("int") or (scheme.bits, zeros) not in _TYPES or scheme.zero_kind == "float":
        raise ValueError(
            f"{scheme}: gguf is written as int4 and int5, with or without zeros or offsets, and symmetric int8"
        )
    if scheme.scaling != "group":
        raise ValueError(f"scales of kind {scheme.scaling} are not written as gguf")
    if scheme.activation is not None or spec.inputs:
        raise ValueError(f"{scheme}: gguf does not say how inputs are quantized; compressed-tensors does")
    if spec.has_perm and scheme.group_size != -1:
        raise ValueError(f"{scheme} with act-order: gguf has its columns in order; gptq has g_idx")
    if K % _BLOCK:
        raise ValueError(f"{scheme}: gguf needs K={K} to be a multiple of {_BLOCK}")
    if scheme.group_size != -1 and scheme.group_size % _BLOCK:
        raise ValueError(f"{scheme}: gguf has a scale for each {_BLOCK} weights, and no group ends within them")
    return Scheme(scheme.format, _BLOCK, "offset" if zeros else "none", "float16", search=scheme.search)


def _adapt(weight: QuantizedWeight) -> QuantizedWeight:
    """Groups of 32 with fp16 scales, and offsets where there are zeros."""
    scheme = _target(LayerSpec(weight.scheme, (weight.N, weight.K), weight.perm is not None))
    third = None
    if weight.zeros is not None:
        third = weight.zeros
        if weight.scheme.zero_kind == "int":  # of the scales as they will be stored
            third = third.float().neg_() * to_half(weight).scales.float()
    half = to_half(weight)
    scales = _per_block(half.scales, weight)
    tensors = {"packed": in_order(weight), "scales": scales}
    if third is not None:
        offsets = _per_block(third.half(), weight)
        if bool(torch.isinf(offsets).any()):
            raise ValueError(
                f"offsets reach {float(third.float().abs().max()):g}, and gguf keeps them in fp16, up to 65504"
            )
        tensors["offsets"] = offsets
    return QuantizedWeight.from_tensors(tensors, scheme, weight.shape)


def _per_block(values: Tensor, weight: QuantizedWeight) -> Tensor:
    """[N, K/32] from a value per group; the last group may be shorter."""
    size = weight.K if weight.scheme.group_size == -1 else weight.scheme.group_size
    return values.repeat_interleave(size // _BLOCK, 1)[:, : weight.K // _BLOCK].contiguous()


def _encode(weight: QuantizedWeight) -> Tensor:
    """uint8 [N, bytes of a row]; the blocks are drawn in _gguf_blocks.py."""
    bits, N = weight.scheme.bits, weight.N
    codes = unpack_codes(weight.packed, bits, weight.K).view(N, -1, _BLOCK)
    parts = [weight.scales.view(torch.uint8).view(N, -1, 2)]
    if weight.zeros is not None:
        parts.append(weight.zeros.view(torch.uint8).view(N, -1, 2))
    if bits == 8:
        parts.append(codes ^ 0x80)  # excess 128 to two's complement
    else:
        if bits == 5:
            parts.append(pack_codes((codes >> 4).reshape(-1, _BLOCK), 1).view(N, -1, 4))
        parts.append((codes[..., :16] & 15) | ((codes[..., 16:] & 15) << 4))
    return torch.cat(parts, -1).view(N, -1)


def _row_bytes(scheme: Scheme, K: int) -> int:
    return K // _BLOCK * (2 + (0 if scheme.symmetric else 2) + _BLOCK * scheme.bits // 8)


# -- what is written ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Plan:
    """Names, and where rows go.

    Args:
        architecture: a family whose names are known; "" for contents with the names of a GGUF file.
        heads, kv_heads: of Llama's Q and K, whose rows are kept in rotary pairs; per block where they differ.
    """

    contents: Contents
    architecture: str

    def name(self, module: str) -> str:
        """What GGUF calls a module."""
        if not self.architecture:
            return module
        found = gguf_name(self.architecture, module)
        if found is None:
            raise ValueError(f"{module} has no name in GGUF's architecture {self.architecture!r} that is known here")
        return found

    def rows(self, name: str, N: int) -> Tensor | None:
        """Row rows[n] of the weight is row n of the file; None: all stay."""
        part = name.rpartition(".")[2]
        if self.architecture != "llama" or part not in ("attn_q", "attn_k"):
            return None
        heads = self._heads(part == "attn_k", int(name.split(".")[1]))
        if N % (2 * heads):
            raise ValueError(f"{name}: N={N} rows are not {heads} heads of an even size")
        return torch.arange(N).view(heads, 2, N // heads // 2).transpose(1, 2).reshape(-1)

    def _heads(self, is_key: bool, block: int) -> int:
        metadata, config = self.contents.metadata, self.contents.config
        values = [metadata.get(f"llama.attention.head_count{end}") for end in (("_kv", "") if is_key else ("",))]
        values += [config.get("num_key_value_heads")] if is_key else []
        values += [config.get("num_attention_heads")]
        value: Any = next((one for one in values if one is not None), None)
        if value is not None and not isinstance(value, int):
            value = value[block] if block < len(value) else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError("the number of heads is not known, and rows of Q and K cannot be put in order without it")
        return value


def _family(contents: Contents) -> str:
    if contents.metadata:
        architecture = str(contents.metadata.get("general.architecture"))
        return architecture if architecture in FAMILIES else ""
    return architecture_of(contents.config)


def _layer_block(plan: _Plan, name: str, layer: PlannedLayer, options: WriteOptions) -> list[PlannedBlock]:
    base = plan.name(name)
    scheme = _target(layer.spec)
    N, K = layer.spec.shape
    rows = plan.rows(base, N)
    kind, _, _ = _TYPES[scheme.bits, not scheme.symmetric]
    nbytes = N * _row_bytes(scheme, K)
    kept: dict[str, Tensor] = {}  # the bias, which is written right after its weight

    def read() -> Tensor:
        try:
            record, reference = layer.read()
            weight = _adapt(record.weight)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{name}: {error}") from None
        if record.bias is not None:
            kept["bias"] = record.bias
        options.written(name, weight, reference, nbytes)
        options.advance(name, layer.nbytes)
        data = _encode(weight)
        return data if rows is None else data[rows]

    made = [PlannedBlock(f"{base}.weight", kind, (N, K), nbytes, read)]
    if layer.spec.bias is not None:
        made.append(PlannedBlock(f"{base}.bias", 0, (N,), 4 * N, lambda: _bias(kept.pop("bias"), rows)))
    return made


def _bias(bias: Tensor, rows: Tensor | None) -> Tensor:
    values = bias.float()
    return (values if rows is None else values[rows]).contiguous()


def _plain_block(plan: _Plan, name: str, tensor: PlannedTensor, options: WriteOptions) -> PlannedBlock:
    module, dot, leaf = name.rpartition(".")
    whole = not plan.architecture or name == "rope_freqs.weight" or leaf not in ("weight", "bias")
    full = name if whole else plan.name(module) + dot + leaf
    if tensor.dtype not in _PLAIN:
        raise ValueError(f"{name}: tensors of {tensor.dtype} are not written as gguf")
    dtype = torch.float32 if len(tensor.shape) == 1 else tensor.dtype
    rows = None if whole else plan.rows(plan.name(module), tensor.shape[0])

    def read() -> Tensor:
        value = tensor.read()
        options.advance(name, value.nbytes)
        value = value.to(dtype)
        return (value if rows is None else value[rows]).contiguous()

    nbytes = dataclasses.replace(tensor, dtype=dtype).nbytes
    return PlannedBlock(full, _PLAIN[dtype], tensor.shape, nbytes, read)


def _blocks(contents: Contents, options: WriteOptions) -> list[PlannedBlock]:
    plan = _Plan(contents, _family(contents))
    made: list[PlannedBlock] = []
    for name, tensor in contents.tensors.items():
        if name.endswith(_COMPUTED):
            continue
        made.append(_plain_block(plan, name, tensor, options))
    if not contents.metadata and (factors := rope_factors(contents.config)) is not None:
        made.append(PlannedBlock("rope_freqs.weight", 0, tuple(factors.shape), factors.nbytes, lambda: factors))
    for name, layer in contents.layers.items():
        made += _layer_block(plan, name, layer, options)
    # A bias follows its weight, whose reading gives it.
    return sorted(
        made, key=lambda block: (natural(block.name.removesuffix(".bias").removesuffix(".weight")), -len(block.shape))
    )


def _metadata(contents: Contents, options: WriteOptions) -> dict[str, bytes]:
    if contents.gguf is not None:
        raw = raw_metadata(contents.gguf)
        found = {key: value for key, value in raw.items() if not key.startswith(_OWN_KEYS)}
    else:
        root = contents.root
        found = metadata_of(contents.config, Path(contents.where).name)
        try:
            if root is None:
                raise TokenizerLeftOut("there is no folder with its files")
            found |= tokenizer_metadata(root, contents.config["vocab_size"])
        except TokenizerLeftOut as why:
            options.note(f"the tokenizer is not in the file: {why}; --metadata-from FILE.gguf copies one")
    common = Counter((s.bits, not s.symmetric) for s in (_target(x.spec) for x in contents.layers.values()))
    if common:
        _, _, file_type = _TYPES[common.most_common(1)[0][0]]
        found["general.file_type"] = number("u32", file_type)
    found["general.quantization_version"] = number("u32", 2)
    return found


def _silent() -> WriteOptions:
    return WriteOptions(0, lambda *_: None, lambda *_: None, lambda _: None)


def _check(contents: Contents) -> None:
    """Names and keys, as far as headers tell."""
    _metadata(contents, _silent())
    blocks = _blocks(contents, _silent())
    names = Counter(block.name for block in blocks)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"two tensors would be called {twice[0]}")


def _write(contents: Contents, path: Path, options: WriteOptions) -> None:
    write_gguf(path, _metadata(contents, options), _blocks(contents, options))


WRITER: Final = Writer(
    "gguf",
    "a file for llama.cpp: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0; names and keys of the Llama, Mistral and Qwen families",
    True,
    "float16",
    frozenset(),
    _target,
    _check,
    _write,
)
