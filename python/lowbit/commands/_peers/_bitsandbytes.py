"""bitsandbytes: its 4-bit layer on the CPU."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from lowbit.commands._contenders import Contender
from lowbit.commands._measure import copies_for
from lowbit.commands._peers._peer import Peer, from_copies

__all__ = ["PEERS"]


def _linear4bit(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    nn: Any = importlib.import_module("bitsandbytes.nn")
    N, K = weight.shape
    kind = peer.options["quant_type"]
    nbytes = N * K // 2 + N * K // 64 * 4
    copies = []
    for _ in range(copies_for(nbytes, warm)):
        layer = nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type=kind, device="meta")
        layer.weight = nn.Params4bit(weight.to(dtype).clone(), requires_grad=False, quant_type=kind, blocksize=64)
        copies.append((layer.to("cpu").eval(),))
        copies[-1][0](torch.zeros(1, K, dtype=dtype))  # it brings its weight into another order at the first call
    return from_copies(peer, nbytes, copies, lambda x, layer: layer(x), "Linear4bit")


PEERS = (
    Peer(
        "bitsandbytes-nf4",
        "bitsandbytes Linear4bit, nf4, blocks of 64",
        "W4A16",
        "bitsandbytes",
        _linear4bit,
        {"quant_type": "nf4"},
    ),
)
