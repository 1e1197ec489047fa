"""What other libraries decode the checkpoints to that lowbit writes, as recorded: written.json, made by make_written.py.

The same bytes are written again, so what the libraries said of them still holds; and what they decoded is, bit for bit, what
our own readers decode.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from checkpoints import DATA
from lowbit import formats
from lowbit.formats import LinearRecord

RECORDED = json.loads((DATA / "written.json").read_text())


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_written", DATA / "make_written.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load()


def test_every_case_is_recorded() -> None:
    assert list(RECORDED) == list(make.CASES)


@pytest.mark.parametrize("case", RECORDED)
def test_written_as_recorded(tmp_path: Path, case: str) -> None:
    path = make.write(case, tmp_path)
    found = {name: one for name, one in formats.read(path) if isinstance(one, LinearRecord)}
    assert found.keys() == RECORDED[case].keys()
    for layer, record in found.items():
        recorded = RECORDED[case][layer]
        assert make.bytes_of(path, layer) == recorded["bytes"]
        weight = record.weight.dequantize(getattr(torch, recorded["dtype"]))
        assert make.value_hash(weight) == recorded["sha256"], layer
