"""Where the CUDA library is not: why, in words, and what still works; and what GPUs and drivers need."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import cases
import lowbit
from cli_helpers import environment
from layers import layer
from lowbit import _C, QuantizedLinear, QuantizedWeight, Scheme, _cuda, ops
from lowbit._canonical import device_layout, preferred_layout, runs_on
from reference import Spec

CUDA = torch.device("cuda")
needs_no_library = pytest.mark.skipif(_cuda.loaded(), reason="the CUDA library is loaded")


def run(code: str) -> str:
    """What a fresh interpreter prints that takes its PyTorch for a CUDA build."""
    code = "import torch\ntorch.version.cuda = '13.0'\nimport lowbit\nfrom lowbit import _C, _cuda, ops\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_no_library
def test_there_is_a_reason() -> None:
    reason = _cuda.absent_reason()
    assert reason is not None and "CUDA" in reason
    with pytest.raises(ValueError, match="no kernels for device 'cuda': "):
        preferred_layout(CUDA, Scheme.parse("int4"))
    assert device_layout(CUDA, Scheme.parse("int4")) is None
    for op in ("pack", "unpack", "quantize", "dequantize"):
        assert runs_on(op, CUDA, Scheme.parse("int4-g32")).type == "cpu"


@pytest.mark.skipif(
    torch.version.cuda is not None, reason="PyTorch is a CUDA build, and what it loads is the real thing"
)
def test_a_library_that_does_not_load_is_a_reason_and_no_error() -> None:
    """With no library, or one that this PyTorch cannot load, import works and a CUDA tensor gets one clear error."""
    code = """
assert not _cuda.loaded() and not torch.cuda.is_initialized()
print(_cuda.absent_reason().splitlines()[0])
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for name in ops.__all__:
    op = getattr(torch.ops.lowbit, name).default
    arguments = [torch.empty(0) if "Tensor" in str(a.type) else False if str(a.type) == "bool" else 1
                 for a in op._schema.arguments]
    try: op.redispatch(cuda, *arguments)
    except RuntimeError as error:
        assert str(error).startswith(f"lowbit::{name}: a tensor is on a GPU, and there are no CUDA kernels here: "), error
        assert "lowbit info" in str(error)
    else: raise AssertionError(name)
layer = lowbit.QuantizedLinear.from_linear(torch.nn.Linear(64, 8), "int4-g32")
print(tuple(layer(torch.ones(2, 64)).shape))
"""
    reason, shape = run(code).splitlines()
    assert reason.startswith(("this lowbit was built without CUDA: ", "liblowbit_cuda.so does not load: "))
    assert shape == "(2, 8)"


# -- the layout of another device, without it ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_cpu_packs_and_unpacks_for_cuda(kind: str) -> None:
    """A weight packed for a GPU is never lost where there is none."""
    for spec, N, K in cases.specs(kind):
        weight = cases.random_weight(spec, N, K)
        desc = cases.desc(spec, _C.preferred_layout("cuda", cases.desc(spec)))
        w = torch.ops.lowbit.pack(*weight.tensors, N, K, desc)
        assert w.shape == (_C.packed_size(N, K, desc),)
        back = ops.unpack(w, N, K, desc)[:4]
        for got, want in zip(back, weight.tensors, strict=True):
            assert (got is None) == (want is None)
            assert got is None or torch.equal(got, want), (spec, N, K)


def test_the_cpu_says_which_layout_it_reads() -> None:
    spec = Spec("int4", "none", 32)
    desc = cases.desc(spec, _C.preferred_layout("cuda", cases.desc(spec)))
    w = torch.ops.lowbit.pack(*cases.random_weight(spec, 16, 64).tensors, 16, 64, desc)
    with pytest.raises(RuntimeError, match="layout is cuda_tile64, the CPU kernels read cpu_tile16; pack it"):
        ops.gemm(torch.ones(1, 64), w, None, 16, 64, desc)
    with pytest.raises(RuntimeError, match=r"w has shape .*, expected"):
        ops.unpack(w[:-1], 16, 64, desc)


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int3-g64", "fp8_e4m3-b128", "nf4-g64"])
def test_a_module_offloaded_from_a_gpu_keeps_its_weight(scheme: str) -> None:
    """Hooks move bytes raw: on the CPU they are still in the GPU's layout, and state_dict, prepare and .to() cope."""
    module = QuantizedLinear.from_linear(torch.nn.Linear(256, 128), scheme)
    weight, expected = module.quantized_weight(), module(torch.ones(2, 256))
    offloaded = copy.deepcopy(module)
    layout = _C.preferred_layout("cuda", weight.scheme.desc())
    offloaded._set_layout(layout)
    offloaded.weight = torch.nn.Parameter(weight.pack(layout, "cpu"), requires_grad=False)
    assert QuantizedWeight.unpack(offloaded.weight, weight.scheme, weight.shape, layout) == weight
    assert "layout=cuda_tile64" in repr(offloaded)
    assert offloaded.quantized_weight() == weight
    for name, tensor in module.state_dict().items():
        assert torch.equal(offloaded.state_dict()[name], tensor)
    with pytest.raises(RuntimeError, match="cuda_tile64"):
        offloaded(torch.ones(2, 256))
    assert torch.equal(offloaded.prepare()(torch.ones(2, 256)), expected)


@pytest.mark.parametrize("where", ["is_cuda", "is_mps"])
def test_a_perm_on_a_gpu_is_looked_at_once(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = layer("int4-g32", perm=True).quantized_weight()
    assert weight.perm is not None
    bad = QuantizedWeight(weight.scheme, weight.shape, weight.packed, weight.scales, None, weight.perm + 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, where, property(lambda self: True))
        for refused in (bad.pack, bad.dequantize):
            with pytest.raises(ValueError, match=r"perm has values from 1 to 128, outside 0\.\.127"):
                refused()
        weight.pack()


# -- drivers and GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "archs", "words"),
    [
        ("8.6", "80 86 90a 80-ptx", "compiled in (sm_86)"),
        ("8.9", "80 86 90a 80-ptx", "compiled in (sm_86)"),
        ("8.7", "80", "compiled in (sm_80)"),
        ("9.0", "80 90a 80-ptx 90-ptx", "compiled in (sm_90a)"),
        ("10.0", "80 90a 80-ptx 90-ptx", "compiled at load time, from PTX for compute_90"),
        ("9.0", "80 80-ptx", "compiled at load time, from PTX for compute_80"),
        ("12.0", "80 120f", "compiled in (sm_120f)"),
        ("12.1", "80 120f", "compiled in (sm_120f)"),
        ("12.1", "120a", "none: the build is for 120a"),
        ("12.0", "80 90a", "none: the build is for 80 90a"),
        ("8.0", "", "none: the build is for no GPU"),
        ("7.5", "80 80-ptx", "too old: the kernels need compute capability 8.0 (Ampere) or later"),
        ("[N/A]", "80", "unknown: the driver does not say what the GPU is"),
    ],
)
def test_code_for(capability: str, archs: str, words: str) -> None:
    assert _cuda.code_for(capability, archs) == words


def test_drivers() -> None:
    assert [_cuda.least_driver(v) for v in ("11.8", "12.8", "13.0", "99.0", "")] == [450, 525, 580, None, None]
    assert _cuda.driver_problem("580.65.06", "13.0") is None
    assert _cuda.driver_problem("570.1", "12.8") is None
    assert _cuda.driver_problem("strange", "13.0") is None
    problem = _cuda.driver_problem("570.1", "13.0")
    assert problem == "the driver 570.1 is too old: kernels built with CUDA 13.0 need 580 or later"


def test_the_driver_is_read_from_its_kernel_module(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.commands import info

    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)\n"
    monkeypatch.setattr(info.Path, "read_text", lambda self, errors: text)
    assert info._driver() == "580.95.05"


def test_library_paths_name_what_can_be_loaded() -> None:
    names = [path.name for path in lowbit.library_paths()]
    assert ("liblowbit_cuda.so" in names) == (_cuda.LIBRARY.exists() and torch.version.cuda is not None)
