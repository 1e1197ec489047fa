"""MXFP4, MXFP8 and NVFP4 made here; and weights of every kind of scale joined, cut, saved, loaded and run as layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lowbit
from cases import SCALED, random_weight
from lowbit import _C, QuantizedLinear, QuantizedWeight, Scheme, ops
from reference import CODES, Weight, nearest_code, unpack_stream

MX = {"mxfp4": ("fp4_e2m1", 2), "mxfp8": ("fp8_e4m3", 8)}


def scheme_of(name: str) -> Scheme:
    spec = SCALED[name][0]
    fields = ("format", "group_size", "zero_kind", "scale_dtype", "scaling", "super_groups", "super_dtype")
    return Scheme(**{field: getattr(spec, field) for field in fields})


def weight_of(w: Weight) -> QuantizedWeight:
    name = next(name for name, (spec, _) in SCALED.items() if spec == w.spec)
    return QuantizedWeight(scheme_of(name), (w.N, w.K), *w.tensors, *w.supers)


def everything() -> list[tuple[str, QuantizedWeight]]:
    return [(name, weight_of(random_weight(spec, *shapes[0]))) for name, (spec, shapes) in SCALED.items()]


def codes_of(w: QuantizedWeight) -> np.ndarray:
    return unpack_stream(w.packed.numpy(), w.K, w.scheme.bits)


# -- made here -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MX)
def test_mx_is_the_rule_of_ocp(name: str, isa: str) -> None:
    """X = 2^(floor(log2 amax) - emax), elements rounded to nearest even and clamped."""
    format, emax = MX[name]
    values = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)) * torch.exp2(
        torch.arange(-6.0, 4.0, 2)
    ).unsqueeze(1)
    values[0, :32], values[1, 32:64] = 0, 1e-39  # a group of zeros; one below the smallest power of two
    w = QuantizedWeight.quantize(values, f"{name}-rtn")
    for n in range(5):
        for g in range(3):
            group = values[n, 32 * g : 32 * g + 32].numpy()
            amax = float(np.abs(group).max())
            scale = 1.0 if amax == 0 else max(2.0 ** (np.floor(np.log2(amax)) - emax), 2.0**-127)
            assert w.scales.float()[n, g] == scale, (n, g)
            top = np.float32(CODES[format][np.isfinite(CODES[format])].max())
            want = nearest_code(np.clip(group / np.float32(scale), -top, top), format)
            assert np.array_equal(codes_of(w)[n, 32 * g : 32 * g + 32], want), (n, g)


def test_nvfp4_is_the_rule(isa: str) -> None:
    """Scales in e4m3, in units that make the largest one 448."""
    values = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    values[3, 16:32] = 0
    w = QuantizedWeight.quantize(values, "nvfp4-rtn")
    f32 = np.float32
    unit = f32(values.abs().max().item()) / (f32(6) * f32(448))
    assert w.super_scales is not None and w.super_scales.item() == unit
    for n in range(7):
        for g in range(4):
            group = values[n, 16 * g : 16 * g + 16].numpy()
            ideal = np.abs(group).max() / f32(6) / unit if group.any() else f32(1)
            code = int(nearest_code(np.array([ideal]), "fp8_e4m3")[0])
            assert w.scales.view(torch.uint8)[n, g] == code
            scale = CODES["fp8_e4m3"][code] * unit
            want = nearest_code(np.clip(group / scale, f32(-6), f32(6)), "fp4_e2m1")
            assert np.array_equal(codes_of(w)[n, 16 * g : 16 * g + 16], want), (n, g)


def test_the_search_is_never_worse() -> None:
    values = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    for name, size in (("mxfp4", 32), ("nvfp4", 16), ("mxfp8", 32), ("int4-g32-e8m0", 32), ("int4-g16-asym-e4m3", 16)):
        found = [QuantizedWeight.quantize(values, f"{name}-{how}") for how in ("rtn", "search")]
        rtn, search = ((w.dequantize() - values).square().view(32, -1, size).sum(-1) for w in found)
        assert (search <= rtn * (1 + 1e-6)).all(), name
        assert search.sum() < rtn.sum() or name == "mxfp8", name


def test_a_scale_beyond_e4m3_is_refused() -> None:
    with pytest.raises(ValueError, match="overflows e4m3"):
        QuantizedWeight.quantize(torch.full((1, 16), 6 * 500.0), "fp4-g16-e4m3")
    assert QuantizedWeight.quantize(torch.full((1, 16), 6 * 500.0), "nvfp4").dequantize()[0, 0] == pytest.approx(3000)
    assert not QuantizedWeight.quantize(torch.zeros(2, 32), "nvfp4").dequantize().any()


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q6_k", "nested", "flat"])
def test_what_is_only_read_is_not_made(name: str) -> None:
    with pytest.raises(ValueError, match="is read from checkpoints and not made"):
        QuantizedWeight.quantize(torch.randn(8, 512), scheme_of(name))
    with pytest.raises(RuntimeError, match="is read from checkpoints and not made"):
        ops.quantize(torch.randn(8, 512), scheme_of(name).desc())
    with pytest.raises(RuntimeError, match="super_scales are absent, but desc says super_groups=-1"):
        ops.quantize(torch.randn(8, 512), Scheme.parse("nvfp4").desc())


# -- schemes ---------------------------------------------------------------------------------------------------------------


def test_schemes_as_text() -> None:
    for name in SCALED:
        scheme = scheme_of(name)
        assert Scheme.parse(str(scheme)) == scheme == Scheme.from_dict(scheme.to_dict())
        assert Scheme.from_desc(scheme.desc()).same_storage(scheme)
    assert str(scheme_of("nvfp4")) == "nvfp4" and str(scheme_of("nested")) == "nf4-g64-flat-dyn8-x4fp32"
    assert str(scheme_of("q4_k")) == "int4-g32-offset-u6-x8fp16"
    assert str(Scheme.parse("nvfp4-rtn")) == "nvfp4-rtn" and Scheme.parse("mxfp8-a8").activation == "fp8"
    assert "super_groups" not in Scheme.parse("int4-g32").to_dict()
    for text in ("int4-g32-x0fp16", "int4-x8", "mxfp4-g16", "nvfp4-x8fp16"):
        with pytest.raises(ValueError, match="scheme"):
            Scheme.parse(text)


def test_bits_per_weight() -> None:
    wanted = {"mxfp4": 4.25, "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
    for name, bits in wanted.items():
        assert scheme_of(name).bits_per_weight(64, 1024) == bits
    for name, w in everything():
        perm = 0 if w.perm is None else 4 * w.K
        assert w.scheme.nbytes(w.N, w.K) == w.nbytes - perm, name


# -- joining and cutting -----------------------------------------------------------------------------------------------------


def test_rows_and_their_union() -> None:
    for name, w in everything():
        cut = 16 if w.scheme.scaling != "block128" else 128
        if w.scheme.scaling == "flat":
            block = w.scheme.group_size * max(1, w.scheme.super_groups)
            cut = next((n for n in range(1, w.N) if n * w.K % block == 0), 0)
        if not 0 < cut < w.N:
            continue
        parts = [w.rows(0, cut), w.rows(cut, w.N)]
        assert torch.equal(torch.cat([part.dequantize() for part in parts]), w.dequantize()), name
        assert QuantizedWeight.cat(parts) == w, name


def test_cuts_through_blocks_are_refused() -> None:
    found = dict(everything())
    with pytest.raises(ValueError, match="rows 0 to 1 of N=40 would cut a super block of 4 blocks"):
        found["nested"].rows(0, 1)
    flat = weight_of(random_weight(SCALED["flat"][0], 20, 80))
    with pytest.raises(ValueError, match=r"a shard of 10 rows .* would cut a block of 64"):
        flat.shard(0, 0, 2)
    with pytest.raises(ValueError, match="blocks of 64 that run across rows cannot be cut along K"):
        flat.shard(1, 0, 2)
    four = flat.shard(0, 1, 5)
    assert torch.equal(four.dequantize(), flat.dequantize()[4:8])
    with pytest.raises(ValueError, match=r"a shard of 128 columns .* would cut a super block of 8 groups"):
        found["q4_k"].shard(1, 0, 4)


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q6_k"])
def test_columns(name: str) -> None:
    w = dict(everything())[name]
    halves = [w.shard(1, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([half.dequantize() for half in halves], 1), w.dequantize())


def test_one_scale_above_all_must_be_the_same() -> None:
    a, b = (QuantizedWeight.quantize(torch.randn(4, 32) * size, "nvfp4") for size in (1, 2))
    with pytest.raises(ValueError, match="cannot join weights whose super_scales differs"):
        QuantizedWeight.cat([a, b])
    assert torch.equal(QuantizedWeight.cat([a, a]).dequantize(), torch.cat([a.dequantize()] * 2))
    left = a.shard(1, 0, 2)
    assert torch.equal(left.dequantize(), a.dequantize()[:, :16])


# -- files and layers --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    for name, w in everything():
        w.save(tmp_path / "w.safetensors")
        again = QuantizedWeight.load(tmp_path / "w.safetensors")
        assert again == w and torch.equal(again.dequantize(), w.dequantize()), name
        assert QuantizedWeight.from_tensors(w.tensors(), w.scheme, w.shape) == w
        assert QuantizedWeight.unpack(w.pack(), w.scheme, w.shape, 1, w.perm is not None) == w


def test_values_are_checked() -> None:
    w = dict(everything())["q4_k"]
    tensors = w.tensors()
    assert set(tensors) == {"packed", "scales", "offsets", "super_scales", "super_offsets"}
    bad = tensors["super_scales"].clone()
    bad[3, 0] = float("inf")
    with pytest.raises(ValueError, match=r"super_scales: 1 values are not finite, the first one \(inf\) at \[3, 0\]"):
        QuantizedWeight.from_tensors({**tensors, "super_scales": bad}, w.scheme, w.shape)
    with pytest.raises(ValueError, match="needs super_offsets"):
        QuantizedWeight.from_tensors({**tensors, "super_offsets": None}, w.scheme, w.shape)
    with pytest.raises(ValueError, match="no tensor called scale_offset"):
        QuantizedWeight.from_tensors({**tensors, "scale_offset": bad}, w.scheme, w.shape)
    with pytest.raises(ValueError, match="has no super_scales"):
        QuantizedWeight("int4-g32", (17, 512), w.packed, torch.ones(17, 16).bfloat16(), super_scales=bad)
    mx = dict(everything())["mxfp4"]
    nan = torch.full_like(mx.scales.view(torch.uint8), 255).view(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match="scales: 51 values are not finite"):
        QuantizedWeight.from_tensors({**mx.tensors(), "scales": nan}, mx.scheme, mx.shape)


def test_a_layer_of_each() -> None:
    for name, w in everything():
        layer = QuantizedLinear.from_weight(w)
        state = layer.state_dict()
        assert {f"weight_{part}" for part in w.tensors()} | {"weight_scheme"} == set(state), name
        other = QuantizedLinear(w.K, w.N, False, w.scheme, has_perm=w.perm is not None)
        other.load_state_dict(state)
        x = torch.randn(3, w.K)
        assert torch.equal(layer(x), other(x)) and other.quantized_weight() == w, name
        assert torch.allclose(layer(x), x @ w.dequantize().t(), rtol=1e-4, atol=1e-3), name


def test_an_artifact_of_nvfp4(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    lowbit.quantize_(model, "nvfp4", overrides={"2": "mxfp4"})
    sha256 = lowbit.save_quantized(model, tmp_path / "m")
    assert sha256 == lowbit.save_quantized(model, tmp_path / "again")
    loaded = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    lowbit.load_quantized(loaded, tmp_path / "m")
    x = torch.randn(2, 64)
    assert torch.equal(loaded(x), model(x)) and _C.parse_desc(loaded[0]._desc)["super_groups"] == -1
