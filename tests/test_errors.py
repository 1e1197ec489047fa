"""Bad input: one exception with the values in it, before any work, and the same words from real and fake kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cases import FP8, INT8, cpu_desc, desc, packed, random_weight, random_x
from lowbit import _C
from reference import Spec

N, K = 17, 40
SPEC = Spec("int4", "int", 16, "bfloat16")
DESC = cpu_desc(SPEC)
W = packed(SPEC, N, K)
X, BIAS = random_x(3, K), random_x(N)
PERM_SPEC = Spec("int4", "none", 16, "float32", has_perm=True)
CANONICAL = random_weight(SPEC, N, K).tensors
WITH_PERM = random_weight(PERM_SPEC, N, K).tensors
XQ, XS, XZ = torch.ops.lowbit.quantize_activation(X, INT8, -1, None, None, None, False)
FQ, FS, _ = torch.ops.lowbit.quantize_activation(X, FP8, 16, None, None, None, True)
OPS = torch.ops.lowbit


class Case:
    """A call that must fail: `op`, what it says, and its arguments with some replaced by position."""

    def __init__(self, op: str, message: str, base: tuple[Any, ...], values_only: bool = False, **at: Any) -> None:
        args = list(base)
        for key, value in at.items():
            args[int(key[1:])] = value
        # values_only: the fake kernel cannot know, because it depends on data, addresses or layouts in memory.
        self.op, self.message, self.args, self.values_only = op, message, tuple(args), values_only

    def __repr__(self) -> str:
        return f"{self.op}: {self.message}"


GEMM = (X, W, None, N, K, DESC, 0)
GRAD = (random_x(3, N), W, N, K, DESC, 0)
A8 = (XQ, XS, XZ, W, None, N, K, DESC, 0, torch.float32)
QUANTIZE = (random_x(N, K), desc(SPEC), False, None)
DEQUANTIZE = (*CANONICAL, N, K, desc(SPEC), torch.float32)
PACK = (*CANONICAL, N, K, DESC)
ACTIVATION = (X, INT8, -1, None, None, None, True)
FP8_ACTIVATION = (X, FP8, -1, None, None, None, True)
ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)


def _cases() -> list[Case]:
    sizes = f"w has shape [{len(W)}], expected [{_C.packed_size(N, K + 32, DESC)}]"
    floats = "expected float32, float16 or bfloat16"
    cases = [
        # what x may be
        Case("gemm", f"x is float64, {floats}", GEMM, _0=X.double()),
        Case("gemm", f"x is int8, {floats}", GEMM, _0=XQ),
        Case("gemm", "x is a scalar, expected shape [..., K]", GEMM, _0=torch.ones(())),
        Case("gemm", "x of shape [3, 39] has K=39 in its last dimension, the weight has K=40", GEMM, _0=X[:, 1:]),
        # what w may be
        Case("gemm", sizes, GEMM, _0=random_x(3, K + 32), _4=K + 32),
        Case("gemm", f"w has shape [{len(W) - 1}], expected [{len(W)}]", GEMM, _1=W[1:]),
        Case("gemm", f"w has shape [1, {len(W)}], expected [{len(W)}]", GEMM, _1=W[None]),
        Case("gemm", "w is int8, expected uint8", GEMM, _1=W.view(torch.int8)),
        Case("gemm", "w is not contiguous", GEMM, True, _1=W.repeat_interleave(2)[::2]),
        Case("gemm", "layout is canonical, the CPU kernels read cpu_tile16", GEMM, True, _5=desc(SPEC)),
        # what bias may be
        Case("gemm", "bias has shape [16], expected [17]", GEMM, _2=BIAS[1:]),
        Case("gemm", "bias has shape [1, 17], expected [17]", GEMM, _2=BIAS[None]),
        Case("gemm", f"bias is int32, {floats}", GEMM, _2=BIAS.int()),
        Case("gemm", "bias is not contiguous", GEMM, True, _2=BIAS.repeat_interleave(2)[::2]),
        Case("gemm", "flags=6 has unknown bits; known: batch_invariant=1", GEMM, _6=6),
        # what out and workspace may be
        Case("gemm_out", "out has shape [3, 16], expected [3, 17]", (*GEMM, torch.empty(3, 16), None)),
        Case("gemm_out", "out is bfloat16, expected float32", (*GEMM, torch.empty(3, N, dtype=torch.bfloat16), None)),
        Case("gemm_out", "out is not contiguous", (*GEMM, torch.empty(N, 3).t(), None), True),
        Case("gemm_out", "workspace has 1 bytes", (*GEMM, torch.empty(3, N), torch.empty(1, dtype=torch.uint8)), True),
        Case("gemm_out", "workspace is float32, expected uint8", (*GEMM, torch.empty(3, N), torch.empty(10**6)), True),
        # the gradient
        Case("gemm_grad_input", f"dy is int8, {floats}", GRAD, _0=XQ),
        Case("gemm_grad_input", "dy of shape [3, 40] has N=40 in its last dimension, the weight has N=17", GRAD, _0=X),
        # canonical tensors
        Case("quantize", "weight has shape [40], expected [N, K]", QUANTIZE, _0=X[0]),
        Case("quantize", f"weight is int64, {floats}", QUANTIZE, _0=torch.ones(4, 40, dtype=torch.int64)),
        Case("quantize", "desc has a perm", QUANTIZE, _1=desc(PERM_SPEC)),
        Case("quantize", "importance has shape [39], expected [40]", QUANTIZE, _3=torch.ones(39)),
        Case("quantize", "importance is float64, expected float32", QUANTIZE, _3=torch.ones(40).double()),
        Case("dequantize", "packed has shape [17, 19], expected [17, 20]", DEQUANTIZE, _0=CANONICAL[0][:, 1:]),
        Case("dequantize", "packed is int8, expected uint8", DEQUANTIZE, _0=CANONICAL[0].view(torch.int8)),
        Case("dequantize", "scales is float32, expected bfloat16", DEQUANTIZE, _1=CANONICAL[1].float()),
        Case("dequantize", "scales has shape [17, 2], expected [17, 3]", DEQUANTIZE, _1=CANONICAL[1][:, 1:]),
        Case("dequantize", "zeros are absent, but desc says", DEQUANTIZE, _2=None),
        Case("dequantize", "zeros is bfloat16, expected uint8", DEQUANTIZE, _2=CANONICAL[1]),
        Case("dequantize", "perm is given, but desc says", DEQUANTIZE, _3=WITH_PERM[3]),
        Case("dequantize", f"out_dtype is float64, {floats}", DEQUANTIZE, _7=torch.float64),
        Case("dequantize", "packed is not contiguous", DEQUANTIZE, True, _0=CANONICAL[0].t().contiguous().t()),
        Case("dequantize_out", "out has shape [17, 41], expected [17, 40]", (*DEQUANTIZE[:7], torch.empty(17, 41))),
        Case("pack", "perm is absent, but desc says", (*WITH_PERM, N, K, cpu_desc(PERM_SPEC)), _3=None),
        Case("pack", "perm is int64, expected int32", (*WITH_PERM, N, K, cpu_desc(PERM_SPEC)), _3=WITH_PERM[3].long()),
        Case(
            "pack",
            "perm[0]=-1 is outside 0..39",
            (*WITH_PERM, N, K, cpu_desc(PERM_SPEC)),
            True,
            _3=WITH_PERM[3] * 0 - 1,
        ),
        Case("pack", "layout canonical", PACK, True, _6=desc(SPEC)),
        Case("unpack", f"w has shape [{len(W) - 1}], expected [{len(W)}]", (W[1:], N, K, DESC)),
        Case("unpack", "w is float32, expected uint8", (torch.ones(len(W)), N, K, DESC)),
        # activations
        Case("quantize_activation", f"x is int32, {floats}", ACTIVATION, _0=X.int()),
        Case("quantize_activation", "x is a scalar, expected shape [..., K]", ACTIVATION, _0=torch.ones(())),
        Case("quantize_activation", "format=3 is not an activation format; expected int8", ACTIVATION, _1=3),
        Case("quantize_activation", "group_size=12 is neither -1 nor a positive multiple of 8", FP8_ACTIVATION, _2=12),
        Case("quantize_activation", "group_size=0 is neither -1 nor a positive multiple of 8", FP8_ACTIVATION, _2=0),
        Case("quantize_activation", "group_size=32 with int8, which has one scale per token (-1)", ACTIVATION, _2=32),
        Case("quantize_activation", "fp8 has no zeros, got symmetric=False", FP8_ACTIVATION, _6=False),
        Case("quantize_activation", "pre_scale has shape [39], expected [40]", ACTIVATION, _5=torch.ones(39)),
        Case("quantize_activation", "scale has shape [2], expected [1]", ACTIVATION, _3=torch.ones(2)),
        Case("quantize_activation", "scale is float64, expected float32", ACTIVATION, _3=ONE.double()),
        Case("quantize_activation", "zero", ACTIVATION, _3=ONE, _4=ZERO),
        Case("quantize_activation", "zero", ACTIVATION, _3=ONE, _6=False),
        Case("quantize_activation", "static scale=-1 is not positive", ACTIVATION, True, _3=-ONE),
        Case("quantize_activation", "static scale=nan is not positive", ACTIVATION, True, _3=ONE * torch.nan),
        Case(
            "quantize_activation",
            "static zero=128 is outside -128..127",
            ACTIVATION,
            True,
            _3=ONE,
            _4=ZERO + 128,
            _6=False,
        ),
        Case("quantize_activation_out", "xq is uint8, expected int8", (*ACTIVATION, XQ.view(torch.uint8), XS, None)),
        Case(
            "quantize_activation_out",
            "x_scales has shape [3], expected [3, 1]",
            (*ACTIVATION, XQ.clone(), XS[:, 0], None),
        ),
        Case("quantize_activation_out", "x_zeros is given, but", (*ACTIVATION, XQ.clone(), XS.clone(), XZ)),
        # gemm_a8
        Case("gemm_a8", "xq is uint8, expected int8 or float8_e4m3fn", A8, _0=XQ.view(torch.uint8)),
        Case("gemm_a8", "xq of shape [3, 39] has K=39 in its last dimension, the weight has K=40", A8, _0=XQ[:, 1:]),
        Case("gemm_a8", "x_scales is float64, expected float32", A8, _1=XS.double()),
        Case("gemm_a8", "x_scales has shape [2, 1], expected [3, 1]", A8, _1=XS[1:]),
        Case(
            "gemm_a8",
            "x_scales of shape [3, 3] has neither one scale per row nor one per 128 of K=40",
            A8,
            _0=FQ,
            _1=FS,
            _2=None,
        ),
        Case("gemm_a8", "x_zeros is int64, expected int32", A8, _2=XZ.long()),
        Case("gemm_a8", "x_zeros are given with float8_e4m3fn activations, which have none", A8, _0=FQ),
        Case("gemm_a8", f"out_dtype is float64, {floats}", A8, _9=torch.float64),
        Case("gemm_a8_out", f"out is int8, {floats}", (*A8[:9], torch.empty(3, N, dtype=torch.int8), None)),
    ]
    return cases + [Case("linear", c.message, c.args, c.values_only) for c in cases if c.op == "gemm"]


CASES = _cases()


def _message(case: Case) -> str:
    # linear is gemm with a gradient, down to its kernel: only its fake kernel has a name of its own.
    name = "(linear|gemm)" if case.op == "linear" else case.op
    return f"^lowbit::{name}: .*{re.escape(case.message)}"


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_refused(case: Case) -> None:
    with pytest.raises(RuntimeError, match=_message(case)):
        getattr(OPS, case.op)(*case.args)


@pytest.mark.parametrize("case", [case for case in CASES if not case.values_only], ids=repr)
def test_refused_while_tracing(case: Case) -> None:
    """Flags are checked when the op runs; everything about shapes and dtypes already in the fake kernel."""
    if "flags" in case.message:
        return
    meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in case.args]
    with pytest.raises(RuntimeError, match=_message(case)):
        getattr(OPS, case.op)(*meta)


@pytest.mark.parametrize("case", [case for case in CASES if case.op.endswith("_out")], ids=repr)
def test_outputs_are_untouched(case: Case) -> None:
    before = [arg.clone() if isinstance(arg, torch.Tensor) else None for arg in case.args]
    with pytest.raises(RuntimeError):
        getattr(OPS, case.op)(*case.args)
    for arg, copy in zip(case.args, before, strict=True):
        assert copy is None or torch.equal(arg.contiguous().view(torch.uint8), copy.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.gemm(X, W, None, 0, K, DESC, 0), "N=0"),
        (lambda: OPS.gemm(X, W, None, -5, K, DESC, 0), "N=-5"),
        (lambda: OPS.gemm(X, W, None, N, 0, DESC, 0), "K=0"),
        (lambda: OPS.gemm(X, W, None, 2**40, K, DESC, 0), "1099511627776"),
        (lambda: OPS.gemm(X, W, None, N, K, -1, 0), "desc=-1 has bits set that mean nothing"),
        (lambda: OPS.gemm(X, W, None, N, K, DESC | 1 << 23, 0), "has bits set that mean nothing"),
        (lambda: OPS.gemm(X, W, None, N, K, (DESC & ~0xFF) | 77, 0), "format=77 is not in the format table"),
        (lambda: OPS.gemm(X, W, None, N, K, DESC | 9 << 24, 0), "layout=9 is not one of"),
        (lambda: OPS.quantize(torch.ones(4, 0), desc(SPEC), False, None), "K=0"),
        (lambda: OPS.quantize(torch.ones(0, 4), desc(SPEC), False, None), "N=0"),
        (
            lambda: OPS.quantize(torch.ones(4, 15), desc(Spec("int4", group_size=24)), False, None),
            "group_size=24 exceeds K=15",
        ),
        (lambda: OPS.quantize_activation(torch.ones(4, 0), INT8, -1, None, None, None, True), "K=0"),
    ],
)
def test_impossible_sizes_and_descs(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, -1, 0, 0, 0, False, 0), "format=0 is not in the format table"),
        ((99, -1, 0, 0, 0, False, 0), "format=99 is not in the format table"),
        ((3, 0, 0, 0, 0, False, 0), "group_size=0 is neither -1 nor a positive multiple of 8"),
        ((3, 12, 0, 0, 0, False, 0), "group_size=12 is neither -1 nor a positive multiple of 8"),
        ((3, 2**24, 0, 0, 0, False, 0), "group_size=16777216 exceeds 16777215"),
        ((3, 32, 4, 0, 0, False, 0), "zero_kind=4 is not one of 0..3"),
        ((7, 32, 1, 0, 0, False, 0), "fp8_e4m3 is a code book and has no zeros"),
        ((3, 32, 0, 10, 0, False, 0), "scale_dtype=10 is not one of 0..9"),
        ((3, 128, 0, 0, 1, False, 0), "128x128 block scaling takes fp8 formats, got int4"),
        ((7, 64, 0, 0, 1, False, 0), "128x128 block scaling needs group_size=128, got 64"),
        ((3, 32, 0, 0, 4, False, 0), "scaling=4 is not one of 0..3"),
        ((3, 32, 0, 4, 2, False, 0, 3, -1), "super_dtype=e8m0 is not one of float32, float16, bfloat16"),
        ((3, 32, 0, 0, 0, False, 7), "layout=7 is not one of"),
    ],
)
def test_make_desc(args: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _C.make_desc(*args)


def test_questions_about_sizes() -> None:
    for call in (_C.canonical_shapes, _C.packed_size):
        with pytest.raises(ValueError, match="N=0"):
            call(0, K, DESC)
        with pytest.raises(ValueError, match="K=-1"):
            call(N, -1, DESC)
    with pytest.raises(ValueError, match="desc=-1"):
        _C.parse_desc(-1)
    with pytest.raises(ValueError, match="'pack' takes no workspace"):
        _C.workspace_size("pack", 1, N, K, DESC)
    with pytest.raises(ValueError, match="M=-1"):
        _C.workspace_size("gemm", -1, N, K, DESC)
    with pytest.raises(ValueError, match="sse9"):
        _C.set_isa("sse9")
    with pytest.raises(ValueError, match="toaster"):
        _C.preferred_layout("toaster", DESC)


def test_devices_must_match() -> None:
    with pytest.raises(RuntimeError, match=r"x is on meta, w is on cpu|is not on the CPU"):
        OPS.gemm(X.to("meta"), W, None, N, K, DESC, 0)
    with pytest.raises(RuntimeError):
        OPS.gemm(X, W.to("meta"), None, N, K, DESC, 0)
