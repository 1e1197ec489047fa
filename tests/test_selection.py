"""explain, can_implement, the kernel table and LOWBIT_STRICT."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cases import BATCH_INVARIANT, FP8, INT8, KINDS, cpu_desc, packed, random_x, specs
from lowbit import _C, _selection, ops
from lowbit._selection import can_implement, explain, kernel_table, set_strict
from reference import Spec

OPS = ("gemm", "gemm_a8", "gemm_grad_input")
GEMM = {"M": 1, "N": 4096, "K": 4096, "scheme": "int4-g128"}


@pytest.fixture
def strict() -> None:
    before = _selection.strict()
    set_strict()
    yield
    set_strict(before)


def _problems():
    for kind, (format, zero_kind, scaling) in KINDS.items():
        for group_size in (128,) if scaling == "block128" else (8, 32, 40, 128, -1):
            yield kind, Spec(format, zero_kind, group_size, "bfloat16", scaling)


def test_table() -> None:
    rows = kernel_table()
    assert {row["op"] for row in rows} == set(OPS)
    for row in rows:
        assert set(row) >= {"backend", "op", "name", "isa", "general", "takes"}
        assert row["takes"]
        levels = {"cpu": _C.isa_levels(), "cuda": ["sm_80", "sm_89", "sm_90"], "metal": ["apple7"]}
        assert row["isa"] in levels[row["backend"]]
    for backend in ("cpu", "cuda", "metal"):
        for op in OPS:
            names = [(row["name"], row["isa"]) for row in rows if (row["backend"], row["op"]) == (backend, op)]
            assert names and len(set(names)) == len(names), "a kernel is listed twice"
            assert any(row["general"] for row in rows if (row["backend"], row["op"]) == (backend, op))


@pytest.mark.parametrize("level", _C.isa_levels())
def test_every_problem_has_a_kernel_and_every_refusal_a_reason(level: str) -> None:
    for kind, spec in _problems():
        for op in OPS:
            for M in (0, 1, 8, 17, 1000):
                for flag in (False, True):
                    for dtype in ("int8", "float8_e4m3fn") if op == "gemm_a8" else ("bfloat16", "float32"):
                        answer = explain(
                            op, M=M, N=130, K=264, scheme=cpu_desc(spec), device=f"cpu:{level}", dtype=dtype,
                            batch_invariant=flag,
                        )  # fmt: skip
                        assert answer.chosen is not None, (kind, spec, op)
                        assert [v for _, v in answer.rows].count("chosen") == 1
                        assert all(verdict for _, verdict in answer.rows)


def test_the_cases_reach_every_kernel() -> None:
    """A row that no case reaches would be untested, or dead. These are the problems of test_gemm, _gemm_a8 and _grad."""
    chosen = set()
    for kind in KINDS:
        for spec, N, K in specs(kind):
            for op in OPS:
                for dtype in ("int8", "float8_e4m3fn") if op == "gemm_a8" else ("bfloat16", "float32", "float16"):
                    for level in _C.isa_levels():
                        for M in (1, 4, 33):
                            answer = explain(
                                op, M=M, N=N, K=K, scheme=cpu_desc(spec), device=f"cpu:{level}", dtype=dtype
                            )
                            chosen.add((op, answer.chosen))
    assert {(row["op"], _selection.full_name(row)) for row in kernel_table() if row["backend"] == "cpu"} == chosen


def test_prints_as_a_table() -> None:
    answer = explain(**GEMM)
    text = str(answer)
    assert text.splitlines()[0].startswith("gemm M=1 N=4096 K=4096 int4-g128 bfloat16 on cpu")
    assert f"-> {answer.chosen}" in text
    assert len(text.splitlines()) == 1 + len(answer.rows)
    assert not answer.general
    assert explain(**{**GEMM, "scheme": "int4-g24"}).general


def test_accepts_schemes_strings_and_descs() -> None:
    class HasDesc:
        def desc(self, layout: int = 0) -> int:
            return cpu_desc(Spec("int4", "none", 128, "bfloat16")) if layout else int4

    int4 = _C.make_desc(3, 128, 0, 2, 0, False, 0)
    answers = [explain(**{**GEMM, "scheme": s}) for s in ("int4-g128", HasDesc(), HasDesc().desc(1))]
    assert len({(a.chosen, a.rows) for a in answers}) == 1
    for wrong in (None, 1.5, True, [1]):
        with pytest.raises(TypeError, match="scheme must be a Scheme"):
            explain(**{**GEMM, "scheme": wrong})


def test_batch_invariant_and_device_matter() -> None:
    few = {**GEMM, "dtype": torch.float32, "device": "cpu:avx2"}
    assert explain(**few).chosen != explain(**few, batch_invariant=True).chosen
    assert explain(**GEMM, device="cpu:portable").chosen.endswith("portable")
    assert explain(**GEMM, device=torch.device("cpu")).chosen == explain(**GEMM).chosen
    assert explain(**GEMM, dtype=torch.float32).chosen is not None
    assert explain("gemm_a8", **GEMM).rows == explain("gemm_a8", **GEMM, dtype=torch.int8).rows


def test_can_implement() -> None:
    assert can_implement(**GEMM) and can_implement(**GEMM, strict=True)
    odd = {**GEMM, "scheme": "int4-g24"}
    assert can_implement(**odd) and not can_implement(**odd, strict=True)
    assert not can_implement(**{**GEMM, "K": 64})  # group_size 128 exceeds K
    assert not can_implement(**GEMM, device="xpu") and not can_implement(**GEMM, device="sm_75")
    assert can_implement("linear", **GEMM)


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown op 'gem'"):
        explain("gem", **GEMM)
    with pytest.raises(ValueError, match="unknown op 'gem'"):
        can_implement("gem", **GEMM)
    with pytest.raises(ValueError, match=r"group_size=128 exceeds K=64"):
        explain(**{**GEMM, "K": 64})
    with pytest.raises(ValueError, match="M=-1"):
        explain(**{**GEMM, "M": -1})
    with pytest.raises(ValueError, match="N=0"):
        explain(**{**GEMM, "N": 0})
    with pytest.raises(ValueError, match="no kernels for device 'xpu'"):
        explain(**GEMM, device="xpu")
    with pytest.raises(
        ValueError, match="dtype=float64 is not one of the activations of gemm: bfloat16, float16, float32"
    ):
        explain(**GEMM, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="dtype=bfloat16 is not one of the activations of gemm_a8: int8, float8_e4m3fn"
    ):
        explain("gemm_a8", **GEMM, dtype=torch.bfloat16)


def _general_calls():
    spec = Spec("int4", "int", 24)
    N, K = 17, 48
    w, d = packed(spec, N, K), cpu_desc(spec)
    a = ops.quantize_activation(random_x(2, K), INT8)
    f = ops.quantize_activation(random_x(2, K), FP8)
    return {
        "gemm": lambda: ops.gemm(random_x(2, K), w, None, N, K, d),
        "gemm_out": lambda: ops.gemm_out(random_x(2, K), w, None, N, K, d, 0, torch.empty(2, N)),
        "linear": lambda: ops.linear(random_x(2, K), w, None, N, K, d),
        "gemm_grad_input": lambda: ops.gemm_grad_input(random_x(2, N), w, N, K, d),
        "gemm_a8": lambda: ops.gemm_a8(*a, w, None, N, K, d),
        "gemm_a8_out": lambda: ops.gemm_a8_out(*f, w, None, N, K, d, 0, torch.empty(2, N)),
    }


@pytest.mark.parametrize("op", list(_general_calls()))
def test_strict_refuses_the_general_kernel(op: str, strict: None) -> None:
    call = _general_calls()[op]
    name = "gemm" if op == "linear" else op  # one kernel behind both
    with pytest.raises(
        RuntimeError, match=f"lowbit::{name}: LOWBIT_STRICT is set and only the general .* group_size=24"
    ):
        call()
    set_strict(False)
    call()


def test_strict_lets_fast_kernels_run(strict: None) -> None:
    assert _selection.strict()
    spec = Spec("int4", "int", 32)
    for M in (1, 40):
        for flags in (0, BATCH_INVARIANT):
            ops.gemm(random_x(M, 64), packed(spec, 17, 64), None, 17, 64, cpu_desc(spec), flags)


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import torch, lowbit\nfrom lowbit import _C, ops\n" + code
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_settings_from_the_environment() -> None:
    code = (
        "d = _C.make_desc(3, 24, 0, 0, 0, False, 1)\n"
        "w = torch.zeros(_C.packed_size(4, 24, d), dtype=torch.uint8)\n"
        "assert _C.isa() == 'portable' and _C.strict()\n"
        "ops.gemm(torch.ones(1, 24), w, None, 4, 24, d)\n"
    )
    done = _run(code, LOWBIT_STRICT="1", LOWBIT_ISA="portable")
    assert "LOWBIT_STRICT is set and only the general kernel takes" in done.stderr, done.stderr


def test_wrong_settings_in_the_environment() -> None:
    """Importing works, so that `lowbit info` can tell; the first use says what is wrong."""
    code = "assert not _C.strict()\ntry: _C.isa()\nexcept ValueError as error: print(error)"
    done = _run(code, LOWBIT_STRICT="0", LOWBIT_ISA="sse9")
    assert done.stdout.startswith("instruction set 'sse9' is not one that this CPU can run: "), done.stderr
