"""Activations as integers (`planes_i8`): what splitting them must never lose."""

from __future__ import annotations

import pytest
import torch

import reference
from cases import cpu_desc, dense, desc, generator, packed, random_x
from lowbit import _C, explain, ops
from reference import Spec

N, K = 48, 544
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPECS = (Spec("int4", "none", 128), Spec("int3", "int", 32), Spec("int6", "float", 96), Spec("int2", "offset", -1))
INVARIANT = _C.enums()["flags"]["batch_invariant"]


def rows(name: str) -> torch.Tensor:
    """Rows [4, K] in fp64 that are hard to hold in a few digits."""
    g = generator("planes", name)
    x = torch.randn(4, K, generator=g, dtype=torch.float64)
    exponents = torch.randint(-14, 15, (4, K), generator=g)
    return {
        "gaussian": x,
        "one huge value in every segment": torch.where(torch.arange(K) % 96 == 5, x * 30000, x * 0.05),
        "half of the values huge": torch.where(torch.arange(K) % 2 == 0, x * 4096, x / 4096),
        "every exponent": torch.copysign(torch.exp2(exponents.double()), x),
        "mostly zeros": torch.where(torch.rand(4, K, generator=g) < 0.97, 0.0, x),
        "negative zero": torch.full((4, K), -0.0, dtype=torch.float64),
        "largest significands": torch.copysign(torch.tensor(1.9921875, dtype=torch.float64), x),  # 255/128
        "small": x * 2.0**-13,
    }[name]


NAMES = [
    "gaussian",
    "one huge value in every segment",
    "half of the values huge",
    "every exponent",
    "mostly zeros",
    "negative zero",
    "largest significands",
    "small",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_activation_is_rounded(name: str, isa: str) -> None:
    """The bound leaves nothing for x, whatever its values."""
    for spec in SPECS:
        w, W = packed(spec, N, K), dense(spec, N, K)
        for dtype in DTYPES:
            x = (rows(name) * (2.0**-8 if dtype == torch.float16 else 1.0)).to(dtype)  # whose products must fit too
            for M in (1, 2, 3, 4):
                y = ops.gemm(x[:M], w, None, N, K, cpu_desc(spec))
                reference.assert_close(y, reference.product(x[:M], W, None, 0, dtype), (name, spec, dtype, M))


@pytest.mark.parametrize("exponent", [-126, -120, 100, 118])
def test_the_ends_of_the_range(exponent: int, isa: str) -> None:
    """bf16 and fp32 activations near the smallest and the largest: units of integers stay normal numbers."""
    spec = Spec("int4", "none", 32)
    w, W = packed(spec, N, K), dense(spec, N, K)
    for dtype in (torch.bfloat16, torch.float32):
        x = (random_x(2, K, dtype=torch.float32).double() * 2.0**exponent).to(dtype)
        y = ops.gemm(x, w, None, N, K, cpu_desc(spec))
        expected, bound = reference.product(x, W, None, 0, dtype)
        bound = bound + K * 2.0**-126 * float(W.abs().max())  # products below the normal numbers may be flushed
        reference.assert_close(y, (expected, bound), (exponent, dtype))


def test_small_beside_huge(isa: str) -> None:
    """In units of the huge value the small one underflows to the integer 0, which is not what it is."""
    spec = Spec("int4", "none", 32)
    weight = torch.zeros(16, 32)
    weight[:, 1] = torch.linspace(0.1, 1, 16)
    stream, scales, _ = ops.quantize(weight, desc(spec))
    w = ops.pack(stream, scales, None, None, 16, 32, cpu_desc(spec))
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(1, 32, dtype=dtype)
        x[0, :2] = torch.tensor([2.0**100, 2.0**-100])
        y = ops.gemm(x, w, None, 16, 32, cpu_desc(spec))
        expected = ops.dequantize(stream, scales, None, None, 16, 32, desc(spec), torch.float32)[:, 1] * 2.0**-100
        torch.testing.assert_close(y[0], expected.to(dtype), rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_its_row_alone(value: float, isa: str) -> None:
    for spec in SPECS:
        for dtype in DTYPES:
            x = random_x(3, K, dtype=dtype)
            clean = ops.gemm(x, packed(spec, N, K), None, N, K, cpu_desc(spec), INVARIANT)
            x[1, 77] = value
            y = ops.gemm(x, packed(spec, N, K), None, N, K, cpu_desc(spec), INVARIANT)
            assert not torch.isfinite(y[1]).all(), (spec, dtype)
            assert torch.equal(y[[0, 2]], clean[[0, 2]]), (spec, dtype)


def test_it_serves_few_rows_of_integers() -> None:
    """Not a matter of speed alone: the tests above must not run around it."""
    if "avx2" not in _C.isa_levels():
        pytest.skip("no instruction set here has fast int8 dot products")
    for dtype in DTYPES:
        problem = explain("gemm", M=1, N=N, K=K, scheme="int3-g32", dtype=dtype)  # bf16 has another one for int4
        assert problem.chosen is not None and "planes_i8" in problem.chosen, str(problem)
