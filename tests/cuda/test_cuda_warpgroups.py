"""The kernels of warpgroups for Hopper: whole numbers, which show a wrong row or column however small, and odd shapes of x."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import cases
import problems
import reference
from emulator.library import ORDERS
from kernel_cases import expected, forced, gemm, on
from lowbit import _C
from problems import Problem, cuda_desc, pack
from reference import Spec, Weight

KERNELS = [name for name in problems.A16 if name.startswith("hopper_matrix_m")]
A8 = [name for name in problems.A8 if name.startswith("hopper_a8_")]
INT4 = Spec("int4", "int", 32, "float16")


def tokens_of(kernel: str) -> int:
    return int(kernel.rsplit("_m", 1)[1])


def one_in_each_row(spec: Spec, N: int, K: int) -> Weight:
    """A weight that is 1 at (n, 5 n % K), and 0 elsewhere."""
    packed = torch.full((N, K // 2), 0x88, dtype=torch.uint8)
    n = torch.arange(N)
    k = 5 * n % K
    packed[n, k // 2] += torch.where(k % 2 == 0, 1, 16).to(torch.uint8)
    shapes = _C.canonical_shapes(N, K, cases.desc(spec))
    scales = torch.ones(shapes["scales"], dtype=torch.float16)
    return dataclasses.replace(cases.random_weight(spec, N, K), packed=packed, scales=scales)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_element_of_y_is_where_it_belongs(backend: Any, kernel: str) -> None:
    """Each row of W picks a column of x, whose elements say which they are. N, M and K end inside tiles."""
    tokens = tokens_of(kernel)
    spec = Spec("int4", "none", 64, "float16")
    for M, N, K in ((tokens, 256, 192), (tokens + 9, 331, 320)):
        weight = one_in_each_row(spec, N, K)
        m, k = torch.arange(M).view(-1, 1), torch.arange(K).view(1, -1)
        x = ((m * 31 + k * 7) % 2039).to(torch.float16)
        p = Problem(spec, M, N, K, torch.float16)
        with forced(kernel):
            y = gemm(backend, p, x, weight)
        assert torch.equal(y, x[:, 5 * torch.arange(N) % K]), (M, N, K)


def columns_of(kernel: str) -> list[int]:
    """The widths that a tile of the kernel can have: what wgmma can, from half of its own on."""
    most = tokens_of(kernel)
    if most == 256:
        return [256]
    integers = kernel.startswith("hopper_a8_int")
    widths = [n for n in range(8, 129, 8) if not integers or n <= 32 or n % 16 == 0]
    return [n for n in widths if n <= most and (most == 64 or n > most // 2)]


def config(kernel: str, M: int, x: str = "bfloat16") -> str:
    op = "gemm_a8" if kernel.startswith("hopper_a8") else "gemm"
    desc = cuda_desc(Spec("int4", "none", 128, "float32"))
    with forced(kernel):
        return _C.describe_config(op, "sm_90", M, 4096, 4096, desc, x, 0)


@pytest.mark.parametrize("kernel", [*KERNELS, *A8])
def test_tiles_are_as_wide_as_m_and_no_wider(kernel: str) -> None:
    """As few tiles as there can be, as narrow as those can be."""
    widths = columns_of(kernel)
    x = {"hopper_a8_i": "int8", "hopper_a8_f": "float8_e4m3fn"}.get(kernel[:11], "bfloat16")
    for M in (1, 8, 9, 24, 33, 40, 64, 65, 72, 96, 100, 128, 129, 136, 192, 200, 256, 257, 1000, 4096):
        tiles = -(-M // widths[-1])
        width = next(n for n in widths if n * tiles >= M)
        text = config(f"{kernel}:1x1", M, x)
        assert f" x {width}, steps" in text and f" x {tiles} tiles" in text, (M, text)


@pytest.mark.parametrize("width", range(16, 257, 16))
@pytest.mark.parametrize("kernel", KERNELS)
def test_narrow_tiles(backend: Any, kernel: str, width: int) -> None:
    """Two widths at a time; M one less than the tile's, which blocks share. Whole numbers, so that y is exact."""
    fitting = [n for n in (width - 8, width) if n in columns_of(kernel)]
    if not fitting:
        pytest.skip("another kernel's width")
    backend.set_device(90, 5)
    spec = Spec("int4", "none", 64, "float16")
    for n in fitting:
        M, N, K = n - 1, 300, 1160
        weight = one_in_each_row(spec, N, K)
        m, k = torch.arange(M).view(-1, 1), torch.arange(K).view(1, -1)
        x = ((m * 31 + k * 7) % 251).to(torch.bfloat16)
        with forced(kernel):
            y = gemm(backend, Problem(spec, M, N, K, torch.bfloat16), x, weight)
        assert torch.equal(y, x[:, 5 * torch.arange(N) % K]), n


@pytest.mark.parametrize("kernel", A8)
def test_narrow_tiles_of_bytes(backend: Any, kernel: str) -> None:
    integers = kernel.startswith("hopper_a8_int")
    backend.set_device(90, 5)
    spec = Spec("int4", "none", 64, "float16")
    for n in columns_of(kernel):
        M, N, K = n - 1, 70, 648
        weight = one_in_each_row(spec, N, K)
        m, k = torch.arange(M).view(-1, 1), torch.arange(K).view(1, -1)
        x = (m * 31 + k * 7) % 15 - 7
        xq = x.to(torch.int8 if integers else torch.float8_e4m3fn)
        scales = torch.ones(M, 1)
        with forced(kernel):
            w = pack(backend, weight)
            y = backend.ops.gemm_a8(
                on(backend, xq), on(backend, scales), None, w, None, N, K, cuda_desc(spec), 0, torch.float32
            )
        assert torch.equal(y.cpu(), x[:, 5 * torch.arange(N) % K].float()), n


@pytest.mark.parametrize("plan", ["2x1", "1x2", "2x2"])
@pytest.mark.parametrize("kernel", [*KERNELS, *A8])
def test_blocks_that_share_what_they_copy(backend: Any, kernel: str, plan: str) -> None:
    """What blocks compute that share nothing, and the same bits in every order of threads and blocks. Clusters share tiles, and
    N and M end inside of clusters: some blocks have no rows, or no tokens."""
    tokens = tokens_of(kernel)
    spec = Spec("int4", "none", 32, "float16")
    a8 = kernel in A8
    M, N, K = 11 if plan == "2x1" else tokens + 5, 330, 1100
    weight = cases.random_weight(spec, N, K)
    xq, scales = None, torch.ones(M, 1)
    if a8:
        codes = torch.randint(-7, 8, (M, K), generator=cases.generator(M, K))
        xq = codes.to(torch.int8 if "int" in kernel else torch.float8_e4m3fn)
    results = []
    for seed, (name, order) in enumerate(((f"{kernel}:1x1", ORDERS[0]), *((f"{kernel}:{plan}", o) for o in ORDERS))):
        backend.set_device(90, 100)
        backend.set_order(order, seed)
        with forced(name):
            if xq is None:
                results.append(gemm(backend, Problem(spec, M, N, K, torch.bfloat16), weight=weight))
                continue
            given = (on(backend, xq), on(backend, scales), None, pack(backend, weight), None)
            results.append(backend.ops.gemm_a8(*given, N, K, cuda_desc(spec), 0, torch.float32).cpu())
    for y in results[1:]:
        reference.assert_close(y, (results[0].double(), results[0].double().abs() * 2**-8 + 1e-3), (kernel, plan))
    assert all(torch.equal(results[1], y) for y in results[2:])


def test_clusters_are_spelled_out() -> None:
    text = config("hopper_matrix_m64:2x2", 40)  # 20 tokens for each block: 24, or halves of eight
    assert "tiles of 256 x 32, steps of 128, 8 warps, clusters of 2 x 2, " in text, text
    assert "8 x 1 tiles of 32 steps on 32 clusters" in text, text
    int4 = cuda_desc(Spec("int4", "none", 128, "float32"))
    with forced("hopper_matrix_m64:4x1"):
        reasons = dict(_C.explain("gemm", "sm_90", 64, 4096, 4096, int4, "bfloat16", 0))
        assert reasons["cuda_hopper_matrix_m64_sm_90"] == "there are no clusters of 4 x 1 blocks"
        assert reasons["cuda_hopper_matrix_m128_sm_90"] == "kernel hopper_matrix_m64 is forced"


@pytest.mark.parametrize("kernel", KERNELS)
def test_x_as_it_comes(backend: Any, kernel: str) -> None:
    """The copy engine takes rows on 16-byte boundaries that do not overlap; others are copied first."""
    p = Problem(INT4, 5, 130, 200, torch.bfloat16)
    w = pack(backend, p.weight)
    wide = torch.full((5, 411), torch.nan, dtype=p.dtype)
    wide[:, 1:201] = p.x()
    one_row = p.x()[:1].expand(5, 200)
    with forced(kernel):
        for x in (p.x(), wide[:, 1:201], p.x()[:1], one_row):
            y = backend.ops.gemm(on(backend, x), w, None, p.N, p.K, p.desc, 0).cpu()
            reference.assert_close(y, expected(p, x), (kernel, x.shape, x.stride()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_order_of_threads_and_blocks_does_not_matter(backend: Any, kernel: str) -> None:
    """With tiles that blocks share and blocks that have several, so that the ring goes on from one tile to the next."""
    for sms in (3, 7):
        backend.set_device(90, sms)
        p = Problem(INT4, 9, 520, 1100, torch.bfloat16)
        results = []
        with forced(kernel):
            for seed, order in enumerate((*ORDERS, ORDERS[2])):
                backend.set_order(order, seed)
                results.append(gemm(backend, p))
        reference.assert_close(results[0], expected(p), (kernel, sms))
        assert all(torch.equal(results[0], other) for other in results[1:]), sms


def test_refusals_have_their_values() -> None:
    """And selection leaves what they refuse to others."""
    int4 = cuda_desc(Spec("int4", "none", 16))
    zeros = cuda_desc(Spec("int8", "int", 32))
    for op, dtype, desc, kernel, words in (
        ("gemm", "float32", int4, "hopper_matrix_m64", "activations are float32, which tensor cores do not take"),
        ("gemm_a8", "int8", int4, "hopper_a8_int_m64", "group_size=16 is not a multiple of 32"),
        ("gemm_a8", "int8", zeros, "hopper_a8_int_m64", "int8 weights less their zeros do not fit int8"),
        ("gemm_a8", "float8_e4m3fn", zeros, "hopper_a8_fp8_m64", "int8 weights are neither fp8 nor made fp8"),
    ):
        reasons = dict(_C.explain(op, "sm_90", 64, 1024, 4096, desc, dtype, 0))
        assert reasons[f"cuda_{kernel}_sm_90"] == words
        assert list(reasons.values()).count("") == 1
    fits = cuda_desc(Spec("int4", "none", 128))
    reasons = dict(_C.explain("gemm", "sm_120", 64, 1024, 4096, fits, "bfloat16", 0))
    assert reasons["cuda_hopper_matrix_m64_sm_90"] == "needs sm_90, the device is sm_120"
    reasons = dict(_C.explain("gemm", "sm_90", 64, 1024, 4096, fits, "bfloat16", cases.BATCH_INVARIANT))
    assert reasons["cuda_hopper_matrix_m64_sm_90"].startswith("its order of additions is not that of other tiles")


@pytest.mark.parametrize("kind", cases.KINDS)
def test_two_stages_of_every_weight_fit(kind: str) -> None:
    format, zero_kind, scaling = cases.KINDS[kind]
    try:
        for group in (128,) if scaling == "block128" else (16, 48, 128, -1):
            desc = cuda_desc(Spec(format, zero_kind, group, "float32", scaling))
            for kernel in KERNELS:
                _C.force_kernel(kernel)
                text = _C.describe_config("gemm", "sm_90", 64, 4096, 4096, desc, "bfloat16", 0)
                assert text.startswith(f"{kernel}: tiles of "), text
    finally:
        _C.force_kernel("")


def test_zeros_of_activations_are_refused(backend: Any) -> None:
    weight = cases.random_weight(Spec("int4", "none", 32, "float16"), 64, 128)
    xq, scales = torch.ones(3, 128, dtype=torch.int8), torch.ones(3, 1)
    arguments = (on(backend, xq), on(backend, scales), torch.ones(3, 1, dtype=torch.int32), pack(backend, weight))
    with forced("hopper_a8_int_m64"), pytest.raises(RuntimeError, match=r"cannot run .*: activations have zeros"):
        backend.ops.gemm_a8(*arguments, None, 64, 128, cuda_desc(weight.spec), 0, torch.float32)
