"""`lowbit bench`: what it measures and prints. Times are not tested, arithmetic on them is."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import Scheme, cli
from lowbit.commands import _benchmark, _contenders, _measure, _peers
from lowbit.commands._cases import MODELS, OTHER_SCHEMES, STANDARD_A8_SCHEMES, STANDARD_SCHEMES, Shape, model_shapes
from lowbit.commands._measure import Roofline, Sample
from lowbit.scheme import PRESETS


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """A small cache means few copies; the real roofline takes seconds and has a test of its own."""
    monkeypatch.setattr(_measure, "cache_bytes", lambda *_: 1 << 16)
    monkeypatch.setattr(_benchmark.Others, "cores", lambda self: 0.0)
    peaks = {"float32": 1e11, "bfloat16": 2e11, "int8": 4e11}
    monkeypatch.setattr(_benchmark, "measure_roofline", lambda threads, **_: Roofline(threads, 1e10, peaks))


def bench(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert cli.main(["bench", "--json", "--time-budget", "0.2", "--threads", "1", *args]) == 0
    return json.loads(capsys.readouterr().out)


# -- the command -------------------------------------------------------------------------------------------------------------


def test_rows_and_their_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    baselines = "torch-bf16,torch-fp32,torch-fp16,dequant"
    result = bench(capsys, "--shape", "64x128", "--scheme", "int4-g32,int8-a8", "--M", "1,3", "--baseline", baselines)
    names = ["int4-g32", "dequant int4-g32", "int8-a8", "torch-bf16", "torch-fp32", "torch-fp16"]
    assert [(row["M"], row["name"]) for row in result["rows"]] == [(M, name) for M in (1, 3) for name in names]
    assert result["complete"]
    assert not result["left_out"]
    rows = {(row["M"], row["name"]): row for row in result["rows"]}
    for (M, name), row in rows.items():
        seconds = row["median_us"] / 1e6
        assert 0 < row["best_us"] <= row["median_us"]
        assert row["operations"] == 2 * M * 64 * 128
        assert row["GBps"] == pytest.approx(row["bytes"] / seconds / 1e9)
        assert row["TFLOPs"] == pytest.approx(row["operations"] / seconds / 1e12)
        roof = max(row["bytes"] / 1e10, row["operations"] / (4e11 if name == "int8-a8" else 2e11))
        assert row["roofline_percent"] == pytest.approx(100 * roof / seconds)
        assert row["vs_torch_bf16"] == pytest.approx(rows[M, "torch-bf16"]["median_us"] / row["median_us"])
    assert rows[1, "torch-bf16"]["bytes"] == 2 * (64 * 128 + 128 + 64)
    assert rows[1, "int4-g32"]["bytes"] >= 64 * 128 // 2 + 64 * 4 * 2 + 2 * (128 + 64)
    assert rows[1, "int4-g32"]["kernel"].startswith("cpu_")


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", "--shape", "64x128", "--M", "1", "--threads", "1", "--time-budget", "0.1", "--warm"]
    assert cli.main(args) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    for head in ("median us", "GB/s", "TFLOP/s", "roofline", "x torch-bf16"):
        assert head in lines[0]
    assert lines[2].split()[:6] == ["64", "x", "128", "1", "1", "int4-g128"]
    assert "weights warm in cache" in captured.out
    assert "read 10.0 GB/s" in captured.out


def test_threads_models_and_dtype(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_benchmark, "interleave", lambda calls, *rest, **_: {name: Sample((1e-3,)) for name in calls})
    before = torch.get_num_threads()
    result = bench(
        capsys, "--model", "qwen2.5-0.5b", "--shape", "8x8", "--threads", "1,2", "--M", "1", "--dtype", "fp16",
        "--baseline", "none", "--scheme", "int8", "--time-budget", "60",
    )  # fmt: skip
    assert torch.get_num_threads() == before
    shapes = [(8, 8), (896, 896), (128, 896), (4864, 896), (896, 4864)]
    assert [tuple(row["shape"]) for row in result["rows"][::2]] == shapes
    assert [row["threads"] for row in result["rows"]] == [1, 2] * 5
    assert [roof["threads"] for roof in result["roofline"]] == [1, 2]
    assert result["dtype"] == "fp16"
    assert all(row["vs_torch_bf16"] is None for row in result["rows"])


def test_what_cannot_take_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(capsys, "--shape", "40x72", "--scheme", "int8,int4-g128", "--baseline", "torch-int4pack", "--M", "1")
    assert {entry["name"]: entry["why"] for entry in result["left_out"]} == {
        "int4-g128": "group_size=128 is larger than K=72; use at most 72, or -1 for all of K",
        "torch-int4pack": "K=72 is not a multiple of 128",
    }
    assert [row["name"] for row in result["rows"]] == ["int8"]


def test_the_time_budget_names_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", "--json", "--threads", "1", "--shape", "64x64,64x128", "--scheme", "int8", "--time-budget", "1e-9"]
    assert cli.main(args) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["complete"]
    assert [entry["why"] for entry in result["left_out"]] == ["the time was up"] * 2


def test_ctrl_c_shows_what_was_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(calls: dict[str, Any], *rest: object, **_: object) -> dict[str, Sample]:
        if measured:
            raise KeyboardInterrupt
        measured.append(1)
        return {name: Sample((1e-3,)) for name in calls}

    measured: list[int] = []
    monkeypatch.setattr(_benchmark, "interleave", measure)
    assert cli.main(["bench", "--shape", "64x64", "--M", "1,2", "--scheme", "int8", "--threads", "1", "--json"]) == 130
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["interrupted"], result["complete"]) == (True, False)
    assert [row["M"] for row in result["rows"]] == [1, 1]
    assert captured.err == "lowbit: interrupted\n"


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    args = ["bench", "--shape", "64x128", "--M", "1,2", "--time-budget", "0.1", "--threads", "1,2"]
    assert cli.main([*args, "--plot", str(tmp_path / "roof.png")]) == 0
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else original(name))
    monkeypatch.setattr("lowbit.commands.bench.run_benchmark", pytest.fail)  # known before a minute of measuring
    assert cli.main(["bench", "--plot", "x.png"]) == 1
    assert capsys.readouterr().err == "lowbit: error: --plot needs matplotlib: pip install 'lowbit[bench]'\n"


# -- its parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*PRESETS, "int8-aint8_static", "int8-aint8_asym"])
def test_contenders_compute_the_product(text: str) -> None:
    """A bench of something else than the product would be fast."""
    W = torch.randn(48, 256).to(torch.bfloat16)
    x = torch.randn(3, 256)
    scheme = Scheme.parse(text)
    contender = _contenders.make_scheme(scheme, W, torch.float32, warm=False)
    call = contender.bind(x)
    for i in range(5):  # every copy
        assert _contenders.check_product(contender, call(i), x, W) > 0
    assert contender.kernel(3).startswith("cpu_")
    assert contender.kind == f"W{scheme.bits}A{8 if scheme.activation else 16}"
    if scheme.activation is None:
        alone = _contenders.make_dequantize(scheme, W, torch.float32, warm=True).bind(x)(0)
        torch.testing.assert_close(alone, call(0), rtol=1e-3, atol=1e-3)
        invariant = _contenders.make_scheme(scheme, W, torch.float32, warm=True, batch_invariant=True)
        assert invariant.name == f"{scheme} batch-invariant"
        torch.testing.assert_close(invariant.bind(x)(0), call(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", _peers.PEERS)
def test_peers_compute_the_product(name: str) -> None:
    """Those that are installed; torchao's da8w4 is not in its wheels, and fp8 matmul not in every torch."""
    if why := _peers.absent(name):
        pytest.skip(why)
    torch.set_num_threads(1)
    W = torch.randn(64, 256).to(torch.bfloat16)
    try:
        contender = _peers.make_peer(name, W, torch.bfloat16, warm=True)
    except RuntimeError as refusal:
        if name not in ("torchao-int4-g32-a8", "torchao-int4-g128", "torch-fp8-mm"):
            raise
        pytest.skip(str(refusal))
    with torch.inference_mode():
        for M in (1, 5):
            x = torch.randn(M, 256).to(torch.bfloat16)
            calls = [contender.bind(x), contender.bind(x + 1), contender.bind(x)]  # binding again disturbs nobody
            for call in calls[::2]:
                assert _contenders.check_product(contender, call(0), x, W) > 0
    peer = _peers.PEERS[name]
    assert (contender.name, contender.kind, contender.baseline) == (name, peer.kind, True)
    assert contender.int8 == peer.kind.endswith("A8")
    assert contender.nbytes >= W.numel() * peer.bits // 8


def test_who_computes_something_else_is_named_and_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [
        ("torch-bf16", lambda x, w: torch.nn.functional.linear(x, w) * 1.1),
        ("torch-fp32", lambda x, w: torch.nn.functional.linear(x, w)[:, :-1]),
        ("torch-int8pack", lambda x, w: torch.full((len(x), len(w)), torch.nan)),
    ]
    for name, multiply in wrong:
        peer = _peers.PEERS[name]

        def make(peer: Any, W: torch.Tensor, dtype: torch.dtype, warm: bool, multiply: Any = multiply) -> Any:
            return _peers._torch.from_tensors(peer, (W,), multiply, "wrong", warm)

        monkeypatch.setitem(_peers.PEERS, name, dataclasses.replace(peer, make=make))
    names = ",".join(name for name, _ in wrong)
    result = bench(capsys, "--shape", "64x128", "--scheme", "int8", "--baseline", names, "--M", "2")
    assert [row["name"] for row in result["rows"]] == ["int8"]
    assert 0 < result["rows"][0]["error"] < 0.01
    why = {entry["name"]: entry["why"] for entry in result["left_out"]}
    assert why["torch-bf16"] == "computes something else: relative error 0.1, at most 0.02 is plausible"
    assert why["torch-fp32"] == "computes something else: a result of shape [2, 63] instead of [2, 64]"
    assert "relative error nan" in why["torch-int8pack"]


def test_who_takes_too_long_is_named_and_spared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_benchmark, "_PATIENCE_SECONDS", 0.05)
    made = []

    def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        made.append(len(x))
        time.sleep(0.06 if len(x) == 2 else 0)
        return torch.nn.functional.linear(x, w)

    peer = dataclasses.replace(
        _peers.PEERS["torch-bf16"], make=lambda peer, W, dtype, warm: _peers._torch.from_tensors(peer, (W,), multiply, "", warm)
    )  # fmt: skip
    monkeypatch.setitem(_peers.PEERS, "torch-bf16", peer)
    result = bench(capsys, "--shape", "64x128", "--scheme", "int8", "--M", "1,2,3")
    assert [row["M"] for row in result["rows"] if row["name"] == "torch-bf16"] == [1]
    assert made.count(2) == 1
    assert 3 not in made  # with more rows it would take longer still
    left = {entry["M"]: entry["why"] for entry in result["left_out"]}
    assert left[2] == left[3]
    assert left[2].startswith("too slow to be timed: one call with M=2 took 0.")


def test_absent_peers_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    hidden = ("onnxruntime", "llama_cpp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else original(name))
    names = "onnxruntime-int8-a8,ggml-q4_0,torch-fp32"
    result = bench(capsys, "--shape", "64x128", "--scheme", "int8", "--baseline", names, "--M", "1")
    assert result["absent"] == [
        {"name": "onnxruntime-int8-a8", "why": "onnxruntime is not installed: pip install 'lowbit[bench]'"},
        {"name": "ggml-q4_0", "why": "llama-cpp-python is not installed: pip install 'lowbit[bench-ggml]'"},
    ]
    assert not result["left_out"]
    assert result["versions"] == {"torch": torch.__version__}
    assert cli.main(["bench", "--shape", "64x128", "--M", "1", "--threads", "1", "--baseline", names]) == 0
    assert "absent: ggml-q4_0: llama-cpp-python is not installed" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="onnxruntime is not installed"):
        _peers.make_peer("onnxruntime-int8-a8", torch.zeros(8, 8), torch.float32, warm=True)


def test_the_table_of_peers() -> None:
    assert list(_peers.PEERS) == [peer.name for peer in _peers.PEERS.values()]
    assert _peers.expand(["peers"]) == list(_peers.PEERS)
    assert _peers.expand(["openvino", "torch-bf16", "dequant"])[-2:] == ["torch-bf16", "dequant"]
    assert {peer.package for peer in _peers.PEERS.values()} >= {"torch", "torchao", "onnxruntime", "openvino"}
    for peer in _peers.PEERS.values():
        assert re.fullmatch(r"W(4|6|8|16|32)A(8|16|32)", peer.kind)
        assert peer.name.startswith((peer.package, "ggml-"))


def test_peers_import_their_library_only_when_they_take_part() -> None:
    """At the head of a file there is the standard library, torch and lowbit."""
    for file in Path(_peers.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                root = name.split(".")[0]
                assert root in ("torch", "lowbit") or root in sys.stdlib_module_names, (file.name, name)


def test_copies_leave_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_measure, "cache_bytes", lambda *_: 32 << 20)
    for size in (1, 1 << 20, 9 << 20, 63 << 20, 64 << 20, 1 << 30):
        count = _measure.copies_for(size, warm=False)
        between = (count - 1) * size if count > 1 else size
        assert between >= 64 << 20  # read between two uses of one copy
        assert _measure.copies_for(size, warm=True) == 1


def test_interleaving_takes_turns_in_changing_order() -> None:
    log: list[str] = []
    used: dict[str, list[int]] = {"a": [], "b": [], "c": []}

    def call(name: str, i: int) -> None:
        log.append(name)
        used[name].append(i)
        torch.randn(300_000)  # long enough not to be repeated a thousand times

    samples = _measure.interleave({name: lambda i, n=name: call(n, i) for name in "abc"}, 0.2)  # type: ignore[misc]
    rounds = {len(sample.seconds) for sample in samples.values()}
    assert len(rounds) == 1
    assert min(rounds) >= 5
    assert all(indices == list(range(len(indices))) for indices in used.values())  # copies in rotation
    turns = [name for i, name in enumerate(log[6:]) if i == 0 or log[6:][i - 1] != name]
    assert len(set(itertools.pairwise(turns))) > 3  # not always a, b, c


def test_contention_is_seen_and_marked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = _benchmark._conditions
    cores = os.cpu_count() or 1
    assert conditions(0.1, cores) == {"others_cores": 0.1, "contended": False}
    assert conditions(0.5, cores)["contended"] is True
    assert conditions(cores - 0.9, 1)["contended"] is False
    assert conditions(None, cores)["contended"] is False
    monkeypatch.setattr(_measure.Others, "cores", lambda self: 1e3)
    assert (
        cli.main(
            ["bench", "--shape", "64x64", "--M", "1", "--scheme", "int8", "--threads", "1", "--time-budget", "0.1"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "*: 2 of 2 rows were measured while other processes wanted the same cores" in text


def test_other_processes_are_counted_and_we_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of what _quick does
    ticks = os.sysconf("SC_CLK_TCK")
    now = {"clock": 10.0, "ours": 1.0, "user": 100 * ticks}
    line = "cpu  {user} 0 0 999999 77 0 0 0 0 0\ncpu0 1 2 3\n"
    monkeypatch.setattr(_measure.Path, "read_text", lambda self: line.format_map(now))
    monkeypatch.setattr(_measure.time, "perf_counter", lambda: now["clock"])
    monkeypatch.setattr(_measure.time, "process_time", lambda: now["ours"])
    others = _measure.Others()
    now |= {"clock": 14.0, "ours": 3.0, "user": 105 * ticks}
    assert others.cores() == pytest.approx(0.75)  # 5 seconds of CPU time in 4, of which 2 were ours


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="read from Linux's /proc")
def test_a_busy_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of what _quick does
    others = _measure.Others()
    begin = time.perf_counter()
    code = "import time\nwhile time.process_time() < 0.6: pass"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    cores = others.cores()
    assert cores is not None
    assert cores * (time.perf_counter() - begin) > 0.5


def test_samples() -> None:
    sample = Sample((3.0, 1.0, 2.0, 4.0, 100.0))
    assert (sample.median, sample.best) == (3.0, 1.0)
    assert Sample((2.0,) * 9).spread == 0


def test_roofline_arithmetic() -> None:
    roof = Roofline(1, 1e10, {"float32": 1e11, "bfloat16": 2e11, "int8": 4e11})
    assert roof.seconds(10**10, 10, int8=False) == 1.0
    assert roof.seconds(10, 2 * 10**11, int8=False) == 1.0
    assert roof.seconds(10, 2 * 10**11, int8=True) == 0.5
    better = roof.merged(Roofline(1, 2e10, {"float32": 5e10, "bfloat16": 3e11, "int8": 1e11}))
    assert (better.read, better.peaks) == (2e10, {"float32": 1e11, "bfloat16": 3e11, "int8": 4e11})


def test_measured_roofline_is_plausible() -> None:
    torch.set_num_threads(1)
    roof = _measure.measure_roofline(1, size=64 << 20)
    assert 1e8 < roof.read < 1e13
    assert 1e9 < roof.peaks["float32"] < 1e14


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model = MODELS[name]
    shapes = model_shapes(name)
    assert len({(shape.N, shape.K) for shape in shapes}) == len(shapes)
    labels = ", ".join(shape.label.removeprefix(f"{name} ") for shape in shapes).split(", ")
    assert sorted(labels) == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert Shape(model.hidden, model.intermediate) in [Shape(s.N, s.K) for s in shapes]
    assert all(shape.K % 32 == 0 for shape in shapes)


def test_standard_schemes_parse() -> None:
    texts = [*STANDARD_SCHEMES, *STANDARD_A8_SCHEMES, *OTHER_SCHEMES]
    assert [str(Scheme.parse(text)) for text in texts] == texts
    assert {Scheme.parse(text).bits for text in texts} == {2, 3, 4, 5, 6, 8}
