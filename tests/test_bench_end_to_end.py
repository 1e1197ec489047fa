"""bench/end_to_end.py: what it times is greedy decoding, and what it writes is what it says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="the benches are not part of a source distribution")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("end_to_end", BENCH / "end_to_end.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_decodes_the_next_token(bench: ModuleType) -> None:
    """The tokens that the model gives when all that came before is given to it at once."""
    torch.manual_seed(3)
    with torch.no_grad():
        model = bench.make_model("tiny", None, "int4-g32-rtn", "cpu")
        seen: list[torch.Tensor] = []
        model.register_forward_pre_hook(
            lambda _, __, inputs: seen.append(inputs["input_ids"].clone()), with_kwargs=True
        )
        decoding = bench.Decoding(model, batch=2, context=5, tokens=4, device="cpu")
        first = decoding.ids.clone()
        for _ in range(2):  # from the same cache again
            seen[1:] = []
            decoding.ids.copy_(first)
            decoding.seconds(4)
            decoded = torch.cat([*seen[1:], decoding.ids], dim=1)
            assert torch.equal(decoded[:, :1], first)
            whole = torch.cat([seen[0], decoded], dim=1)
            logits = model(input_ids=whole).logits.float()[:, 5:-1]
            # bf16: another order of sums may make a near tie fall the other way, so what was chosen is as large as any.
            chosen = logits.gather(-1, decoded[:, 1:, None]).squeeze(-1)
            assert (chosen >= logits.amax(-1) - 0.02 * logits.std()).all()


def test_it_writes_rows(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "end.json"
    arguments = ["--shape=tiny", "--device=cpu", "--batch=1,3", "--context=4", "--tokens=2", "--rounds=2"]
    assert bench.main([*arguments, "--layers=1", "--schemes=bf16,int4-g32-rtn", f"--out={out}"]) == 0
    record = json.loads(out.read_text())
    assert [(row["batch"], row["scheme"]) for row in record["rows"]] == [
        *((1, "bf16"), (1, "int4-g32-rtn"), (3, "bf16"), (3, "int4-g32-rtn"))
    ]
    assert (record["layers"], record["layers_of_the_model"], record["cuda_graph"]) == (1, 2, False)
    dense, quantized = record["rows"][:2]
    # Seven linear layers of 4 * 64 * 64 and 3 * 64 * 128 weights less two narrow heads of keys and values.
    linear = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert dense["weight_bytes"] - quantized["weight_bytes"] >= 0.9 * linear * (2 - 4.5 / 8)
    for row in record["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["step_seconds"])
        assert len(row["rounds"]) == 2
    text = capsys.readouterr().out
    assert "| 1 | `bf16` |" in text
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize("arguments", [["--batch=0"], ["--layers=0"], ["--device=cuda"]])
def test_what_cannot_be_measured_is_refused(bench: ModuleType, arguments: list[str]) -> None:
    if "--device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench.parse(arguments)


def test_an_unknown_scheme_is_refused_before_a_model_is_made(bench: ModuleType) -> None:
    with pytest.raises(ValueError, match="int9"):
        bench.parse(["--schemes=bf16,int9-g64"])
