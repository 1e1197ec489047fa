"""Kernels started by torch.mps.compile_shader (python/lowbit/_compile_shader.py): the bits that torch's C interface gives.

On the emulator a stand-in for that function runs the kernels and checks what it is given; on a Mac the function is itself.
"""

from __future__ import annotations

import collections
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cases
from kernel_cases import on
from lowbit import _compile_shader
from metal_problems import BACKEND, metal_desc, pack
from reference import Spec

CSRC = Path(__file__).resolve().parents[2] / "csrc"
sys.path.insert(0, str(CSRC.parent / "cmake"))

import embed_shaders  # noqa: E402

SHADERS = {path.stem: embed_shaders.source(path, CSRC) for path in (CSRC / "metal" / "shaders").glob("*.metal")}


class StandIn:
    """torch.mps.compile_shader, with the emulator as the GPU."""

    def __init__(self, emulator: Any):
        self.emulator = emulator
        self.calls: list[str] = []

    def __call__(self, source: str) -> Library:
        defines, head, rest = source.partition(embed_shaders.HEAD)
        (shader,) = (name for name, text in SHADERS.items() if text == head + rest)
        assert re.fullmatch(r"(#define LOWBIT_\w+ [^\n]+\n)*", defines)
        return Library(self, shader, dict(re.findall(r"#define LOWBIT_(\w+_NAME) \"(\w+)\"", defines)))


class Library:
    """What compile_shader returns: kernels as attributes."""

    def __init__(self, made_by: StandIn, shader: str, names: dict[str, str]):
        self.made_by, self.shader, self.names = made_by, shader, names

    def __getattr__(self, kernel: str) -> Callable[..., None]:
        return functools.partial(self.run, kernel)

    def run(self, kernel: str, *arguments: int | torch.Tensor, threads: list[int], group_size: list[int]) -> None:
        """As torch takes them: ints travel as 64 bits, tensors as buffers, sizes are of one length."""
        assert all(f"_{name}" in kernel for name in self.names.values()), (kernel, self.names)
        words = [a for a in arguments if type(a) is int]
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        assert [type(a) is int for a in arguments] == [True] * len(words) + [False] * len(tensors)
        assert len(threads) == len(group_size) == 3 and threads[2] == group_size[1] == group_size[2] == 1
        assert threads[0] % group_size[0] == 0
        self.made_by.calls.append(kernel)
        groups = threads[0] // group_size[0], threads[1]
        self.made_by.emulator.run(kernel, words, tensors, groups, group_size[0])


@pytest.fixture
def compile_shader(metal: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Inside, kernels are started from Python."""
    stand_in = None
    if BACKEND == "emulator":
        stand_in = StandIn(metal)
        monkeypatch.setattr(torch.mps, "compile_shader", stand_in)
    _compile_shader.install()
    yield stand_in
    _compile_shader.uninstall()


Tensors = list[torch.Tensor]


def gemm(metal: Any, M: int, perm: bool = False) -> Tensors:
    spec = Spec("int4", "int", 32, "bfloat16", has_perm=perm)
    weight, x, bias = cases.random_weight(spec, 20, 96), cases.random_x(M, 96, dtype=torch.bfloat16), cases.random_x(20)
    return [metal.ops.gemm(on(metal, x), pack(metal, weight), on(metal, bias), 20, 96, metal_desc(spec), 0)]


def gemm_a8(metal: Any, M: int) -> Tensors:
    spec = Spec("int8", "none", 32)
    weight, x = cases.random_weight(spec, 20, 96), on(metal, cases.random_x(M, 96))
    q, s, z = metal.ops.quantize_activation(x, cases.INT8, -1, None, None, None, False)
    y = metal.ops.gemm_a8(q, s, z, pack(metal, weight), None, 20, 96, metal_desc(spec), 0, torch.float16)
    return [q, s, z, y]


def grad(metal: Any) -> Tensors:
    spec = Spec("nf4", "none", 64)
    dy = on(metal, cases.random_x(3, 20))
    return [metal.ops.gemm_grad_input(dy, pack(metal, cases.random_weight(spec, 20, 96)), 20, 96, metal_desc(spec), 0)]


def canonical(metal: Any) -> Tensors:
    spec = Spec("int3", "float", 32, "float16", has_perm=True)
    d, tensors = metal_desc(spec), [on(metal, t) for t in cases.random_weight(spec, 20, 96).tensors]
    w = metal.ops.pack(*tensors, 20, 96, d)
    return [w, *metal.ops.unpack(w, 20, 96, d), metal.ops.dequantize(*tensors, 20, 96, d, torch.float32)]


OPS: dict[str, Callable[[Any], Tensors]] = {
    "gemm-m1": lambda metal: gemm(metal, 1),
    "gemm-m5-perm": lambda metal: gemm(metal, 5, perm=True),
    "gemm-m40": lambda metal: gemm(metal, 40),
    "gemm_a8-m3": lambda metal: gemm_a8(metal, 3),
    "gemm_a8-m9": lambda metal: gemm_a8(metal, 9),
    "gemm_grad_input": grad,
    "canonical": canonical,
}


def launches(metal: Any) -> collections.Counter[str]:
    """Of every kernel; only the emulator keeps count."""
    return collections.Counter({name: n for name, (n, _) in metal.kernels().items()} if BACKEND == "emulator" else {})


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_and_kernels(metal: Any, op: str, request: pytest.FixtureRequest) -> None:
    before = launches(metal)
    expected = OPS[op](metal)
    launched = launches(metal) - before
    stand_in = request.getfixturevalue("compile_shader")
    found = OPS[op](metal)
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if stand_in is not None:
        assert collections.Counter(stand_in.calls) == launched


def test_a_source_is_compiled_once(metal: Any, compile_shader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    original = torch.mps.compile_shader
    monkeypatch.setattr(torch.mps, "compile_shader", lambda source: compiled.append(source) or original(source))
    gemm(metal, 1), gemm(metal, 1), gemm(metal, 3)
    assert len(compiled) == len(set(compiled)) == 1  # stream of one format and dtype


def test_what_the_compiler_says_is_in_the_error(
    metal: Any, compile_shader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str) -> None:
        raise SyntaxError("program_source:7:1: error: unknown type name 'bfloat'")

    monkeypatch.setattr(torch.mps, "compile_shader", refuse)
    words = (
        "Metal's compiler refused the shader stream: SyntaxError: program_source:7:1: error: unknown type name 'bfloat'"
    )
    for _ in range(2):  # and again: a failure is not remembered
        with pytest.raises(RuntimeError, match=f"^lowbit::gemm: {words}"):
            gemm(metal, 1)


def test_what_torch_says_is_in_the_error(metal: Any, compile_shader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "compile_shader", lambda source: object())
    with pytest.raises(RuntimeError, match=r"^lowbit::gemm: torch could not start the kernel stream_m1_\w+: Attribute"):
        gemm(metal, 1)


@pytest.mark.skipif(BACKEND != "emulator", reason="looks at memory of the CPU")
def test_tensors_are_not_kept(metal: Any, compile_shader: Any) -> None:
    spec = Spec("int4", "int", 32)
    w = pack(metal, cases.random_weight(spec, 20, 96))
    memory = np.ones((1, 96), np.float32)
    before = sys.getrefcount(memory)
    metal.ops.gemm(torch.from_numpy(memory), w, None, 20, 96, metal_desc(spec), 0)
    assert len(compile_shader.calls) == 1
    assert sys.getrefcount(memory) == before
