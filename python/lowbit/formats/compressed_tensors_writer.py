"""Writing compressed-tensors checkpoints: what vLLM and Transformers load.

    pack-quantized     integers of 2 to 8 bits with inputs as they are
    int-quantized      integers with inputs in int8, a byte for each code
    float-quantized    fp8 e4m3, one scale per row or per block of 128 x 128

The layouts are drawn in compressed_tensors.py. Our codes are the file's: both are q + 2^(b-1), a dense bit stream.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.formats._bits import pack_codes, unpack_codes
from lowbit.formats._folder import in_order, unquantized_linears, words, write_folder
from lowbit.formats._module import SCALE_DTYPES
from lowbit.formats._record import LinearRecord
from lowbit.formats._writer import Contents, FolderWriter, LayerSpec, WriteOptions, Writer
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["WRITER"]

#: The version of compressed-tensors whose layout is written: codes run on across words since 0.18.
_VERSION: Final = "0.20.0"


def _target(spec: LayerSpec) -> Scheme:
    scheme, K = spec.scheme, spec.shape[1]
    if "input_pre_scale" in spec.inputs:
        raise ValueError("inputs scaled by column (input_pre_scale) have no place in compressed-tensors")
    if scheme.scaling not in ("group", "block128") or scheme.scale_dtype not in SCALE_DTYPES.values():
        raise ValueError(f"{scheme}: scales of this kind are not written as compressed-tensors")
    if scheme.format == "fp8_e4m3":
        if scheme.scaling == "group" and scheme.group_size != -1:
            raise ValueError(f"{scheme}: fp8 has one scale per row or per 128 x 128 block in compressed-tensors")
    elif not scheme.format.startswith("int"):
        raise ValueError(f"{scheme}: compressed-tensors holds integers and fp8 e4m3, not {scheme.format}")
    if scheme.zero_kind not in ("none", "int"):
        raise ValueError(f"{scheme}: compressed-tensors has integer zeros, not {_ZEROS[scheme.zero_kind]}")
    if spec.has_perm and scheme.group_size != -1:
        raise ValueError(f"{scheme} with act-order: compressed-tensors has no g_idx since 0.19; gptq does")
    if scheme.group_size != -1 and scheme.scaling == "group" and K % scheme.group_size:
        raise ValueError(f"{scheme}: compressed-tensors needs K={K} to be a multiple of the group size")
    return scheme


_ZEROS: Final = {"float": "fractional ones", "offset": "offsets"}


def _format(scheme: Scheme) -> str:
    if not scheme.format.startswith("int"):
        return "float-quantized"
    return "pack-quantized" if scheme.activation is None else "int-quantized"


# -- tensors ---------------------------------------------------------------------------------------------------------------


def _encode(record: LinearRecord) -> dict[str, Tensor]:
    weight = record.weight
    kind = _format(weight.scheme)
    if kind == "pack-quantized":
        made = _packed(weight)
    elif kind == "int-quantized":
        made = _bytes(weight)
    else:
        made = {"weight": in_order(weight).view(torch.float8_e4m3fn)}
    made["weight_scale"] = weight.scales
    if record.bias is not None:
        made["bias"] = record.bias
    if weight.scheme.activation_static:
        meta = weight.packed.is_meta
        made["input_scale"] = torch.empty(1, device="meta") if meta else _required(record.input_scale).reshape(1)
        if not weight.scheme.activation_symmetric:
            zero = torch.empty(1, device="meta") if meta else _required(record.input_zero).reshape(1)
            made["input_zero_point"] = zero.to(torch.int8)
    return made


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # a static scheme has them
    return tensor


def _packed(weight: QuantizedWeight) -> dict[str, Tensor]:
    bits = weight.scheme.bits
    made = {"weight_packed": words(in_order(weight)), "weight_shape": torch.tensor([weight.N, weight.K])}
    if weight.zeros is not None:
        along_n = pack_codes(weight.zeros.t().contiguous(), bits)
        made["weight_zero_point"] = words(along_n).t().contiguous()
    return made


def _bytes(weight: QuantizedWeight) -> dict[str, Tensor]:
    bits = weight.scheme.bits
    offset = 1 << (bits - 1)
    codes = unpack_codes(in_order(weight), bits, weight.K)
    made = {"weight": (codes - offset).view(torch.int8)}  # modulo 256, which is what two's complement is
    if weight.zeros is not None:
        made["weight_zero_point"] = (weight.zeros - offset).view(torch.int8)
    return made


# -- config ----------------------------------------------------------------------------------------------------------------


def _config(contents: Contents) -> dict[str, Any]:
    kinds = {name: _group(layer.spec.scheme) for name, layer in contents.layers.items()}
    counted = Counter(map(repr, kinds.values()))
    groups: dict[str, Any] = {}
    # The most frequent kind is for "Linear", which names go before.
    for number, (key, _) in enumerate(counted.most_common()):
        names = [name for name, kind in kinds.items() if repr(kind) == key]
        groups[f"group_{number}"] = {"targets": ["Linear"] if number == 0 else names, **kinds[names[0]]}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "version": _VERSION,
        "config_groups": groups,
        "ignore": unquantized_linears(contents),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(scheme: Scheme) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.format.startswith("int") else "float",
        "symmetric": scheme.symmetric,
        "dynamic": False,
    }
    if scheme.scaling == "block128":
        weights |= {"strategy": "block", "block_structure": [128, 128]}
    elif scheme.group_size == -1:
        weights["strategy"] = "channel"
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    inputs = None if scheme.activation is None else _inputs(scheme)
    return {"format": _format(scheme), "weights": weights, "input_activations": inputs, "output_activations": None}


def _inputs(scheme: Scheme) -> dict[str, Any]:
    static = scheme.activation_static
    inputs: dict[str, Any] = {
        "num_bits": 8,
        "type": "int" if scheme.activation_format == "int8" else "float",
        "symmetric": scheme.activation_symmetric,
        "dynamic": not static,
        "strategy": "tensor" if static else "token",
    }
    if scheme.activation_group_size != -1:
        inputs |= {"strategy": "group", "group_size": scheme.activation_group_size}
    return inputs


def _check(contents: Contents) -> None:
    for name, layer in contents.layers.items():
        mixed = layer.spec.scheme.activation
        if mixed is not None and (layer.spec.scheme.format.startswith("int")) != mixed.startswith("int8"):
            raise ValueError(f"{name}: {layer.spec.scheme} has inputs of another kind than its weight")


def _write(contents: Contents, folder: Path, options: WriteOptions) -> None:
    write_folder(_HOW, contents, folder, options)


_HOW: Final = FolderWriter(adapt=lambda weight: weight, encode=_encode, config=_config)
WRITER: Final = Writer(
    "compressed-tensors",
    "a folder that vLLM and Transformers load: integers of 2 to 8 bits, fp8",
    False,
    None,
    frozenset({"embeddings"}),
    _target,
    _check,
    _write,
)
