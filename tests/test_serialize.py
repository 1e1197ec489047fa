"""save_quantized and load_quantized: what is stored, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

import lowbit
from artifacts import Tiny, contents, edit_manifest, quantized_tiny, replace_shard, same
from lowbit import ArtifactError, FormatError, QuantizedLinear, QuantizedWeight, load_quantized, save_quantized

SCHEMES = ["int4-g8", "int3-g8-offset", "int5-g8-fzero", "fp8", "fp8-b128", "nf4-g16", "int8-a8", "int4-g16-fp16"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_quantized(quantized_tiny(), tmp_path / "model")
    return tmp_path / "model"


# -- round trips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_round_trip_into_every_kind_of_target(tmp_path: Path, scheme: str) -> None:
    model = quantized_tiny(scheme)
    save_quantized(model, tmp_path)
    ids = torch.arange(10).view(2, 5) % 10
    targets: list[Any] = [
        Tiny,
        Tiny(),
        quantized_tiny(scheme, seed=1),
        quantized_tiny("int8", seed=1),
        lambda: Tiny().half(),
    ]
    with torch.device("meta"):
        targets.append(Tiny())
    for target in targets:
        loaded = load_quantized(target, tmp_path).eval()
        assert isinstance(target, nn.Module) == (loaded is target)
        assert same(loaded, model)
        assert loaded.first is loaded.again
        assert loaded.first.scheme == model.first.scheme
        assert loaded.head.weight is loaded.embed.weight
        assert loaded.embed.weight.requires_grad
        assert torch.equal(loaded(ids.view(-1)), model(ids.view(-1)))


def test_saving_is_deterministic_and_reports_its_hash(tmp_path: Path) -> None:
    first = save_quantized(quantized_tiny(), tmp_path / "a")
    second = save_quantized(load_quantized(Tiny, tmp_path / "a"), tmp_path / "b")
    assert first == second == json.loads((tmp_path / "a/lowbit.json").read_text())["sha256"]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert save_quantized(quantized_tiny(seed=1), tmp_path / "c") != first


def test_others_can_read_the_shards(saved: Path) -> None:
    (shard,) = saved.glob("*.safetensors")
    peer = load_file(shard)
    model = quantized_tiny()
    state = model.state_dict()
    assert torch.equal(peer["first.weight_packed"], state["first.weight_packed"])
    assert torch.equal(peer["embed.weight"], state["embed.weight"])
    assert "head.weight" not in peer  # tied, stored once
    assert "again.weight_packed" not in peer


def test_shards(tmp_path: Path) -> None:
    model = quantized_tiny()
    save_quantized(model, tmp_path, max_shard_bytes=400)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        names = load_file(shard).keys()
        assert sum(name.endswith("weight_packed") for name in names) == sum(n.endswith("weight_scales") for n in names)
    assert same(load_quantized(Tiny, tmp_path), model)
    save_quantized(model, tmp_path)  # the next artifact replaces the shards of this one
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_other_files_in_the_folder_are_left_alone(saved: Path) -> None:
    (saved / "config.json").write_text("{}")
    (saved / "notes").mkdir()
    (saved / ".lowbit-tmp-0123").write_text("left by a save that was killed")
    (saved / "lowbit-0123456789abcdef.safetensors").write_text("left by a save that was killed")
    assert same(load_quantized(Tiny, saved), quantized_tiny())
    save_quantized(quantized_tiny(seed=1), saved)
    assert {p.name for p in saved.iterdir() if "lowbit-" not in p.name} == {"config.json", "notes", "lowbit.json"}
    assert len(list(saved.glob("*lowbit-*"))) == 1


def test_perm_static_activations_and_experts_of_one_model(tmp_path: Path) -> None:
    weight = QuantizedWeight.quantize(torch.randn(8, 16), "int8-aint8_static_asym")
    perm = torch.randperm(16).to(torch.int32)
    weight = QuantizedWeight.from_tensors({**weight.tensors(), "perm": perm}, weight.scheme, weight.shape)
    given = {"input_scale": torch.tensor([0.02]), "input_zero": torch.tensor([3], dtype=torch.int32)}
    layer = QuantizedLinear.from_weight(weight, torch.randn(8), **given, input_pre_scale=torch.rand(16) + 0.5)
    model = nn.Sequential(layer, nn.ReLU())
    save_quantized(model, tmp_path)
    loaded = load_quantized(lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU()), tmp_path)
    assert same(loaded, model)
    assert torch.equal(loaded(torch.ones(2, 16)), model(torch.ones(2, 16)))


def test_a_model_without_quantized_layers_or_tensors(tmp_path: Path) -> None:
    save_quantized(nn.ReLU(), tmp_path / "empty")
    load_quantized(nn.ReLU, tmp_path / "empty")
    dense = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    dense[0].weight.data = dense[0].weight.data.to(torch.bfloat16)
    save_quantized(dense, tmp_path / "dense")
    assert same(load_quantized(lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), tmp_path / "dense"), dense)


def test_device_and_batch_invariance_are_the_targets(saved: Path) -> None:
    target = quantized_tiny(seed=1)
    target.first.flags = 1
    target.eval()
    loaded = load_quantized(target, saved, device="cpu")
    assert loaded.first.flags == 1
    assert not loaded.first.training


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
            self.register_buffer("empty", torch.empty(0, 3, dtype=torch.int16))
            self.register_buffer("flags", torch.tensor([True, False, True]))
            self.register_buffer("strided", torch.arange(12.0).view(3, 4).t())

    model = Odd()
    save_quantized(model, tmp_path)
    assert same(load_quantized(Odd, tmp_path), model)


# -- refused on saving -----------------------------------------------------------------------------------------------------


def test_saving_refuses_what_cannot_be_saved(tmp_path: Path) -> None:
    class Stateful(nn.Module):
        def get_extra_state(self) -> Any:
            return {"secret": 1}

    for model, message in (
        (nn.Sequential(Stateful()), "0: Stateful keeps state that is not a tensor"),
        (nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
        (nn.Sequential(QuantizedLinear(8, 8, scheme="int8")), "0: the quantized weight was never loaded"),
        (QuantizedLinear.from_linear(nn.Linear(8, 8), "int8"), "QuantizedWeight.save"),
        (nn.ParameterList([torch.zeros(2, dtype=torch.complex128)]), "complex128 cannot be stored"),
    ):
        with pytest.raises(ValueError, match=message):
            save_quantized(model, tmp_path / "x")
        assert not (tmp_path / "x").exists()


# -- refused on loading ----------------------------------------------------------------------------------------------------


def refuses(target: Any, directory: Path, message: str, kind: type[Exception] = ArtifactError) -> None:
    before = {name: t.clone() for name, t in target.state_dict().items()}
    modules = dict(target.named_modules())
    with pytest.raises(kind, match=message):
        load_quantized(target, directory)
    assert dict(target.named_modules()) == modules  # the very same objects
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def shard_of(directory: Path) -> Path:
    (shard,) = directory.glob("*.safetensors")
    return shard


@pytest.mark.parametrize("where", [0, 4, 8, 60, -1, -200])
def test_flipped_bits_in_a_shard(saved: Path, where: int) -> None:
    shard = shard_of(saved)
    data = bytearray(shard.read_bytes())
    data[where] ^= 0x10
    shard.write_bytes(data)
    refuses(Tiny(), saved, shard.name)


@pytest.mark.parametrize("size", [0, 7, 8, 300, -1])
def test_truncated_shard(saved: Path, size: int) -> None:
    shard = shard_of(saved)
    shard.write_bytes(shard.read_bytes()[:size])
    refuses(Tiny(), saved, f"{shard.name}: .* truncated")


def test_grown_shard(saved: Path) -> None:
    shard = shard_of(saved)
    shard.write_bytes(shard.read_bytes() + b"\0")
    refuses(Tiny(), saved, f"{shard.name}: .* altered")


def test_missing_renamed_extra_and_irregular_shards(saved: Path) -> None:
    shard = shard_of(saved)
    extra = saved / "model.safetensors"
    shutil.copy(shard, extra)
    refuses(Tiny(), saved, r"model\.safetensors: not part of the artifact")
    shard.unlink()
    extra.rename(saved / "lowbit-0000000000000000.safetensors")
    refuses(Tiny(), saved, f"{shard.name}: listed in lowbit.json, but missing or renamed")
    shard.mkdir()
    refuses(Tiny(), saved, shard.name)


def test_a_shard_of_another_artifact_under_the_right_name(saved: Path, tmp_path: Path) -> None:
    save_quantized(quantized_tiny(seed=1), tmp_path / "other")
    shard = shard_of(saved)
    shutil.copy(shard_of(tmp_path / "other"), shard)
    refuses(Tiny(), saved, f"{shard.name}: corrupted: sha256")


def test_missing_and_altered_manifest(saved: Path) -> None:
    manifest = saved / "lowbit.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"group_size": 8', '"group_size": 16'))
    refuses(Tiny(), saved, r"lowbit\.json: corrupted", FormatError)
    for size in (0, 1, 100, len(text) - 2):
        manifest.write_text(text[:size])
        refuses(Tiny(), saved, r"lowbit\.json: not valid JSON", FormatError)
    manifest.unlink()
    refuses(Tiny(), saved, "not a lowbit artifact")
    refuses(Tiny(), saved / "nowhere", "not a lowbit artifact")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "gguf", "not a lowbit manifest"),
        ("format_version", 2, "format version 2; this lowbit reads version 1"),
        ("format_version", True, "format version"),
        ("files", [], "files must be an object"),
        ("surprise", 1, r"\['surprise'\] are missing or unknown"),
    ],
)
def test_manifest_fields(saved: Path, field: str, value: object, message: str) -> None:
    edit_manifest(saved, lambda body: body.update({field: value}))
    refuses(Tiny(), saved, message, FormatError)


def _rename_file(body: dict[str, Any]) -> None:
    body["files"] = {"../../etc/passwd": next(iter(body["files"].values()))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename_file, r"file '\.\./\.\./etc/passwd' must be called lowbit-"),
        (lambda b: b["tensors"].pop("first.weight_scales"), r"first\.weight_scales.* is missing"),
        (lambda b: b["tensors"].pop("norm.bias"), r"nothing is stored for the model's norm\.bias"),
        (lambda b: b["tensors"]["norm.bias"].update(shape=[8]), r"norm\.bias is \[8\], the model's is \[16\]"),
        (lambda b: b["tensors"]["norm.bias"].update(dtype="F16"), r"norm\.bias' is F32 \[16\], the manifest says F16"),
        (lambda b: b["tensors"]["norm.bias"].update(kind="buffer"), r"norm\.bias is stored as a buffer"),
        (lambda b: b["tensors"]["norm.bias"].update(kind="x"), "unknown kind 'x'"),
        (lambda b: b["tensors"]["norm.bias"].update(file="x"), "file 'x', which is not listed"),
        (lambda b: b["tensors"]["norm.bias"].update(kind="quantized"), "belongs to no layer"),
        (lambda b: b["layers"]["first"].update(shape=[24, 24]), r"first\.weight_packed' is"),
        (lambda b: b["layers"]["first"].update(shape=[24, -1]), "layer 'first': .*K=-1"),
        (lambda b: b["layers"]["first"].update(shape=[1 << 40, 1 << 40]), "layer 'first'"),
        (lambda b: b["layers"]["first"].update(has_perm=True), r"first\.weight_perm' .* is missing"),
        (lambda b: b["layers"]["first"]["scheme"].update(format="int9"), "unknown format 'int9'"),
        (lambda b: b["layers"]["first"]["scheme"].update(format=[]), "must be a string"),
        (lambda b: b["aliases"].update({"norm.x": "nowhere"}), "alias 'norm.x' refers to 'nowhere'"),
        (lambda b: b["aliases"].update({"norm.x": ["norm.bias"]}), "which does not exist"),
        (lambda b: b["aliases"].update({"norm.x": "norm.bias"}), r"the model has no norm\.x"),
        (lambda b: b["layer_aliases"].pop("again"), "the model's again"),
    ],
)
def test_hostile_manifests(saved: Path, change: Any, message: str) -> None:
    edit_manifest(saved, change)
    refuses(Tiny(), saved, message)


def test_the_models_own_tie_stands_in_for_an_alias(saved: Path) -> None:
    edit_manifest(saved, lambda body: body["aliases"].pop("head.weight"))
    assert same(load_quantized(Tiny, saved), quantized_tiny())


def test_tensors_that_the_manifest_does_not_list(saved: Path) -> None:
    tensors = load_file(shard_of(saved))
    replace_shard(saved, save({**tensors, "surprise": torch.zeros(1)}))
    refuses(Tiny(), saved, "tensor 'surprise' is not in the manifest")
    replace_shard(saved, save({name: t for name, t in tensors.items() if name != "norm.bias"}))
    refuses(Tiny(), saved, "tensor 'norm.bias' is missing")
    replace_shard(saved, save({**tensors, "norm.bias": torch.zeros(2, 8)}))
    refuses(Tiny(), saved, r"tensor 'norm\.bias' is F32 \[2, 8\], the manifest says F32 \[16\]")
    replace_shard(saved, save(tensors))  # written by another writer, but the same tensors
    assert same(load_quantized(Tiny, saved), quantized_tiny())


def test_models_that_do_not_fit(saved: Path) -> None:
    def changed(**modules: nn.Module) -> Tiny:
        model = Tiny()
        for name, module in modules.items():
            setattr(model, name, module)
        return model

    extra = quantized_tiny()
    extra.more = QuantizedLinear.from_linear(nn.Linear(8, 8), "int8")
    for target, message in (
        (Tiny(width=32), r"layer 'first' is N=24, K=16, the model's is N=24, K=32"),
        (changed(first=nn.ReLU()), "layer 'first' is quantized, the model has a ReLU there"),
        (changed(second=nn.Linear(24, 16)), "layer 'second' is stored without a bias"),
        (changed(more=nn.Linear(2, 2)), r"nothing is stored for the model's more\.bias, more\.weight"),
        (
            changed(norm=nn.Identity()),
            r"the model has no norm\.bias, norm\.num_batches_tracked, norm.* and more|no norm",
        ),
        (extra, "the model's quantized layers more are not in the artifact"),
        (nn.Linear(2, 2), "the model has no layer called again, first, second"),
    ):
        refuses(target, saved, message)
    with pytest.raises(TypeError, match=r"must return an nn\.Module, got int"):
        load_quantized(lambda: 3, saved)  # type: ignore[arg-type, return-value]


def test_values_are_checked_too(tmp_path: Path) -> None:
    model = quantized_tiny("int4-g8-fp32")
    weight = model.first.quantized_weight()
    weight.scales[2, 1] = float("nan")
    model.first.weight = nn.Parameter(weight.pack(), requires_grad=False)
    save_quantized(model, tmp_path)
    refuses(Tiny(), tmp_path, r"layer 'first': scales: 1 values are not finite, the first one \(nan\) at \[2, 1\]")


def test_nothing_is_unpickled(saved: Path) -> None:
    assert {p.suffix for p in saved.iterdir()} == {".json", ".safetensors"}
    source = Path(lowbit.__file__).parent
    for path in source.glob("*.py"):
        assert "pickle" not in path.read_text()
        assert "torch.load(" not in path.read_text()
