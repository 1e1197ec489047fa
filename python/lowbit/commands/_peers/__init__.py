"""What else can multiply with the same weight: other libraries, and torch's own ops. One row is one contender.

A file per library, each with a tuple PEERS, which imports its library only when a contender is made. A new peer is a row
there, and a library of its own a file and a line below.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from lowbit.commands._contenders import Contender
from lowbit.commands._peers import _bitsandbytes, _ggml, _onnxruntime, _openvino, _torch, _torchao
from lowbit.commands._peers._peer import Peer

__all__ = ["BASELINES", "PEERS", "Peer", "absent", "expand", "make_peer", "versions"]

#: By name, in the order of tables.
PEERS: Final[dict[str, Peer]] = {
    peer.name: peer
    for library in (_torch, _torchao, _onnxruntime, _openvino, _ggml, _bitsandbytes)
    for peer in library.PEERS
}

#: What `lowbit bench --baseline` knows, and what it is.
BASELINES: Final = {
    "dequant": "lowbit's dequantize, then F.linear, for each scheme",
    **{name: peer.what for name, peer in PEERS.items()},
}


def expand(names: Iterable[str]) -> list[str]:
    """Names of baselines, with "peers" for all peers and a package's name for all of its own.

    Example:
        >>> expand(["openvino"])[0]
        'openvino-int4-g32'
    """
    found: dict[str, None] = {}
    for name in names:
        group = [peer.name for peer in PEERS.values() if name in ("peers", peer.package)]
        found.update(dict.fromkeys(group or [name]))
    return list(found)


def absent(name: str) -> str | None:
    """Why a baseline cannot take part on this machine at all, or None."""
    peer = PEERS.get(name)
    if peer is None or importlib.util.find_spec(peer.module) is not None:
        return None
    return f"{peer.package} is not installed: pip install 'lowbit[{peer.extra}]'"


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the packages of those baselines, as far as they are installed."""
    packages = dict.fromkeys(PEERS[name].package for name in names if name in PEERS and absent(name) is None)
    return {package: importlib.metadata.version(package) for package in packages}


def make_peer(name: str, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    """A peer over a weight.

    Args:
        name: in `PEERS`.
        weight: W [N, K], on the device that is compared on.
        dtype: of x.
        warm: one copy of the weight is enough.

    Raises:
        RuntimeError: it cannot do it here; the message says why.
    """
    peer = PEERS[name]
    if why := absent(name):
        raise RuntimeError(why)
    if weight.device.type != "cpu" and not peer.gpu:
        raise RuntimeError("multiplies on the CPU only")
    return peer.make(peer, weight, dtype, warm)
