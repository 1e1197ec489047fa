"""What the tests of kernel layouts share: bytes against a model in numpy, and what holds whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch

import reference
from cases import KINDS, SCALE_DTYPES, desc, fits, random_weight, rng
from lowbit import _C, ops
from reference import Spec, Weight

GROUP_SIZES = (8, 16, 24, 32, 40, 64, 128, 256, -1)
#: The bits of a code, from the lowest on, plane by plane.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def padded(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)


def bits_of(tensor: torch.Tensor | None) -> np.ndarray | None:
    """As integers that numpy has."""
    if tensor is None:
        return None
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def rows_from(table: np.ndarray, first: int, count: int) -> np.ndarray:
    """`count` rows, zeros where there are none."""
    some = table[first : first + count]
    return np.concatenate([some, np.zeros((count - len(some), *table.shape[1:]), table.dtype)])


class LayoutTests:
    """A test class of a layout derives from this, and says what is below."""

    layout: ClassVar[int]
    rows: ClassVar[int]  # of a strip
    shapes: ClassVar[tuple[tuple[int, int], ...]]  # (N, K), on every side of what the layout counts in
    turn: ClassVar[int]  # how far apart shapes are that follow one another

    def strip(self, w: Weight, s: int) -> bytes:
        """The bytes of a strip, as the drawing has them."""
        raise NotImplementedError

    def model(self, w: Weight) -> np.ndarray:
        data = b"".join(self.strip(w, s) for s in range(-(-w.N // self.rows)))
        if w.perm is not None:
            data += w.perm.numpy().astype("<i4").tobytes()
        return np.frombuffer(data, np.uint8)

    def pack(self, w: Weight) -> torch.Tensor:
        return ops.pack(*w.tensors, w.N, w.K, desc(w.spec, self.layout))

    def specs(self, kind: str) -> Iterator[tuple[Spec, int, int]]:
        """Every group size with every scale dtype and with and without perm, on shapes that take turns."""
        format, zero_kind, scaling = KINDS[kind]
        turn = 0
        for group_size in (128,) if scaling == "block128" else GROUP_SIZES:
            shapes = [s for s in self.shapes if scaling == "block128" or fits(group_size, s[1])]
            for dtype in SCALE_DTYPES:
                for has_perm in (False, True):
                    turn += self.turn
                    yield Spec(format, zero_kind, group_size, dtype, scaling, has_perm), *shapes[turn % len(shapes)]

    @pytest.mark.parametrize("kind", KINDS)
    def test_bytes_are_the_drawn_ones(self, kind: str) -> None:
        """Padding among them: the model fills it with zeros."""
        for spec, N, K in self.specs(kind):
            weight = random_weight(spec, N, K)
            packed, expected = self.pack(weight).numpy(), self.model(weight)
            assert packed.shape == expected.shape, f"{spec} {N}x{K}"
            different = np.flatnonzero(packed != expected)
            assert not len(different), f"{spec} {N}x{K}: {len(different)} bytes differ, the first at {different[0]}"

    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, kind: str) -> None:
        for spec, N, K in self.specs(kind):
            weight = random_weight(spec, N, K)
            w = self.pack(weight)
            assert w.shape == (_C.packed_size(N, K, desc(spec, self.layout)),)
            after = ops.unpack(w, N, K, desc(spec, self.layout))[:4]
            for name, was, now in zip(("packed", "scales", "zeros", "perm"), weight.tensors, after, strict=True):
                assert (was is None) == (now is None), f"{spec} {N}x{K}: {name}"
                if was is not None:
                    assert now is not None and now.dtype == was.dtype, f"{spec} {N}x{K}: {name}"
                    assert torch.equal(now, was), f"{spec} {N}x{K}: {name} changed"

    @pytest.mark.parametrize("kind", KINDS)
    def test_any_code_survives(self, kind: str) -> None:
        """Also codes that no quantizer makes; and bits past K of the canonical stream are no part of the weight."""
        r = rng("bytes", kind)
        format, zero_kind, scaling = KINDS[kind]
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 40, "float16", scaling)
        for N, K in ((65, 130), (70, 521)):
            weight = random_weight(spec, N, K)
            codes = r.integers(0, 2**spec.bits, (N, K))
            stream = torch.from_numpy(reference.pack_stream(codes, spec.bits))
            dirty = stream.clone()
            if K * spec.bits % 8:
                dirty[:, -1] |= 0xFF << K * spec.bits % 8 & 0xFF
            w = ops.pack(dirty, *weight.tensors[1:], N, K, desc(spec, self.layout))
            assert torch.equal(w, ops.pack(stream, *weight.tensors[1:], N, K, desc(spec, self.layout))), (
                f"{spec} {N}x{K}"
            )
            assert torch.equal(ops.unpack(w, N, K, desc(spec, self.layout))[0], stream), f"{spec} {N}x{K}"

    @pytest.mark.parametrize("kind", ["int3-int", "int4", "fp8_e4m3-block128"])
    def test_same_bytes_whatever_the_threads(self, kind: str, threads: None) -> None:
        N, K = 1030, 520
        format, zero_kind, scaling = KINDS[kind]
        weight = random_weight(
            Spec(format, zero_kind, 128 if scaling == "block128" else 40, "float16", scaling, True), N, K
        )
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(self.pack(weight))
            after = ops.unpack(results[-1], N, K, desc(weight.spec, self.layout))[:4]
            for was, now in zip(weight.tensors, after, strict=True):
                assert (was is None) == (now is None)
                assert was is None or now is None or torch.equal(was, now)
        assert all(torch.equal(w, results[0]) for w in results)

    def test_sizes_are_known_without_data(self) -> None:
        for kind in KINDS:
            for spec, N, K in self.specs(kind):
                shapes = _C.canonical_shapes(N, K, desc(spec))
                dtypes = {"packed": torch.uint8, "scales": reference.DTYPES[spec.scale_dtype], "perm": torch.int32}
                dtypes["zeros"] = torch.uint8 if spec.zero_kind == "int" else dtypes["scales"]
                packed, scales, zeros, perm = (
                    None if (shape := shapes[name]) is None else torch.empty(shape, dtype=dtypes[name], device="meta")
                    for name in ("packed", "scales", "zeros", "perm")
                )
                assert packed is not None and scales is not None
                w = ops.pack(packed, scales, zeros, perm, N, K, desc(spec, self.layout))
                assert w.shape == (_C.packed_size(N, K, desc(spec, self.layout)),)

    def test_cost_beyond_the_canonical_tensors(self) -> None:
        """At real sizes under 2%: only ends are padded, and a block's scale may be held by each of its strips."""
        for kind in KINDS:
            format, zero_kind, scaling = KINDS[kind]
            for group_size in (128,) if scaling == "block128" else (32, 128, -1):
                spec = Spec(format, zero_kind, group_size, "bfloat16", scaling)
                shapes = _C.canonical_shapes(4096, 4096, desc(spec))
                zero_bytes = {"none": 0, "int": 1}.get(zero_kind, 2)
                canonical = int(np.prod(shapes["packed"])) + int(np.prod(shapes["scales"])) * (2 + zero_bytes)
                assert canonical <= _C.packed_size(4096, 4096, desc(spec, self.layout)) <= 1.02 * canonical, (
                    kind,
                    group_size,
                )
