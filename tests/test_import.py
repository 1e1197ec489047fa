"""What `import lowbit` does, and does not do."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import lowbit


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_the_public_surface() -> None:
    assert set(lowbit.__all__) <= set(dir(lowbit))
    assert lowbit.__all__ == sorted(lowbit.__all__)
    for name in lowbit.__all__:
        assert name == "__version__" or getattr(lowbit, name).__doc__
    assert lowbit.__version__ == importlib.metadata.version("lowbit")
    assert issubclass(lowbit.FormatError, lowbit.ArtifactError)
    assert issubclass(lowbit.ArtifactError, ValueError)
    assert Path(lowbit.__file__).with_name("py.typed").exists()


@pytest.mark.parametrize(
    "name", ["QuantizedWeight", "QuantizedLinear", "Scheme", "quantize_", "save_quantized", "load_quantized"]
)
def test_public_things_are_documented_and_typed(name: str) -> None:
    thing = getattr(lowbit, name)
    assert "Example:" in thing.__doc__
    methods = (
        [thing] if not isinstance(thing, type) else [m for n, m in vars(thing).items() if callable(m) and n[0] != "_"]
    )
    for method in methods:
        assert method.__doc__, method
        assert "return" in typing.get_type_hints(method), method


def test_import_is_quiet_lazy_and_does_not_touch_cuda() -> None:
    code = """
import sys, torch
before = set(sys.modules)
def refuse(*args): raise AssertionError("CUDA was initialised")
torch.cuda._lazy_init = refuse
import lowbit
loaded = set(sys.modules) - before
slow = sorted(n for n in loaded if n.partition(".")[0] in {"rich", "safetensors", "numpy", "transformers", "triton"})
assert not slow, slow
assert not torch.cuda.is_initialized()
assert "int4" in str(lowbit.Scheme("int4"))
"""
    done = run(code, "-W", "error::UserWarning:lowbit")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_torch_there_is_one_clear_line() -> None:
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "torch": raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Missing())
import lowbit
"""
    done = run(code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: lowbit needs PyTorch 2.11 or later: pip install torch"


def test_works_where_no_gpu_is_visible() -> None:
    code = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch, lowbit
layer = lowbit.QuantizedLinear.from_linear(torch.nn.Linear(64, 8), "int4-g32")
print(tuple(layer(torch.ones(2, 64)).shape))
"""
    assert run(code).stdout == "(2, 8)\n"
