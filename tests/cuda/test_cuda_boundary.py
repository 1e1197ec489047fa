"""What stands between torch and the CUDA kernels: workspaces, settings, errors. The kernels themselves are tested elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cases
from kernel_cases import forced, gemm, on
from lowbit import _C
from problems import Problem, cuda_desc, pack
from reference import Spec

INT4 = Spec("int4", "int", 32, "float16")
COUNTERS = 16 * 1024  # csrc/cuda/select.h: kCounterBytes


@pytest.fixture
def strict() -> Iterator[None]:
    before = _C.strict()
    _C.set_strict(True)
    yield
    _C.set_strict(before)


def test_one_workspace_serves_every_shape(backend: Any) -> None:
    """Counters stand at one place, whatever lies behind them: a call of one shape leaves them ready for any other."""
    backend.set_device(90, 7)
    perm = Spec("int3", "none", 64, "bfloat16", has_perm=True)
    problems = [
        Problem(INT4, 3, 130, 1300, torch.float16),
        Problem(perm, 20, 66, 1000, torch.bfloat16),
        Problem(INT4, 40, 400, 640, torch.float16),
        Problem(perm, 1, 64, 2048, torch.bfloat16),
    ]
    size = max(_C.workspace_size("gemm_out", p.M, p.N, p.K, p.desc, backend.model) for p in problems)
    workspace = torch.zeros(size, dtype=torch.uint8, device=backend.device)
    first = 0
    for _ in range(2):
        for p in (*problems, *reversed(problems)):
            out = torch.full((p.M, p.N), torch.nan, dtype=p.dtype, device=backend.device)
            backend.ops.gemm_out(on(backend, p.x()), pack(backend, p.weight), None, p.N, p.K, p.desc, 0, out, workspace)
            assert torch.equal(out.cpu(), gemm(backend, p)), p
            if backend.device == "cpu":  # where the first 256-byte boundary is known
                first = -workspace.data_ptr() % 256
            assert not workspace[first + 256 if first else 0 : COUNTERS].any(), p
    assert size > COUNTERS


def test_a_workspace_may_start_anywhere(backend: Any) -> None:
    p = Problem(INT4, 5, 70, 999, torch.float16)
    size = _C.workspace_size("gemm_out", p.M, p.N, p.K, p.desc, backend.model)
    want = gemm(backend, p)
    for offset in (0, 1, 13, 255):
        workspace = torch.zeros(size + offset, dtype=torch.uint8, device=backend.device)[offset:]
        out = torch.empty(p.M, p.N, dtype=p.dtype, device=backend.device)
        backend.ops.gemm_out(on(backend, p.x()), pack(backend, p.weight), None, p.N, p.K, p.desc, 0, out, workspace)
        assert torch.equal(out.cpu(), want)


def test_workspace_of_gemm_a8(backend: Any) -> None:
    """One size for int8 and fp8, per token and per 128 of K."""
    weight = cases.random_weight(Spec("int4", "none", 32, "bfloat16", has_perm=True), 66, 600)
    desc = cuda_desc(weight.spec)
    w = pack(backend, weight)
    size = _C.workspace_size("gemm_a8_out", 5, 66, 600, desc, backend.model)
    workspace = torch.zeros(size, dtype=torch.uint8, device=backend.device)
    x = cases.random_x(5, 600)
    for format, group in ((cases.INT8, -1), (cases.FP8, -1), (cases.FP8, 128)):
        q, s, _ = (
            on(backend, t) for t in torch.ops.lowbit.quantize_activation(x, format, group, None, None, None, True)
        )
        y = backend.ops.gemm_a8(q, s, None, w, None, 66, 600, desc, 0, torch.float32)
        for _ in range(2):
            out = torch.full((5, 66), torch.nan, device=backend.device)
            backend.ops.gemm_a8_out(q, s, None, w, None, 66, 600, desc, 0, out, workspace)
            assert torch.equal(out, y)


def test_wrong_workspaces(backend: Any) -> None:
    spec = Spec("int4", "none", 32, has_perm=True)  # x is gathered into the workspace
    p = Problem(spec, 3, 64, 64, torch.bfloat16)
    w, x = pack(backend, p.weight), on(backend, p.x())
    out = torch.empty(3, 64, dtype=p.dtype, device=backend.device)
    size = _C.workspace_size("gemm_out", 3, 64, 64, p.desc, backend.model)
    for workspace, words in (
        (torch.zeros(size), "workspace is float32, expected uint8"),
        (torch.zeros(size - 256, dtype=torch.uint8), f"workspace has {size - 256} bytes, expected at least"),
        (torch.zeros(2 * size, dtype=torch.uint8)[::2], "workspace is not contiguous"),
    ):
        moved = on(backend, workspace) if workspace.is_contiguous() else on(backend, workspace.contiguous())
        moved = moved if workspace.is_contiguous() else torch.zeros(2 * size, dtype=torch.uint8, device=out.device)[::2]
        with pytest.raises(RuntimeError, match=words):
            backend.ops.gemm_out(x, w, None, 64, 64, p.desc, 0, out, moved)


def test_strict_refuses_the_general_kernel(backend: Any, strict: None) -> None:
    spec = Spec("int4", "int", 24)
    w = pack(backend, cases.random_weight(spec, 17, 48))
    x = on(backend, cases.random_x(2, 48, dtype=torch.bfloat16))
    with pytest.raises(
        RuntimeError, match=r"only the general kernel takes M=2 N=17 K=48 int4 group_size=24.* on cuda:sm_"
    ):
        backend.ops.gemm(x, w, None, 17, 48, cuda_desc(spec), 0)
    p = Problem(INT4, 3, 64, 64, torch.float16)
    gemm(backend, p)


def test_a_forced_kernel_runs_or_raises(backend: Any) -> None:
    """Also where selection would take another; an op without that kernel is left alone."""
    p = Problem(INT4, 3, 64, 64, torch.float16)
    usual = gemm(backend, p)
    for name in ("matrix_m128", "general"):
        with forced(name):
            assert torch.allclose(gemm(backend, p), usual, rtol=2e-2, atol=2e-2)
    odd = Spec("int4", "int", 24)
    with forced("matrix_m64"):
        with pytest.raises(RuntimeError, match=r"kernel matrix_m64 is forced and cannot run M=2 .*multiple of 16"):
            backend.ops.gemm(
                on(backend, cases.random_x(2, 48, dtype=torch.float16)),
                pack(backend, cases.random_weight(odd, 17, 48)), None, 17, 48, cuda_desc(odd), 0,
            )  # fmt: skip
        w = pack(backend, cases.random_weight(odd, 17, 48))
        dx = backend.ops.gemm_grad_input(on(backend, torch.ones(2, 17)), w, 17, 48, cuda_desc(odd), 0)
        assert dx.shape == (2, 48)


@pytest.mark.parametrize("kind", ["int4-int", "fp8_e4m3", "nf4"])
@pytest.mark.parametrize("activation", ["int8", "fp8"])
def test_batch_invariant_with_8_bit_activations(backend: Any, kind: str, activation: str) -> None:
    """Whatever tile serves M, the bits of a row are the same; also across the tiles for more and for fewer tokens."""
    format, zero_kind, _ = cases.KINDS[kind]
    weight = cases.random_weight(Spec(format, zero_kind, 64, "bfloat16"), 130, 700)
    w, desc = pack(backend, weight), cuda_desc(weight.spec)
    x = cases.random_x(140, 700)
    which = cases.INT8 if activation == "int8" else cases.FP8
    q, s, _ = (on(backend, t) for t in torch.ops.lowbit.quantize_activation(x, which, -1, None, None, None, True))
    whole = backend.ops.gemm_a8(q, s, None, w, None, 130, 700, desc, cases.BATCH_INVARIANT, torch.float32)
    for rows in (slice(0, 1), slice(3, 12), slice(20, 60), slice(60, 140)):
        part = backend.ops.gemm_a8(
            q[rows], s[rows], None, w, None, 130, 700, desc, cases.BATCH_INVARIANT, torch.float32
        )
        assert torch.equal(part, whole[rows]), rows


def test_batch_invariant_gradient(backend: Any) -> None:
    weight = cases.random_weight(Spec("int4", "int", 64, "bfloat16"), 700, 130)
    w, desc = pack(backend, weight), cuda_desc(weight.spec)
    dy = on(backend, cases.random_x(140, 700, dtype=torch.bfloat16))
    whole = backend.ops.gemm_grad_input(dy, w, 700, 130, desc, cases.BATCH_INVARIANT)
    for rows in (slice(0, 1), slice(3, 12), slice(60, 140)):
        part = backend.ops.gemm_grad_input(dy[rows], w, 700, 130, desc, cases.BATCH_INVARIANT)
        assert torch.equal(part, whole[rows]), rows


def test_a_weight_may_not_start_between_vectors(backend: Any) -> None:
    p = Problem(INT4, 3, 64, 64, torch.float16)
    w = pack(backend, p.weight)
    shifted = torch.empty(w.numel() + 8, dtype=torch.uint8, device=backend.device)[8:]
    shifted.copy_(w)
    with pytest.raises(RuntimeError, match="w must start on a 16-byte boundary"):
        backend.ops.gemm(on(backend, p.x()), shifted, None, 64, 64, p.desc, 0)


def test_devices_below_ampere_are_refused(backend: Any) -> None:
    """One clear error, from the ops and from explain."""
    p = Problem(INT4, 3, 64, 64, torch.float16)
    w, x = pack(backend, p.weight), on(backend, p.x())
    with pytest.raises(ValueError, match=r"the device is sm_75; lowbit's CUDA kernels need compute capability 8\.0"):
        _C.explain("gemm", "sm_75", 1, 64, 64, p.desc, "float16", 0)
    if not backend.set_device(75, 40):
        return  # a real device is what it is
    for call in (
        lambda: backend.ops.gemm(x, w, None, 64, 64, p.desc, 0),
        lambda: backend.ops.unpack(w, 64, 64, p.desc),
        lambda: backend.ops.quantize_activation(x, cases.INT8, -1, None, None, None, True),
    ):
        with pytest.raises(RuntimeError, match=r"^lowbit::\w+: the device is sm_75; lowbit's CUDA kernels need"):
            call()


def test_pack_says_which_layout(backend: Any) -> None:
    weight = cases.random_weight(INT4, 64, 64)
    tensors = [on(backend, t) for t in weight.tensors]
    with pytest.raises(RuntimeError, match="desc asks for layout cpu_tile16, CUDA packs cuda_tile64"):
        backend.ops.pack(*tensors, 64, 64, cases.cpu_desc(INT4))
    w = pack(backend, weight)
    with pytest.raises(RuntimeError, match="layout is cpu_tile16, the CUDA kernels read cuda_tile64"):
        backend.ops.unpack(w, 64, 64, cases.cpu_desc(INT4))


def test_the_same_bits_as_the_cpu(backend: Any) -> None:
    """Quantize, dequantize, pack and quantize_activation through the whole boundary: a smoke test, the rest is elsewhere."""
    dense = cases.random_x(40, 96)
    for kind in ("int4-int", "int3", "fp8_e4m3-block128", "nf4", "int6-offset"):
        format, zero_kind, scaling = cases.KINDS[kind]
        spec = Spec(format, zero_kind, 128 if scaling == "block128" else 32, "bfloat16", scaling)
        desc = cases.desc(spec)
        for wide in (dense, torch.cat([dense, dense], 1)[:, 96:]):  # contiguous, and rows with a stride
            want = torch.ops.lowbit.quantize(wide, desc, False, None)
            got = backend.ops.quantize(torch.cat([on(backend, wide)] * 2, 1)[:, 96:], desc, False, None)
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a.cpu(), b), kind
        third = got[2] if got[2].numel() else None
        cpu_third = want[2] if want[2].numel() else None
        args = (None, 40, 96, desc, torch.float16)
        assert torch.equal(
            backend.ops.dequantize(got[0], got[1], third, *args).cpu(),
            torch.ops.lowbit.dequantize(want[0], want[1], cpu_third, *args),
        )
    for format, group, symmetric in ((cases.INT8, -1, True), (cases.INT8, -1, False), (cases.FP8, 32, True)):
        want = torch.ops.lowbit.quantize_activation(dense, format, group, None, None, None, symmetric)
        got = backend.ops.quantize_activation(on(backend, dense), format, group, None, None, None, symmetric)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))
