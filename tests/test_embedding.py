"""The op embedding: rows of a packed weight are those of dequantize, to the bit, by the kernel and as other devices do it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
from lowbit import _C, ops
from lowbit._ops_embedding import gather_strips
from reference import Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(N: int, *shape: int) -> torch.Tensor:
    """Indices, the first and the last row among them."""
    found = torch.randint(0, N, shape or (9,), generator=torch.Generator().manual_seed(N))
    found.view(-1)[0], found.view(-1)[-1] = N - 1, 0
    return found


def dequantized(weight: Any, N: int, K: int, spec: Spec, dtype: torch.dtype) -> torch.Tensor:
    return ops.dequantize(*weight.tensors, N, K, cases.desc(spec), dtype, *weight.supers)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_rows_are_those_of_dequantize(kind: str) -> None:
    for i, (spec, N, K) in enumerate(cases.specs(kind)):
        weight, dtype = cases.random_weight(spec, N, K), DTYPES[i % 3]
        w, indices = cases.pack(weight), rows(N)
        got = ops.embedding(indices, w, N, K, cases.cpu_desc(spec), dtype)
        assert got.dtype == dtype
        assert torch.equal(got, dequantized(weight, N, K, spec, dtype)[indices]), (spec, N, K)


@pytest.mark.parametrize("name", cases.SCALED)
def test_rows_under_scales_of_two_levels(name: str) -> None:
    spec, shapes = cases.SCALED[name]
    for N, K in shapes:
        weight = cases.random_weight(spec, N, K)
        want = dequantized(weight, N, K, spec, torch.float32)[rows(N)]
        args = rows(N), cases.pack(weight), N, K, cases.cpu_desc(spec), torch.float32
        assert torch.equal(ops.embedding(*args), want)
        assert torch.equal(gather_strips(*args), want)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("kind", ["int4", "int3-int", "int6-offset", "nf4", "iq4_nl", "bnb_fp4", "fp8_e4m3-block128"])
def test_by_strips(kind: str, device: str) -> None:
    """What CUDA and Metal do, with the CPU's unpack and dequantize of their layouts; more indices than are done at a time."""
    format, zero_kind, scaling = cases.KINDS[kind]
    for has_perm in (False, True):
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 16, "bfloat16", scaling, has_perm)
        N, K = 150, 136
        weight = cases.random_weight(spec, N, K)
        desc = cases.desc(spec, _C.preferred_layout(device, cases.desc(spec)))
        w = torch.ops.lowbit.pack(*weight.tensors, N, K, desc)
        indices = rows(N, 3, 100)
        want = dequantized(weight, N, K, spec, torch.bfloat16)[indices]
        assert torch.equal(gather_strips(indices, w, N, K, desc, torch.bfloat16), want)
        assert gather_strips(indices[:0], w, N, K, desc, torch.bfloat16).shape == (0, 100, K)


@pytest.mark.parametrize("isa", _C.isa_levels())
def test_every_isa(isa: str) -> None:
    before = _C.isa()
    spec, N, K = Spec("int5", "float", 32, "float16"), 40, 200
    weight = cases.random_weight(spec, N, K)
    want = dequantized(weight, N, K, spec, torch.bfloat16)[rows(N)]
    _C.set_isa(isa)
    try:
        assert torch.equal(ops.embedding(rows(N), cases.pack(weight), N, K, cases.cpu_desc(spec), torch.bfloat16), want)
    finally:
        _C.set_isa(before)


def test_shapes_and_dtypes_of_indices() -> None:
    spec, N, K = Spec("int4", "none", 32), 24, 64
    w, desc = cases.pack(cases.random_weight(spec, N, K)), cases.cpu_desc(spec)
    wide = rows(N, 2, 3, 4)
    want = ops.embedding(wide, w, N, K, desc)
    assert want.shape == (2, 3, 4, K)
    assert torch.equal(ops.embedding(wide.int(), w, N, K, desc), want)
    assert torch.equal(ops.embedding(wide.transpose(0, 2), w, N, K, desc), want.transpose(0, 2))
    assert torch.equal(ops.embedding(wide[0, 0, 0], w, N, K, desc), want[0, 0, 0])
    assert ops.embedding(wide[:0], w, N, K, desc).shape == (0, 3, 4, K)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.tensor([0, 24])}, "index 24 at position 1 is not a row of a weight of N=24"),
        ({"indices": torch.tensor([-1])}, "index -1 at position 0 is not a row"),
        ({"indices": torch.tensor([1 << 40])}, "index 1099511627776 at position 0"),
        ({"indices": torch.tensor([1.0])}, "indices are float32, expected int64 or int32"),
        ({"indices": torch.tensor([1], dtype=torch.uint8)}, "indices are uint8, expected int64 or int32"),
        ({"out_dtype": torch.float64}, "out_dtype is float64, expected float32, float16 or bfloat16"),
        ({"N": 25}, r"w has shape \[.*\], expected"),
        ({"desc": cases.desc(Spec("int4", "none", 32))}, "layout is canonical"),
    ],
)
def test_wrong_calls(change: dict[str, Any], message: str) -> None:
    spec, N, K = Spec("int4", "none", 32), 24, 64
    w = cases.pack(cases.random_weight(spec, N, K))
    args = {
        "indices": torch.tensor([1]),
        "w": w,
        "N": N,
        "K": K,
        "desc": cases.cpu_desc(spec),
        "out_dtype": torch.float32,
    }
    if "N" in change:
        args["N"] = 33  # a strip more
    args |= {key: value for key, value in change.items() if key != "N"}
    with pytest.raises(RuntimeError, match=f"lowbit::embedding: .*{message}"):
        ops.embedding(**args)


def test_compiled() -> None:
    spec, N, K = Spec("int4", "none", 32), 24, 64
    w, desc = cases.pack(cases.random_weight(spec, N, K)), cases.cpu_desc(spec)

    def run(indices: torch.Tensor) -> torch.Tensor:
        return ops.embedding(indices, w, N, K, desc, torch.bfloat16) * 2

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(rows(N)), run(rows(N)))
