"""QuantizedWeight: values, shapes, joining, sharding, files."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lowbit
from lowbit import _C, QuantizedWeight, Scheme

SCHEMES = ["int2-g8", "int3-g16-offset", "int4-g32", "int4-g64-asym", "int5-g8-fzero", "int6", "int8", "int8-g64-asym",
           "fp8", "fp8-b128", "fp8_e5m2-g32", "fp4-g32", "nf4-g64-fp32", "nf4-g64-fp16"]  # fmt: skip
# Layouts that kernels read: all but the canonical one, which is several tensors.
LAYOUTS = [value for name, value in _C.enums()["layout"].items() if name.startswith("cpu")]


def random_weight(N: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def quantized(text: str, N: int = 24, K: int = 128, seed: int = 0, perm: bool = False) -> QuantizedWeight:
    w = QuantizedWeight.quantize(random_weight(N, K, seed), text)
    if not perm:
        return w
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    return QuantizedWeight.from_tensors({**w.tensors(), "perm": order}, w.scheme, w.shape)


@pytest.mark.parametrize("text", SCHEMES)
def test_error_is_within_one_step(text: str) -> None:
    scheme = Scheme.parse(text)
    weight = random_weight(40, 136)
    made = QuantizedWeight.quantize(weight, scheme).dequantize()
    # Two bits of a normal weight leave at most this much; each further bit halves it, coded formats are coarser.
    bound = {2: 0.6, 3: 0.3, 4: 0.16, 5: 0.08, 6: 0.04, 8: 0.1 if scheme.format.startswith("fp8") else 0.02}
    assert float((made - weight).norm() / weight.norm()) < bound[scheme.bits]


@pytest.mark.parametrize("text", SCHEMES)
def test_quantizing_is_deterministic(text: str) -> None:
    first = quantized(f"{text}-rtn" if Scheme.parse(text).search else text)
    assert QuantizedWeight.quantize(random_weight(24, 128), first.scheme) == first


@pytest.mark.parametrize(("text", "perm"), list(itertools.product(SCHEMES, [False, True])))
def test_pack_and_unpack_are_inverse(text: str, perm: bool) -> None:
    for N, K in ((24, 128), (17, 136), (1, 64)):
        w = quantized(text, N, K, perm=perm)
        for layout in LAYOUTS:
            packed = w.pack(layout)
            assert packed.dtype == torch.uint8
            assert packed.dim() == 1
            assert QuantizedWeight.unpack(packed, w.scheme, w.shape, layout, has_perm=perm) == w


def test_unpack_refuses_another_size() -> None:
    w = quantized("int4-g32")
    with pytest.raises(RuntimeError, match=r"unpack: w has shape"):
        QuantizedWeight.unpack(w.pack()[:-1], w.scheme, w.shape, LAYOUTS[0])
    with pytest.raises(RuntimeError, match="layout canonical"):
        w.pack(0)


@pytest.mark.parametrize("text", ["int4-g32", "int5-g8-fzero", "fp8-b128", "int3-g16-offset"])
def test_perm_restores_the_order_of_columns(text: str) -> None:
    weight = random_weight(24, 128)
    perm = torch.randperm(128, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    sorted_columns = QuantizedWeight.quantize(weight[:, perm.long()], text)
    w = QuantizedWeight.from_tensors({**sorted_columns.tensors(), "perm": perm}, text, (24, 128))
    back = torch.empty_like(weight)
    back[:, perm.long()] = sorted_columns.dequantize()
    assert torch.equal(w.dequantize(), back)


# -- checks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "text", "message"),
    [
        (torch.zeros(2, 3, 8), "int4", "expert dimension"),
        (torch.zeros(8), "int4", r"a weight is \[N, K\], got \[8\]"),
        (torch.zeros(2, 8, dtype=torch.float64), "int4", "got torch.float64"),
        (torch.zeros(2, 8, dtype=torch.int8), "int4", "got torch.int8"),
        (torch.zeros(2, 100), "int4-g128", "group_size=128 is larger than K=100"),
        (torch.zeros(2, 8, device="meta"), "int4", "meta device"),
        (torch.full((2, 8), torch.nan), "int4", "16 of 16 weights are NaN or infinite"),
        (torch.tensor([[1.0, torch.inf]]), "int8", "1 of 2 weights are NaN or infinite"),
        (torch.full((1, 8), 1e30), "int4-g8-fp16", "1e[+]30.* overflows float16"),
        (torch.empty(0, 8), "int4", "N=0, K=8"),
    ],
)
def test_quantize_refuses(weight: torch.Tensor, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedWeight.quantize(weight, text)


@pytest.mark.parametrize(
    ("importance", "message"),
    [(torch.ones(7), r"\[K=8\], got \[7\]"), (-torch.ones(8), ">= 0"), (torch.full((8,), torch.inf), "finite")],
)
def test_quantize_refuses_importance(importance: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedWeight.quantize(torch.ones(2, 8), "int4", importance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": None}, "needs packed and scales"),
        (
            {"packed": torch.zeros(24, 63, dtype=torch.uint8)},
            r"packed of .* torch.uint8 \[24, 64\], got torch.uint8 \[24, 63\]",
        ),
        ({"packed": torch.zeros(24, 64, dtype=torch.int8)}, "got torch.int8"),
        ({"scales": torch.zeros(24, 4)}, "must be torch.bfloat16"),
        ({"scales": torch.full((24, 4), torch.nan, dtype=torch.bfloat16)}, "scales: 96 values are not finite"),
        ({"zeros": None}, "needs zeros"),
        ({"zeros": torch.zeros(24, 3, dtype=torch.uint8)}, r"zeros of .* \[24, 4\]"),
        ({"offsets": torch.zeros(24, 4)}, "has no tensor called offsets"),
        ({"perm": torch.zeros(128, dtype=torch.int32)}, "not a permutation of 0..127: it has 1 distinct"),
        ({"perm": torch.arange(1, 129, dtype=torch.int32)}, "from 1 to 128"),
        ({"perm": torch.arange(-1, 127, dtype=torch.int32)}, "from -1 to 126"),
        ({"perm": torch.arange(128)}, "must be torch.int32"),
        ({"scales": torch.zeros(24, 4, dtype=torch.bfloat16, device="meta")}, "scales is on meta"),
    ],
)
def test_from_tensors_refuses(changes: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {**quantized("int4-g32-asym").tensors(), **changes}
    with pytest.raises(ValueError, match=message):
        QuantizedWeight.from_tensors(tensors, "int4-g32-asym", (24, 128))


def test_superfluous_zeros_and_experts_are_refused() -> None:
    w = quantized("int4-g32")
    with pytest.raises(ValueError, match="has no zeros"):
        QuantizedWeight(w.scheme, w.shape, w.packed, w.scales, torch.zeros(24, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expert dimension"):
        QuantizedWeight(w.scheme, (2, 24, 128), w.packed, w.scales)
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        QuantizedWeight(w.scheme, (24,), w.packed, w.scales)


# -- joining and cutting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SCHEMES)
def test_cat_then_shard_is_bit_exact(text: str) -> None:
    rows = 128 if text == "fp8-b128" else 24
    parts = [quantized(text, rows, 128, seed) for seed in range(3)]
    whole = QuantizedWeight.cat(parts)
    assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts]))
    assert [whole.shard(0, rank, 3) == part for rank, part in enumerate(parts)] == [True] * 3


def test_cat_keeps_perm_and_takes_different_heights() -> None:
    a, b = quantized("int4-g32", 24, perm=True), quantized("int4-g32", 8, perm=True)
    whole = QuantizedWeight.cat([a, b])
    assert whole.shape == (32, 128)
    assert torch.equal(whole.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
    assert QuantizedWeight.cat([a]) == a
    assert QuantizedWeight.cat([quantized("fp8-b128", 128), quantized("fp8-b128", 3)]).shape == (131, 128)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "at least one"),
        ([quantized("int4-g32"), quantized("int4-g64")], "int4-g32 and int4-g64"),
        ([quantized("int8"), quantized("int8-a8")], "int8 and int8-a8"),
        ([quantized("int4-g32"), quantized("int4-g32", K=64)], "K=128 and K=64"),
        ([quantized("int4-g32"), quantized("int4-g32", perm=True)], "perm differs"),
        ([quantized("int4-g32", perm=True), quantized("int4-g32", seed=1, perm=True)], "perm differs"),
        ([quantized("fp8-b128", 100), quantized("fp8-b128", 128)], "N=100 .* cut a 128 x 128 block"),
    ],
)
def test_cat_refuses(weights: list[QuantizedWeight], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedWeight.cat(weights)


@pytest.mark.parametrize(("text", "world"), list(itertools.product(SCHEMES, [1, 2, 4])))
def test_shards_of_k_are_bit_exact(text: str, world: int) -> None:
    w = quantized(text, 24, 512)
    shards = [w.shard(1, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([s.dequantize() for s in shards], 1), w.dequantize())
    assert sum(s.packed.nbytes for s in shards) == w.packed.nbytes


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([-1, 8, 16, 24]),
    N=st.integers(1, 40),
    K=st.integers(24, 200),
    world=st.integers(1, 5),
    dim=st.sampled_from([0, 1]),
)
def test_any_shard_is_bit_exact_or_refused(bits: int, group: int, N: int, K: int, world: int, dim: int) -> None:
    w = QuantizedWeight.quantize(random_weight(N, K), Scheme(f"int{bits}", group, search=False))
    size = (N, K)[dim]
    step = size // world
    whole_bytes = step * bits % 8 == 0
    fits = size % world == 0 and (world == 1 or dim == 0 or (whole_bytes if group == -1 else step % group == 0))
    if not fits:
        with pytest.raises(ValueError, match=f"{size}"):
            w.shard(dim, 0, world)
        return
    shards = [w.shard(dim, rank, world).dequantize() for rank in range(world)]
    assert torch.equal(torch.cat(shards, dim), w.dequantize())


@pytest.mark.parametrize(
    ("w", "args", "message"),
    [
        (quantized("int4-g64"), (1, 0, 4), "a shard of 32 columns .K=128. would cut a group of 64"),
        (quantized("int4-g32", perm=True), (1, 0, 2), "perm"),
        (quantized("int3", K=8), (1, 0, 2), "would cut a byte"),
        (quantized("fp8-b128", 128, 256), (1, 0, 4), "cut a 128 x 128 block"),
        (quantized("fp8-b128", 256, 128), (0, 1, 4), "64 rows .N=256. would cut a 128 x 128 block"),
        (quantized("int4-g32"), (0, 0, 5), "N=24 is not a multiple of world=5"),
        (quantized("int4-g32"), (2, 0, 2), "dim=2"),
        (quantized("int4-g32"), (0, 2, 2), "rank=2"),
        (quantized("int4-g32"), (0, -1, 2), "rank=-1"),
        (quantized("int4-g32"), (0, 0, 0), "world=0"),
    ],
)
def test_shard_refuses(w: QuantizedWeight, args: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        w.shard(*args)


def test_shard_of_rows_keeps_perm() -> None:
    w = quantized("int4-g32", perm=True)
    assert torch.equal(w.shard(0, 1, 2).dequantize(), w.dequantize()[12:])


# -- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "perm"), list(itertools.product(SCHEMES, [False, True])))
def test_save_and_load(tmp_path: Path, text: str, perm: bool) -> None:
    w = quantized(text, 17, 136, perm=perm)
    w.save(tmp_path / "a.safetensors")
    w.save(tmp_path / "b.safetensors")
    loaded = QuantizedWeight.load(tmp_path / "a.safetensors")
    assert loaded == w
    assert loaded.scheme == w.scheme
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    peer = load_file(tmp_path / "a.safetensors")  # somebody else's reader
    assert peer.keys() == w.tensors().keys()
    assert all(torch.equal(peer[name], tensor) for name, tensor in w.tensors().items())
    assert len(list(tmp_path.iterdir())) == 2


def test_load_refuses_by_name(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(lowbit.ArtifactError, match=r"w\.safetensors: no such file"):
        QuantizedWeight.load(path)
    w = quantized("int4-g32-asym")
    w.save(path)
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(lowbit.FormatError, match=r"w\.safetensors"):
            QuantizedWeight.load(path)
    for old, new, message in (
        (b'\\"shape\\": [24, 128]', b'\\"shape\\": [24, 120]', "needs"),
        (b'\\"zero_kind\\": \\"int\\"', b'\\"zero_kind\\": \\"xyz\\"', "zero_kind"),
        (b'\\"version\\": 1', b'\\"version\\": 2', "version 2"),
    ):
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(lowbit.ArtifactError, match=message):
            QuantizedWeight.load(path)
    from safetensors.torch import save_file

    save_file({"packed": w.packed}, path)
    with pytest.raises(lowbit.FormatError, match="not a lowbit weight"):
        QuantizedWeight.load(path)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    quantized("int8").save(path)
    before = path.read_bytes()

    def broken(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        quantized("int4").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


# -- the rest ------------------------------------------------------------------------------------------------------------------


def test_equality_and_repr() -> None:
    w = quantized("int4-g32")
    assert w == quantized("int4-g32")
    assert w != quantized("int4-g32", seed=1)
    assert w != quantized("int4-g64")
    assert w != quantized("int4-g32", perm=True)
    assert (w == 3) is False
    assert repr(w) == "QuantizedWeight('int4-g32', N=24, K=128, 4.5 bits per weight, cpu)"
    with pytest.raises(TypeError):
        hash(w)


def test_copies_and_moves() -> None:
    w = quantized("int4-g32-asym", perm=True)
    assert copy.deepcopy(w) == w
    assert pickle.loads(pickle.dumps(w)) == w
    assert w.to("cpu") == w
    assert w.to("meta").packed.is_meta
    assert w.nbytes == sum(t.nbytes for t in w.tensors().values())


def test_dequantize_rounds_once() -> None:
    w = quantized("int4-g32-fp32")
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(w.dequantize(dtype), w.dequantize().to(dtype))


def test_search_and_importance_lower_the_error() -> None:
    weight = random_weight(32, 128)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 4
    searched = QuantizedWeight.quantize(weight, "int3-g32")
    rounded = QuantizedWeight.quantize(weight, "int3-g32-rtn")
    weighted = QuantizedWeight.quantize(weight, "int3-g32", importance)

    def loss(w: QuantizedWeight, scale: torch.Tensor) -> float:
        return float(((w.dequantize() - weight).square() * scale).sum())

    ones = torch.ones(128)
    assert loss(searched, ones) < loss(rounded, ones)
    assert loss(weighted, importance) < loss(searched, importance)
