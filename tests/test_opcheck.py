"""torch.library.opcheck, all of its tests, on every op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cases import DTYPES, FP8, INT8, KINDS, SCALED, cpu_desc, desc, pack, packed, random_weight, random_x
from lowbit import ops
from reference import Spec

N, K = 17, 40


def _spec(kind: str, has_perm: bool = False) -> Spec:
    format, zero_kind, scaling = KINDS[kind]
    return Spec(format, zero_kind, 128 if scaling == "block128" else 16, "bfloat16", scaling, has_perm)


def _gemm_args(kind: str, dtype: torch.dtype, bias: bool, perm: bool = False) -> tuple[Any, ...]:
    spec = _spec(kind, perm)
    return random_x(2, 3, K, dtype=dtype), packed(spec, N, K), random_x(N) if bias else None, N, K, cpu_desc(spec), 0


def _calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(op, label, arguments): formats and dtypes take turns; every op, every dtype and every third tensor is in it."""
    for kind, dtype in zip(("int4", "int3-offset", "fp8_e4m3-block128", "nf4"), (*DTYPES, torch.bfloat16), strict=True):
        yield "quantize", kind, (random_x(N, K, dtype=dtype), desc(_spec(kind)), kind == "int4", None)
    yield "quantize", "importance", (random_x(N, K), desc(_spec("int2-int")), True, torch.rand(K))
    for kind, dtype, perm in (
        ("int5-float", torch.float16, True),
        ("fp8_e5m2", torch.bfloat16, False),
        ("fp4_e2m1", torch.float32, False),
    ):
        spec = _spec(kind, perm)
        canonical = (*random_weight(spec, N, K).tensors, N, K)
        yield "dequantize", kind, (*canonical, desc(spec), dtype)
        yield "dequantize_out", kind, (*canonical, desc(spec), torch.empty(N, K, dtype=dtype))
        yield "pack", kind, (*canonical, cpu_desc(spec))
        yield "unpack", kind, (packed(spec, N, K), N, K, cpu_desc(spec))
    for name in ("q4_k", "nvfp4", "nested"):  # opcheck cannot compare tensors in float8_e8m0fnu
        scaled, shapes = SCALED[name]
        weight, (n, k) = random_weight(scaled, *shapes[0]), shapes[0]
        canonical = (*weight.tensors, n, k)
        yield "dequantize", name, (*canonical, desc(scaled), torch.float32, *weight.supers)
        yield "dequantize_out", name, (*canonical, desc(scaled), torch.empty(n, k), *weight.supers)
        yield "pack", name, (*canonical, cpu_desc(scaled), *weight.supers)
        yield "unpack", name, (pack(weight), n, k, cpu_desc(scaled))
    for kind, dtype, perm in (
        ("int4", torch.float32, False),
        ("nf4", torch.bfloat16, True),
        ("int3-offset", torch.float16, False),
    ):
        rows = torch.tensor([[3, 0, N - 1]], dtype=torch.int32 if perm else torch.int64)
        spec = _spec(kind, perm)
        yield "embedding", kind, (rows, packed(spec, N, K), N, K, cpu_desc(spec), dtype)
    yield "quantize", "nvfp4", (random_x(N, 64), desc(SCALED["nvfp4"][0]), True, None, torch.ones(1))
    for op in ("gemm", "linear"):
        yield op, "int4-fp32-bias", _gemm_args("int4", torch.float32, True)
        yield op, "int8-int-bf16-perm", _gemm_args("int8-int", torch.bfloat16, True, True)
        yield op, "nf4-fp16", _gemm_args("nf4", torch.float16, False)
    x, *rest = _gemm_args("int4", torch.float32, True)
    yield "linear", "grad", (x.clone().requires_grad_(), *rest)
    for dtype in DTYPES:
        x, *rest = _gemm_args("int6-offset", dtype, True)
        yield "gemm_out", str(dtype), (x, *rest, torch.empty(2, 3, N, dtype=dtype), None)
    x, w, _, *rest = _gemm_args("int3", torch.bfloat16, False)
    yield "gemm_grad_input", "int3", (random_x(2, 3, N, dtype=torch.bfloat16), w, *rest)
    for label, args in {
        "int8": (INT8, -1, None, None, None, True),
        "asym": (INT8, -1, None, None, torch.rand(K), False),
        "static": (INT8, -1, torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32), None, False),
        "fp8": (FP8, 16, None, None, None, True),
    }.items():
        x = random_x(2, 3, K, dtype=torch.bfloat16)
        yield "quantize_activation", label, (x, *args)
        out = ops.quantize_activation(x, *args)
        yield "quantize_activation_out", label, (x, *args, *(None if t is None else torch.empty_like(t) for t in out))
    for kind, format, symmetric in (("int4", INT8, True), ("int8-int", INT8, False), ("fp8_e4m3-block128", FP8, True)):
        spec = _spec(kind)
        a = ops.quantize_activation(random_x(2, 3, K), format, symmetric=symmetric)
        common = (*a, packed(spec, N, K), random_x(N), N, K, cpu_desc(spec), 0)
        yield "gemm_a8", kind, (*common, torch.bfloat16)
        yield "gemm_a8_out", kind, (*common, torch.empty(2, 3, N), None)


CALLS = list(_calls())
ALL_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("op", "args"), [pytest.param(op, args, id=f"{op}-{label}") for op, label, args in CALLS])
def test_opcheck(op: str, args: tuple[Any, ...]) -> None:
    call = getattr(torch.ops.lowbit, op).default
    if any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float8_e4m3fn for arg in args):
        # torch's test of the schema compares inputs before and after with allclose, which float8 does not have.
        before = [
            arg.view(torch.uint8).clone() for arg in args if isinstance(arg, torch.Tensor) and not op.endswith("_out")
        ]
        call(*args)
        after = [arg.view(torch.uint8) for arg in args if isinstance(arg, torch.Tensor) and not op.endswith("_out")]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        torch.library.opcheck(call, args, test_utils=[name for name in ALL_TESTS if name != "test_schema"])
    else:
        torch.library.opcheck(call, args)


def test_every_op_is_checked() -> None:
    assert {op for op, _, _ in CALLS} == set(ops.__all__)


@pytest.mark.parametrize("kind", KINDS)
def test_fake_kernels_agree_with_real_ones(kind: str) -> None:
    """Shapes, strides and dtypes of every format on the meta device: cheap, so here for all of them."""
    for perm in (False, True):
        spec = _spec(kind, perm)
        weight = random_weight(spec, N, K)
        x = random_x(3, K)
        plain = desc(_spec(kind))
        a = torch.ops.lowbit.quantize_activation(x, INT8, -1, None, None, None, False)
        w = packed(spec, N, K)
        calls: list[tuple[str, tuple[Any, ...]]] = [
            ("quantize", (random_x(N, K), plain, False, None)),
            ("dequantize", (*weight.tensors, N, K, desc(spec), torch.float16)),
            ("pack", (*weight.tensors, N, K, cpu_desc(spec))),
            ("unpack", (w, N, K, cpu_desc(spec))),
            ("gemm", (x, w, None, N, K, cpu_desc(spec), 0)),
            ("gemm_grad_input", (random_x(3, N), w, N, K, cpu_desc(spec), 0)),
            ("gemm_a8", (*a, w, None, N, K, cpu_desc(spec), 0, torch.bfloat16)),
        ]
        for op, args in calls:
            call = getattr(torch.ops.lowbit, op).default
            real = call(*args)
            fake = call(*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args))
            pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
            for r, f in pairs:
                assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), op
