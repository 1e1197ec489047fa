"""Every op is complete: schema, CPU kernel, fake kernel, wrapper with documentation, and all in the same order."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

from lowbit import _C, Scheme, _ops_a8, _ops_embedding, _ops_weight, ops

ROOT = Path(__file__).resolve().parent.parent
WRAPPERS = [name for name in dir(ops) if name in ops.__all__]


def _registered() -> set[str]:
    return {
        name.removeprefix("lowbit::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("lowbit::")
    }


def _order_in_python() -> list[str]:
    source = "".join(inspect.getsource(module) for module in (_ops_weight, _ops_embedding, ops, _ops_a8))
    return [name for name in re.findall(r"^def (\w+)\(", source, re.M) if name in ops.__all__]


def test_wrappers_are_the_registered_ops() -> None:
    assert set(WRAPPERS) == _registered()
    assert list(ops.__all__) == sorted(ops.__all__)


def test_wrappers_stand_in_the_order_of_the_schema() -> None:
    schema = ROOT / "csrc" / "schema.cpp"
    order = re.findall(r"m\.def\(\s*\"(\w+)\(", schema.read_text())
    assert order == _order_in_python()


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_takes_what_the_schema_takes(name: str) -> None:
    schema = getattr(torch.ops.lowbit, name).default._schema
    assert list(inspect.signature(getattr(ops, name)).parameters) == [a.name for a in schema.arguments]
    assert not schema.is_mutable or name.endswith("_out")


@pytest.mark.parametrize("name", WRAPPERS)
def test_kernels_are_registered(name: str) -> None:
    for key in ("CPU", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowbit::{name}", key), key
    autograd = torch._C._dispatch_has_kernel_for_dispatch_key(f"lowbit::{name}", "Autograd")
    assert autograd == (name == "linear")  # every other op would pay for it on each call


@pytest.mark.parametrize("name", WRAPPERS)
def test_documentation_is_complete(name: str) -> None:
    doc = inspect.getdoc(getattr(ops, name)) or ""
    summary = doc.partition("\n\n")[0]
    assert "\n" not in summary and summary.endswith("."), summary
    assert "Example:" in doc and name in doc[doc.index("Example:") :]
    if not name.endswith("_out"):
        assert "Raises:" in doc


@pytest.mark.parametrize("name", WRAPPERS)
def test_example_runs(name: str) -> None:
    """Each example, with the names that it takes for granted."""
    N, K = 64, 256
    scheme = Scheme.parse("int4-g128")
    layout = _C.preferred_layout("cpu", scheme.desc())
    desc = scheme.desc() if name in ("quantize", "dequantize", "dequantize_out") else scheme.desc(layout)
    packed, scales, _ = ops.quantize(torch.randn(N, K), scheme.desc())
    x = torch.randn(8, K)
    INT8 = _C.enums()["format"]["int8"]
    xq, x_scales, _ = ops.quantize_activation(x, INT8)
    known = {
        **{wrapper: getattr(ops, wrapper) for wrapper in WRAPPERS},
        "torch": torch,
        "Scheme": Scheme,
        "_C": _C,
        "INT8": INT8,
        "scheme": scheme,
        "layout": layout,
        "desc": desc,
        "packed": packed,
        "scales": scales,
        "w": ops.pack(packed, scales, None, None, N, K, scheme.desc(layout)),
        "x": x,
        "dy": torch.randn(8, N),
        "bias": torch.randn(N),
        "xq": xq,
        "x_scales": x_scales,
    }
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(ops, name)) or "")
    assert examples
    for example in examples:
        exec(example.source, known)
