"""The row of a peer, and what the files of peers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.commands._contenders import Contender, copy_tensors, rotate
from lowbit.commands._measure import Call, copies_for

__all__ = ["Bound", "Engine", "Peer", "codes_in_groups", "from_copies", "from_engines", "from_tensors"]

# Each has sessions, arenas and threads of its own: copies of a weight under a megabyte stay partly in cache.
_MAX_ENGINES: Final = 48

#: A weight inside another library: given x, a function without arguments that multiplies.
Bound = Callable[[], object]
Engine = Callable[[Tensor], Bound]


@dataclasses.dataclass(frozen=True)
class Peer:
    """One contender of a comparison.

    Args:
        name: in tables and after --baseline.
        what: a line for people: the function that is called, and with what.
        kind: bits of weight and inputs, such as "W4A8".
        package: whose version is recorded, and that pip installs.
        make: makes the contender from this row, W [N, K], the dtype of x and whether one copy is enough; raises
            RuntimeError, with the reason, where it cannot.
        options: of `make`.
        import_name: what the package is imported as, where that is not its name.
        extra: the extra of lowbit that brings it.
        gpu: whether it multiplies on a GPU too, where W and x are.
    """

    name: str
    what: str
    kind: str
    package: str
    make: Callable[[Peer, Tensor, torch.dtype, bool], Contender]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    import_name: str = ""
    extra: str = "bench"
    gpu: bool = False

    @property
    def module(self) -> str:
        """What to import."""
        return self.import_name or self.package

    @property
    def bits(self) -> int:
        """Of the weight."""
        return int(self.kind[1 : self.kind.index("A")])

    @property
    def int8(self) -> bool:
        """Whether inputs are quantized too."""
        return self.kind.endswith("A8")


def from_copies(
    peer: Peer,
    nbytes: int,
    copies: Sequence[tuple[Any, ...]],
    multiply: Callable[..., object],
    kernel: str,
    cast: torch.dtype | None = None,
) -> Contender:
    """A contender that runs on torch's threads: `multiply(x, *copy)`.

    Args:
        nbytes: of one copy of the weight.
        copies: `copies_for(nbytes, warm)` of them, in whatever form.
        cast: x is converted to this dtype beforehand, because the peer takes no other.
    """

    def bind(x: Tensor) -> Call:
        inputs = x if cast is None else x.to(cast)
        return rotate(copies, lambda *weight: multiply(inputs, *weight))

    return Contender(peer.name, peer.kind, nbytes, bind, lambda M: kernel, peer.bits, peer.int8, baseline=True)


def from_tensors(
    peer: Peer,
    tensors: tuple[Tensor, ...],
    multiply: Callable[..., object],
    kernel: str,
    warm: bool,
    cast: torch.dtype | None = None,
) -> Contender:
    """`from_copies` of a weight that is plain tensors."""
    nbytes = sum(t.nbytes for t in tensors)
    return from_copies(peer, nbytes, copy_tensors(tensors, warm), multiply, kernel, cast)


def from_engines(
    peer: Peer,
    nbytes: int,
    build: Callable[[int], Engine],
    kernel: str,
    warm: bool,
    result: Callable[[Any], Tensor] = torch.as_tensor,
) -> Contender:
    """A contender whose weight lives in another library, which has threads of its own.

    Args:
        nbytes: of the weight in the form that is read at every call.
        build: given the number of threads, makes one copy.
    """
    count = min(copies_for(nbytes, warm), _MAX_ENGINES)
    made: dict[int, list[Engine]] = {}

    def bind(x: Tensor) -> Call:
        threads = torch.get_num_threads()
        if threads not in made:
            made.clear()
            made[threads] = [build(threads) for _ in range(count)]
        return rotate([(engine(x),) for engine in made[threads]], lambda bound: bound())

    return Contender(
        peer.name, peer.kind, nbytes, bind, lambda M: kernel, peer.bits, peer.int8, baseline=True, result=result
    )


def codes_in_groups(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes around 2^(bits-1), as most libraries store them.

    Returns:
        codes uint8 [N, G, group_size] and scales fp32 [N, G].

    Raises:
        RuntimeError: K is not a multiple of the group size.
    """
    N, K = weight.shape
    if K % group_size:
        raise RuntimeError(f"K={K} is not a multiple of {group_size}")
    grouped = weight.float().view(N, K // group_size, group_size)
    middle = 1 << (bits - 1)
    scales = grouped.abs().amax(2).clamp_min(1e-6) / (middle - 0.5)
    codes = ((grouped / scales[..., None]).round() + middle).clamp(0, 2 * middle - 1)
    return codes.to(torch.uint8), scales
