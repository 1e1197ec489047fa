"""`lowbit quantize`: the same bits as quantize_, which tensors it leaves alone, and that it makes all of DIR or nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cli_helpers
from artifacts import contents, same
from cli_helpers import Llama, llama_checkpoint, make_llama, write_checkpoint
from lowbit import QuantizedLinear, cli, load_quantized, quantize_
from lowbit.commands import quantize as command


def quantize(source: Path, out: Path, *args: str, scheme: str = "int4-g32") -> int:
    return cli.main(["quantize", str(source), "--scheme", scheme, "--out", str(out), *args])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


# -- the same as quantize_ -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_as_quantize_(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    source = llama_checkpoint(tmp_path / "model", shards, dtype=dtype)
    args = ("--override", "*.down_proj=int8-asym", "--skip", "re:.*layers\\.0\\..*o_proj", "--quiet")
    assert quantize(source, tmp_path / "out", *args) == 0
    wanted = make_llama(dtype)
    quantize_(wanted, "int4-g32", overrides={"*.down_proj": "int8-asym", "re:.*layers\\.0\\..*o_proj": None})
    for target in (Llama, make_llama(dtype)):
        loaded = load_quantized(target, tmp_path / "out")
        assert same(loaded, wanted)
        assert torch.equal(loaded.model.rotary_emb.inv_freq, wanted.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("scheme", ["nf4-g16", "fp8-b128", "int3-g32-offset", "int8-a8", "int4-g32-rtn"])
def test_schemes(tmp_path: Path, scheme: str) -> None:
    assert quantize(llama_checkpoint(tmp_path / "model"), tmp_path / "out", "--quiet", scheme=scheme) == 0
    wanted = make_llama()
    quantize_(wanted, scheme)
    loaded = load_quantized(Llama, tmp_path / "out")
    assert same(loaded, wanted)
    assert str(loaded.model.layers[0].mlp.up_proj.scheme) == scheme


def test_search_and_no_search(tmp_path: Path) -> None:
    source = llama_checkpoint(tmp_path / "model")
    for flag, scheme in (("--search", "int8-search"), ("--no-search", "int8")):
        assert quantize(source, tmp_path / flag, flag, "--quiet", scheme="int8") == 0
        layer = load_quantized(Llama, tmp_path / flag).model.layers[0].mlp.up_proj
        wanted = make_llama()
        quantize_(wanted, scheme)
        assert same(layer, wanted.model.layers[0].mlp.up_proj)
        assert str(layer.scheme) == scheme


def test_tied_output_layer_as_transformers_stores_it(tmp_path: Path) -> None:
    source = llama_checkpoint(tmp_path / "model", tie=True)
    assert quantize(source, tmp_path / "out", "--quiet") == 0
    for target in (lambda: Llama(tie=True), make_llama(tie=True)):
        loaded = load_quantized(target, tmp_path / "out")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(loaded.lm_head.weight, make_llama(tie=True).lm_head.weight)


def test_a_factory_holds_one_parameter_at_a_time(tmp_path: Path) -> None:
    seen = []

    def factory() -> Llama:
        model = Llama()
        seen.append({p.device.type for p in model.parameters()})
        return model

    quantize(llama_checkpoint(tmp_path / "model"), tmp_path / "out", "--quiet")
    load_quantized(factory, tmp_path / "out")
    assert seen == [{"meta"}, {"meta"}]  # again, for the rotary table, but still without parameters
    with torch.device("meta"):
        assert nn.Linear(2, 2).weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta  # the hook is gone


# -- which tensors ---------------------------------------------------------------------------------------------------------


def layers_of(folder: Path) -> dict[str, str]:
    from lowbit._artifact import read_manifest

    return {name: str(layer.scheme) for name, layer in read_manifest(folder).layers.items()}


def test_what_is_left_alone_by_name_and_shape(tmp_path: Path) -> None:
    left = {
        "shared.weight": (64, 32),
        "encoder.embed_positions.weight": (48, 32),
        "bert.embeddings.word_embeddings.weight": (64, 32),
        "transformer.wte.weight": (64, 32),
        "block.0.relative_attention_bias.weight": (32, 8),
        "output.weight": (64, 32),  # as many rows as the vocabulary
        "lm_head.weight": (50, 32),
        "embed_out.weight": (50, 32),
        "norm.weight": (32,),
        "conv.weight": (32, 32, 3),
        "attn.in_proj_weight": (96, 32),
        "attn.out_proj.weight": (32, 32),  # of nn.MultiheadAttention
        "attn.out_proj.bias": (32,),
        "h.0.c_fc.weight": (32, 128),  # a Conv1D: its bias has the second dimension
        "h.0.c_fc.bias": (128,),
        "table": (32, 32),
        "weight": (32, 32),
    }
    linear = {"attn2.out_proj.weight": (32, 32), "time_embedding.linear_1.weight": (32, 32), "fc.weight": (16, 32)}
    tensors = {name: torch.randn(shape) for name, shape in {**left, **linear}.items()}
    tensors |= {"ids.weight": torch.arange(64).view(2, 32), "wide.weight": torch.randn(8, 32, dtype=torch.float64)}
    source = write_checkpoint(tmp_path / "model", tensors, config={"vocab_size": "?", "model_type": ["?"]})
    assert quantize(source, tmp_path / "out", "--quiet") == 0
    assert layers_of(tmp_path / "out") == {name.removesuffix(".weight"): "int4-g32" for name in linear}
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    stored = load_file(shard)
    assert all(torch.equal(stored[name], tensors[name]) for name in [*left, "ids.weight", "wide.weight"])


def test_routers_are_left_alone(tmp_path: Path) -> None:
    routers = ["h.0.moe.gate", "h.0.moe.router.classifier", "h.0.moe.shared_expert_gate", "h.1.moe.gate"]
    others = ["h.0.attn.gate", "h.0.moe.experts.0.gate", "h.0.moe.gate_proj", "h.1.moe.switch_mlp.up_proj"]
    source = write_checkpoint(tmp_path / "model", {f"{name}.weight": torch.randn(8, 32) for name in routers + others})
    assert quantize(source, tmp_path / "out", "--quiet") == 0
    assert sorted(layers_of(tmp_path / "out")) == others
    assert quantize(source, tmp_path / "all", "--quiet", "--override", "*.moe.gate=int8") == 0
    assert sorted(layers_of(tmp_path / "all")) == sorted([*others, "h.0.moe.gate", "h.1.moe.gate"])


def test_weights_that_models_use_directly_are_left_alone(tmp_path: Path) -> None:
    direct = ["encoder.block.0.layer.1.DenseReluDense.wo", "backbone.layers.0.mixer.dt_proj"]
    others = ["backbone.layers.0.mixer.in_proj", "encoder.block.0.layer.1.DenseReluDense.wi"]
    source = write_checkpoint(tmp_path / "model", {f"{name}.weight": torch.randn(8, 32) for name in direct + others})
    assert quantize(source, tmp_path / "out", "--quiet") == 0
    assert sorted(layers_of(tmp_path / "out")) == others


def test_gpt2_is_known_by_its_config(tmp_path: Path) -> None:
    tensors = {"h.0.attn.c_proj.weight": torch.randn(32, 32), "h.0.fc.weight": torch.randn(32, 32)}
    source = write_checkpoint(tmp_path / "model", tensors, config={"model_type": "gpt2"})
    assert quantize(source, tmp_path / "out", "--quiet") == 0
    assert list(layers_of(tmp_path / "out")) == ["h.0.fc"]


def test_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama_checkpoint(tmp_path / "model")
    args = [
        "--override",
        "lm_head=int8",
        "--override",
        "model.embed_tokens=int6-g32",
        "--override",
        "re:.*(q|k)_proj=none",
    ]
    args += ["--skip", "*.mlp.*", "--override", "*.up_proj=int2-g32"]  # too late: the skip is first
    assert quantize(source, tmp_path / "out", *args, "--quiet") == 0
    found = layers_of(tmp_path / "out")
    assert found.pop("lm_head") == "int8"
    assert found.pop("model.embed_tokens") == "int6-g32"  # an exact name settles what was a guess
    assert {name.rpartition(".")[2] for name in found} == {"v_proj", "o_proj"}
    for override, message in (
        ("*.missing=int8", "matches no layer; layers are called, for example, lm_head, model.layers.0.mlp.down_proj"),
        ("*norm=int8", "matches no layer"),
        ("model.norm=int8", "asks for int8, but model.norm: 1-D, not the weight of a linear layer"),
        ("re:(=int8", "is not a regular expression"),
    ):
        capsys.readouterr()
        assert quantize(source, tmp_path / "other", "--override", override) == 1
        assert message in error(capsys)
        assert not (tmp_path / "other").exists()


def test_strict_and_the_list_of_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "embed.weight": torch.randn(1000, 256),
        "fc.weight": torch.randn(64, 32),
        "lm_head.weight": torch.randn(1000, 256),
    }
    source = write_checkpoint(tmp_path / "model", tensors)
    assert quantize(source, tmp_path / "out", "--strict") == 1
    assert "strict: these would be left unquantized: embed.weight (1024000 bytes): an embedding" in error(capsys)
    assert quantize(source, tmp_path / "out", "--strict", "--skip", "embed", "--override", "lm_head=int8") == 0
    text = capsys.readouterr().out
    assert "override 'embed' is none" in text
    assert "2 layers quantized" in text


def test_json_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama_checkpoint(tmp_path / "model")
    assert quantize(source, tmp_path / "out", "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert report["sha256"] == json.loads((tmp_path / "out/lowbit.json").read_text())["sha256"]
    assert report["copied"] == ["config.json", "tokenizer.json"]
    assert len(report["layers"]) == 14
    assert all(0.05 < layer["relative_error"] < 0.15 for layer in report["layers"])
    dense = sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert report["bytes_before"] == dense
    assert report["bytes_after"] == sum(t.nbytes for t in load_file(shard).values())


def test_side_files_are_copied_and_weights_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama_checkpoint(tmp_path / "model", shards=2)
    for name in ("merges.txt", "LICENSE", "README.md", "1_Pooling/config.json", "modeling.py", ".git/config", "x.bin"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "2_Dense").mkdir()
    save_file({"linear.weight": torch.zeros(2, 2)}, source / "2_Dense/model.safetensors")
    (source / "blob").write_text("elsewhere")
    (source / "vocab.json").symlink_to("blob")  # the Hub's cache is made of links
    assert quantize(source, source / "int4") == 0  # a folder inside the model's own
    copied = {str(p.relative_to(source / "int4")) for p in (source / "int4").rglob("*") if p.is_file()}
    shards = {name for name in copied if name.endswith(".safetensors")}
    assert copied - shards == {
        "config.json", "tokenizer.json", "merges.txt", "LICENSE", "README.md", "1_Pooling/config.json", "modeling.py",
        "vocab.json", "lowbit.json",
    }  # fmt: skip
    assert (source / "int4/vocab.json").read_text() == "elsewhere"
    assert not (source / "int4/vocab.json").is_symlink()
    assert "not copied: blob, 2_Dense/model.safetensors" in capsys.readouterr().out
    assert quantize(source, tmp_path / "other", "--quiet") == 0  # and an artifact inside is not part of the model
    assert not (tmp_path / "other/int4").exists()


def test_shards_of_the_artifact(tmp_path: Path) -> None:
    source = llama_checkpoint(tmp_path / "model")
    assert quantize(source, tmp_path / "out", "--max-shard-bytes", "20000", "--quiet") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    wanted = make_llama()
    quantize_(wanted, "int4-g32")
    assert same(load_quantized(Llama, tmp_path / "out"), wanted)


def test_nothing_but_ordinary_files_matter_in_natural_order(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.fc.weight": torch.randn(8, 32) for i in (0, 10, 2, 1)}
    assert quantize(write_checkpoint(tmp_path / "model", tensors), tmp_path / "out", "--quiet") == 0
    assert list(layers_of(tmp_path / "out")) != []
    from lowbit.formats._source import open_source

    with open_source(tmp_path / "model") as checkpoint:
        assert list(checkpoint.tensors) == [f"layers.{i}.fc.weight" for i in (0, 1, 2, 10)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_memory_holds_about_one_tensor(tmp_path: Path) -> None:
    """A checkpoint of 24 layers needs hardly more than one of a single layer, not the 92 MB that it is larger."""
    code = """
import re, sys
from lowbit.cli import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    peaks = []
    for count in (1, 24):
        tensors = {f"layers.{i}.fc.weight": torch.randn(1024, 1024) for i in range(count)}
        source, out = write_checkpoint(tmp_path / f"model{count}", tensors), tmp_path / f"out{count}"
        args = ["quantize", str(source), "--scheme", "int8", "--out", str(out), "--quiet"]
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True, text=True, env=cli_helpers.environment(), timeout=120, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout) << 10)
        assert len(layers_of(out)) == count
    assert peaks[1] - peaks[0] < 30 << 20


# -- refused, with nothing made --------------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = llama_checkpoint(tmp_path / "good", shards=2)

    def case(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    (tmp_path / "empty").mkdir()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    missing = case("missing")
    (missing / "model-00002-of-00002.safetensors").unlink()
    truncated = case("truncated")
    shard = truncated / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    outside = case("outside")
    (outside / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../good/model.safetensors"}}')
    moved = case("moved")
    index = json.loads((moved / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    (moved / "model.safetensors.index.json").write_text(json.dumps(index))
    twice = case("twice")
    (twice / "model.safetensors.index.json").unlink()
    shutil.copy(twice / "model-00001-of-00002.safetensors", twice / "copy.safetensors")
    gptq = case("gptq")
    (gptq / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    gpt2 = write_checkpoint(tmp_path / "gpt2", {"c_fc.weight": torch.zeros(8, 8)}, config={"model_type": "gpt2"})
    config = case("config")
    (config / "config.json").write_text("[1]")
    quantize(good, tmp_path / "artifact", "--quiet")
    for folder, message in {
        tmp_path / "nowhere": "nowhere: no such folder",
        good / "config.json": "config.json: not a folder",
        tmp_path / "empty": "empty: no *.safetensors files",
        pickled: "pytorch_model.bin cannot be read: convert to safetensors first",
        missing: "model-00002-of-00002.safetensors: no such file",
        truncated: "truncated",
        outside: "which is not a file name",
        moved: "has no tensor 'ghost.weight', which the index puts there",
        twice: "is also in",
        gptq: "quantized already",
        gpt2: "no layer would be quantized (c_fc: stored as [K, N]: a Conv1D, not an nn.Linear)",
        config: "config.json: expected a JSON object",
        tmp_path / "artifact": "is a lowbit artifact, and quantized already",
    }.items():
        assert quantize(folder, tmp_path / "out") == 1
        assert message in error(capsys)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scheme", "int4-g128"], "model.layers.0.mlp.gate_proj: group_size=128 is larger than K=64"),
        (["--scheme", "int8-aint8_static"], "needs calibrated input scales"),
    ],
)
def test_schemes_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    source = llama_checkpoint(tmp_path / "model")
    assert quantize(source, tmp_path / "out", *args) == 1
    assert message in error(capsys)
    assert not (tmp_path / "out").exists()


def test_nan_in_the_middle_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    source = write_checkpoint(tmp_path / "model", model.state_dict())
    assert quantize(source, tmp_path / "out") == 1
    assert "model.layers.1.mlp.up_proj: 1 of 8192 weights are NaN or infinite" in error(capsys)
    assert sorted(os.listdir(tmp_path)) == ["model"]


# -- the folder that is made -----------------------------------------------------------------------------------------------


def test_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama_checkpoint(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    assert quantize(source, tmp_path / "empty", "--quiet") == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to").symlink_to(tmp_path / "elsewhere")
    assert quantize(source, tmp_path / "to", "--quiet") == 0
    assert (tmp_path / "elsewhere/lowbit.json").exists()
    assert quantize(source, tmp_path / "new/deep", "--quiet") == 0
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("mine")
    (tmp_path / "link").symlink_to(source)
    for out, message in (
        ("file", "exists and is not a folder"),
        ("full", "not empty, and what is in it is not a lowbit artifact"),
        ("empty", "holds an artifact already; --force replaces it"),
        ("model", "is the model's own folder"),
        ("link", "is the model's own folder"),
    ):
        before = contents(tmp_path / out) if (tmp_path / out).is_dir() else None
        assert quantize(source, tmp_path / out) == 1
        assert message in error(capsys)
        assert quantize(source, tmp_path / out, "--force", "--quiet") == (0 if out == "empty" else 1)
        capsys.readouterr()
        assert out == "empty" or before is None or contents(tmp_path / out) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_force_replaces_the_artifact_and_leaves_other_files(tmp_path: Path) -> None:
    source = llama_checkpoint(tmp_path / "model")
    out = tmp_path / "out"
    assert quantize(source, out, "--quiet", "--max-shard-bytes", "9000") == 0
    (out / "notes.txt").write_text("mine")
    assert quantize(source, out, "--quiet", "--force", scheme="int8") == 0
    assert set(layers_of(out).values()) == {"int8"}
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list(out.glob("*.safetensors"))) == 1
    assert same(load_quantized(Llama, out).model.norm, make_llama().model.norm)
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


# A run that stops in the middle and says so: the third layer is never finished.
_STUCK = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would this
import lowbit.commands.quantize as command
original, count = command.QuantizedWeight.quantize, 0
def slow(*args):
    global count
    count += 1
    if count == 3:
        print("ready", flush=True)
        time.sleep(100)
    return original(*args)
command.QuantizedWeight.quantize = slow
from lowbit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start_and_stop(source: Path, out: Path, how: signal.Signals) -> tuple[int, str]:
    args = ["quantize", str(source), "--scheme", "int4-g32", "--out", str(out), "--force", "--max-shard-bytes", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", _STUCK, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cli_helpers.environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(how)
    _, text = process.communicate(timeout=60)
    return process.returncode, text


@pytest.mark.parametrize("again", [False, True], ids=["new", "over an artifact"])
def test_ctrl_c_leaves_nothing_or_the_old_artifact(tmp_path: Path, again: bool) -> None:
    source, out = llama_checkpoint(tmp_path / "model"), tmp_path / "out"
    if again:
        assert quantize(source, out, "--quiet", scheme="int8") == 0
    before = contents(out) if again else None
    assert start_and_stop(source, out, signal.SIGINT) == (130, "lowbit: interrupted\n")
    assert sorted(os.listdir(tmp_path)) == (["model", "out"] if again else ["model"])
    assert before is None or contents(out) == before


def test_kill_leaves_nothing_at_dir_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    source, out = llama_checkpoint(tmp_path / "model"), tmp_path / "out"
    code, _ = start_and_stop(source, out, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == [".out.lowbit-partial", "model"]
    assert quantize(source, out, "--quiet") == 0
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    assert isinstance(load_quantized(Llama, out).model.layers[0].mlp.up_proj, QuantizedLinear)


def test_two_at_once_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = llama_checkpoint(tmp_path / "model"), tmp_path / "out"
    inner: list[int] = []

    def again(root: Path, names: list[str], target: Path) -> None:
        monkeypatch.undo()
        inner.append(quantize(source, out))

    monkeypatch.setattr(command._staging, "copy_files", again)
    assert quantize(source, out, "--quiet") == 0
    assert inner == [1]
    assert "another process is writing to it" in error(capsys)
    assert layers_of(out)
