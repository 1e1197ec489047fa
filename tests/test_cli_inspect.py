"""`lowbit inspect`: what it lists, what it verifies, and that hostile files get one clean line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from artifacts import edit_manifest, quantized_tiny, replace_shard
from checkpoints import DATA
from cli_helpers import llama_checkpoint
from lowbit import QuantizedWeight, cli, save_quantized


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_quantized(quantized_tiny(), tmp_path / "model")
    return tmp_path / "model"


def inspect(*args: object) -> int:
    return cli.main(["inspect", *map(str, args)])


def found(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert inspect(*args, "--json") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert inspect(*args) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("lowbit: error: ")
    assert "LOWBIT_DEBUG" not in line  # that would be a bug, not an answer
    return line


# -- listing -----------------------------------------------------------------------------------------------------------------


def test_an_artifact(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = found(capsys, saved)
    assert (body["kind"], body["verified"]) == ("artifact", False)
    first, second = sorted(body["layers"], key=lambda layer: layer["name"])
    model = quantized_tiny()
    assert (first["name"], first["scheme"], first["shape"]) == ("first", "int4-g8", [24, 16])
    assert (second["name"], second["scheme"], second["shape"]) == ("second", "int8-asym", [16, 24])
    assert first["bytes"] == model.first.quantized_weight().nbytes
    assert first["bits_per_weight"] == pytest.approx(6.0)
    assert {"head.weight": "embed.weight", "again": "first"}.items() <= body["aliases"].items()
    assert body["bytes"] == sum(tensor["bytes"] for tensor in body["tensors"])
    assert inspect(saved) == 0
    text = capsys.readouterr().out
    assert "again is first" in text
    assert "not verified" in text
    assert "first.weight_packed" not in text  # it is in the line of its layer


def test_an_artifact_by_its_manifest(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(capsys, saved / "lowbit.json") == found(capsys, saved)


def test_a_folder_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama_checkpoint(tmp_path / "llama", shards=2)
    body = found(capsys, folder)
    assert (body["kind"], len(body["files"]), body["layers"]) == ("folder", 2, [])
    listed = {t["name"]: (t["dtype"], t["shape"], t["bytes"]) for t in body["tensors"]}
    assert listed["model.layers.1.mlp.up_proj.weight"] == ("BF16", [128, 64], 16384)
    file = found(capsys, folder / "model-00001-of-00002.safetensors")
    assert (file["kind"], file["metadata"]) == ("file", {"format": "pt"})
    assert {t["name"] for t in file["tensors"]} < listed.keys()
    assert inspect(folder) == 0
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out


def test_one_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = QuantizedWeight.quantize(torch.randn(8, 64), "nf4-g64")
    weight.save(tmp_path / "w.safetensors")
    (layer,) = found(capsys, tmp_path / "w.safetensors")["layers"]
    assert (layer["scheme"], layer["shape"], layer["bytes"]) == ("nf4-g64", [8, 64], weight.nbytes)


def test_names_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"\x1b[2J[red]\n\u202e": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert inspect(tmp_path / "x.safetensors") == 0
    text = capsys.readouterr().out
    assert "\\x1b[2J[red]\\n\\u202e" in text
    assert "\x1b" not in text


def test_lone_surrogates_in_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    assert inspect(tmp_path / "x.safetensors") == 0
    assert "\\ud800" in capsys.readouterr().out
    assert inspect(tmp_path / "x.safetensors", "--json") == 0


# -- verifying ---------------------------------------------------------------------------------------------------------------


def test_verify(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(capsys, saved, "--verify")["verified"] is True
    assert inspect(saved, "--verify") == 0
    assert capsys.readouterr().out.rstrip().endswith(", verified")


@pytest.mark.parametrize("position", [100, -1])
def test_verify_finds_one_flipped_bit(saved: Path, capsys: pytest.CaptureFixture[str], position: int) -> None:
    (shard,) = saved.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[position] ^= 1
    shard.write_bytes(data)
    assert shard.name in refused(capsys, saved, "--verify")


def test_verify_finds_a_shard_with_other_tensors(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"first.bias": torch.zeros(24)}, tmp_path / "other.safetensors")
    replace_shard(saved, (tmp_path / "other.safetensors").read_bytes())
    assert "is not what lowbit.json says" in refused(capsys, saved, "--verify")


def test_sizes_and_missing_shards_are_seen_without_verify(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = saved.glob("*.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    assert "truncated or altered" in refused(capsys, saved)
    shard.unlink()
    assert "missing or renamed" in refused(capsys, saved)


def test_there_is_nothing_to_verify_in_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama_checkpoint(tmp_path / "llama")
    for path in (folder, folder / "model.safetensors"):
        assert "no hashes to verify" in refused(capsys, path, "--verify")


# -- checkpoints of other libraries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq-v2-asym-act-order", "gptq-v2-asym-act-order/model.safetensors"])
def test_a_checkpoint_of_another_library(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    about = found(capsys, DATA / name)
    assert (about["format"], about["variant"]) == ("gptq", "v2, int4, groups of 64, act-order")
    assert "quant_method is 'gptq'" in about["why"]
    layer = about["layers"][0]
    assert layer["name"] == "model.layers.0.self_attn.k_proj" and layer["shape"] == [128, 256]
    assert layer["scheme"] == "int4, groups of 64, act-order" and layer["bytes"] == 18688
    plain = [tensor["name"] for tensor in about["tensors"] if tensor.get("kind") != "quantized"]
    assert plain == ["model.layers.0.input_layernorm.weight"] and len(about["tensors"]) == 9
    assert inspect(DATA / name) == 0
    out = capsys.readouterr().out
    assert "gptq: v2, int4, groups of 64, act-order; load_checkpoint reads it" in out and "qzeros\n" not in out


def test_a_gguf_file(capsys: pytest.CaptureFixture[str]) -> None:
    about = found(capsys, DATA / "gguf-q4_k_m.gguf")
    assert about["format"] == "gguf" and "model.layers.0.self_attn.v_proj" in [x["name"] for x in about["layers"]]
    assert about["bytes"] == sum(entry["bytes"] for entry in about["layers"] + about["tensors"])


def test_why_a_checkpoint_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mxfp6"
    shutil.copytree(DATA / "ct-nvfp4", folder)
    config = (folder / "config.json").read_text().replace("nvfp4-pack-quantized", "mxfp6-pack-quantized")
    (folder / "config.json").write_text(config)
    about = found(capsys, folder)
    assert "mxfp6-pack-quantized is not read yet" in about["not_read"] and "format" not in about and not about["layers"]
    assert inspect(folder) == 0
    assert "load_checkpoint does not read it: " in capsys.readouterr().out
    about = found(capsys, llama_checkpoint(tmp_path / "llama"))
    assert "not_read" not in about and "format" not in about


# -- hostile -----------------------------------------------------------------------------------------------------------------


def test_files_that_are_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data, message in (
        (b"", "too short"),
        (b"GGUF\x09\x00\x00\x00" + bytes(64), "version 9"),
        (b"\xff" * 64, "the header claims"),
        ((8).to_bytes(8, "little") + b"not json", "not valid JSON"),
        ((2).to_bytes(8, "little") + b"{}" + b"rest", "truncated or padded"),
    ):
        (tmp_path / "x.safetensors").write_bytes(data)
        assert message in refused(capsys, tmp_path / "x.safetensors")
    assert "not a regular file" in refused(capsys, "/dev/zero")
    assert "no *.safetensors files" in refused(capsys, Path("/dev/fd"))


def test_manifests_that_lie(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def widen(body: dict[str, object]) -> None:
        body["layers"]["first"]["shape"] = [24, 2**40]  # type: ignore[index]

    edit_manifest(saved, widen)
    refused(capsys, saved)
    (saved / "lowbit.json").write_text("{}")
    refused(capsys, saved)


def test_mutated_headers_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loader's fuzz mutates thousands of files; here a few hundred go through the command."""
    QuantizedWeight.quantize(torch.randn(4, 16), "int4-g8").save(tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    codes = set()
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(8 + size)] = rng.randrange(256)
        (tmp_path / "w.safetensors").write_bytes(changed)
        codes.add(inspect(tmp_path / "w.safetensors"))
        assert "LOWBIT_DEBUG" not in capsys.readouterr().err
    assert codes == {0, 1}
