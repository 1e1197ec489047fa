"""QuantizedWeight: a weight in the canonical form that checkpoints hold.

    packed   uint8 [N, ceil(K*bits/8)]    codes as a bit stream along K, least significant bits first
    scales   [N, G], or [ceil(N/128), ceil(K/128)] with 128 x 128 blocks, or [ceil(N*K/group_size)] in blocks across rows
    zeros    uint8 or the scales' dtype [N, G]; or offsets in the scales' dtype
    perm     int32 [K]: packed column j holds column perm[j] of the weight
    super_scales, super_zeros      what scales and offsets of two levels are multiplied by (docs/format.md)

G = ceil(K / group_size). The weights of experts, [E, N, K], are `ExpertWeights`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from lowbit import _cut, _safetensors, ops
from lowbit._canonical import (
    all_finite,
    attribute_name,
    canonical_tensors,
    check_dense,
    check_importance,
    check_shape,
    preferred_layout,
    runs_on,
    same_tensor,
    super_scale_of,
    tensor_name,
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
        packed, scales, zeros, perm, super_scales, super_zeros: as drawn at the head of this module; `zeros` holds offsets
            when the scheme has them, `super_zeros` what those are multiplied by, or what dynamic8 scales are added to.

    Raises:
        ValueError: a tensor has another shape, dtype or device than scheme and shape ask for.

    Example:
        >>> w = QuantizedWeight.quantize(torch.randn(64, 256), "int4-g64")
        >>> w.dequantize().shape, w.nbytes
        (torch.Size([64, 256]), 8704)
    """

    __slots__ = ("packed", "perm", "scales", "scheme", "shape", "super_scales", "super_zeros", "zeros")

    scheme: Scheme
    shape: torch.Size
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    super_scales: Tensor | None
    super_zeros: Tensor | None

    def __init__(
        self,
        scheme: Scheme | str,
        shape: Sequence[int],
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        perm: Tensor | None = None,
        super_scales: Tensor | None = None,
        super_zeros: Tensor | None = None,
    ) -> None:
        self.scheme = Scheme.parse(scheme)
        self.shape = check_shape(self.scheme, shape)
        self.packed, self.scales, self.zeros, self.perm = packed, scales, zeros, perm
        self.super_scales, self.super_zeros = super_scales, super_zeros
        wanted = canonical_tensors(self.scheme, self.N, self.K, perm is not None)
        for name, (dtype, want) in wanted.items():
            tensor = getattr(self, attribute_name(name))
            if tensor is None:
                raise ValueError(f"scheme {self.scheme} needs {name}{list(want)}, none was given")
            if tensor.dtype != dtype or tuple(tensor.shape) != want:
                raise ValueError(
                    f"{name} of a {self.scheme} weight N={self.N}, K={self.K} must be {dtype} {list(want)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.device != packed.device:
                raise ValueError(f"{name} is on {tensor.device}, packed is on {packed.device}")
        for attribute in ("zeros", "super_scales", "super_zeros"):
            tensor = getattr(self, attribute)
            if tensor is not None and tensor_name(self.scheme, attribute) not in wanted:
                raise ValueError(
                    f"scheme {self.scheme} has no {attribute}, but {attribute}{list(tensor.shape)} were given"
                )

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
        run = runs_on("quantize", weight.device, scheme)
        here = weight.detach().to(run)
        supers = super_scale_of(here, scheme)
        importance = to_device(importance, run)
        packed, scales, zeros = ops.quantize(here, scheme.desc(), bool(scheme.search), importance, supers)
        if not all_finite(scales) or (zeros is not None and zeros.is_floating_point() and not all_finite(zeros)):
            raise ValueError(
                f"a scale of the weight (largest |w| = {float(here.abs().max()):g}) overflows {scheme.scale_dtype}; "
                "use a scheme with fp32 or bf16 scales"
            )
        device = weight.device
        zeros, supers = to_device(zeros, device), to_device(supers, device)
        return cls(scheme, weight.shape, packed.to(device), scales.to(device), zeros, super_scales=supers)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor | None], scheme: Scheme | str, shape: Sequence[int]
    ) -> QuantizedWeight:
        """Take canonical tensors written elsewhere, checking shapes, dtypes and values.

        Args:
            tensors: "packed", "scales", "zeros" or "offsets" where the scheme has them, optionally "perm"; of scales of two
                levels "super_scales", "super_offsets" beside offsets, "scale_offset" with dynamic8.
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
        third, fourth = tensor_name(scheme, "zeros"), tensor_name(scheme, "super_zeros")
        unknown = sorted(set(tensors) - {"packed", "scales", third, "perm", "super_scales", fourth})
        if unknown:
            raise ValueError(f"a {scheme} weight has no tensor called {', '.join(unknown)}")
        packed, scales = tensors.get("packed"), tensors.get("scales")
        if packed is None or scales is None:
            raise ValueError(f"a weight needs packed and scales, got {sorted(tensors) or 'nothing'}")
        supers = tensors.get("super_scales"), tensors.get(fourth)
        made = cls(scheme, shape, packed, scales, tensors.get(third), tensors.get("perm"), *supers)
        made._check_values()
        return made

    def _check_values(self) -> None:
        if self.packed.is_meta:
            return
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point() and not all_finite(tensor):
                tensor = tensor.float()
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
        run = runs_on("dequantize", self.device, self.scheme)
        t = self if run == self.device else self.to(run)
        desc = self.scheme.desc(0, self.perm is not None)
        tensors = (t.packed, t.scales, t.zeros, t.perm)
        return ops.dequantize(*tensors, self.N, self.K, desc, dtype, t.super_scales, t.super_zeros).to(self.device)

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
        run = runs_on("pack", device, self.scheme, layout)
        t = self if run == self.device else self.to(run)
        desc = self.scheme.desc(layout, has_perm)
        tensors = (t.packed, t.scales, t.zeros, t.perm)
        return ops.pack(*tensors, self.N, self.K, desc, t.super_scales, t.super_zeros).to(device)

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
        run = runs_on("unpack", weight.device, scheme, layout)
        packed, *others = ops.unpack(weight.to(run), N, K, scheme.desc(layout, has_perm))
        return cls(scheme, (N, K), packed.to(weight.device), *(to_device(t, weight.device) for t in others))  # type: ignore[arg-type]

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
        return _cut.join(weights)

    def rows(self, begin: int, end: int) -> QuantizedWeight:
        """Rows [begin, end) as a weight of their own; its tensors are views.

        Raises:
            ValueError: an end goes through a block that is more than a row.

        Example:
            >>> w.rows(0, 16).shape
            torch.Size([16, 256])
        """
        return _cut.rows(self, begin, end)

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
        return _cut.shard_rows(self, rank, step) if dim == 0 else _cut.shard_columns(self, rank, step)

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
        """The canonical tensors that are present, by the names that files have for them: "packed", "scales", ...."""
        found = {}
        for attribute in ("packed", "scales", "zeros", "perm", "super_scales", "super_zeros"):
            if (tensor := getattr(self, attribute)) is not None:
                found[tensor_name(self.scheme, attribute)] = tensor
        return found

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with its tensors on `device`."""
        moved = {attribute_name(name): tensor.to(device) for name, tensor in self.tensors().items()}
        return QuantizedWeight(self.scheme, self.shape, **moved)

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
