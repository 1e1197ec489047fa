"""`lowbit compare` and compare_checkpoints: errors against an independent computation, names that differ, and outputs."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import cli_helpers
from checkpoints import DATA
from cli_helpers import llama_checkpoint, make_llama
from lowbit import ArtifactError, QuantizedWeight, cli, compare_checkpoints, formats, quantize_, save_quantized
from lowbit._outputs import compare_outputs
from lowbit._weight_error import weight_error
from lowbit.commands.compare import read_tokens
from lowbit.errors import FormatError
from lowbit.formats import LinearRecord
from writers import CONFIG


def pair(tmp_path: Path, scheme: str = "int4-g32") -> tuple[Path, Path, nn.Module, nn.Module]:
    """A dense checkpoint, an artifact of the same model, and both in memory."""
    source = llama_checkpoint(tmp_path / "model")
    model = make_llama()
    quantize_(model, scheme)
    save_quantized(model, tmp_path / "artifact")
    return source, tmp_path / "artifact", make_llama(), model


def test_errors_of_every_layer(tmp_path: Path) -> None:
    a, b, dense, model = pair(tmp_path)
    found = compare_checkpoints(a, b)
    assert len(found.layers) == 14
    for layer in found.layers:
        before = dense.get_submodule(layer.name).weight.detach().double()
        weight = model.get_submodule(layer.name).quantized_weight()
        noise = weight.dequantize().double() - before
        assert layer.relative_error == pytest.approx(float(noise.norm() / before.norm()), rel=1e-6)
        assert layer.largest_error == pytest.approx(float(noise.abs().max()), rel=1e-6)
        assert layer.sqnr_db == pytest.approx(20 * math.log10(before.norm() / noise.norm()), abs=1e-4)
        assert (layer.a, layer.b, layer.bytes_b) == ("bfloat16", "int4-g32", weight.nbytes)
        assert layer.bytes_a == 2 * before.numel()
    assert found.different == {} and found.only_a == () and found.only_b == ()
    assert found.bytes_a > found.bytes_b and found.equal == len(dense.state_dict()) - 14 - 2  # two biases of layers


def test_what_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = llama_checkpoint(tmp_path / "a")
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight[3] += 0.5
        model.lm_head.weight[0, 0] += 2
    tensors = model.state_dict()
    tensors["extra.weight"] = torch.ones(2, 2)
    b = cli_helpers.write_checkpoint(tmp_path / "b", tensors)
    assert cli.main(["compare", str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == [] and found["only_b"] == ["extra"] and found["only_a"] == []
    assert found["different"] == {"model.norm.weight": 0.5, "lm_head.weight": pytest.approx(2, abs=0.01)}  # of bf16
    assert cli.main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "model.norm.weight: differs by up to 0.5" in out and "only in B: extra" in out


def test_two_checkpoints_of_other_libraries(tmp_path: Path) -> None:
    found = compare_checkpoints(DATA / "dense", DATA / "awq-gemm")
    (layer,) = found.layers
    record = next(r for _, r in formats.read(DATA / "awq-gemm") if isinstance(r, LinearRecord))
    assert layer.relative_error > 0.05 and layer.b == "gemm: int4, groups of 64"
    assert weight_error(record.weight, record.weight).relative == 0
    same = compare_checkpoints(DATA / "awq-gemm", DATA / "awq-gemm")
    assert same.layers[0].relative_error == 0 and same.layers[0].sqnr_db == math.inf


def test_weights_of_zeros_and_other_shapes() -> None:
    zeros = torch.zeros(4, 32)
    assert weight_error(zeros, zeros.clone()).sqnr_db == math.inf
    lost = weight_error(zeros, torch.ones(4, 32))
    assert lost.relative == math.inf and lost.largest == 1 and lost.sqnr_db == -math.inf
    weight = QuantizedWeight.quantize(torch.randn(300, 4096), "fp8-b128")
    dense = weight.dequantize()
    dense[299, 4095] += 0.25
    assert weight_error(weight, dense).largest == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"the weights are \[4, 32\] and \[4, 8\]"):
        weight_error(zeros, torch.zeros(4, 8))


def test_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = llama_checkpoint(tmp_path / "a")
    b = cli_helpers.write_checkpoint(tmp_path / "b", {"fc.weight": torch.ones(4, 4)})
    assert cli.main(["compare", str(a), str(b)]) == 1
    assert "have no layer in common; layers are called lm_head and fc" in capsys.readouterr().err
    c = cli_helpers.write_checkpoint(tmp_path / "c", {"lm_head.weight": torch.ones(4, 4)})
    with pytest.raises(ArtifactError, match=r"lm_head is \[40, 64\] in A and \[4, 4\] in B"):
        compare_checkpoints(a, c)


# -- outputs -------------------------------------------------------------------------------------------------------------------


class _Toy(nn.Module):
    """Logits that depend on the token and on a table."""

    def __init__(self, table: torch.Tensor, name: str = "logits") -> None:
        super().__init__()
        self.table, self.name = table, name

    def forward(self, input_ids: torch.Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(**{self.name: self.table[input_ids]})


def test_top_one_kl_and_likelihood() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(7, 7), torch.randn(7, 7)
    tokens = [[0, 3, 5], [6], [2, 2, 2, 1]]
    found = compare_outputs(_Toy(a), _Toy(b), tokens)
    p, q = torch.softmax(a.double(), -1), torch.softmax(b.double(), -1)
    seen = [t for sequence in tokens for t in sequence]
    kl = [float((p[t] * (p[t] / q[t]).log()).sum()) for t in seen]
    assert found.positions == 8 and found.sequences == 3
    assert found.kl_mean == pytest.approx(sum(kl) / 8) and found.kl_largest == pytest.approx(max(kl))
    assert found.top1 == pytest.approx(sum(int(a[t].argmax() == b[t].argmax()) for t in seen) / 8)
    nexts = [(s[i], s[i + 1]) for s in tokens for i in range(len(s) - 1)]
    assert found.nll_b == pytest.approx(sum(-math.log(q[t, n]) for t, n in nexts) / len(nexts))
    same = compare_outputs(_Toy(a), _Toy(a), tokens)
    assert same.top1 == 1 and same.kl_mean == 0 and same.nll_a == same.nll_b
    assert compare_outputs(_Toy(a), _Toy(b), [[4]]).nll_a is None
    hidden = compare_outputs(_Toy(a, "last_hidden_state"), _Toy(b, "last_hidden_state"), [[1, 2]])
    wanted = torch.cosine_similarity(a[[1, 2]].double(), b[[1, 2]].double())
    assert hidden.cosine_mean == pytest.approx(float(wanted.mean())) and hidden.kl_mean is None
    with pytest.raises(ValueError, match="at least one sequence"):
        compare_outputs(_Toy(a), _Toy(b), [[1], []])
    with pytest.raises(ValueError, match="the output of B on sequence 1 is not finite"):
        compare_outputs(_Toy(a), _Toy(b.index_fill(0, torch.tensor(5), math.nan)), [[1], [5]])


def test_a_language_model_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From token ids in a file: dense, an artifact and GGUF, whose config is another one's."""
    pytest.importorskip("transformers")
    config = {
        **CONFIG,
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": 16,
        "vocab_size": 40,
        "attention_bias": False,
    }
    tensors = {n: t for n, t in make_llama(layers=1).state_dict().items() if not n.endswith(("steps", "bias"))}
    tensors["model.layers.0.post_attention_layernorm.weight"] = torch.ones(64).bfloat16()
    source = cli_helpers.write_checkpoint(tmp_path / "model", tensors, config=config)
    (tmp_path / "ids.txt").write_text("1 5 7 9\n\n2, 3, 4\n")
    for to, scheme, path in (("artifact", "int8-g32", "a"), ("gguf", "int8-g32", "b.gguf"), ("gptq", "int4-g32", "c")):
        args = [str(source), str(tmp_path / path), "--to", to, "--scheme", scheme, "--quiet"]
        assert cli.main(["convert", *args]) == 0
        args = [str(source), str(tmp_path / path), "--tokens", str(tmp_path / "ids.txt"), "--json"]
        assert cli.main(["compare", *args]) == 0
        found = json.loads(capsys.readouterr().out)["outputs"]
        assert found["positions"] == 7 and found["sequences"] == 2
        assert 0 < found["kl_mean"] < (1e-4 if scheme == "int8-g32" else 1e-1)
        assert found["top1"] >= (0.8 if scheme == "int8-g32" else 0.3)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[[1, 2], [3]]", [[1, 2], [3]]),
        ("[4, 5]", [[4, 5]]),
        ("1 2\n3,4\n", [[1, 2], [3, 4]]),
        ("[[1, -2]]", None),
        ("[[1.5]]", None),
        ("[[]]", None),
        ("", None),
        ("hello", None),
        ("[[true]]", None),
        ("[1", None),
    ],
)
def test_token_files(tmp_path: Path, text: str, wanted: list[list[int]] | None) -> None:
    (tmp_path / "ids").write_text(text)
    if wanted is not None:
        assert read_tokens(tmp_path / "ids") == wanted
        return
    with pytest.raises(FormatError, match="ids: "):
        read_tokens(tmp_path / "ids")


def test_a_config_is_needed(tmp_path: Path) -> None:
    a = llama_checkpoint(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"has a config.json with the architecture: name one \(--config-from\)"):
        compare_checkpoints(a, a, tokens=[[1]])
