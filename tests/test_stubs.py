"""_C.pyi says what the compiled module is: the same functions, with the same parameters and results."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lowbit
from lowbit import _C

STUB = Path(lowbit.__file__).with_name("_C.pyi")


def _stubs() -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.FunctionDef)}


def _typed_dicts() -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)}


def _outer(annotation: str) -> str:
    """`list[str]` -> `list`; a TypedDict of the stub is a dict."""
    outer = annotation.partition("[")[0].strip()
    return "dict" if outer in _typed_dicts() else outer


def _simplify(annotation: str) -> str:
    return annotation.replace("typing.SupportsInt | typing.SupportsIndex", "int").strip()


def test_the_same_functions() -> None:
    public = {name for name in dir(_C) if not name.startswith("_")}
    assert public == set(_stubs())
    assert all(callable(getattr(_C, name)) for name in public)


@pytest.mark.parametrize("name", sorted(_stubs()))
def test_the_same_signature(name: str) -> None:
    signature = (getattr(_C, name).__doc__ or "").splitlines()[0]
    match = re.fullmatch(rf"{name}\((.*)\) -> (.*)", signature)
    assert match is not None
    real = [tuple(_simplify(part) for part in piece.split(":", 1)) for piece in match[1].split(", ") if piece]
    stub = _stubs()[name]
    defaults = [None] * (len(stub.args.args) - len(stub.args.defaults)) + stub.args.defaults
    written = [
        (arg.arg, ast.unparse(arg.annotation) + (f" = {ast.unparse(default)}" if default else ""))
        for arg, default in zip(stub.args.args, defaults, strict=True)
        if arg.annotation
    ]
    assert written == real
    assert stub.returns is not None
    assert _outer(ast.unparse(stub.returns)) == _outer(_simplify(match[2]))


def test_the_fields_of_what_is_returned() -> None:
    values = {
        "_FormatRow": _C.format_table()[0],
        "_ScaleRow": _C.scale_table()[3],
        "_DescFields": _C.parse_desc(lowbit.Scheme.parse("int4-g32").desc()),
        "_Shapes": _C.canonical_shapes(8, 64, lowbit.Scheme.parse("int4-g32-offset-u6-x8fp16").desc(0, True)),
    }
    assert values.keys() == _typed_dicts().keys()
    for name, value in values.items():
        fields = {
            node.target.id: ast.unparse(node.annotation)
            for node in _typed_dicts()[name].body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        assert fields.keys() == value.keys()
        for field, annotation in fields.items():
            outer = annotation.partition("[")[0].partition(" |")[0]
            assert type(value[field]).__name__ == {"Literal": "str"}.get(outer, outer), field
    assert all(row["kind"] in ("int", "code") for row in _C.format_table())
    assert {type(key) for key in _C.kernel_table()[0]} == {str}
    assert set(_C.kernel_table()[0]) == {"backend", "op", "name", "isa", "general", "takes"}
