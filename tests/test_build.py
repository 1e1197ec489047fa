"""The built libraries and the build itself: what they link, export and leak, and what the build says when it cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import build_audit as audit
import lowbit

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path(lowbit._C.__file__).parent
OPS = INSTALLED / "liblowbit_ops.so"
BINDINGS = Path(lowbit._C.__file__)
TORCH = Path(torch.__file__).parent

# Both libraries, stripped, and the wheel that holds them; the CUDA library has its own test file. Kernels are instantiated
# per ISA: the budget is what notices a template that got out of hand.
LIBRARIES_BUDGET = 8 << 20
WHEEL_BUDGET = 3 << 20

elf_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the audits read ELF, which only Linux has")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles C++ text into a shared library (or, with shared=False, an object file)."""
    folder = tmp_path_factory.mktemp("planted")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "these tests compile small libraries: set CXX to a C++ compiler"

    def compile_(name, text, *flags, shared=True):
        source = folder / f"{name}.cpp"
        source.write_text(text)
        target = folder / (f"lib{name}.so" if shared else f"{name}.o")
        kind = ["-shared"] if shared else ["-c"]
        command = [compiler, "-fPIC", "-std=c++17", *kind, str(source), "-o", str(target), *flags]
        subprocess.run(command, check=True)
        return target

    return compile_


# ---- the libraries as they are ---------------------------------------------------------------------------------------


@elf_only
class TestOpsLibrary:
    def test_has_no_python_symbols(self):
        assert audit.python_symbols(audit.Library(OPS)) == []

    def test_has_no_torch_cpp_symbols(self):
        assert audit.torch_cpp_symbols(audit.Library(OPS)) == []

    def test_uses_the_stable_c_interface_and_the_system_only(self):
        assert audit.foreign_symbols(audit.Library(OPS), [audit.STABLE_C]) == []

    def test_exports_only_lowbit(self):
        library = audit.Library(OPS)
        assert audit.exported_symbols(library, audit.LOWBIT_CPP) == []
        assert library.exported, "it exports nothing, so `_C` could not call it"

    def test_loads_libtorch_cpu_and_the_system(self):
        assert audit.needed_libraries(audit.Library(OPS), ["libtorch_cpu.so"], []) == []


@elf_only
class TestBindings:
    def test_have_no_torch_symbols(self):
        library = audit.Library(BINDINGS)
        assert audit.torch_cpp_symbols(library) == []
        assert audit.foreign_symbols(library, [audit.PYTHON, audit.LOWBIT_CPP]) == []

    def test_load_the_ops_library_and_no_torch(self):
        assert audit.needed_libraries(audit.Library(BINDINGS), ["liblowbit_ops.so"], []) == []

    def test_export_only_their_init(self):
        allowed = re.compile(r"PyInit__C$")
        assert audit.exported_symbols(audit.Library(BINDINGS), allowed) == []


@elf_only
@pytest.mark.parametrize("path", [OPS, BINDINGS], ids=["ops", "bindings"])
class TestBoth:
    def test_runpath_is_the_own_folder(self, path):
        assert audit.runpath(audit.Library(path)) == []

    def test_name_no_path_of_the_build_machine(self, path):
        folders = [ROOT, TORCH, Path.home(), Path(sysconfig.get_path("include"))]
        assert audit.build_paths(path, folders) == []


def test_libraries_fit_the_size_budget():
    libraries = [path for path in INSTALLED.iterdir() if path.suffix in (".so", ".dylib") and "cuda" not in path.name]
    sizes = {path.name: path.stat().st_size for path in libraries}
    assert sum(sizes.values()) <= LIBRARIES_BUDGET, sizes


def test_versions_agree():
    text = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"', text, re.MULTILINE).group(1)
    assert lowbit._C.build_info()["version"] == version
    assert lowbit.__version__ == version


@elf_only
def test_no_inline_function_is_shared_across_instruction_sets():
    """Reads the object files of the last editable build."""
    objects = sorted(ROOT.glob("build/editable-*/**/lowbit_ops.dir/**/*.o"))
    if not objects:
        pytest.skip("lowbit was not built in this checkout, so there are no object files to read")
    pairs = [(instruction_set(path), path) for path in objects]
    assert {"portable"} < {isa for isa, _ in pairs} or sys.platform == "darwin"
    assert audit.shared_across_isas(pairs) == []


def instruction_set(path):
    """What an object file was compiled for: kernel files end in it, everything else is the baseline."""
    isa = path.name.split(".")[0].rpartition("_")[2]
    return isa if path.parent.name == "kernels" else "portable"


# ---- each audit finds what was planted -------------------------------------------------------------------------------


@elf_only
class TestPlanted:
    def test_python_symbols(self):
        found = audit.python_symbols(audit.Library(TORCH / "lib" / "libtorch_python.so"))
        assert any(line.startswith("PyErr_") for line in found)

    def test_torch_cpp_symbols(self):
        found = audit.torch_cpp_symbols(audit.Library(TORCH / "lib" / "libtorch_python.so"))
        for namespace in ("2at", "3c10", "5torch"):
            assert any(namespace in line for line in found)

    def test_torch_in_an_argument(self, compiled):
        text = "namespace c10 { struct Half; }  void take(c10::Half*) {}"
        assert audit.torch_cpp_symbols(audit.Library(compiled("argument", text))) != []

    def test_foreign_symbol(self, compiled):
        text = 'extern "C" { int somebody(); int aoti_torch_x(); int torch_y(); }\n'
        text += "int f() { return somebody() + aoti_torch_x() + torch_y(); }"
        found = audit.foreign_symbols(audit.Library(compiled("foreign", text)), [audit.STABLE_C])
        assert found == ["somebody: nobody known provides it"]

    def test_exported_template(self, compiled):
        text = "#include <vector>\nnamespace lowbit { int own() { std::vector<int> v;"
        text += " for (int i = 0; i < 9; ++i) v.push_back(i); return v[3]; } }"
        library = audit.Library(compiled("exports", text, "-O0"))
        found = audit.exported_symbols(library, audit.LOWBIT_CPP)
        assert any("vector" in line for line in found)
        assert "_ZN6lowbit3ownEv: exported" not in found

    def test_runpath(self, compiled):
        flag = "-Wl,--enable-new-dtags,-rpath,"
        for name, value in [("here", "/opt/here"), ("two", "$ORIGIN:/opt/here")]:
            library = audit.Library(compiled(f"runpath_{name}", "int x;", flag + value))
            assert audit.runpath(library) != []
        assert audit.runpath(audit.Library(compiled("runpath_none", "int x;"))) != []
        old = compiled("rpath", "int x;", "-Wl,--disable-new-dtags,-rpath,$ORIGIN")
        assert audit.runpath(audit.Library(old)) == ["RUNPATH is ['DT_RPATH:$ORIGIN']"]
        good = compiled("runpath_good", "int x;", flag + "$ORIGIN")
        assert audit.runpath(audit.Library(good)) == []

    def test_needed_libraries(self, compiled):
        helper = compiled("helper", "int helper() { return 1; }", "-Wl,-soname,libhelper.so")
        text = "int helper();  int user() { return helper(); }"
        library = audit.Library(compiled("user", text, str(helper)))
        found = audit.needed_libraries(library, ["liblowbit_ops.so"], [])
        assert found == ["does not load liblowbit_ops.so", "loads libhelper.so"]
        assert audit.needed_libraries(library, ["libhelper.so"], []) == []

    def test_source_path(self, compiled):
        path = compiled("source", "const char* where() { return __FILE__; }")
        assert audit.build_paths(path) == [f"{path.parent}/source.cpp: a path of the build machine"]
        assert audit.build_paths(path, [path.parent])[0].startswith(f"{path.parent}: ")
        relative = f"-fmacro-prefix-map={path.parent}/="
        assert audit.build_paths(compiled("source", "const char* x = __FILE__;", relative)) == []

    def test_inline_function_in_two_instruction_sets(self, compiled):
        text = "template <class T> T shared(T x) { return x * 3; }\n"
        text += "int NAME(int x) { return shared(x); }"
        objects = [(isa, compiled(isa, text.replace("NAME", isa), "-O0", shared=False)) for isa in ("portable", "avx2")]
        found = audit.shared_across_isas(objects)
        assert found == ["_Z6sharedIiET_S0_: compiled for avx2, portable"]
        assert audit.shared_across_isas([("avx2", path) for _, path in objects]) == []


# ---- what the build says when it cannot ------------------------------------------------------------------------------


def configure(tmp_path, *defines, python=sys.executable, **environment):
    """Runs CMake's configure step alone; returns its exit status and everything it said."""
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", "-DLOWBIT_CUDA=OFF"]
    command += [f"-DPython_EXECUTABLE={python}", *defines]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_build_without_torch_says_what_to_run(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    status, output = configure(tmp_path, python=python, PYTHONPATH="", LOWBIT_TORCH_DIR="")
    assert status != 0
    line = "lowbit builds against an installed PyTorch and found none. Run: pip install 'torch>=2.11'"
    assert line in [text.strip() for text in output.splitlines()]


def test_build_with_an_old_torch_names_it(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.10.1+cpu'\n")
    status, output = configure(tmp_path, f"-DLOWBIT_TORCH_DIR={tmp_path / 'torch'}")
    assert status != 0
    assert f"lowbit needs torch >= 2.11 and found 2.10.1 in {tmp_path / 'torch'}. Run:" in output


def test_build_with_a_wrong_torch_folder_names_it(tmp_path):
    status, output = configure(tmp_path, LOWBIT_TORCH_DIR=str(tmp_path))
    assert status != 0
    assert f"LOWBIT_TORCH_DIR={tmp_path} is not an installed torch: it has no version.py" in output


def test_build_without_a_compiler_says_what_to_install(tmp_path):
    status, output = configure(tmp_path, CXX=str(tmp_path / "absent"))
    assert status != 0
    assert "lowbit needs a C++17 compiler and found none. Run: apt install g++" in output
    # Once there is one, the same build folder works.
    status, output = configure(tmp_path)
    assert status == 0, output
    assert f"torch {torch.__version__.partition('+')[0]}, Python" in output


# ---- the CUDA library: built where nvcc works, and no reason to fail where it does not ---------------------------------


def fake_nvcc(folder, release, works=False):
    """Knows its release and where its libraries would be; every compilation fails, or makes an object with nothing in it."""
    (folder / "lib").mkdir()
    subprocess.run(["ar", "rcs", str(folder / "lib" / "libcudart_static.a")], check=True)
    compiled = 'c++ -x c++ -c /dev/null -o "$object"'
    refused = "echo '/opt/include/crt/host_config.h:137:2: error: #error -- unsupported GNU version!' >&2; exit 1"
    nvcc = folder / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        "for object; do :; done  # the last argument\n"
        'case "$*" in\n'
        f"  --version) echo 'Cuda compilation tools, release {release}, V{release}.1' ;;\n"
        f"""  --dryrun*) echo '#$ LIBRARIES="-L{folder}/lib"' >&2 ;;\n"""
        f"  *) {compiled if works else refused} ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


NO_NVCC = "nvcc --version did not name a release when lowbit was built"


def test_build_goes_on_without_cuda_and_says_why(tmp_path):
    status, output = configure(tmp_path, "-DLOWBIT_CUDA=AUTO", CUDACXX=str(tmp_path / "absent"))
    assert status == 0, output
    assert f"-- without CUDA: {NO_NVCC}\n" in output


def test_build_with_cuda_on_stops_without_nvcc(tmp_path):
    status, output = configure(tmp_path, "-DLOWBIT_CUDA=ON", CUDACXX=str(tmp_path / "absent"))
    assert status != 0
    assert f"LOWBIT_CUDA=ON, but {NO_NVCC}\n" in output


def test_build_names_an_old_nvcc(tmp_path):
    nvcc = fake_nvcc(tmp_path, "12.4")
    status, output = configure(tmp_path, "-DLOWBIT_CUDA=AUTO", CUDACXX=str(nvcc))
    assert status == 0, output
    assert "-- without CUDA: the nvcc found is CUDA 12.4, and lowbit needs 12.8 or later\n" in output


def test_build_quotes_an_nvcc_that_fails(tmp_path):
    """Without the folders of the machine: the text becomes part of the library."""
    nvcc = fake_nvcc(tmp_path, "13.0")
    defines = ["-DLOWBIT_CUDA=AUTO", "-DCMAKE_CUDA_HOST_COMPILER=/opt/gcc/bin/g++"]
    status, output = configure(tmp_path, *defines, CUDACXX=str(nvcc))
    assert status == 0, output
    assert "-- without CUDA: nvcc 13.0 with g++ failed on a test file: unsupported GNU version!\n" in output


@pytest.mark.parametrize(
    ("release", "archs", "flags"),
    [
        ("13.0", "all", "80=sm_80,sm_86,compute_80 89=sm_89 90a=sm_90a 120f=sm_120f 90=compute_90"),
        ("12.8", "120f,90a", "120=sm_120 90a=sm_90a"),  # families of architectures came with 12.9
        ("13.0", "86;90-ptx", "86=sm_86 90=compute_90"),
    ],
)
def test_build_turns_architectures_into_flags(tmp_path, release, archs, flags):
    configure(tmp_path, "-DLOWBIT_CUDA=AUTO", f"-DLOWBIT_CUDA_ARCHS={archs}", CUDACXX=str(fake_nvcc(tmp_path, release)))
    assert gencode(tmp_path / "build" / "lowbit_cuda_probe" / "options") == flags.split()


def gencode(options):
    """-gencode=arch=compute_90,code=[sm_90] as 90=sm_90."""
    found = re.findall(r"^-gencode=arch=compute_(\w+),code=\[(.*)\]$", options.read_text(), re.MULTILINE)
    return [f"{arch}={code}" for arch, code in found]


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("all", "80=sm_80,sm_86,sm_89,sm_90,sm_120,compute_80"),
        ("90a", "90=sm_90"),
        ("120f;90-ptx", "90=sm_120,compute_90"),
    ],
)
def test_files_without_code_for_one_architecture_are_compiled_once(tmp_path, archs, flags):
    nvcc = fake_nvcc(tmp_path, "13.0", works=True)
    status, output = configure(tmp_path, "-DLOWBIT_CUDA=ON", f"-DLOWBIT_CUDA_ARCHS={archs}", CUDACXX=str(nvcc))
    assert status == 0, output
    (once,) = (tmp_path / "build" / "lowbit_cuda").glob("*.once.options")
    (each,) = (tmp_path / "build" / "lowbit_cuda").glob("*.each.options")
    assert gencode(once) == flags.split()
    assert gencode(each) == gencode(tmp_path / "build" / "lowbit_cuda_probe" / "options")
    assert "-DLOWBIT_ONE_PASS" in once.read_text()
    assert "-DLOWBIT_ONE_PASS" not in each.read_text()


@pytest.mark.parametrize(("archs", "is_there"), [("80;90a", True), ("80;90-ptx", False)])
def test_files_for_hopper_are_compiled_for_90a_alone_or_left_out(tmp_path, archs, is_there):
    nvcc = fake_nvcc(tmp_path, "13.0", works=True)
    status, output = configure(tmp_path, "-DLOWBIT_CUDA=ON", f"-DLOWBIT_CUDA_ARCHS={archs}", CUDACXX=str(nvcc))
    assert status == 0, output
    ninja = (tmp_path / "build" / "build.ninja").read_text()
    (options,) = (tmp_path / "build" / "lowbit_cuda").glob("*.hopper.options")
    (once,) = (tmp_path / "build" / "lowbit_cuda").glob("*.once.options")
    assert ("lowbit_cuda/hopper_stream.o" in ninja) == is_there
    assert ("-DLOWBIT_HOPPER" in once.read_text()) == is_there  # runtime.cu, which says so to selection
    assert ("-DLOWBIT_HOPPER" in ninja) == is_there  # the op boundary, which calls them
    if is_there:
        assert gencode(options) == ["90a=sm_90a"]
        assert "--no-compress" in options.read_text()


@pytest.mark.parametrize("archs", ["sm_90", "90,banana"])
def test_build_names_a_wrong_architecture(tmp_path, archs):
    nvcc = fake_nvcc(tmp_path, "13.0")
    status, output = configure(tmp_path, "-DLOWBIT_CUDA=AUTO", f"-DLOWBIT_CUDA_ARCHS={archs}", CUDACXX=str(nvcc))
    assert status != 0
    assert f"LOWBIT_CUDA_ARCHS: '{archs.split(',')[-1]}' is neither all, native, nor like 90, 90a" in output


# ---- from the source distribution to an installed wheel --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles everything
def test_sdist_builds_a_wheel_that_works(tmp_path):
    """Without a network, and without what only the checkout has. The CUDA library, minutes more, is left out."""
    hook = "import sys, scikit_build_core.build as b; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", hook, str(tmp_path)], cwd=ROOT, check=True)
    (sdist,) = tmp_path.glob("lowbit-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    subprocess.run(
        [
            *pip,
            "wheel",
            *offline,
            "--no-build-isolation",
            "-Ccmake.define.LOWBIT_CUDA=OFF",
            "-w",
            str(tmp_path),
            str(sdist),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("lowbit-*.whl")
    assert wheel.stat().st_size <= WHEEL_BUDGET
    names = zipfile.ZipFile(wheel).namelist()
    assert "lowbit/py.typed" in names
    assert "lowbit/_C.pyi" in names
    assert {"lowbit/cmake/lowbitConfig.cmake", "lowbit/cmake/lowbitConfigVersion.cmake"} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o", ".cu", ".cuh"))]

    target = tmp_path / "site"
    subprocess.run([*pip, "install", *offline, "--target", str(target), str(wheel)], check=True)
    # -S leaves out the hook of an editable install, which would win over the path.
    path = os.pathsep.join([str(target), *(p for p in sys.path if p.endswith("-packages"))])
    code = "import lowbit, torch; print(lowbit.__file__, lowbit._C.__file__); torch.ops.lowbit.gemm"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(file.startswith(str(target)) for file in done.stdout.split())
