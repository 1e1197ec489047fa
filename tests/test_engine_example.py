"""For authors of engines: the example in Python, the one in C++, and where a build finds the libraries."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import build_audit as audit
import lowbit
from lowbit import QuantizedWeight, Scheme

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "examples" / "engine"
INSTALLED = Path(lowbit._C.__file__).parent
TORCH = Path(torch.__file__).parent
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

needs_cmake = pytest.mark.skipif(shutil.which("cmake", path=PATH) is None, reason="no cmake: pip install cmake ninja")


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PATH": PATH, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


# -- the engine in Python ----------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ENGINE))
    for name in ("engine", "agreement"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import engine

    return engine


def decoders(engine: ModuleType, scheme: str, dtype: torch.dtype, *worlds: int):
    checkpoint = engine.make_checkpoint(Scheme.parse(scheme))
    return checkpoint, [engine.Decoder(world, checkpoint, torch.device("cpu"), dtype) for world in worlds]


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    done = run(sys.executable, ENGINE / "engine.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "2 ranks and 1 agree" in done.stdout
    assert len(re.findall(r"^[12] x \d+ bytes of weights, \d+ of workspace: \d+ tokens/s$", done.stdout, re.M)) == 2


def test_it_runs_on_the_gpu(engine: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("lowbit::gemm_out", "CUDA"):
        pytest.skip("lowbit was built without CUDA")
    for dtype in ("bfloat16", "float16"):
        assert engine.main(["--device", "cuda", "--dtype", dtype]) == 0, capsys.readouterr().out


# No zeros, integer zeros, offsets; one scale per row, which every K-shard keeps; blocks, whose scales have fewer rows.
@pytest.mark.parametrize("scheme", ["int4-g128", "int4-g32-asym", "int3-g64-offset", "int8", "fp8-b128", "nf4-g64"])
def test_ranks_agree(engine: ModuleType, scheme: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        checkpoint, (whole, *sharded) = decoders(engine, scheme, dtype, 1, 2, 4)
        for decoder in sharded:
            assert engine.check(whole, decoder, checkpoint, engine.PROJECTIONS) <= 1


def test_a_step_agrees(engine: ModuleType) -> None:
    """The whole of it, reductions included. In fp32, whose roundings are far below what a wrong sum would change."""
    _, (whole, *sharded) = decoders(engine, "int4-g128", torch.float32, 1, 2, 4)
    tokens = whole.decode(whole.step, 8)
    for decoder in sharded:
        assert torch.equal(decoder.decode(decoder.step, 8), tokens)
        torch.testing.assert_close(decoder.h, whole.h, rtol=1e-4, atol=1e-4)
    assert len(tokens.unique()) > 8  # it does not stand still


def test_a_rank_holds_its_shard_only(engine: ModuleType) -> None:
    _, (whole, sharded) = decoders(engine, "int4-g128", torch.float32, 1, 2)
    for key, linear in whole.ranks[0].linears.items():
        for rank in sharded.ranks:
            part = rank.linears[key]
            assert all(tensor.is_meta for tensor in part.canonical)
            assert part.N * part.K * 2 == linear.N * linear.K
            assert part.w.numel() * 2 == linear.w.numel()


def swap_ranks(weight: QuantizedWeight, dim: int, rank: int, world: int) -> QuantizedWeight:
    return SHARD(weight, dim, world - 1 - rank, world)


def first_rank(weight: QuantizedWeight, dim: int, rank: int, world: int) -> QuantizedWeight:
    return SHARD(weight, dim, 0, world)


SHARD = QuantizedWeight.shard


@pytest.mark.parametrize("wrong", [swap_ranks, first_rank])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_shards_are_noticed(
    engine: ModuleType, wrong, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(QuantizedWeight, "shard", wrong)
    assert engine.main(["--steps", "2", "--dtype", dtype]) == 1
    assert "DISAGREE" in capsys.readouterr().out


def test_every_projection_is_checked(engine: ModuleType) -> None:
    for key in ((0, "qkv"), (0, "gate_up"), (1, "o"), (1, "down")):
        checkpoint, (whole, sharded) = decoders(engine, "int8", torch.bfloat16, 1, 2)
        sharded.ranks[1].linears[key].w[:64] = 0  # some codes of its first strip of rows
        assert engine.check(whole, sharded, checkpoint, engine.PROJECTIONS) > 1, key


def test_a_nan_is_noticed(engine: ModuleType) -> None:
    checkpoint, (whole, sharded) = decoders(engine, "int8", torch.bfloat16, 1, 2)
    rank = sharded.ranks[1]
    right = rank.run
    rank.run = lambda layer, name, x: right(layer, name, x) * (torch.nan if name == "qkv" else 1)
    assert not engine.check(whole, sharded, checkpoint, engine.PROJECTIONS) <= 1


def test_a_step_that_differs_is_noticed(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine.Decoder, "capture", lambda decoder: lambda: None)
    assert engine.main(["--steps", "2"]) == 1
    assert "FAILED: the captured step decodes other tokens" in capsys.readouterr().out


# -- the engine in C++ -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, built with the folders that the package names."""
    build = tmp_path_factory.mktemp("cpp")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    folders = [f"-DTORCH_DIR={TORCH}", f"-Dlowbit_DIR={lowbit.cmake_dir()}"]
    if sys.platform.startswith("linux"):  # the default of some linkers and not of others
        folders.append("-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed")
    for command in (["-S", ENGINE / "cpp", "-B", build, *generator, *folders], ["--build", build]):
        done = run("cmake", *command, cwd=build)
        assert done.returncode == 0, done.stdout
    return build / "engine"


@needs_cmake
class TestCpp:
    def test_products_are_right(self, program: Path, tmp_path: Path) -> None:
        done = subprocess.run([program], cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"largest error: \S+ of the bound\nright\n", done.stdout)
        assert "lowbit::gemm: x of shape [4, 520] has K=520 in its last dimension, the weight has K=512" in done.stdout

    def test_a_damaged_weight_is_noticed(self, program: Path, tmp_path: Path) -> None:
        done = run(program, "damage", cwd=tmp_path)
        assert done.returncode == 1 and "WRONG" in done.stdout

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF, which only Linux has")
    def test_it_loads_the_ops_and_no_python(self, program: Path) -> None:
        libraries = ["liblowbit_ops.so", "libtorch_cpu.so", "libc10.so"]
        assert audit.needed_libraries(audit.Library(program), libraries, []) == []
        loaded = run("ldd", program, cwd=program.parent)
        assert str(INSTALLED / "liblowbit_ops.so") in loaded.stdout
        assert "not found" not in loaded.stdout and "libpython" not in loaded.stdout

    def test_it_finds_the_folders_itself(self, tmp_path: Path) -> None:
        done = run("cmake", "-S", ENGINE / "cpp", "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}", cwd=tmp_path)
        assert done.returncode == 0, done.stdout


# -- where things are --------------------------------------------------------------------------------------------------


def test_library_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    ops, cuda = (INSTALLED / f"liblowbit_{name}.{suffix}" for name in ("ops", "cuda"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert lowbit.library_paths() == [ops] and ops.is_file()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert lowbit.library_paths() == ([ops, cuda] if cuda.exists() else [ops])


def test_library_paths_name_a_cuda_library_that_this_torch_can_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    both = [tmp_path / f"liblowbit_{name}.{suffix}" for name in ("ops", "cuda")]
    for path in both:
        path.touch()
    monkeypatch.setattr("lowbit._locations._FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert lowbit.library_paths() == both[:1]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert lowbit.library_paths() == both


def test_loading_the_library_registers_the_ops(tmp_path: Path) -> None:
    """In a process that does not import lowbit."""
    code = "import sys, torch\nfor path in sys.argv[1:]: torch.ops.load_library(path)\n"
    code += "assert 'lowbit' not in sys.modules\nprint(torch.ops.lowbit.gemm.default)"
    done = run(sys.executable, "-c", code, *lowbit.library_paths(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "lowbit.gemm.default\n")


def test_cmake_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lowbit.cmake_dir() == INSTALLED / "cmake"
    assert (lowbit.cmake_dir() / "lowbitConfig.cmake").read_text() == (ROOT / "cmake/lowbitConfig.cmake").read_text()
    monkeypatch.setattr("lowbit._locations._FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no lowbitConfig\.cmake in {re.escape(str(tmp_path))}"):
        lowbit.cmake_dir()


PROBE = """
cmake_minimum_required(VERSION 3.21)
project(probe LANGUAGES NONE)
find_package(lowbit {version} REQUIRED)
foreach(target lowbit::ops lowbit::cuda)
  if(TARGET ${{target}})
    get_target_property(location ${{target}} IMPORTED_LOCATION)
    get_target_property(links ${{target}} INTERFACE_LINK_LIBRARIES)
    message(STATUS "probe ${{target}} ${{location}} ${{links}}")
  endif()
endforeach()
"""


def find(folder: Path, version: str, *defines: str) -> tuple[int, list[str], str]:
    """Configures a project that finds lowbit; its exit status, the targets that it saw, and all that it said."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(PROBE.format(version=version))
    done = run("cmake", "-S", folder, "-B", folder / "build", *defines, cwd=folder)
    return done.returncode, re.findall(r"^-- probe (.*)$", done.stdout, re.M), done.stdout


@needs_cmake
def test_find_package_follows_the_installed_folder(tmp_path: Path) -> None:
    """Wherever it was moved: as in a wheel, the libraries are one folder up. With and without CUDA."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    package = tmp_path / "a folder" / "lowbit"
    shutil.copytree(lowbit.cmake_dir(), package / "cmake")
    define = f"-Dlowbit_DIR={package / 'cmake'}"

    status, _, output = find(tmp_path / "empty", "0.1", define)
    assert status != 0 and f"there is no liblowbit_ops.{suffix} in" in output

    ops, cuda = (package / f"liblowbit_{name}.{suffix}" for name in ("ops", "cuda"))
    ops.touch()
    status, targets, output = find(tmp_path / "cpu", "0.1", define)
    assert status == 0, output
    assert targets == [f"lowbit::ops {ops} links-NOTFOUND"]

    cuda.touch()
    status, targets, output = find(tmp_path / "cuda", "0.1", f"-DCMAKE_PREFIX_PATH={package / 'cmake'}")
    assert status == 0, output
    assert targets == [f"lowbit::ops {ops} links-NOTFOUND", f"lowbit::cuda {cuda} lowbit::ops"]


@needs_cmake
def test_find_package_knows_the_version(tmp_path: Path) -> None:
    major, minor = lowbit.__version__.split(".")[:2]
    define = f"-Dlowbit_DIR={lowbit.cmake_dir()}"
    status, targets, output = find(tmp_path / "same", f"{major}.{minor}", define)
    assert status == 0 and len(targets) >= 1, output
    status, _, output = find(tmp_path / "next", f"{major}.{int(minor) + 1}", define)
    assert status != 0 and f"version: {lowbit.__version__}" in output
