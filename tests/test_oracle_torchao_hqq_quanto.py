"""torchao, HQQ and quanto run again: what is committed in data/checkpoints is what they write and decode.

Needs what data/checkpoints/make_torchao_hqq_quanto.py needs; skipped without. pytest -m oracle
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoints import DATA

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize(("name", "package"), [("torchao", "torchao"), ("hqq", "hqq"), ("quanto", "optimum.quanto")])
def test_made_again(name: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    spec = importlib.util.spec_from_file_location("make_more", DATA / "make_torchao_hqq_quanto.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.HERE = tmp_path
    module.MAKERS[name]()
    for file in ("model.safetensors", "decoded.safetensors"):
        made, committed = load_file(tmp_path / name / file), load_file(DATA / name / file)
        assert made.keys() == committed.keys()
        for key, tensor in made.items():
            assert torch.equal(tensor.flatten().view(torch.uint8), committed[key].flatten().view(torch.uint8)), key
    headers = []
    for folder in (tmp_path, DATA):
        with safe_open(folder / name / "model.safetensors", "pt") as opened:
            headers.append(opened.metadata())
    assert headers[0] == headers[1]
    for side in (DATA / name).glob("*.json"):
        assert json.loads((tmp_path / name / side.name).read_text()) == json.loads(side.read_text())
