"""The claims of docs/quality.md: in the result that is committed, and measured again on layers of the model."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lowbit import QuantizedWeight

ROOT = Path(__file__).resolve().parent.parent
RESULT = json.loads((ROOT / "bench" / "results" / "quality-minilm.json").read_text())


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    """bench/quality.py, which puts two folders on the path."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("quality", ROOT / "bench" / "quality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_claims_hold_in_the_result(quality: ModuleType) -> None:
    assert quality.broken_claims(RESULT) == []
    assert set(RESULT["schemes"]) == set(quality.SCHEMES)
    assert {row["peer"] for row in RESULT["peers"]} == {peer.name for peer in quality.quality_peers.PEERS}


def test_claims_that_do_not_hold_are_noticed(quality: ModuleType) -> None:
    for change, message in (
        (lambda r: r["schemes"]["int4-g64"]["rtn"].update(sqnr_db=99), "rtn, g64: the error does not fall strictly"),
        (
            lambda r: r["schemes"]["nf4-g64"]["search"]["layers"].update({"layers.0.up": 1.0}),
            "nf4-g64: the search is no better than round-to-nearest on layers.0.up",
        ),
        (lambda r: r["schemes"]["fp8"]["importance"].update(output_db=1.0), "fp8: importance makes the outputs"),
        (lambda r: r["peers"][0]["ours"].update(bits=4.6), "nf4-g64-fp32 takes 4.6 bits, bitsandbytes NF4, 64 4.5"),
        (lambda r: r["peers"][0]["ours"].update(output_db=1.0), "bitsandbytes NF4, 64: output_db"),
    ):
        result = copy.deepcopy(RESULT)
        change(result)
        (broken,) = quality.broken_claims(result)
        assert broken.startswith(message)


def test_the_page_has_these_numbers(quality: ModuleType) -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    assert quality.fill(page, RESULT) == page, "run: python bench/quality.py --docs"
    assert all(len(table.splitlines()) > 3 for table in quality.tables(RESULT).values())


@pytest.fixture(scope="module")
def layers(quality: ModuleType) -> dict[str, Tensor]:
    """Rows of two layers of the encoder."""
    minilm = importlib.import_module("minilm")
    try:
        state = minilm.load_encoder().state_dict()
    except minilm.ModelNotFound as missing:
        pytest.skip(str(missing))
    return {name: state[f"{name}.weight"][:64] for name in ("layers.0.query", "layers.4.down")}


def _sqnr(weight: Tensor, scheme: str) -> float:
    made = QuantizedWeight.quantize(weight, scheme).dequantize()
    return 20 * float(torch.log10(weight.norm() / (weight - made).norm()))


def test_more_bits_and_the_search_are_better(quality: ModuleType, layers: dict[str, Tensor]) -> None:
    for weight in layers.values():
        found = {s: (_sqnr(weight, f"{s}-rtn"), _sqnr(weight, f"{s}-search")) for s in quality.SCHEMES}
        assert all(searched > nearest for nearest, searched in found.values())
        for kind in ("", "-offset"):
            for which in (0, 1):
                series = [found[f"int{bits}-g64{kind}"][which] for bits in quality.BITS]
                assert series == sorted(series, reverse=True) and len(set(series)) == len(series)


@pytest.mark.oracle
@pytest.mark.parametrize("number", range(len(RESULT["peers"])), ids=[row["peer"] for row in RESULT["peers"]])
def test_no_worse_than_other_quantizers(quality: ModuleType, layers: dict[str, Tensor], number: int) -> None:
    """On each layer, in no more than 1% more bytes."""
    peer = quality.quality_peers.PEERS[number]
    if not peer.installed():
        pytest.skip(f"{peer.package} is not installed")
    for weight in layers.values():
        decoded, size = peer.quantize(weight)
        theirs = 20 * float(torch.log10(weight.norm() / (weight - decoded).norm()))
        made = QuantizedWeight.quantize(weight, f"{peer.scheme}-search")
        assert made.nbytes <= 1.01 * size + 64
        assert _sqnr(weight, f"{peer.scheme}-search") >= theirs
