"""collect_importance: the mean square of every input channel, and what it does to quantizing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cli_helpers import llama_checkpoint
from lowbit import (
    ArtifactError,
    QuantizedLinear,
    cli,
    collect_importance,
    load_importance,
    quantize_,
    save_importance,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.idle = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.down(input=torch.relu(self.drop(self.up(x * scale))))


def inputs(count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, 32, generator=generator) * torch.arange(1, 33) for _ in range(count)]


def test_mean_squares() -> None:
    torch.manual_seed(0)
    model = Model().train()
    batches = inputs()
    found = collect_importance(model, batches)
    assert found.keys() == {"up", "down"}  # no input came to `idle`
    assert model.training and model.drop.training and not model.up._forward_pre_hooks
    x = torch.cat([batch.reshape(-1, 32) for batch in batches]).double()
    wanted = x.square().mean(0)
    torch.testing.assert_close(found["up"].double(), wanted / wanted.mean(), rtol=1e-5, atol=0)
    hidden = torch.relu(torch.nn.functional.linear(x.float(), model.up.weight, model.up.bias)).double().square().mean(0)
    torch.testing.assert_close(found["down"].double(), hidden / hidden.mean(), rtol=1e-4, atol=1e-6)
    assert all(values.dtype == torch.float32 and abs(float(values.mean()) - 1) < 1e-5 for values in found.values())


def test_kinds_of_batches() -> None:
    torch.manual_seed(0)
    model = Model()
    (x,) = inputs(1)
    wanted = collect_importance(model, [x * 2])
    for batch in ({"x": x, "scale": 2.0}, (x, 2.0), [x, 2.0]):
        found = collect_importance(model, [batch])
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    found = collect_importance(model, [x], forward=lambda m, batch: m(batch, 2.0))
    assert torch.equal(found["down"], wanted["down"])


def test_the_outputs_that_were_measured_are_nearer() -> None:
    """On every layer, the expected squared error of the output falls."""
    torch.manual_seed(0)
    errors = {}
    batches = inputs(8)
    state = Model().state_dict()
    for name in ("plain", "weighted"):
        model = Model().eval()
        model.load_state_dict(state)
        importance = collect_importance(model, batches)
        quantize_(model, "int3-g32", importance=importance if name == "weighted" else None)
        for layer in ("up", "down"):
            made = model.get_submodule(layer).quantized_weight().dequantize()
            errors[name, layer] = float(((made - state[f"{layer}.weight"]).square() * importance[layer]).sum())
    assert errors["weighted", "up"] < 0.9 * errors["plain", "up"]  # inputs of 1 to 32 standard deviations
    assert errors["weighted", "down"] < errors["plain", "down"]


def test_quantized_layers_are_measured_too() -> None:
    model = Model()
    (x,) = inputs(1)
    before = collect_importance(model, [x])
    quantize_(model, "int8", overrides={"down": None})
    assert isinstance(model.up, QuantizedLinear)
    assert torch.equal(collect_importance(model, [x])["up"], before["up"])


def test_what_makes_no_sense() -> None:
    model = Model()
    with pytest.raises(ValueError, match="there are no batches"):
        collect_importance(model, [])
    with pytest.raises(ValueError, match="no linear layers"):
        collect_importance(nn.ReLU(), [torch.ones(1)])
    with pytest.raises(ValueError, match="an input of up holds NaN"):
        collect_importance(model, [torch.full((1, 32), float("nan"))])
    with pytest.raises(ZeroDivisionError):
        collect_importance(model, [1], forward=lambda m, b: 1 / 0)
    assert not model.up._forward_pre_hooks
    zeros = collect_importance(model, [torch.zeros(1, 32)])
    assert torch.equal(zeros["up"], torch.ones(32))


def test_files(tmp_path: Path) -> None:
    made = collect_importance(Model(), inputs())
    save_importance(tmp_path / "i.safetensors", made)
    found = load_importance(tmp_path / "i.safetensors")
    assert found.keys() == made.keys() and all(torch.equal(found[name], made[name]) for name in made)
    with pytest.raises(ValueError, match=r"importance of up is \[2, 2\], not \[K\]"):
        save_importance(tmp_path / "j.safetensors", {"up": torch.ones(2, 2)})
    model = llama_checkpoint(tmp_path / "model")
    with pytest.raises(ArtifactError, match="not a file of importance"):
        load_importance(model / "model.safetensors")


def test_quantize_takes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = llama_checkpoint(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj"
    column = torch.ones(64)
    column[5] = 1e4
    save_importance(tmp_path / "good.safetensors", {name: column, "lm_head": column})
    save_importance(tmp_path / "short.safetensors", {name: column[:8]})
    save_importance(tmp_path / "other.safetensors", {"model.layers.7": column})
    args = ["quantize", str(source), "--scheme", "int3-g32", "--quiet", "--importance"]
    assert cli.main([*args, str(tmp_path / "good.safetensors"), "--out", str(tmp_path / "a")]) == 0
    assert cli.main([*args[:-1], "--out", str(tmp_path / "b")]) == 0
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("model.layers")]
    assert [row[0] for row in rows if row[-3] != "0"] == [name]
    for file, message in (
        ("short", f"{name}: importance must be [K=64], got [8]"),
        ("other", "importance names model.layers.7, which the model does not have"),
    ):
        assert cli.main([*args, str(tmp_path / f"{file}.safetensors"), "--out", str(tmp_path / "c")]) == 1
        assert message in capsys.readouterr().err
