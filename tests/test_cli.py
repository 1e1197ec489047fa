"""What all commands have in common: help, exit codes, errors, pipes; and `lowbit info`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli_helpers
import lowbit
from lowbit import _C, cli
from lowbit.commands import _output

COMMANDS = ["info", "quantize", "inspect", "bench"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"lowbit {lowbit.__version__}\n"


def test_the_console_script_is_this_main() -> None:
    scripts = {e.name: e.value for e in importlib.metadata.entry_points(group="console_scripts")}
    assert scripts["lowbit"] == "lowbit.cli:main"
    done = cli_helpers.run(["--version"])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"lowbit {lowbit.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert f"examples:\n  lowbit {command}" in text
    assert "--json" in text


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["fly"],
        ["quantize"],
        ["quantize", "x", "--out", "y", "--scheme", "int9"],
        ["quantize", "x", "--out", "y", "--scheme", "int4-g128", "--override", "int8"],
        ["quantize", "x", "--out", "y", "--scheme", "int4", "--max-shard-bytes", "0"],
        ["bench", "--shape", "4096"],
        ["bench", "--shape", "0x4"],
        ["bench", "--model", "gpt-5"],
        ["bench", "--baseline", "cublas"],
        ["bench", "--M", "-1"],
        ["bench", "--time-budget", "nan"],
        ["inspect"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(args)
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert "error: " in captured.err.splitlines()[-1]


def test_an_error_is_one_line_without_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "bad\n\x1b[31mname"
    assert cli.main(["inspect", str(missing)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"lowbit: error: {tmp_path}/bad\\n\\x1b[31mname: no such file\n"


def test_debug_shows_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_DEBUG", "1")
    assert cli.main(["inspect", "/nowhere"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_one_line_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("kernels")

    monkeypatch.setattr("lowbit.commands.info.collect", broken)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "lowbit: error: KeyError: 'kernels' (LOWBIT_DEBUG=1 shows where)\n"


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.commands.info.collect", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "lowbit: interrupted\n"


def test_a_reader_that_leaves_is_not_an_error_message() -> None:
    process = subprocess.Popen(
        cli_helpers.command("info", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=cli_helpers.environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # long before the command prints
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_output_for_a_terminal_that_is_not_utf8() -> None:
    done = cli_helpers.run(["info"], PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")


def test_clean_leaves_nothing_that_a_terminal_obeys() -> None:
    assert _output.clean("häuser [red]x[/red]") == "häuser [red]x[/red]"
    assert _output.clean("a\x1b[2J\r\n\u202e\ud800") == "a\\x1b[2J\\r\\n\\u202e\\ud800"


def test_tables_print_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    _output.print_table(("name", "size"), [("[bold]x[/bold]", 7), ("y" * 300, 1)], left=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "size"]
    assert lines[2].split() == ["[bold]x[/bold]", "7"]
    assert lines[3].split() == ["y" * 300, "1"]  # never cut where nobody watches


# -- info --------------------------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (torch.__version__, _C.isa(), "liblowbit_ops", "nf4", "general"):
        assert word in text
    assert text.count("gemm_a8") == sum(row["op"] == "gemm_a8" for row in _C.kernel_table())


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu"]["isa"] in found["cpu"]["isa_available"]
    assert found["kernels"] == _C.kernel_table()
    assert found["build"] == _C.build_info()
    for name in ("_C", "liblowbit_ops"):
        library = found["libraries"][name]
        assert library["bytes"] == os.path.getsize(library["path"])
        assert library["loaded"]
    cuda = found["libraries"]["liblowbit_cuda"]
    assert cuda["loaded"] or "CUDA" in cuda["why"]
    assert found["cuda"]["loaded"] == cuda["loaded"]
    assert bool(found["cuda"]["built_with"]) == bool(found["cuda"]["architectures"])


def test_info_does_not_touch_cuda() -> None:
    code = """
import sys, torch
def refuse(*args): raise AssertionError("CUDA was initialised")
torch.cuda._lazy_init = torch.cuda.init = torch.cuda.device_count = refuse
torch.version.cuda = "13.0"  # as a torch built for CUDA says
from lowbit.cli import main
sys.exit(main(["info", "--json"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=cli_helpers.environment(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"]["cuda"] != "torch is built without CUDA"


def test_info_lists_gpus_as_the_driver_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771 MiB, 580.95.05'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    from lowbit.commands import info

    real = _C.build_info()
    build = {**real, "cuda": "13.0", "cuda_archs": "80 90a 80-ptx 90-ptx"}
    monkeypatch.setattr(info._C, "build_info", lambda: build)
    monkeypatch.setattr(info, "_multiprocessors", lambda index, capability: 132)
    found = info.collect()
    (gpu,) = found["devices"]["cuda"]["gpus"]
    assert gpu == {
        "name": "NVIDIA H200",
        "compute_capability": "9.0",
        "memory": "143771 MiB",
        "driver": "580.95.05",
        "multiprocessors": 132,
        "code": "compiled in (sm_90a)",
    }
    cuda = found["cuda"]
    assert (cuda["driver"], cuda["needs_driver"], cuda["problem"]) == ("580.95.05", "580 or later", None)
    assert cuda["built_with"] == "13.0" and cuda["architectures"] == ["80", "90a", "80-ptx", "90-ptx"]

    tool.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3090, 8.6, 24576 MiB, 535.104.05'\n")
    assert cli.main(["info"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "NVIDIA GeForce RTX 3090, compute capability 8.6, 132 multiprocessors, 24576 MiB, driver 535.104.05" in text
    assert "code: compiled in (sm_80)" in text
    assert "the driver 535.104.05 is too old: kernels built with CUDA 13.0 need 580 or later" in text
    assert "CUDA 13.0, for 80 90a 80-ptx 90-ptx" in text


@pytest.mark.parametrize("isa", _C.isa_levels()[-1:])
def test_info_says_what_lowbit_isa_did(isa: str) -> None:
    done = cli_helpers.run(["info", "--json"], LOWBIT_ISA=isa)
    cpu = json.loads(done.stdout)["cpu"]
    assert (cpu["isa"], cpu["LOWBIT_ISA"]) == (isa, isa)
