"""Writing AWQ checkpoints in the gemm version: what AutoAWQ, vLLM and Transformers load.

The layout is drawn in awq.py. Zeros are always stored, and `zero_point` is always true: loaders take its absence for a kind
of weight that this layout is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.formats._bits import pack_codes, unpack_codes
from lowbit.formats._folder import in_order, unquantized_linears, words, write_folder
from lowbit.formats._record import LinearRecord
from lowbit.formats._writer import Contents, FolderWriter, LayerSpec, WriteOptions, Writer, to_half
from lowbit.formats.gptq_writer import integer_target
from lowbit.scheme import Scheme

__all__ = ["WRITER"]

#: Column (of eight) that nibble i of a word holds.
_COLUMN: Final = (0, 2, 4, 6, 1, 3, 5, 7)


def _target(spec: LayerSpec) -> Scheme:
    scheme = integer_target(spec, "awq", (4,))
    if spec.shape[0] % 8:
        raise ValueError(f"{scheme}: awq needs N={spec.shape[0]} to be a multiple of 8")
    if spec.has_perm and scheme.group_size != -1:
        raise ValueError(f"{scheme} with act-order: awq has no g_idx; gptq does")
    return scheme


def _encode(record: LinearRecord) -> dict[str, Tensor]:
    weight = record.weight
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full(weight.scales.shape, 8, dtype=torch.uint8, device=weight.device)
    made = {
        "qweight": _interleaved(unpack_codes(in_order(weight), 4, weight.K)),
        "qzeros": _interleaved(zeros),
        "scales": weight.scales.t().contiguous(),
    }
    return made if record.bias is None else {**made, "bias": record.bias}


def _interleaved(codes: Tensor) -> Tensor:
    """int32 [C, N/8] from codes uint8 [N, C]: the columns of the file are rows of W."""
    N = codes.shape[0]
    # Rows of W in the order of nibbles, so that one transposition is all that moves codes.
    order = torch.arange(N).view(-1, 8)[:, list(_COLUMN)].reshape(-1)
    return words(pack_codes(codes[order].t().contiguous(), 4))


def _config(contents: Contents) -> dict[str, Any]:
    group_size = next(iter(contents.layers.values())).spec.scheme.group_size
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": unquantized_linears(contents),
    }


def _check(contents: Contents) -> None:
    """All layers have one group size: there is one for the whole checkpoint."""
    first: dict[int, str] = {}
    for name, layer in contents.layers.items():
        first.setdefault(layer.spec.scheme.group_size, name)
    if len(first) != 1:
        what = "; ".join(f"{size} in {name}" for size, name in first.items()) or "none, as no layer is quantized"
        raise ValueError(f"awq has one group size for all layers, here there are: {what}")


def _write(contents: Contents, folder: Path, options: WriteOptions) -> None:
    write_folder(_HOW, contents, folder, options)


_HOW: Final = FolderWriter(to_half, _encode, _config)
WRITER: Final = Writer(
    "awq",
    "a folder in AWQ's gemm layout, as AutoAWQ has it: int4 with one group size",
    False,
    "float16",
    frozenset({"embeddings", "outputs"}),
    _target,
    _check,
    _write,
)
