"""Quantizers of other libraries that need no data, on the CPU: what they make of a weight, and how many bytes it takes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["PEERS", "Peer"]

Result = tuple[Tensor, float]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A quantizer.

    Args:
        name: in tables.
        package: that it is in.
        scheme: of ours that stands against it: the same format where there is one, and at most 1% more bytes.
        quantize: weight [N, K] -> what it decodes to, and its bytes.
    """

    name: str
    package: str
    scheme: str
    quantize: Callable[[Tensor], Result]

    def installed(self) -> bool:
        """Whether the package is there."""
        return importlib.util.find_spec(self.package) is not None

    def version(self) -> str:
        """Of the package."""
        return importlib.metadata.version(self.package)


def _bitsandbytes(weight: Tensor, kind: str, double: bool) -> Result:
    functional = importlib.import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type=kind, compress_statistics=double
    )
    size = packed.numel() + state.absmax.numel() * state.absmax.element_size()
    if double:
        size += state.state2.absmax.numel() * 4 + 4
    return functional.dequantize_4bit(packed, state).float().view_as(weight), size


def _hqq(weight: Tensor, bits: int, group: int) -> Result:
    """Scale and zero in fp16; codes counted at `bits` each, although 3 of them take a third of 10 bits in its packing."""
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(
        weight.clone(), nbits=bits, group_size=group, optimize=True, axis=1, device="cpu", compute_dtype=torch.float16
    )
    decoded = quantizer.dequantize(codes, meta).float().view_as(weight)
    return decoded, weight.numel() * bits / 8 + 2 * 2 * meta["scale"].numel()


def _gguf(weight: Tensor, kind: str) -> Result:
    gguf = importlib.import_module("gguf")
    type_ = getattr(gguf.GGMLQuantizationType, kind)
    blocks = gguf.quantize(weight.numpy(), type_)
    return torch.from_numpy(gguf.dequantize(blocks, type_)), blocks.nbytes


def _peer(name: str, package: str, scheme: str, quantize: Callable[..., Result], *args: object) -> Peer:
    def run(weight: Tensor) -> Result:
        return quantize(weight, *args)

    return Peer(name, package, scheme, functools.wraps(quantize)(run))


PEERS = (
    _peer("bitsandbytes NF4, 64", "bitsandbytes", "nf4-g64-fp32", _bitsandbytes, "nf4", False),
    _peer("bitsandbytes NF4, 64, double", "bitsandbytes", "nf4-g128", _bitsandbytes, "nf4", True),
    _peer("bitsandbytes FP4, 64", "bitsandbytes", "bnb_fp4-g64-fp32", _bitsandbytes, "fp4", False),
    _peer("HQQ 8 bits, 64", "hqq", "int8-g64-offset-fp16", _hqq, 8, 64),
    _peer("HQQ 4 bits, 64", "hqq", "int4-g64-offset-fp16", _hqq, 4, 64),
    _peer("HQQ 3 bits, 64", "hqq", "int3-g64-offset-fp16", _hqq, 3, 64),
    _peer("HQQ 2 bits, 64", "hqq", "int2-g64-offset-fp16", _hqq, 2, 64),
    _peer("HQQ 2 bits, 16", "hqq", "int2-g16-offset-fp16", _hqq, 2, 16),
    _peer("GGUF Q4_0", "gguf", "int4-g32-fp16", _gguf, "Q4_0"),
    _peer("GGUF Q4_1", "gguf", "int4-g32-offset-fp16", _gguf, "Q4_1"),
    _peer("GGUF Q5_0", "gguf", "int5-g32-fp16", _gguf, "Q5_0"),
    _peer("GGUF Q5_1", "gguf", "int5-g32-offset-fp16", _gguf, "Q5_1"),
    _peer("GGUF Q8_0", "gguf", "int8-g32-fp16", _gguf, "Q8_0"),
    _peer("GGUF MXFP4", "gguf", "int4-g64", _gguf, "MXFP4"),
)
