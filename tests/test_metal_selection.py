"""Which Metal kernel would run, asked of the library on any machine: every cell has one, every refusal a reason."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cases
from cases import KINDS
from lowbit import _C, _metal
from lowbit._selection import can_implement, explain, kernel_table
from reference import Spec, exact16

LAYOUT = cases.ENUMS["layout"]["metal_tile4"]
ACTIVATIONS = {
    "gemm": ("bfloat16", "float16", "float32"),
    "gemm_a8": ("int8", "float8_e4m3fn"),
    "gemm_grad_input": ("bfloat16", "float16", "float32"),
}
ROWS = (0, 1, 2, 3, 8, 9, 32, 33, 4096)
GEMM = {"N": 4096, "K": 4096, "scheme": "int4-g128"}


@pytest.fixture(autouse=True)
def _nothing_forced() -> Iterator[None]:
    yield
    _C.force_kernel("")


def name_of(op: str, M: int, desc: int, dtype: str, flags: int = 0, device: str = "apple9") -> str:
    """The chosen kernel, after a look at all verdicts."""
    rows = _C.explain(op, device, M, 200, 1200, desc, dtype, flags)
    chosen = [name for name, reason in rows if not reason]
    assert len(chosen) == 1, (device, op, M, rows)
    return chosen[0].removeprefix("metal_").removesuffix("_apple7")


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_has_a_kernel(kind: str) -> None:
    """formats x groups x zeros x dtypes x M; and only 8-bit activations that half cannot multiply exactly are general."""
    format, zero_kind, scaling = KINDS[kind]
    for group, has_perm in itertools.product((128,) if scaling == "block128" else (8, 32, 40, 128, -1), (False, True)):
        desc = cases.desc(Spec(format, zero_kind, group, "bfloat16", scaling, has_perm), LAYOUT)
        for op, dtypes in ACTIVATIONS.items():
            for dtype, M, flags in itertools.product(dtypes, ROWS, (0, cases.BATCH_INVARIANT)):
                name = name_of(op, M, desc, dtype, flags)
                exact = exact16(format) and zero_kind in ("none", "int") and (group == -1 or group % 32 == 0)
                general = op == "gemm_a8" and M > 8 and not flags and not exact
                assert (name == "general") == general, (op, dtype, M, flags, group, name)


@pytest.mark.parametrize(
    ("M", "expected"),
    [(1, "stream_m1"), (2, "stream_m2"), (3, "stream_m4"), (8, "stream_m8"), (9, "matrix_m32"), (33, "matrix_m64")],
)
def test_number_of_rows(M: int, expected: str) -> None:
    desc = cases.desc(Spec("int4", "none", 128), LAYOUT)
    assert name_of("gemm", M, desc, "bfloat16") == expected
    assert name_of("gemm", M, desc, "bfloat16", cases.BATCH_INVARIANT) == (expected if M <= 8 else "stream_m8")


def test_reasons() -> None:
    rows = dict(explain("gemm", M=40, **GEMM, device="apple9:40", batch_invariant=True).rows)
    assert rows["metal_stream_m1_apple7"] == "M=40 exceeds its 1 row"
    assert rows["metal_stream_m4_apple7"] == "M=40 exceeds its 4 rows"
    assert rows["metal_stream_m8_apple7"] == "chosen"
    assert rows["metal_matrix_m32_apple7"] == "batch_invariant is set, and few rows are summed in another order"
    rows = dict(explain("gemm", M=40, **GEMM, device="mps").rows)
    assert rows["metal_matrix_m32_apple7"] == "M=40 exceeds its 32 rows"
    assert rows["metal_general_apple7"] == "slower than the chosen one"


def test_how_K_is_shared_depends_on_the_weight_and_the_device_alone() -> None:
    def split(N: int, K: int, device: str, M: int = 1) -> str:
        config = explain("gemm", M=M, N=N, K=K, scheme="int4-g128", device=device).config
        return config.rpartition("K in ")[2].partition(",")[0]

    assert split(65536, 4096, "apple7:8") == "1"
    assert split(1024, 4096, "apple7:8") == "2"
    assert split(1024, 4096, "apple9:40") == "4"
    assert split(1024, 512, "apple9:40") == "1"  # each lane keeps two chunks
    assert {split(1024, 4096, "apple7:8", M) for M in (1, 2, 5, 8)} == {"2"}


def test_device_strings() -> None:
    desc = cases.desc(Spec("int4"), LAYOUT)
    for device in ("mps", "mps:0", "apple7", "mps:apple10", "apple99:1000"):
        assert _C.explain("gemm", device, 1, 8, 8, desc, "float32", 0)
    for device, words in (
        ("apple", "is not mps, apple<family>"),
        ("apple9:", "is not mps, apple<family>"),
        ("apple9:0", "is not mps, apple<family>"),
        ("mps:pple", "is not mps, apple<family>"),
        ("apple6", "need GPU family apple7"),
    ):
        with pytest.raises(ValueError, match=words):
            _C.explain("gemm", device, 1, 8, 8, desc, "float32", 0)
    assert _metal.device_string(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize(
    ("chip", "model"),
    [
        ("Apple M1", "apple7:8"),
        ("Apple M1 Ultra", "apple7:64"),
        ("Apple M2 Pro", "apple8:19"),
        ("Apple M3 Max", "apple9:40"),
        ("Apple M4", "apple9:10"),
        ("Apple M5", "apple10:10"),
        ("Apple M1 (Virtual)", "apple7:8"),
        ("Apple M12", "apple7:8"),  # not known: as the first
        ("Intel(R) Core(TM) i7", "apple7:8"),
    ],
)
def test_chips(chip: str, model: str) -> None:
    assert _C.metal_model(chip) == model


def test_workspace_is_none() -> None:
    desc = cases.desc(Spec("int4"), LAYOUT)
    for device in ("", "mps", "apple9"):
        assert _C.workspace_size("gemm_out", 5, 64, 64, desc, device) == 0
    with pytest.raises(ValueError, match="device='cpu' does not read layout metal_tile4"):
        _C.workspace_size("gemm_out", 5, 64, 64, desc, "cpu")


def test_forced() -> None:
    desc = cases.desc(Spec("int4", "none", 40), LAYOUT)
    _C.force_kernel("stream_m8")
    assert name_of("gemm", 1, desc, "bfloat16") == "stream_m8"
    assert name_of("gemm_grad_input", 1, desc, "bfloat16") == "grad_m64"  # has no row of that name
    _C.force_kernel("matrix_exact_m64")
    with pytest.raises(ValueError, match=r"matrix_exact_m64 is forced and cannot run .* is not a multiple of 32"):
        _C.describe_config("gemm_a8", "apple9", 4, 8, 80, desc, "int8", 0)
    with pytest.raises(ValueError, match="kernel 'stream_m9' is not one of"):
        _C.force_kernel("stream_m9")


def test_forced_from_the_environment() -> None:
    code = (
        "import torch; from lowbit import _C; d = _C.make_desc(3, 128, 0, 2, 0, False, 3); "
        "print([n for n, r in _C.explain('gemm', 'apple9', 1, 256, 256, d, 'float16', 0) if not r])"
    )
    environment = {**os.environ, "LOWBIT_KERNEL": "matrix_m64"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "['metal_matrix_m64_apple7']", done.stderr


def test_here_there_are_none() -> None:
    """On a machine without Metal the layout can be packed, and a device is refused with the reason."""
    if _metal.loaded():
        pytest.skip("this is a Mac")
    assert can_implement("gemm", M=1, **GEMM, device="mps")  # what the library has, wherever
    assert "built without" in str(_metal.absent_reason())
    assert any(row["backend"] == "metal" for row in kernel_table())
    from lowbit import QuantizedWeight
    from lowbit._canonical import preferred_layout

    weight = QuantizedWeight.quantize(torch.randn(8, 64), "int4-g32")
    with pytest.raises(ValueError, match="no kernels for device 'mps': "):
        preferred_layout(torch.device("mps"), weight.scheme)
    packed = weight.pack(LAYOUT)
    assert QuantizedWeight.unpack(packed, weight.scheme, (8, 64), layout=LAYOUT) == weight


def test_what_starts_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's C interface, where there is one and nobody asks for the other."""
    for there, variable, by_python in ((True, "", False), (True, "0", False), (True, "1", True), (False, "", True)):
        monkeypatch.setattr(_C, "has_metal_interface", lambda there=there: there)
        monkeypatch.setenv("LOWBIT_METAL_COMPILE_SHADER", variable)
        assert _metal._needs_python() == by_python
    assert (_metal.started_by() is not None) == _metal.loaded()


def test_tensors_on_mps_are_refused_with_the_reason() -> None:
    """Where PyTorch has MPS and lowbit has no kernels for it; a subprocess, because registrations last."""
    code = (
        "import torch; from lowbit import _refusals; from torch._subclasses import FakeTensorMode\n"
        "_refusals.refuse_tensors('MPS', 'on mps', 'Metal', 'because')\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('lowbit::gemm', 'MPS'))\n"
        "kernel = torch.library.get_kernel('lowbit::gemm', 'MPS')\n"
        "keys = torch._C.DispatchKeySet(torch._C.DispatchKey.MPS)\n"
        "try: kernel.call_boxed(keys, torch.ones(1, 8), torch.ones(1, dtype=torch.uint8), None, 1, 8, 0, 0)\n"
        "except RuntimeError as error: print(error)\n"
    )
    if _metal.loaded():
        pytest.skip("this is a Mac")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "True", done.stderr
    assert "lowbit::gemm: a tensor is on mps, and there are no Metal kernels here: because." in done.stdout, done.stdout


def test_tracing_knows_the_ops_on_mps() -> None:
    """By the fake kernels of every device: compile and export see shapes, dtypes and the device, without a Mac."""
    desc = cases.desc(Spec("int4", "int", 32), LAYOUT)
    lowbit = torch.ops.lowbit
    with FakeTensorMode():
        x = torch.empty(2, 64, device="mps", dtype=torch.bfloat16)
        w = torch.empty(_C.packed_size(20, 64, desc), device="mps", dtype=torch.uint8)
        q, s, _ = lowbit.quantize_activation(x, cases.ENUMS["format"]["int8"], -1, None, None, None, True)
        y8 = lowbit.gemm_a8(q, s, None, w, None, 20, 64, desc, 0, torch.float16)
        found = [y8, lowbit.gemm_grad_input(y8, w, 20, 64, desc, 0), *lowbit.unpack(w, 20, 64, desc)]
        assert {t.device.type for t in found} == {"mps"} and found[1].shape == (2, 64)
        traced = make_fx(lambda x, w: lowbit.gemm(x, w, None, 20, 64, desc, 0).relu())(x, w)
    assert any(node.target is lowbit.gemm.default for node in traced.graph.nodes)
