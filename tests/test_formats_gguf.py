"""GGUF: every type to the bit, names and row orders of Transformers, and files that are not what they say."""

from __future__ import annotations

import array
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_files as G
import lowbit.formats
from gguf_files import LLAMA, rng, write
from lowbit import ArtifactError
from lowbit.formats import LinearRecord
from lowbit.formats._gguf_names import hugging_face_name
from lowbit.formats.gguf import GGUFModel, load_gguf

REAL = Path(__file__).parent / "data" / "checkpoints" / "gguf-q4_k_m.gguf"


def weight(model: GGUFModel, name: str) -> np.ndarray:
    record = model.read(name)
    assert isinstance(record, LinearRecord)
    return record.weight.dequantize().numpy()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b)


# -- types -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", G.QUANTIZED)
def test_every_type_decodes_to_the_bit(name: str, tmp_path: Path) -> None:
    shape = (5, 2 * G.TYPES[name][1])
    tensor = G.block_tensor(name, shape, rng())
    with load_gguf(write(tmp_path / "w.gguf", {}, {"w": tensor})) as model:
        assert model.layers["w"].shape == shape and model.layers["w"].about.startswith(name)
        assert model.layers["w"].nbytes == len(tensor[2])
        assert same(weight(model, "w"), G.decode(name, tensor[2], shape))


@pytest.mark.oracle
@pytest.mark.parametrize("name", G.QUANTIZED)
def test_as_the_gguf_package_decodes(name: str, tmp_path: Path) -> None:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    shape = (64, 3 * G.TYPES[name][1])
    tensor = G.block_tensor(name, shape, rng(1))
    raw = np.frombuffer(tensor[2], np.uint8).reshape(shape[0], -1)
    try:
        want = quants.dequantize(raw, GGMLQuantizationType(G.TYPES[name][0]))
    except (NotImplementedError, ValueError):  # an older package
        pytest.skip(f"this gguf package does not know {name}")
    with load_gguf(write(tmp_path / "w.gguf", {}, {"w": tensor})) as model:
        assert same(weight(model, "w"), want)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(G.QUANTIZED), data=st.data())
def test_any_bytes_decode_to_the_bit_or_are_refused(name: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    _, block, nbytes = G.TYPES[name]
    raw = data.draw(st.binary(min_size=2 * nbytes, max_size=2 * nbytes))
    path = write(tmp_path_factory.getbasetemp() / "any.gguf", {}, {"w": (name, (2, block), raw)})
    with np.errstate(all="ignore"):
        want = G.decode(name, raw, (2, block))
    with load_gguf(path) as model:
        try:
            assert same(weight(model, "w"), want)
        except ArtifactError:
            signed = name == "NVFP4" and any(byte > 0x7F for at in (0, nbytes) for byte in raw[at : at + 4])
            exponent = name == "MXFP4" and 255 in (raw[0], raw[nbytes])
            assert signed or exponent or not np.isfinite(want).all()


def test_sizes_are_those_of_the_tables() -> None:
    """The one in the module and the one in the docs."""
    from lowbit.formats import _gguf_blocks

    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    lines = (_gguf_blocks.__doc__ or "").splitlines() + page.replace("|", " ").splitlines()
    for block in _gguf_blocks.QUANTIZED.values():
        rows = [line.split() for line in lines if line.split()[:1] == [block.name]]
        assert len(rows) == 2 and f"`{block.scheme}`" in rows[1]
        for row in rows:
            sizes = {8 * block.nbytes / block.block, block.scheme.bits_per_weight(1024, 1024)}
            assert {float(row[-1]), float(row[-2] if len(sizes) == 2 or row is rows[1] else row[-1])} == sizes


def test_plain_types(tmp_path: Path) -> None:
    tensors = {
        "a": G.float_tensor((3, 5), rng()),
        "b": G.float_tensor((7,), rng(), "F16"),
        "c": ("BF16", (2, 2), struct.pack("<4H", 0x3F80, 0xBF80, 0x4000, 0)),
        "d": ("I32", (2, 1, 1, 3), np.arange(6, dtype="<i4").tobytes()),
    }
    with load_gguf(write(tmp_path / "w.gguf", {}, tensors)) as model:
        found = dict(model)
        assert [str(found[name].dtype) for name in "abcd"] == [
            "torch.float32", "torch.float16", "torch.bfloat16", "torch.int32",
        ]  # fmt: skip
        assert {name: tuple(found[name].shape) for name in "abcd"} == {n: tuple(t[1]) for n, t in tensors.items()}
        assert found["a"].numpy().tobytes() == tensors["a"][2] and found["b"].numpy().tobytes() == tensors["b"][2]
        assert found["c"].tolist() == [[1, -1], [2, 0]] and found["d"].flatten().tolist() == list(range(6))


def test_many_rows_are_decoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.formats.gguf._CHUNK", 100)
    tensor = G.block_tensor("Q4_K", (16, 256), rng())
    metadata = {**LLAMA, "llama.attention.head_count": 2}
    with load_gguf(write(tmp_path / "w.gguf", metadata, {"blk.0.attn_q.weight": tensor})) as model:
        want = G.decode("Q4_K", tensor[2], (2, 4, 2, 256)).swapaxes(1, 2).reshape(16, 256)
        assert same(weight(model, "model.layers.0.self_attn.q_proj"), want)


# -- names -------------------------------------------------------------------------------------------------------------------


def test_llama_by_the_names_of_transformers(tmp_path: Path) -> None:
    parts = {
        "token_embd.weight": ("Q4_0", (8, 64)),
        "output_norm.weight": ("F32", (64,)),
        "output.weight": ("Q6_K", (8, 256)),
        "rope_freqs.weight": ("F32", (4,)),
        "blk.11.attn_q.weight": ("Q4_0", (32, 64)),
        "blk.11.attn_k.weight": ("F16", (16, 64)),
        "blk.11.attn_k.bias": ("F32", (16,)),
        "blk.11.attn_q.bias": ("F32", (32,)),
        "blk.11.attn_output.weight": ("Q8_0", (64, 32)),
        "blk.11.ffn_down.weight": ("Q5_1", (64, 128)),
    }
    made = {
        name: G.float_tensor(shape, rng(i), kind) if kind[0] == "F" else G.block_tensor(kind, shape, rng(i))
        for i, (name, (kind, shape)) in enumerate(parts.items())
    }
    with load_gguf(write(tmp_path / "w.gguf", LLAMA, made)) as model:
        layer = "model.layers.11."
        assert set(model.layers) == {
            "model.embed_tokens", "lm_head", layer + "self_attn.q_proj", layer + "self_attn.o_proj", layer + "mlp.down_proj",
        }  # fmt: skip
        assert set(model.tensors) == {
            "model.norm.weight", "rope_freqs.weight", layer + "self_attn.k_proj.weight", layer + "self_attn.k_proj.bias",
        }  # fmt: skip
        # A head of GGUF has pairs (2j, 2j+1); one of Transformers has them half a head apart.
        q = G.decode("Q4_0", made["blk.11.attn_q.weight"][2], (4, 4, 2, 64)).swapaxes(1, 2).reshape(32, 64)
        assert same(weight(model, layer + "self_attn.q_proj"), q)
        k = np.frombuffer(made["blk.11.attn_k.weight"][2], "<f2").reshape(2, 4, 2, 64).swapaxes(1, 2).reshape(16, 64)
        assert same(model.read(layer + "self_attn.k_proj.weight").numpy(), k)
        bias = np.frombuffer(made["blk.11.attn_q.bias"][2], "<f4").reshape(4, 4, 2).swapaxes(1, 2).reshape(32)
        record = model.read(layer + "self_attn.q_proj")
        assert same(record.bias.numpy(), bias)
        assert model.layers[layer + "self_attn.q_proj"].sources == ("blk.11.attn_q.weight", "blk.11.attn_q.bias")
        bias = np.frombuffer(made["blk.11.attn_k.bias"][2], "<f4").reshape(2, 4, 2).swapaxes(1, 2).reshape(16)
        assert same(model.read(layer + "self_attn.k_proj.bias").numpy(), bias)
        down = made["blk.11.ffn_down.weight"]
        assert same(weight(model, layer + "mlp.down_proj"), G.decode("Q5_1", down[2], down[1]))
        assert model.variant == "llama, 4 float32, 2 Q4_0, 1 Q6_K, 1 float16, 1 Q8_0, 1 Q5_1"


def test_rows_of_qwen_stay_in_place_and_unknown_models_keep_their_names(tmp_path: Path) -> None:
    tensor = G.block_tensor("Q4_0", (16, 32), rng())
    want = G.decode("Q4_0", tensor[2], (16, 32))
    for architecture, name in (
        ("qwen3", "model.layers.2.self_attn.q_proj"),
        ("gemma3", "blk.2.attn_q"),
        (None, "blk.2.attn_q"),
    ):
        metadata = {} if architecture is None else {"general.architecture": architecture}
        with load_gguf(write(tmp_path / "w.gguf", metadata, {"blk.2.attn_q.weight": tensor})) as model:
            assert model.names == [name]
            assert same(weight(model, name), want)
    adapter = {**LLAMA, "general.type": "adapter"}
    with load_gguf(write(tmp_path / "w.gguf", adapter, {"blk.2.attn_q.weight": tensor})) as model:
        assert same(weight(model, "blk.2.attn_q"), want)


def test_heads_may_differ_by_layer(tmp_path: Path) -> None:
    metadata = {"general.architecture": "llama", "llama.attention.head_count": [4, 2]}
    tensors = {f"blk.{i}.attn_{part}.weight": G.block_tensor("Q4_0", (16, 32), rng(i)) for i in (0, 1) for part in "qk"}
    with load_gguf(write(tmp_path / "w.gguf", metadata, tensors)) as model:
        for i, heads in enumerate((4, 2)):
            raw = G.decode("Q4_0", tensors[f"blk.{i}.attn_k.weight"][2], (heads, 8 // heads, 2, 32))
            assert same(weight(model, f"model.layers.{i}.self_attn.k_proj"), raw.swapaxes(1, 2).reshape(16, 32))


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "model.layers.0.block_sparse_moe.experts.{}.w1"),
        ("qwen3moe", "model.layers.0.mlp.experts.{}.gate_proj"),
        ("gpt-oss", "blk.0.ffn_gate_exps.{}"),
    ],
)
def test_experts_one_by_one(architecture: str, name: str, tmp_path: Path) -> None:
    tensors = {
        "blk.0.ffn_gate_exps.weight": G.block_tensor("MXFP4", (3, 5, 64), rng()),
        "blk.0.ffn_up_exps.weight": G.float_tensor((3, 4, 8), rng(), "F16"),
    }
    with load_gguf(write(tmp_path / "w.gguf", {"general.architecture": architecture}, tensors)) as model:
        want = G.decode("MXFP4", tensors["blk.0.ffn_gate_exps.weight"][2], (3, 5, 64))
        assert list(model.layers) == [name.format(i) for i in range(3)]
        for i in range(3):
            assert same(weight(model, name.format(i)), want[i])
        up = np.frombuffer(tensors["blk.0.ffn_up_exps.weight"][2], "<f2").reshape(3, 4, 8)
        if architecture == "gpt-oss":
            assert same(model.read("blk.0.ffn_up_exps.weight").numpy(), up)
        else:
            other = name.replace("w1", "w3").replace("gate_proj", "up_proj")
            assert all(same(model.read(other.format(i) + ".weight").numpy(), up[i]) for i in range(3))


def test_the_first_mixtral_files_have_a_tensor_per_expert(tmp_path: Path) -> None:
    tensors = {f"blk.1.ffn_down.{i}.weight": G.block_tensor("Q4_0", (4, 32), rng(i)) for i in range(2)}
    with load_gguf(write(tmp_path / "w.gguf", LLAMA, tensors)) as model:
        for i in range(2):
            want = G.decode("Q4_0", tensors[f"blk.1.ffn_down.{i}.weight"][2], (4, 32))
            assert same(weight(model, f"model.layers.1.block_sparse_moe.experts.{i}.w2"), want)


def test_the_gate_of_qwens_shared_expert_is_a_row(tmp_path: Path) -> None:
    tensors = {"blk.0.ffn_gate_inp_shexp.weight": G.float_tensor((16,), rng())}
    with load_gguf(write(tmp_path / "w.gguf", {"general.architecture": "qwen2moe"}, tensors)) as model:
        assert model.read("model.layers.0.mlp.shared_expert_gate.weight").shape == (1, 16)


def test_a_scale_per_tensor_is_folded_into_the_scales(tmp_path: Path) -> None:
    tensors = {
        "blk.0.ffn_up.weight": G.block_tensor("NVFP4", (4, 64), rng()),
        "blk.0.ffn_up.scale": ("F32", (1,), struct.pack("<f", 0.3)),
        "blk.0.ffn_down_exps.weight": G.block_tensor("NVFP4", (2, 4, 64), rng()),
        "blk.0.ffn_down_exps.scale": ("F32", (2,), struct.pack("<2f", 0.3, -7.1)),
    }
    with load_gguf(write(tmp_path / "w.gguf", LLAMA, tensors)) as model:
        assert not model.tensors
        plain = G.decode("NVFP4", tensors["blk.0.ffn_up.weight"][2], (4, 64))
        want = plain.astype(np.float64) * float(np.float32(0.3))
        found = weight(model, "model.layers.0.mlp.up_proj")
        assert np.abs(found - want).max() <= 2.0**-23 * np.abs(want).max() and not same(found, plain)
        plain = G.decode("NVFP4", tensors["blk.0.ffn_down_exps.weight"][2], (2, 4, 64))
        found = weight(model, "model.layers.0.block_sparse_moe.experts.1.w2")
        np.testing.assert_allclose(found, plain[1] * np.float32(-7.1), rtol=2.0**-22)


def test_a_model_over_several_files(tmp_path: Path) -> None:
    tensors = {f"blk.{i}.ffn_up.weight": G.block_tensor("Q4_0", (4, 32), rng(i)) for i in range(3)}
    for i, (name, tensor) in enumerate(tensors.items()):
        split = {"split.no": i, "split.count": 3, "split.tensors.count": ("i32", 3)}
        metadata = {**(LLAMA if i == 0 else {}), **split}
        write(tmp_path / f"model-{i + 1:05}-of-00003.gguf", metadata, {name: tensor})
    with load_gguf(tmp_path / "model-00001-of-00003.gguf") as model:
        assert model.variant == "llama, 3 Q4_0"
        for i, tensor in enumerate(tensors.values()):
            assert same(weight(model, f"model.layers.{i}.mlp.up_proj"), G.decode("Q4_0", tensor[2], (4, 32)))


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("architecture", "family"),
    [("llama", "LLAMA"), ("qwen2", "QWEN2"), ("qwen3", "QWEN3"), ("qwen2moe", "QWEN2MOE"), ("qwen3moe", "QWEN3MOE")],
)
def test_names_as_the_gguf_package_maps_them(architecture: str, family: str) -> None:
    package = pytest.importorskip("gguf")
    arch = package.MODEL_ARCH[family]
    mapped = package.get_tensor_name_map(arch, 2)
    for part in package.MODEL_TENSORS[arch]:
        base = package.TENSOR_NAMES[part].format(bid=1)
        name = hugging_face_name(architecture, base)
        if name is None:
            assert "rope" in base or "rot_embd" in base or base == "blk.1.ffn_norm_exps", base
        else:  # experts alone, and their tensor: "experts.3.w1" is of "experts.w1"
            assert mapped.get_name(name.replace("{}.", "")) == base
    assert hugging_face_name("llama", "blk.1.ffn_up.3") == "model.layers.1.block_sparse_moe.experts.3.w3"


# -- a real file -------------------------------------------------------------------------------------------------------------


def test_a_file_of_llama_cpp() -> None:
    with load_gguf(REAL) as model:
        assert model.variant == "llama, 4 Q4_K, 2 float32, 1 Q6_K"
        assert model.metadata["llama.attention.head_count_kv"] == 2
        assert model.metadata["tokenizer.ggml.tokens"][:2] == ["w0", "w1"]
        assert isinstance(model.metadata["tokenizer.ggml.scores"], array.array)
        raw = REAL.read_bytes()
        for name, heads in (("embed_tokens", 0), ("layers.0.self_attn.q_proj", 4), ("layers.0.self_attn.k_proj", 2),
                            ("layers.0.self_attn.o_proj", 0), ("layers.0.self_attn.v_proj", 0)):  # fmt: skip
            (source,) = model.layers[f"model.{name}"].sources
            info = model._gguf.tensors[source]
            want = G.decode(info.type_name, raw[info.begin : info.begin + info.nbytes], info.shape)
            if heads:
                want = want.reshape(heads, -1, 2, want.shape[1]).swapaxes(1, 2).reshape(want.shape)
            assert same(weight(model, f"model.{name}"), want)
            assert 0.015 < want.std() < 0.025  # as the model was initialised: the layout is the right one


@pytest.mark.oracle
def test_a_file_of_llama_cpp_as_the_gguf_package_reads_it() -> None:
    package = pytest.importorskip("gguf")
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in package.GGUFReader(REAL).tensors}
    with load_gguf(REAL) as model:
        for name, layer in model.layers.items():
            if name.endswith(("q_proj", "k_proj")):
                continue
            source = tensors[layer.sources[0]]
            assert same(weight(model, name), dequantize(source.data, source.tensor_type))


def test_through_the_registry() -> None:
    assert lowbit.formats.detect(REAL).format == "gguf"
    records = dict(lowbit.formats.read(REAL))
    linear = records["model.layers.0.self_attn.v_proj"].linear()
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    w = records["model.layers.0.self_attn.v_proj"].weight.dequantize()
    torch.testing.assert_close(linear(x), x @ w.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ArtifactError, match="is a gguf file, not gptq"):
        dict(lowbit.formats.read(REAL, format="gptq"))


# -- metadata ----------------------------------------------------------------------------------------------------------------


def test_metadata_of_every_type(tmp_path: Path) -> None:
    metadata = {
        "a": ("u8", 255), "b": ("i32", -5), "c": 1.5, "d": True, "e": ("u64", 2**64 - 1), "f": "text", "g": b"\xff\xfe!",
        "h": [1, 2, 3], "i": [True, False], "j": ["x", b"\xe2\x82"], "k": [], "general.alignment": 64,
    }  # fmt: skip
    tensors = {"w": G.float_tensor((3,), rng()), "v": G.float_tensor((3,), rng(1))}
    path = write(tmp_path / "w.gguf", metadata, tensors, version=2, alignment=64)
    with load_gguf(path) as model:
        found = dict(model.metadata)
        assert found.pop("h") == array.array("I", [1, 2, 3]) and list(found.pop("k")) == []
        assert found == {
            "a": 255, "b": -5, "c": 1.5, "d": True, "e": 2**64 - 1, "f": "text", "g": "\\xff\\xfe!",
            "i": [True, False], "j": ["x", "\\xe2\\x82"], "general.alignment": 64,
        }  # fmt: skip
        assert model.read("v").numpy().tobytes() == tensors["v"][2]


def test_strings_longer_than_what_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["x" * (7 * i % 41) for i in range(200)]
    for chunk in (1, 64, 999):
        monkeypatch.setattr("lowbit.formats._gguf_file._CHUNK", chunk)
        tensors = {"w": G.float_tensor((3,), rng())}
        with load_gguf(write(tmp_path / "w.gguf", {"a": words, "b": words[:3], "c": "end"}, tensors)) as model:
            assert model.metadata == {"a": words, "b": words[:3], "c": "end"}
            assert model.read("w").numpy().tobytes() == tensors["w"][2]


def test_a_file_without_tensors_is_metadata(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    path.write_bytes(G.gguf_bytes({"general.architecture": "llama"}, {}).rstrip(b"\0"))
    with load_gguf(path) as model:
        assert model.names == [] and model.metadata == {"general.architecture": "llama"}


def test_closing(tmp_path: Path) -> None:
    path = write(tmp_path / "w.gguf", {}, {"w": G.float_tensor((3,), rng())})
    model = load_gguf(path)
    model.close()
    with pytest.raises(ArtifactError, match="closed file"):
        model.read("w")
