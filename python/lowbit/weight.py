"""QuantizedWeight: a weight in the canonical form that checkpoints hold.

    packed   uint8 [N, ceil(K*bits/8)]    codes as a bit stream along K, least significant bits first
    scales   [N, G], or [ceil(N/128), ceil(K/128)] with 128 x 128 blocks
    zeros    uint8 or the scales' dtype [N, G]; or offsets in the scales' dtype
    perm     int32 [K]: packed column j holds column perm[j] of the weight

G = ceil(K / group_size). The weights of experts, [E, N, K], are `ExpertWeights`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from lowbit import _safetensors, ops
from lowbit._canonical import (
    all_finite,
    canonical_tensors,
    check_dense,
    check_importance,
    check_shape,
    preferred_layout,
    runs_on,
    same_tensor,
    to_device,
)
from lowbit.errors import ArtifactError, FormatError
from lowbit.scheme import Scheme

__all__ = ["QuantizedWeight"]

_METADATA_KEY: Final = "lowbit"
_FILE_VERSION: Final = 1


class QuantizedWeight:
    """A weight W[N, K] as codes, scales and, where the scheme has them, zeros or offsets and a permutation.

    Constructing one checks shapes, dtypes and devices; `quantize` and `from_tensors` also check values. The tensors
    are not copied and must not be changed afterwards.

    Args:
        scheme: what the tensors mean.
        shape: (N, K) of the weight.
        packed, scales, zeros, perm: as drawn at the head of this module; `zeros` holds offsets when the scheme has them.

    Raises:
        ValueError: a tensor has another shape, dtype or device than scheme and shape ask for.

    Example:
        >>> w = QuantizedWeight.quantize(torch.randn(64, 256), "int4-g64")
        >>> w.dequantize().shape, w.nbytes
        (torch.Size([64, 256]), 8704)
    """

    __slots__ = ("packed", "perm", "scales", "scheme", "shape", "zeros")

    scheme: Scheme
    shape: torch.Size
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None

    def __init__(
        self,
        scheme: Scheme | str,
        shape: Sequence[int],
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> None:
        self.scheme = Scheme.parse(scheme)
        self.shape = check_shape(self.scheme, shape)
        self.packed, self.scales, self.zeros, self.perm = packed, scales, zeros, perm
        for name, (dtype, want) in canonical_tensors(self.scheme, self.N, self.K, perm is not None).items():
            tensor = getattr(self, "zeros" if name == "offsets" else name)
            if tensor is None:
                raise ValueError(f"scheme {self.scheme} needs {name}{list(want)}, none was given")
            if tensor.dtype != dtype or tuple(tensor.shape) != want:
                raise ValueError(
                    f"{name} of a {self.scheme} weight N={self.N}, K={self.K} must be {dtype} {list(want)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.device != packed.device:
                raise ValueError(f"{name} is on {tensor.device}, packed is on {packed.device}")
        if zeros is not None and self.scheme.symmetric:
            raise ValueError(f"scheme {self.scheme} has no zeros, but zeros{list(zeros.shape)} were given")

    # -- making one -----------------------------------------------------------------------------------------------------

    @classmethod
    def quantize(cls, weight: Tensor, scheme: Scheme | str, importance: Tensor | None = None) -> QuantizedWeight:
        """Quantize a dense weight.

        Args:
            weight: [N, K], fp32, bf16 or fp16.
            scheme: a Scheme or its string.
            importance: optional [K], >= 0: weighs the squared error of each column in the search for scales.

        Raises:
            ValueError: wrong shape or dtype, a group_size that does not fit K, a NaN or an infinity in the weight,
                or a scale outside the range of the scales' dtype.

        Example:
            >>> QuantizedWeight.quantize(torch.randn(64, 256), "nf4-g64").scheme.bits
            4
        """
        scheme = Scheme.parse(scheme)
        check_dense(weight, scheme)
        if importance is not None:
            importance = check_importance(importance, weight.shape[1])
        run = runs_on("quantize", weight.device)
        here = weight.detach().to(run)
        packed, scales, zeros = ops.quantize(here, scheme.desc(), bool(scheme.search), to_device(importance, run))
        if not all_finite(scales) or (zeros is not None and zeros.is_floating_point() and not all_finite(zeros)):
            raise ValueError(
                f"a scale of the weight (largest |w| = {float(here.abs().max()):g}) overflows {scheme.scale_dtype}; "
                "use a scheme with fp32 or bf16 scales"
            )
        device = weight.device
        return cls(scheme, weight.shape, packed.to(device), scales.to(device), to_device(zeros, device))

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor | None], scheme: Scheme | str, shape: Sequence[int]
    ) -> QuantizedWeight:
        """Take canonical tensors written elsewhere, checking shapes, dtypes and values.

        Args:
            tensors: "packed", "scales", "zeros" or "offsets" where the scheme has them, and optionally "perm".
            scheme: what they mean.
            shape: (N, K).

        Raises:
            ValueError: a tensor is missing, unknown, or of the wrong shape or dtype; a scale or offset is not finite;
                perm is not a permutation of 0..K-1.

        Example:
            >>> QuantizedWeight.from_tensors(w.tensors(), w.scheme, w.shape) == w
            True
        """
        scheme = Scheme.parse(scheme)
        third = "offsets" if scheme.zero_kind == "offset" else "zeros"
        unknown = sorted(set(tensors) - {"packed", "scales", third, "perm"})
        if unknown:
            raise ValueError(f"a {scheme} weight has no tensor called {', '.join(unknown)}")
        packed, scales = tensors.get("packed"), tensors.get("scales")
        if packed is None or scales is None:
            raise ValueError(f"a weight needs packed and scales, got {sorted(tensors) or 'nothing'}")
        made = cls(scheme, shape, packed, scales, tensors.get(third), tensors.get("perm"))
        made._check_values()
        return made

    def _check_values(self) -> None:
        if self.packed.is_meta:
            return
        zeros = self.zeros if self.zeros is not None and self.zeros.is_floating_point() else None
        for name, tensor in (("scales", self.scales), ("zeros or offsets", zeros)):
            if tensor is not None and not all_finite(tensor):
                bad = (~torch.isfinite(tensor)).nonzero()
                first = bad[0].tolist()
                raise ValueError(
                    f"{name}: {len(bad)} values are not finite, the first one ({tensor[tuple(first)]:g}) at {first}"
                )
        if self.perm is not None:
            values = self.perm.long()
            valid = bool((values >= 0).all() & (values < self.K).all())
            if not valid or int(torch.bincount(values, minlength=self.K).max()) != 1:
                low, high, distinct = int(values.min()), int(values.max()), values.unique().numel()
                raise ValueError(
                    f"perm is not a permutation of 0..{self.K - 1}: it has {distinct} distinct values from {low} to {high}"
                )

    def _check_perm(self) -> None:
        """On a GPU the ops trust perm, because to look at it is to wait for the GPU; here it is looked at once per weight."""
        if self.perm is not None and (self.perm.is_cuda or self.perm.is_mps):
            low, high = (int(value) for value in torch.aminmax(self.perm))
            if low < 0 or high >= self.K:
                raise ValueError(f"perm has values from {low} to {high}, outside 0..{self.K - 1}")

    # -- back to a dense weight, and to kernels -------------------------------------------------------------------------

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K], columns in their original order, rounded once to `dtype`.

        w = (q - zero) * scale, or q * scale + offset, or code[q] * scale.

        Example:
            >>> QuantizedWeight.quantize(torch.ones(1, 8), "int8").dequantize(torch.bfloat16).dtype
            torch.bfloat16
        """
        self._check_perm()
        run = runs_on("dequantize", self.device)
        t = self if run == self.device else self.to(run)
        desc = self.scheme.desc(0, self.perm is not None)
        return ops.dequantize(t.packed, t.scales, t.zeros, t.perm, self.N, self.K, desc, dtype).to(self.device)

    def pack(self, layout: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """The weight as one tensor in the layout that kernels read: uint8, 1-D, holding codes, scales, zeros and perm.

        Args:
            layout: value of the layout enum; by default the one preferred on the device.
            device: where the result is wanted; by default where the weight is.

        Example:
            >>> w.pack().dtype
            torch.uint8
        """
        device = self.device if device is None else torch.device(device)
        has_perm = self.perm is not None
        if layout is None:
            layout = preferred_layout(device, self.scheme, has_perm)
        self._check_perm()
        run = runs_on("pack", device, layout)
        t = self if run == self.device else self.to(run)
        desc = self.scheme.desc(layout, has_perm)
        return ops.pack(t.packed, t.scales, t.zeros, t.perm, self.N, self.K, desc).to(device)

    @classmethod
    def unpack(
        cls, weight: Tensor, scheme: Scheme | str, shape: Sequence[int], layout: int, has_perm: bool = False
    ) -> QuantizedWeight:
        """The exact inverse of `pack`.

        Args:
            weight: uint8, 1-D, as `pack` made it.
            scheme, shape, layout, has_perm: of the weight that was packed; they are not stored in the tensor.

        Raises:
            RuntimeError: the tensor has another size than these ask for.
        """
        scheme = Scheme.parse(scheme)
        N, K = check_shape(scheme, shape)
        run = runs_on("unpack", weight.device, layout)
        packed, scales, zeros, perm = ops.unpack(weight.to(run), N, K, scheme.desc(layout, has_perm))
        device = weight.device
        return cls(
            scheme, (N, K), packed.to(device), scales.to(device), to_device(zeros, device), to_device(perm, device)
        )

    # -- joining and cutting --------------------------------------------------------------------------------------------

    @classmethod
    def cat(cls, weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Join weights along N, as for a fused QKV projection: rows of the first, then of the second, and so on.

        Raises:
            ValueError: schemes, K or permutations differ, or a 128-row block would be cut.

        Example:
            >>> QuantizedWeight.cat([q, k, v]).shape  # three of [64, 256]
            torch.Size([192, 256])
        """
        if not weights:
            raise ValueError("cat needs at least one weight")
        first = weights[0]
        for i, other in enumerate(weights[1:], 1):
            if not first.scheme.same_storage(other.scheme) or first.scheme.activation != other.scheme.activation:
                raise ValueError(f"cannot join {first.scheme} and {other.scheme} (weight {i})")
            if other.K != first.K:
                raise ValueError(f"cannot join K={first.K} and K={other.K} (weight {i})")
            if not same_tensor(first.perm, other.perm):
                raise ValueError(f"cannot join weights whose perm differs (weights 0 and {i})")
        if first.scheme.scaling == "block128":
            for i, weight in enumerate(weights[:-1]):
                if weight.N % 128:
                    raise ValueError(f"cannot join after N={weight.N} (weight {i}): it would cut a 128 x 128 block")
        join = functools.partial(torch.cat, dim=0)
        zeros = None if first.zeros is None else join([w.zeros for w in weights if w.zeros is not None])
        packed, scales = join([w.packed for w in weights]), join([w.scales for w in weights])
        return cls(first.scheme, (packed.shape[0], first.K), packed, scales, zeros, first.perm)

    def shard(self, dim: int, rank: int, world: int) -> QuantizedWeight:
        """The part that belongs to `rank` of `world` under tensor parallelism; its codes and scales are not changed.

        Args:
            dim: 0 cuts N (column parallel), 1 cuts K (row parallel).
            rank, world: 0 <= rank < world; the dimension must be a multiple of `world`.

        With group_size -1 every K-shard keeps the scale of the whole row, so that it still dequantizes to the same bits.

        Raises:
            ValueError: the cut would go through a group, a block or a byte, or cuts K of a weight with perm.

        Example:
            >>> left, right = (w.shard(1, rank, 2) for rank in range(2))
            >>> torch.equal(torch.cat([left.dequantize(), right.dequantize()], 1), w.dequantize())
            True
        """
        if dim not in (0, 1):
            raise ValueError(f"dim={dim} is neither 0 (N) nor 1 (K)")
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank={rank} is not in 0..world-1 with world={world}")
        size, name = self.shape[dim], "NK"[dim]
        if size % world:
            raise ValueError(f"{name}={size} is not a multiple of world={world}")
        step = size // world
        if world == 1:
            return self
        return self._shard_n(rank, step) if dim == 0 else self._shard_k(rank, step)

    def _shard_n(self, rank: int, step: int) -> QuantizedWeight:
        blocks = self.scheme.scaling == "block128"
        if blocks and step % 128:
            raise ValueError(f"a shard of {step} rows (N={self.N}) would cut a 128 x 128 block")
        rows = slice(rank * step, (rank + 1) * step)
        groups = slice(rows.start // 128, rows.stop // 128) if blocks else rows
        zeros = None if self.zeros is None else self.zeros[groups].contiguous()
        packed, scales = self.packed[rows].contiguous(), self.scales[groups].contiguous()
        return QuantizedWeight(self.scheme, (step, self.K), packed, scales, zeros, self.perm)

    def _shard_k(self, rank: int, step: int) -> QuantizedWeight:
        if self.perm is not None:
            raise ValueError("a weight with perm cannot be cut along K: its columns are not in order")
        scheme, group = self.scheme, self.scheme.group_size
        if group != -1 and step % group:
            what = "a 128 x 128 block" if scheme.scaling == "block128" else f"a group of {group}"
            raise ValueError(f"a shard of {step} columns (K={self.K}) would cut {what}")
        if step * scheme.bits % 8:
            raise ValueError(f"a shard of {step} columns of {scheme.bits} bits (K={self.K}) would cut a byte")
        begin, end = rank * step, (rank + 1) * step
        packed = self.packed[:, begin * scheme.bits // 8 : end * scheme.bits // 8].contiguous()
        groups = slice(None) if group == -1 else slice(begin // group, end // group)
        zeros = None if self.zeros is None else self.zeros[:, groups].contiguous()
        return QuantizedWeight(scheme, (self.N, step), packed, self.scales[:, groups].contiguous(), zeros)

    # -- files ----------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weight to one safetensors file, atomically: the old file or the new one, never half of one.

        Example:
            >>> w.save("q_proj.safetensors"); QuantizedWeight.load("q_proj.safetensors") == w
            True
        """
        from lowbit._artifact import write_single  # imports this module

        about = {"version": _FILE_VERSION, "scheme": self.scheme.to_dict(), "shape": list(self.shape)}
        write_single(path, self.tensors(), {_METADATA_KEY: json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantizedWeight:
        """Read what `save` wrote, onto the CPU, checking everything.

        Raises:
            ArtifactError: the file is missing or does not hold one lowbit weight.
            FormatError: it is not a well-formed safetensors file.
        """
        with _safetensors.SafetensorsFile(path) as file:
            where = file.path
            text = file.metadata.get(_METADATA_KEY)
            if text is None:
                raise FormatError(f"{where}: not a lowbit weight: its metadata has no {_METADATA_KEY!r}")
            about = _safetensors.parse_json(text.encode(errors="replace"), f"{where}: metadata")
            if about.get("version") != _FILE_VERSION:
                raise FormatError(f"{where}: version {about.get('version')!r}; this lowbit reads {_FILE_VERSION}")
            try:
                scheme = Scheme.from_dict(about.get("scheme", {}))
                shape = check_shape(scheme, about.get("shape", ()))
                # Before reading: a hostile header must not make us allocate what the scheme does not ask for.
                wanted = canonical_tensors(scheme, shape[0], shape[1], "perm" in file.tensors)
                got = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
                if got != wanted:
                    raise ValueError(f"a {scheme} weight {list(shape)} needs {wanted}, the file holds {got}")
                return cls.from_tensors({name: file.read(name) for name in file}, scheme, shape)
            except (ValueError, TypeError) as error:
                if isinstance(error, ArtifactError):
                    raise
                raise ArtifactError(f"{where}: {error}") from None

    # -- the rest -------------------------------------------------------------------------------------------------------

    @property
    def N(self) -> int:
        """Rows: output features."""
        return self.shape[0]

    @property
    def K(self) -> int:
        """Columns: input features."""
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    @property
    def is_meta(self) -> bool:
        """Whether the tensors have no values."""
        return self.packed.is_meta

    @property
    def has_perm(self) -> bool:
        """Whether the columns are stored in another order."""
        return self.perm is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all canonical tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The canonical tensors that are present: "packed", "scales", "zeros" or "offsets", "perm"."""
        third = "offsets" if self.scheme.zero_kind == "offset" else "zeros"
        named = {"packed": self.packed, "scales": self.scales, third: self.zeros, "perm": self.perm}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with its tensors on `device`."""
        moved = (to_device(t, torch.device(device)) for t in (self.scales, self.zeros, self.perm))
        return QuantizedWeight(self.scheme, self.shape, self.packed.to(device), *moved)  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantizedWeight):
            return NotImplemented
        mine, theirs = self.tensors(), other.tensors()
        return (
            self.scheme.same_storage(other.scheme)
            and self.shape == other.shape
            and mine.keys() == theirs.keys()
            and all(same_tensor(mine[name], theirs[name]) for name in mine)
        )

    __hash__ = None  # type: ignore[assignment]  # holds tensors, which are compared by value

    def __repr__(self) -> str:
        perm = ", perm" if self.perm is not None else ""
        bits = self.nbytes * 8 / (self.N * self.K)
        return f"QuantizedWeight({str(self.scheme)!r}, N={self.N}, K={self.K}, {bits:.3g} bits per weight{perm}, {self.device})"
