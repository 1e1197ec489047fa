"""The built CUDA library, on a machine that need not have a GPU: what it holds, links, exports, and that it loads.

`make build CUDA=all` builds what these tests look at, nvcc being there; without it they skip. LOWBIT_TEST_CUDA=1, which
.ci/run sets, makes that a failure instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import build_audit as audit
import cuda_audit
import lowbit

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path(lowbit._C.__file__).parent
CUDA = INSTALLED / "liblowbit_cuda.so"
TORCH = Path(torch.__file__).parent
ALL_ARCHS = ["80", "86", "89", "90a", "120f", "80-ptx", "90-ptx"]
WHEEL_BUDGET = 60 << 20

# The C interface of CUDA builds of libtorch, of which a CPU build has nothing.
TORCH_CUDA_C = re.compile(r"aoti_torch_\w*cuda\w*")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CUDA libraries are built on Linux")


def absent(text: str) -> NoReturn:
    if os.environ.get("LOWBIT_TEST_CUDA") == "1":
        pytest.fail(text)
    pytest.skip(text)


@pytest.fixture(scope="module")
def library() -> Path:
    if not CUDA.exists():
        absent(f"lowbit was built without CUDA: {lowbit._C.build_info()['cuda_absent']}. Try make build CUDA=all")
    return CUDA


@pytest.fixture(scope="module")
def archs(library) -> list[str]:
    return lowbit._C.build_info()["cuda_archs"].split()


# ---- what it links and exports ---------------------------------------------------------------------------------------


class TestLibrary:
    def test_loads_torch_and_its_own_and_no_cuda_runtime(self, library):
        required = ["libtorch_cpu.so", "libtorch.so", "liblowbit_ops.so"]
        assert audit.needed_libraries(audit.Library(library), required, ["librt.so.1"]) == []

    def test_exports_nothing(self, library):
        assert audit.exported_symbols(audit.Library(library), re.compile(r"$^")) == []

    def test_has_no_torch_cpp_and_no_python_symbols(self, library):
        read = audit.Library(library)
        assert audit.torch_cpp_symbols(read) == []
        assert audit.python_symbols(read) == []

    def test_needs_the_stable_c_interface_and_lowbit_only(self, library):
        read = audit.Library(library)
        assert audit.foreign_symbols(read, [audit.STABLE_C, audit.LOWBIT_CPP]) == []

    def test_finds_in_the_ops_library_what_it_needs_of_lowbit(self, library):
        exported = set(audit.Library(INSTALLED / "liblowbit_ops.so").exported)
        needed = [name for name in audit.Library(library).undefined if audit.LOWBIT_CPP.match(name)]
        assert [name for name in needed if name not in exported] == []

    def test_runpath_is_the_own_folder(self, library):
        assert audit.runpath(audit.Library(library)) == []

    def test_names_no_path_of_the_build_machine(self, library):
        folders = [ROOT, TORCH, Path.home(), Path(sysconfig.get_path("include"))]
        assert audit.build_paths(library, folders) == []


# ---- its device code -------------------------------------------------------------------------------------------------


class TestDeviceCode:
    def test_every_kernel_file_has_code_for_every_architecture(self, library, archs):
        assert cuda_audit.missing_code(library, archs) == []
        if os.environ.get("LOWBIT_TEST_CUDA") == "1":
            assert archs == ALL_ARCHS

    def test_fits_the_wheel(self, library):
        """A wheel is a zip file: what the libraries take in it."""
        sizes = {path.name: len(zlib.compress(path.read_bytes(), 6)) for path in INSTALLED.glob("*.so")}
        assert sum(sizes.values()) <= WHEEL_BUDGET, sizes

    def test_hot_kernels_keep_everything_in_registers(self, library, archs):
        """Reads what the assembler said in the last editable build."""
        sources = {path.stem for path in ROOT.glob("csrc/cuda/**/*.cu")}  # a log outlives its source
        logs = [path for path in ROOT.glob("build/editable-*/lowbit_cuda/*.o.log") if path.name[:-6] in sources]
        if not logs:
            absent("lowbit was not built in this checkout, so there are no logs to read")
        kernels = [kernel for log in logs for kernel in cuda_audit.resources(log.read_text())]
        machine_code = {re.sub("[af]", "", arch) for arch in archs if not arch.endswith("-ptx")}
        assert {re.sub("[af]", "", kernel.arch) for kernel in kernels} == machine_code
        found = {match[1] for kernel in kernels if (match := cuda_audit.HOT.search(kernel.kernel))}
        assert found == {"stream", "matrix", "a8", "grad", *(["hopper"] if "90a" in archs else [])}
        assert cuda_audit.spills(kernels) == []
        assert [line for log in logs for line in cuda_audit.serialized(log.read_text())] == []

    def test_kernels_for_hopper_are_made_of_the_instructions_meant(self, library, archs):
        if "90a" not in archs:
            absent(f"the library is for {' '.join(archs)}, which Hopper's instructions are not in")
        assert cuda_audit.departures(cuda_audit.hopper_code(library)) == []


# ---- it loads and registers ------------------------------------------------------------------------------------------

LOAD = """
import ctypes, sys, torch, lowbit
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lowbit::")]
for name in names:
    on = [key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]
    print(name, *on)
"""


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert found, "these tests compile small libraries: set CXX to a C++ compiler"
    return found


@pytest.fixture(scope="module")
def stub(library, tmp_path_factory) -> Path:
    """A library that has, by name alone, what this build of libtorch lacks of the interface to CUDA."""
    names = [name for name in audit.Library(library).undefined if TORCH_CUDA_C.fullmatch(name)]
    assert names, "it asks torch for no stream, so kernels would run on the wrong one"
    folder = tmp_path_factory.mktemp("stub")
    text = "\n".join(f'extern "C" int {name}() {{ return 1; }}' for name in names)
    (folder / "stub.cpp").write_text(text + "\n")
    command = [compiler(), "-shared", "-fPIC", str(folder / "stub.cpp"), "-o", str(folder / "libstub.so")]
    subprocess.run(command, check=True)
    return folder / "libstub.so"


def test_registers_every_op_that_has_a_cpu_kernel(library, stub):
    """In a process of its own: a registration cannot be taken back."""
    command = [sys.executable, "-c", LOAD, str(stub), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    keys = {name: set(on) for name, *on in (line.split() for line in done.stdout.splitlines())}
    assert keys
    # On CUDA, embedding is made of unpack and dequantize, in Python, where lowbit itself has loaded the library.
    composed = ["lowbit::embedding"]
    assert [name for name, on in keys.items() if on not in ({"CPU", "CUDA"}, set())] == composed
    assert keys["lowbit::gemm"] == {"CPU", "CUDA"}


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_import_does_not_load_it_under_a_cpu_build_of_torch(library):
    code = "import lowbit; print('lowbit_cuda' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# ---- each audit finds what was planted -------------------------------------------------------------------------------

LOG = """\
ptxas info    : Compiling entry function '_ZN6lowbit4cuda13stream_kernelILi4EEEvPKfPf' for 'sm_80'
ptxas info    : Function properties for _ZN6lowbit4cuda13stream_kernelILi4EEEvPKfPf
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6lowbit4cuda14general_kernelEv' for 'sm_90a'
ptxas info    : Function properties for _ZN6lowbit4cuda14general_kernelEv
    64 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers
"""


class TestPlanted:
    @pytest.mark.parametrize("planted", [(8, 0, 0), (0, 4, 0), (0, 0, 4)])
    def test_spill(self, planted):
        log = LOG.format(stack=planted[0], stores=planted[1], loads=planted[2])
        kernels = cuda_audit.resources(log)
        assert [(k.arch, k.registers, k.stack) for k in kernels] == [("80", 168, planted[0]), ("90a", 255, 64)]
        (found,) = cuda_audit.spills(kernels)
        assert "stream_kernel" in found and "sm_80" in found

    def test_no_spill(self):
        assert cuda_audit.spills(cuda_audit.resources(LOG.format(stack=0, stores=0, loads=0))) == []

    @pytest.mark.parametrize(("stack", "arch", "found"), [(8, "80", 0), (16, "80", 1), (8, "90a", 1)])
    def test_known_spill_that_grows_or_is_elsewhere(self, stack, arch, found):
        log = LOG.format(stack=stack, stores=4, loads=4).replace("'sm_80'", f"'sm_{arch}'")
        log = log.replace("stream_kernelILi4EEE", "stream_kernelILNS_6FormatE6ENS0_8BFloat16ELi3EEE")
        assert len(cuda_audit.spills(cuda_audit.resources(log))) == found

    def test_frame_of_a_function_that_was_not_inlined(self):
        log = LOG.format(stack=0, stores=0, loads=0).replace(
            "ptxas info    : Compiling entry function '_ZN6lowbit4cuda14general",
            "ptxas info    : Function properties for _ZN6lowbit4helperEv\n"
            "    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Compiling entry function '_ZN6lowbit4cuda14general",
        )
        assert len(cuda_audit.spills(cuda_audit.resources(log))) == 1

    def test_wgmma_that_the_assembler_serializes(self):
        line = (
            "ptxas info    : (C7518) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
        )
        assert cuda_audit.serialized(f"ptxas info    : Used 168 registers\n{line}\n") == [line]

    @staticmethod
    def compiled(folder: Path, text: str, *flags: str) -> Path:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            absent("nvcc is not in PATH")
        (folder / "one.cu").write_text(text)
        target = folder / "libone.so"
        command = [nvcc, *flags, "-shared", "-Xcompiler=-fPIC", str(folder / "one.cu"), "-o", str(target)]
        subprocess.run([*command, "-ccbin", compiler(), "-cudart=none"], check=True)
        return target

    def test_missing_architecture(self, tmp_path):
        flags = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=[sm_90a]"]
        target = self.compiled(tmp_path, "__global__ void one(int* x) { *x = 1; }\n", *flags)
        assert cuda_audit.missing_code(target, ["80", "90a", "80-ptx"]) == []
        assert cuda_audit.missing_code(target, ["80", "90a", "120f"]) == [
            "120f: no file has code for it",
            "80-ptx: not asked for",
        ]

    def test_a_kernel_for_hopper_that_is_not_as_designed(self, tmp_path):
        """Instructions that are there, that are missing and that are there by mistake; too many registers."""
        text = HOPPER % "numbers[threadIdx.x]"
        target = self.compiled(tmp_path, text, HOPPER_CODE, "--no-compress")
        (kernel,) = cuda_audit.hopper_code(target)
        expected = frozenset({"SYNCS", "UCGABAR", "ACQBULK"})
        assert {name: kernel.instructions[name] for name in expected} == {"SYNCS": 2, "UCGABAR": 2, "ACQBULK": 1}
        assert kernel.instructions["STL"] >= 32 and kernel.instructions["LDL"] == 1

        def design(has=expected, lacks=frozenset(), registers=64, columns=()):
            sets = (frozenset(columns),)
            return [cuda_audit.Design("hopper_kernel", frozenset(has), frozenset(lacks), registers, sets)]

        assert cuda_audit.departures([kernel], design()) == []
        assert cuda_audit.departures([kernel], design(has={"HGMMA"})) == ["hopper_kernel: no HGMMA"]
        assert cuda_audit.departures([kernel], design(lacks=cuda_audit.LOCAL)) == [
            "hopper_kernel: LDL",
            "hopper_kernel: STL",
        ]
        assert cuda_audit.departures([kernel], design(registers=8)) == [
            f"hopper_kernel: {kernel.registers} registers, designed for 8"
        ]
        assert cuda_audit.departures([kernel], design(columns=(8, 16))) == ["hopper_kernel: wgmma of [] columns"]
        assert cuda_audit.departures([kernel], []) == ["hopper_kernel: no design says what it is"]
        assert cuda_audit.departures([], design()) == ["hopper_kernel: there is no such kernel"]
        assert cuda_audit.missing_code(target, ["90a"]) == []

    def test_machine_code_that_cannot_be_read(self, tmp_path):
        target = self.compiled(tmp_path, HOPPER % "numbers[0]", HOPPER_CODE, "--compress-mode=size")
        with pytest.raises(ValueError, match="a file for 90a is compressed"):
            cuda_audit.hopper_code(target)


HOPPER_CODE = "-gencode=arch=compute_90a,code=[sm_90a]"
HOPPER = """\
extern "C" __global__ void hopper_kernel(float* x) {
  __shared__ unsigned long long barrier;
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(&barrier));
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%%0], 1;" ::"r"(at) : "memory");
  asm volatile("barrier.cluster.arrive.aligned;\\nbarrier.cluster.wait.aligned;" ::: "memory");
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%%0];" ::"r"(at) : "memory");
  volatile float numbers[128];
  for (int i = 0; i < 128; ++i) numbers[i] = x[i];
  x[threadIdx.x] = %s;
}
"""
