"""`lowbit convert` and convert_checkpoint: every kind of source, what is refused before anything is written, and that all of the
target appears or nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cli_helpers
from checkpoints import DATA, Layer, awq_gemm, gptq, gptq_config, named, records, write
from cli_helpers import Llama, llama_checkpoint, make_llama
from gguf_files import block_tensor, float_tensor, rng
from gguf_files import write as write_gguf
from lowbit import (
    ArtifactError,
    cli,
    convert_checkpoint,
    formats,
    load_gguf,
    load_quantized,
    quantize_,
    save_importance,
    save_quantized,
)
from lowbit.formats import LinearRecord
from lowbit.formats._gguf_write import raw_metadata
from writers import CONFIG

UP = "model.layers.1.mlp.up_proj"


def convert(source: Path, target: Path, to: str, *args: str) -> int:
    return cli.main(["convert", str(source), str(target), "--to", to, *args])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {n: r.weight.dequantize() for n, r in formats.read(path) if isinstance(r, LinearRecord)}


# -- sources -----------------------------------------------------------------------------------------------------------------


def test_a_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bits as quantize_; the rest as it was; files around it copied."""
    source = llama_checkpoint(tmp_path / "model", 2)
    args = ("--scheme", "int4-g32", "--override", "*.down_proj=int8", "--override", "*.o_proj=none")
    assert convert(source, tmp_path / "out", "compressed-tensors", *args) == 0
    table = capsys.readouterr().out
    assert "12 layers, 0 of them without any change" in table and "int4-g32" in table and "SQNR dB" in table
    wanted = make_llama()
    quantize_(wanted, "int4-g32", overrides={"*.down_proj": "int8", "*.o_proj": None})
    for name, record in records(tmp_path / "out").items():
        assert record.weight == wanted.get_submodule(name).quantized_weight()
        bias = wanted.get_submodule(name).bias
        assert (record.bias is None) == (bias is None)
        assert bias is None or torch.equal(record.bias, bias)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], wanted.lm_head.weight)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_scales_are_searched_in_the_dtype_of_the_format(tmp_path: Path) -> None:
    report = convert_checkpoint(llama_checkpoint(tmp_path / "model"), tmp_path / "out", "gptq", scheme="int4-g32")
    assert {layer.scheme for layer in report.layers} == {"int4-g32-fp16"}
    wanted = make_llama()
    quantize_(wanted, "int4-g32-fp16")
    assert records(tmp_path / "out")[UP].weight == wanted.get_submodule(UP).quantized_weight()


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq"])
def test_an_artifact(tmp_path: Path, to: str) -> None:
    model = make_llama()
    quantize_(model, "int4-g32-asym")
    save_quantized(model, tmp_path / "artifact")
    report = convert_checkpoint(tmp_path / "artifact", tmp_path / "out", to)
    assert all(layer.relative_error == 0 and layer.source == "int4-g32-asym" for layer in report.layers)
    assert len(report.layers) == 14 and "config.json holds nothing but" in report.notes[0]
    found = weights(tmp_path / "out")
    for name in found:
        assert torch.equal(found[name], model.get_submodule(name).quantized_weight().dequantize())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("inv_freq" in name for name in stored)  # the model computes it
    assert torch.equal(stored["model.layers.0.steps"], torch.tensor(3))


def test_an_altered_artifact_is_refused(tmp_path: Path) -> None:
    model = make_llama()
    quantize_(model, "int4-g32")
    save_quantized(model, tmp_path / "artifact")
    (shard,) = (tmp_path / "artifact").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match="corrupted"):
        convert_checkpoint(tmp_path / "artifact", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gptq-v2-asym-act-order", "awq-gemm", "ct-w4a16-asym", "ct-w8a8", "bitsandbytes-nf4"])
def test_checkpoints_of_others_to_an_artifact(tmp_path: Path, name: str) -> None:
    report = convert_checkpoint(DATA / name, tmp_path / "out", "artifact")
    assert report.layers and all(layer.relative_error == 0 for layer in report.layers)
    from lowbit.formats._contents import open_artifact

    with open_artifact(tmp_path / "out") as made:
        assert made.layers.keys() == records(DATA / name).keys()
        for layer, record in records(DATA / name).items():
            found, _ = made.layers[layer].read()
            assert found.weight == record.weight and found.weight.scheme == record.weight.scheme
        assert "quantization_config" not in made.config


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
def test_awq_to_others(tmp_path: Path, to: str) -> None:
    report = convert_checkpoint(DATA / "awq-gemm", tmp_path / "out", to)
    assert all(layer.relative_error == 0 for layer in report.layers)
    before, after = weights(DATA / "awq-gemm"), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if to == "awq":
        old, new = (load_file(p / "model.safetensors") for p in (DATA / "awq-gemm", tmp_path / "out"))
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_biases_beside_a_quantized_checkpoint(tmp_path: Path) -> None:
    layer = Layer()
    tensors = {**named("fc", gptq(layer, 2)), "fc.bias": torch.randn(32).half()}
    source = write(tmp_path / "in", tensors, gptq_config(layer, checkpoint_format="gptq_v2"))
    convert_checkpoint(source, tmp_path / "a", "artifact")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "awq")
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(found["fc.bias"], tensors["fc.bias"])
    wanted = named("fc", awq_gemm(layer))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_quantized_again(tmp_path: Path) -> None:
    """Where a scheme is given: errors are against what the source decodes to."""
    report = convert_checkpoint(DATA / "awq-gemm", tmp_path / "out.gguf", "gguf", scheme="int4-g32")
    (layer,) = report.layers
    assert (
        layer.source == "int4-g64-asym-fp16" and layer.scheme == "int4-g32-fp16" and 0.02 < layer.relative_error < 0.2
    )
    (found,) = weights(tmp_path / "out.gguf").values()
    (before,) = weights(DATA / "awq-gemm").values()
    assert float((found - before).norm() / before.norm()) == pytest.approx(layer.relative_error, rel=1e-5)
    # The scheme that it has already: codes are kept, and what is said of inputs goes.
    (layer,) = convert_checkpoint(DATA / "ct-w8a8", tmp_path / "w8", "gptq", scheme="int8-bf16").layers
    assert layer.relative_error == 0 and layer.scheme == "int8-fp16"


# -- GGUF ----------------------------------------------------------------------------------------------------------------------


def gguf_model(path: Path, kind: str = "Q4_0") -> Path:
    """A Llama of one block, its embedding quantized too."""
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "ffn_up": (96, 64)}
    tensors = {f"blk.0.{n}.weight": block_tensor(kind, s, rng(i)) for i, (n, s) in enumerate(shapes.items())}
    tensors |= {
        "blk.0.attn_norm.weight": float_tensor((64,), rng(7)),
        "token_embd.weight": block_tensor(kind, (40, 64), rng(8)),
    }
    metadata = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "general.file_type": 2,
        "tokenizer.ggml.tokens": ["a", b"\xff\xfe", "c"],
        "tokenizer.ggml.scores": [0.5, 1.5, -1.0],
        "tokenizer.ggml.add_bos_token": True,
    }
    return write_gguf(path, metadata, tensors)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_to_itself(tmp_path: Path, kind: str) -> None:
    """Every block to the byte, in the rows where it was, and every key."""
    source, target = gguf_model(tmp_path / "in.gguf", kind), tmp_path / "out.gguf"
    report = convert_checkpoint(source, target, "gguf")
    assert all(layer.relative_error == 0 for layer in report.layers) and not report.notes
    old, new = raw_metadata(source), raw_metadata(target)
    added = {"general.quantization_version", "general.file_type"}
    assert {k: v for k, v in new.items() if k not in added} == {k: v for k, v in old.items() if k not in added}
    with load_gguf(source) as a, load_gguf(target) as b:
        assert a._gguf.tensors.keys() == b._gguf.tensors.keys()
        for name, tensor in a._gguf.tensors.items():
            again = b._gguf.tensors[name]
            assert (tensor.type, tensor.shape) == (again.type, again.shape)
            rows = [file.read_rows(t, 0, t.rows) for file, t in ((a._gguf, tensor), (b._gguf, again))]
            assert torch.equal(*rows), name


def test_gguf_to_a_folder(tmp_path: Path) -> None:
    """Names are those of Transformers; the embedding becomes dense, and the report says so."""
    source = gguf_model(tmp_path / "in.gguf")
    report = convert_checkpoint(source, tmp_path / "out", "compressed-tensors")
    before, after = weights(source), weights(tmp_path / "out")
    embedding = before.pop("model.embed_tokens")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored, embedding.half())
    assert "model.embed_tokens was int4-g32-fp16; compressed-tensors has it dense, here in float16" in report.notes


def test_a_folder_to_gguf_and_back(tmp_path: Path) -> None:
    """With keys from config.json, or from a file of the same model."""
    model = make_llama()
    tensors = {n: t for n, t in model.state_dict().items() if not n.endswith("steps")}
    config = {**CONFIG, "hidden_size": 64, "head_dim": 16, "vocab_size": 40}
    source = cli_helpers.write_checkpoint(tmp_path / "model", tensors, config=config)
    target = tmp_path / "out.gguf"
    assert convert(source, target, "gguf", "--scheme", "int8-g32", "--quiet") == 0
    quantize_(model, "int8-g32-fp16")
    with load_gguf(target) as found:
        assert found.metadata["general.architecture"] == "llama" and found.metadata["llama.rope.dimension_count"] == 16
        assert found.metadata["llama.context_length"] == 128 and found.metadata["general.file_type"] == 7
        for name, record in found:
            if isinstance(record, LinearRecord):
                assert record.weight == model.get_submodule(name).quantized_weight(), name
                bias = model.get_submodule(name).bias
                assert bias is None or torch.equal(record.bias, bias.float())
            else:
                assert torch.equal(record, tensors[name].to(record.dtype))
    keys = gguf_model(tmp_path / "keys.gguf")
    again = tmp_path / "again.gguf"
    assert convert(source, again, "gguf", "--scheme", "int8-g32", "--quiet", "--metadata-from", str(keys)) == 0
    with load_gguf(again) as found:
        assert found.metadata["general.name"] == "tiny" and found.metadata["general.file_type"] == 7
        assert raw_metadata(again)["tokenizer.ggml.tokens"] == raw_metadata(keys)["tokenizer.ggml.tokens"]
        key = found.read("model.layers.0.self_attn.k_proj")
        assert isinstance(key, LinearRecord)
        assert key.weight == model.get_submodule("model.layers.0.self_attn.k_proj").quantized_weight()


# -- refused -------------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama_checkpoint(tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for target, to, message in (
        ("full", "awq", "the folder is not empty; nothing is overwritten"),
        ("file", "awq", "exists and is not a folder"),
        ("file", "gguf", "exists; nothing is overwritten"),
        ("empty", "gguf", "exists; nothing is overwritten"),
        ("model", "awq", "is the source; choose another folder"),
    ):
        assert convert(source, tmp_path / target, to, "--scheme", "int4-g32") == 1
        assert error(capsys) == f"lowbit: error: {tmp_path / target}: {message}"
    assert convert(source, tmp_path / "empty", "awq", "--scheme", "int4-g32", "--quiet") == 0
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full", "model"]


@pytest.mark.parametrize(
    ("to", "args", "message"),
    [
        ("gptq", [], "the model is not quantized: say how with a scheme"),
        (
            "gptq",
            ["--scheme", "nf4-g32"],
            "o_proj: nf4-g32-fp16: gptq holds integers of 2, 3, 4, 8 bits (and 13 more layers)",
        ),
        ("awq", ["--scheme", "int4-g32", "--override", "*.up_proj=int4-g64"], "awq has one group size for all layers"),
        ("awq", ["--override", "*.up_proj=int4-g64"], "overrides and importance are for quantizing: give a scheme"),
        ("awq", ["--scheme", "int4-g32", "--metadata-from", "x.gguf"], "metadata_from is for gguf, not for awq"),
        ("gguf", ["--scheme", "int4-g32"], "num_attention_heads of config.json is None, a whole number is needed"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, args: list[str], message: str
) -> None:
    source = llama_checkpoint(tmp_path / "model")
    assert convert(source, tmp_path / "out", to, *args) == 1
    assert message.replace("o_proj: ", "") in error(capsys)
    assert os.listdir(tmp_path) == ["model"]


def test_what_a_format_cannot_hold_names_the_layer(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"k_proj: nf4-g64-flat-dyn8-x256fp32: awq holds .*; with a scheme they are quantized again"
    ):
        convert_checkpoint(DATA / "bitsandbytes-nf4", tmp_path / "out", "awq")
    source = llama_checkpoint(tmp_path / "model")
    (source / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(
        ArtifactError, match=r"model_type 'opt' of config.json is not one of llama, mistral, qwen2, qwen3"
    ):
        convert_checkpoint(source, tmp_path / "out.gguf", "gguf", scheme="int8-g32")
    assert os.listdir(tmp_path) == ["model"]


# -- the command ---------------------------------------------------------------------------------------------------------------


def test_json_and_importance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama_checkpoint(tmp_path / "model")
    column = torch.ones(64)
    column[3] = 1e6
    save_importance(tmp_path / "importance.safetensors", {UP: column})
    args = ("--scheme", "int3-g32", "--json", "--importance", str(tmp_path / "importance.safetensors"))
    assert convert(source, tmp_path / "out", "artifact", *args) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "artifact" and len(report["layers"]) == 14 and report["seconds"] > 0
    assert report["bytes_after"] < report["bytes_before"]
    found = load_quantized(Llama, tmp_path / "out").get_submodule(UP).quantized_weight()
    wanted = make_llama()
    quantize_(wanted, "int3-g32", importance={UP: column})
    assert found == wanted.get_submodule(UP).quantized_weight()
    save_importance(tmp_path / "bad.safetensors", {"model.layers.9.mlp.up_proj": column})
    assert (
        convert(source, tmp_path / "b", "artifact", *args[:2], "--importance", str(tmp_path / "bad.safetensors")) == 1
    )
    assert "importance names model.layers.9.mlp.up_proj, which the model does not have" in error(capsys)


# A run that stops in the middle and says so: the third layer is never finished.
_STUCK = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would this
import lowbit.conversion as conversion
original, count = conversion.weight_error, 0
def slow(*args):
    global count
    count += 1
    if count == 3:
        print("ready", flush=True)
        time.sleep(100)
    return original(*args)
conversion.weight_error = slow
from lowbit.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("to", ["awq", "gguf", "artifact"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, to: str) -> None:
    source = gguf_model(tmp_path / "in.gguf")
    process = subprocess.Popen(
        [sys.executable, "-c", _STUCK, "convert", str(source), str(tmp_path / "out"), "--to", to],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cli_helpers.environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert (process.returncode, text) == (130, "lowbit: interrupted\n")
    assert os.listdir(tmp_path) == ["in.gguf"]
