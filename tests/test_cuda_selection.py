"""Which CUDA kernel would run, asked of the library without CUDA: every cell has one, every refusal a reason."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import cases
from cases import KINDS
from lowbit import _C, _cuda
from lowbit._selection import can_implement, explain, kernel_table
from reference import Spec, exact16

DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
ACTIVATIONS = {
    "gemm": ("bfloat16", "float16", "float32"),
    "gemm_a8": ("int8", "float8_e4m3fn"),
    "gemm_grad_input": ("bfloat16", "float16", "float32"),
}
ROWS = (0, 1, 2, 8, 9, 16, 17, 33, 64, 65, 129, 4096)
BATCH_INVARIANT = cases.BATCH_INVARIANT
GEMM = {"N": 4096, "K": 4096, "scheme": "int4-g128"}


@pytest.fixture(autouse=True)
def _nothing_forced() -> Iterator[None]:
    yield
    _C.force_kernel("")


def cuda_desc(spec: Spec) -> int:
    return cases.desc(spec, _C.preferred_layout("cuda", cases.desc(spec)))


def name_of(device: str, op: str, M: int, N: int, K: int, desc: int, dtype: str, flags: int = 0) -> str:
    """The chosen kernel, after a look at all verdicts."""
    rows = _C.explain(op, device, M, N, K, desc, dtype, flags)
    chosen = [name for name, reason in rows if not reason]
    assert len(chosen) == 1, (device, op, M, N, K, rows)
    assert chosen[0].startswith("cuda_")
    return chosen[0].removeprefix("cuda_").rpartition("_sm_")[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_has_a_kernel(device: str, kind: str) -> None:
    """formats x groups x zeros x dtypes x M; and what is general, and only that, is what nothing else takes."""
    format, zero_kind, scaling = KINDS[kind]
    groups = (128,) if scaling == "block128" else (8, 16, 24, 32, 40, 48, 128, 200, -1)
    for group, has_perm in itertools.product(groups, (False, True)):
        desc = cuda_desc(Spec(format, zero_kind, group, "bfloat16", scaling, has_perm))
        for op, dtypes in ACTIVATIONS.items():
            for dtype, M, flags in itertools.product(dtypes, ROWS, (0, BATCH_INVARIANT)):
                name = name_of(device, op, M, 200, 1200, desc, dtype, flags)
                tiled = group == -1 or group % 16 == 0
                if op == "gemm_a8":
                    exact = zero_kind in ("none", "int") and exact16(format)
                    assert (name == "general") == (not tiled or not exact)
                else:
                    assert (name == "general") == (not tiled or dtype == "float32")


def test_which_kernel_and_why() -> None:
    int4 = cuda_desc(Spec("int4", "none", 128, "bfloat16"))
    fp8 = cuda_desc(Spec("fp8_e4m3", "none", 128, "float32", "block128"))
    at = [name_of("sm_90", "gemm", M, 4096, 4096, int4, "bfloat16") for M in (1, 8, 9, 16, 17, 64, 65, 4096)]
    assert at[:4] == ["stream_m8", "stream_m8", "stream_m16", "stream_m16"]
    assert all(name.startswith("matrix_m") for name in at[4:])
    assert name_of("sm_80", "gemm_a8", 64, 4096, 4096, int4, "int8").startswith("a8_int")
    assert name_of("sm_89", "gemm_a8", 64, 4096, 4096, fp8, "float8_e4m3fn").startswith("a8_fp8")
    assert name_of("sm_80", "gemm_a8", 64, 4096, 4096, fp8, "float8_e4m3fn").startswith("a8_decode")
    assert name_of("sm_90", "gemm_a8", 64, 4096, 4096, int4, "float8_e4m3fn").startswith("a8_decode")
    reasons = dict(_C.explain("gemm_a8", "sm_80", 64, 4096, 4096, fp8, "float8_e4m3fn", 0))
    assert reasons["cuda_a8_fp8_m64_sm_89"] == "needs sm_89, the device is sm_80"
    assert reasons["cuda_a8_int_m64_sm_80"] == "activations are not int8"
    reasons = dict(_C.explain("gemm", "sm_90", 20, 64, 120, cuda_desc(Spec("int4", "none", 24)), "float16", 0))
    assert reasons["cuda_matrix_m64_sm_80"] == "group_size=24 is not a multiple of 16"


def test_batch_invariant_shares_nothing() -> None:
    """One order of addition for every M: no kernel for few rows, no tile that several blocks sum."""
    desc = cuda_desc(Spec("int4", "none", 128, "bfloat16"))
    for op, dtype in (("gemm", "bfloat16"), ("gemm_a8", "int8"), ("gemm_grad_input", "bfloat16")):
        for M in (1, 16, 17, 300):
            name = name_of("sm_90", op, M, 1024, 8192, desc, dtype, BATCH_INVARIANT)
            assert not name.startswith("stream")
            text = _C.describe_config(op, "sm_90", M, 1024, 8192, desc, dtype, BATCH_INVARIANT)
            assert ", shared," not in text, text
    split = _C.describe_config("gemm", "sm_90", 1, 1024, 8192, desc, "bfloat16", 0)
    assert ", shared," in split, split


def test_kernels_for_hopper_stand_aside_until_they_are_measured() -> None:
    """And can be forced on Hopper, nowhere else; their plan says how the work is cut."""
    int4 = cuda_desc(Spec("int4", "none", 128, "bfloat16"))
    args = ("gemm", "sm_90", 1, 8192, 8192, int4, "bfloat16", 0)
    reasons = dict(_C.explain(*args))
    assert reasons["cuda_hopper_stream_m8_sm_90"].startswith("unmeasured: stands aside until bench/sweep.py")
    assert reasons["cuda_stream_m8_sm_80"] == ""
    for device in ("sm_80", "sm_89", "sm_100", "sm_120"):
        reasons = dict(_C.explain("gemm", device, 1, 8192, 8192, int4, "bfloat16", 0))
        assert reasons["cuda_hopper_stream_m8_sm_90"] == f"needs sm_90, the device is {device}"
    _C.force_kernel("hopper_stream_m8")
    text = _C.describe_config(*args)
    for words in ("clusters of", "stages", "KB in flight per multiprocessor", "97% busy", "workspace 0 bytes"):
        assert words in text, text
    # Few rows of W: K is cut, and no multiprocessor is left without work.
    assert "clusters of 8, " in _C.describe_config("gemm", "sm_90", 1, 1024, 8192, int4, "bfloat16", 0)
    _C.force_kernel("hopper_stream_m16:4x2")
    text = _C.describe_config("gemm", "sm_90", 16, 8192, 8192, int4, "bfloat16", 0)
    assert text.startswith("hopper_stream_m16: tiles of 256 x 16, ") and "clusters of 2, " in text, text


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_for_every_weight(kind: str) -> None:
    """Whatever a tile holds, two stages fit; a stage has the same readers every time round; no block is without tiles."""
    format, zero_kind, scaling = KINDS[kind]
    for group in (128,) if scaling == "block128" else (16, 48, 128, -1):
        desc = cuda_desc(Spec(format, zero_kind, group, "float32", scaling))
        for kernel, M in (("hopper_stream_m8", 1), ("hopper_stream_m16", 16)):
            for N, K in ((64, 128), (1024, 8192), (4096, 4096), (8192, 28672), (130, 400)):
                _C.force_kernel(kernel)
                text = _C.describe_config("gemm", "sm_90", M, N, K, desc, "bfloat16", 0)
                found = re.search(r"tiles of (\d+) x .* clusters of (\d+), (\d+) stages, (\d+) bytes shared", text)
                assert found, text
                rows, cluster, stages, shared = map(int, found.groups())
                assert stages >= 2 and stages % (4 * 64 // rows) == 0 and shared <= 227 * 1024, text
                assert cluster <= -(-K // 128), text


def test_explain_takes_devices_that_are_not_here() -> None:
    answer = explain("gemm", M=1, device="sm_86", **GEMM)
    assert answer.chosen == "cuda_stream_m8_sm_80" and not answer.general
    assert answer.config in str(answer) and "workspace" in answer.config
    assert explain("gemm", M=1, device="cuda:sm_86", **GEMM).rows == answer.rows
    assert explain("gemm", M=1, device="cuda", **GEMM).chosen == answer.chosen
    assert explain("gemm", M=1, device=torch.device("cuda", 1), **GEMM).chosen == answer.chosen
    assert explain("gemm", M=1, device="cpu", **GEMM).config == ""
    assert explain("gemm", M=1, device="sm_90", N=64, K=48, scheme="int4-g24").general
    assert not can_implement("gemm", M=1, device="sm_90", N=64, K=48, scheme="int4-g24", strict=True)
    few, many = (explain("gemm", M=1, device=f"sm_90:{n}", **GEMM).config for n in (2, 132))
    assert few != many


def test_wrong_devices() -> None:
    for device, words in {
        "sm_75": "compute capability 8.0",
        "sm_5": "compute capability 8.0",
        "sm_": "such as sm_90:132",
        "sm_90a": "such as sm_90:132",
        "sm_90:": "such as sm_90:132",
        "sm_90:0": "such as sm_90:132",
        "sm_90:9999999": "such as sm_90:132",
        "cuda:x": "such as sm_90:132",
    }.items():
        with pytest.raises(ValueError, match=words):
            explain("gemm", M=1, device=device, **GEMM)


def test_device_string_does_not_initialise_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cuda.device_string("cuda:1") == "cuda:1" and _cuda.device_string("cpu:avx2") == "cpu:avx2"

    class Properties:
        major, minor, multi_processor_count = 8, 6, 84

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert _cuda.device_string(torch.device("cuda", 1)) == "sm_86:84"
    assert "on sm_86:84" in explain("gemm", M=1, device="cuda", **GEMM).problem


def test_sizes_beyond_any_device() -> None:
    """Numbers that no GPU holds are an error, not an overflow."""
    huge = cuda_desc(Spec("int4", "none", 128))
    with pytest.raises(ValueError, match=r"makes more (tiles|steps) than one launch takes"):
        _C.describe_config("gemm", "sm_90", 2**29, 2**28, 2**28, huge, "bfloat16", 0)
    with pytest.raises(ValueError, match=r"M=1073741824 is outside 1\.\.2\^30"):
        _C.describe_config("gemm", "sm_90", 2**30, 64, 128, huge, "bfloat16", 0)
    assert _C.workspace_size("gemm_out", 2**20, 2**16, 2**16, huge) >= 0


# -- forced kernels -----------------------------------------------------------------------------------------------------


def test_force_kernel() -> None:
    desc = cuda_desc(Spec("int4", "none", 128, "bfloat16"))
    args = (1, 4096, 4096, desc, "bfloat16")
    for row in kernel_table():
        if row["backend"] == "cuda" and row["op"] == "gemm":
            _C.force_kernel(row["name"])
            assert _C.forced_kernel() == row["name"]
            assert name_of("sm_90", "gemm", *args) == row["name"]
            # An op without that row is left alone.
            name_of("sm_90", "gemm_grad_input", *args)
    reasons = dict(_C.explain("gemm", "sm_90", *args, 0))
    assert reasons["cuda_stream_m8_sm_80"] == "kernel general is forced"
    _C.force_kernel("matrix_m64")
    odd = cuda_desc(Spec("int4", "none", 24))
    with pytest.raises(
        ValueError, match=r"matrix_m64 is forced and cannot run .* group_size=24 is not a multiple of 16"
    ):
        _C.describe_config("gemm", "sm_90", 1, 64, 48, odd, "bfloat16", 0)
    assert not any(not reason for _, reason in _C.explain("gemm", "sm_90", 1, 64, 48, odd, "bfloat16", 0))
    with pytest.raises(ValueError, match="kernel 'fast' is not one of the CUDA kernels: hopper_stream_m8, "):
        _C.force_kernel("fast")
    assert _C.forced_kernel() == "matrix_m64"
    _C.force_kernel("")
    assert _C.forced_kernel() == ""


def test_lowbit_kernel_in_the_environment() -> None:
    code = "import torch; from lowbit import _C\ntry: print(_C.forced_kernel())\nexcept ValueError as e: print(e)"
    for name, words in {"general": "general", "fast": "kernel 'fast' is not one of", "": ""}.items():
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "LOWBIT_KERNEL": name}, capture_output=True, text=True
        )
        assert done.stdout.startswith(words) and done.returncode == 0, done.stderr


# -- workspaces ---------------------------------------------------------------------------------------------------------


def test_workspace_size() -> None:
    """Grows to what the largest device needs where none is named; smaller ones never need more."""
    for kind, group in (("int4", 128), ("fp8_e4m3", 128), ("int4", 24)):
        for has_perm, M, N, K in ((False, 1, 4096, 4096), (True, 3, 1000, 11008), (False, 200, 8192, 1024)):
            desc = cuda_desc(Spec(kind, "none", group, "bfloat16", has_perm=has_perm))
            for op in ("gemm_out", "gemm_a8_out"):
                enough = _C.workspace_size(op, M, N, K, desc)
                assert enough == _C.workspace_size(op, M, N, K, desc, "cuda:0")
                for device in (*DEVICES, "sm_86:82", "sm_89:58", "sm_90:114", "sm_90:16", "sm_120:188"):
                    assert 0 <= _C.workspace_size(op, M, N, K, desc, device) <= enough, device
                assert _C.workspace_size(op, 0, N, K, desc) == 0
    layouts = _C.preferred_layout("cpu", desc), _C.preferred_layout("cuda", desc)
    assert layouts[0] != layouts[1]
    with pytest.raises(ValueError, match="device='sm_90' does not read layout cpu_tile16"):
        _C.workspace_size("gemm_out", 1, 64, 64, cases.cpu_desc(Spec("int4")), "sm_90")
    with pytest.raises(ValueError, match="such as sm_90:132"):
        _C.workspace_size("gemm_out", 1, 64, 64, cuda_desc(Spec("int4")), "tpu")
    with pytest.raises(ValueError, match="takes no workspace"):
        _C.workspace_size("gemm_grad_input", 1, 64, 64, cuda_desc(Spec("int4")))
