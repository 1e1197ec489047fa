"""README and docs are true: their code runs, their links resolve, and what they list is what there is."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lowbit
from lowbit import _C, QuantizedWeight, Scheme
from lowbit.cli import make_parser
from lowbit.commands._peers import BASELINES, PEERS
from lowbit.scheme import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAPERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAPERS += [ROOT / "third_party" / "README.md", ROOT / "bench" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _read(path: str) -> str:
    return (ROOT / path).read_text()


def _between(text: str, marker: str) -> str:
    found = re.search(rf"<!-- {marker}:begin.*?-->(.*?)<!-- {marker}:end -->", text, re.S)
    assert found, f"no {marker} block"
    return found[1]


def _files() -> list[str]:
    """Files of the source tree, relative; without what builds and tools leave."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in ("build", "dist", "__pycache__") and (f == ".ci" or f[0] != ".")]
        found += [(Path(folder) / name).relative_to(ROOT).as_posix() for name in names]
    return found


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=_name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every python block, in order, in one namespace; a text block behind one is what it printed."""
    for library in ("transformers", "peft") if page.stem == "transformers" else ():
        pytest.importorskip(library, reason=f"{page.name} needs it: pip install 'lowbit[test]'")
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__docs__"}
    isa, strict = _C.isa(), _C.strict()
    printed = ""
    try:
        for block in FENCE.finditer(text):
            line = text[: block.start()].count("\n") + 1
            if block[1] == "text":
                assert printed.strip() == block[2].strip(), f"{_name(page)}:{line}"
            elif block[1] == "python":
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(compile("\n" * line + block[2], str(page), "exec"), namespace)
                printed = out.getvalue()
    finally:
        _C.set_isa(isa)
        _C.set_strict(strict)


# -- links and files ---------------------------------------------------------------------------------------------------


def _anchors(page: Path) -> set[str]:
    """As the usual renderers make them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES + PAPERS, ids=_name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{_name(page)} links to {target}"
        if anchor:
            assert anchor in _anchors(file), f"{_name(page)} links to {target}; {_name(file)} has no such heading"


@pytest.mark.parametrize("page", PAGES + PAPERS, ids=_name)
def test_named_files_exist(page: Path) -> None:
    """Names of source files in code spans and drawings, with or without folders. <placeholders> and *.globs are none."""
    files = _files()
    bare = {Path(file).name for file in files}
    folders = {part.as_posix() for file in files for part in Path(file).parents}
    text = page.read_text()
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    blocks = "\n".join(block[2] for block in FENCE.finditer(text) if block[1] in ("", "bash"))
    named = spans + re.findall(r"(?:csrc|python|tests|docs|examples|cmake|bench)/[\w./-]+", blocks)
    for name in named:
        if re.fullmatch(r"(?:csrc|python|tests|docs|examples|cmake|bench|third_party|\.ci)/[\w./-]*", name):
            assert name in files or name.rstrip("/") in folders, f"{_name(page)} names {name}"
        elif page in PAGES and re.fullmatch(r"[\w-]+\.(?:cpp|h|py|cmake|toml|md)", name):
            assert name in bare, f"{_name(page)} names {name}"


@pytest.mark.parametrize("page", PAGES + PAPERS, ids=_name)
def test_named_tests_exist(page: Path) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert f"def {name}(" in sources, f"{_name(page)} names {name}"


# -- complete ----------------------------------------------------------------------------------------------------------


def test_every_op_is_documented() -> None:
    """In the order of schema.cpp, with its schema to the letter."""
    schemas = [
        "".join(re.findall(r'"([^"]*)"', definition))
        for definition in re.findall(r"m\.def\((.*?)\);", _read("csrc/schema.cpp"), re.S)
    ]
    names = [schema.partition("(")[0] for schema in schemas]
    page = _read("docs/ops.md")
    blocks = [block[2].strip() for block in FENCE.finditer(page) if block[1] == ""]
    assert blocks == schemas
    heads = re.findall(r"^## (\w+)$", page, re.M)
    assert [head for head in heads if head in names] == sorted(names, key=heads.index)
    assert set(names) <= set(heads)
    sections = re.split(r"^## ", page, flags=re.M)
    for name in names:
        section = next(s for s in sections if s.startswith(name + "\n"))
        assert f"ops.{name}(" in section, f"{name} has no example"


def test_every_public_name_is_documented() -> None:
    page = _read("docs/python.md")
    for name in lowbit.__all__:
        assert name == "__version__" or name in page, name
    for name in (n for n in dir(QuantizedWeight) if not n.startswith("_") and callable(getattr(QuantizedWeight, n))):
        assert name in page, f"QuantizedWeight.{name}"


def test_every_preset_is_documented() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", _read("docs/python.md"), re.M)
    assert [row for row in rows if row in PRESETS] == list(PRESETS)


def test_every_format_is_documented() -> None:
    for page in ("docs/format.md", "docs/support.md"):
        for row in _C.format_table():
            assert f"`{row['name']}`" in _read(page), (page, row["name"])


def test_every_kernel_has_a_bound() -> None:
    page = _read("docs/numerics.md")
    for row in _C.kernel_table():
        # CUDA has a row per tile shape, which all share what numerics.md says.
        name = row["name"] if row["backend"] == "cpu" else re.sub(r"_m\d+$", "_*", row["name"])
        assert f"| `{name}` |" in page, name


def _commands() -> dict[str, argparse.ArgumentParser]:
    parser = make_parser()
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices)


def test_every_command_is_documented() -> None:
    """With every option and a choice of each baseline."""
    page = _read("docs/cli.md")
    assert re.findall(r"^## lowbit (\w+)$", page, re.M) == list(_commands())
    for name, parser in _commands().items():
        section = page.split(f"## lowbit {name}\n")[1].split("\n## ")[0]
        for action in parser._actions:
            for option in action.option_strings:
                if option not in ("-h", "--help") and not (name == "info" and option == "--json"):
                    assert f"| `{option}" in section or f", `{option}" in section, f"lowbit {name} {option}"


def test_every_baseline_is_documented() -> None:
    rows = [f"| `dequant` | | {BASELINES['dequant']} |"]
    rows += [f"| `{peer.name}` | {peer.kind} | {peer.what} |" for peer in PEERS.values()]
    table = "\n".join(["| baseline | weights and inputs | what it calls |", "|---|---|---|", *rows])
    assert _between(_read("docs/cli.md"), "baselines").strip() == table


@pytest.mark.parametrize("page", PAGES + PAPERS, ids=_name)
def test_command_lines_parse(page: Path) -> None:
    blocks = "\n".join(block[2] for block in FENCE.finditer(page.read_text()) if block[1] == "bash")
    for line in re.findall(r"^lowbit (.+)$", blocks, re.M):
        make_parser().parse_args(shlex.split(line, comments=True))  # exits where an option is unknown


def test_every_environment_variable_is_documented() -> None:
    sources = [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("python/**/*.py"), *ROOT.glob("cmake/*.cmake")]
    read = re.compile(r"(?:getenv\(|environ\W+(?:get\W+)?|ENV\{)\"?(LOWBIT_\w+)")
    used = {name for path in sources for name in read.findall(path.read_text())}
    assert {"LOWBIT_ISA", "LOWBIT_STRICT", "LOWBIT_TORCH_DIR"} <= used
    for name in used:
        assert f"| `{name}` |" in _read("docs/python.md"), name


# -- measured ----------------------------------------------------------------------------------------------------------


def test_table_of_schemes() -> None:
    """The README's bits per weight and signal to noise."""
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \|", _between(_read("README.md"), "schemes"), re.M)
    assert len(rows) > 8
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for name, bits, sqnr in rows:
        assert f"{Scheme.parse(name).bits_per_weight(4096, 4096):.3f}" == bits, name
        part = weight if name.endswith("b128") else weight[:256]
        error = QuantizedWeight.quantize(part, name).dequantize() - part
        measured = 20 * torch.log10(part.norm() / error.norm()).item()
        assert abs(measured - float(sqnr)) < 0.15, f"{name}: {measured:.2f} dB"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_speed_tables_are_what_was_measured() -> None:
    """The numbers of the README and of docs/speed.md are those of the newest result, to the character."""
    script = _script("generate_bench")
    for page, text in script.pages(script.newest()).items():
        assert text == _read(page), "run: python docs/generate_bench.py"


def test_every_block_of_speed_is_on_a_page() -> None:
    script = _script("generate_bench")
    pages = "".join(_read(page) for page in script.PAGES)
    made = script.blocks(json.loads(script.newest().read_text()), "x")
    assert sorted(made) == sorted(re.findall(r"<!-- ([\w-]+):begin -->", pages.replace("schemes:begin", "")))


@pytest.mark.skipif("avx2" not in _C.isa_levels(), reason="the page is about x86-64, and this CPU has no AVX2")
def test_support_matrix_is_up_to_date() -> None:
    assert _script("generate_support").page() == _read("docs/support.md"), "run: python docs/generate_support.py"


@pytest.mark.parametrize("page", PAGES + PAPERS, ids=_name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", _read("Makefile"), re.M))
    text = page.read_text()
    code = re.findall(r"`(make [^`]+)`", FENCE.sub("", text)) + re.findall(r"^(?:    )?(make .+)$", text, re.M)
    for target in (command.split()[1] for command in code):
        assert target in targets or "=" in target, f"{_name(page)}: make {target}"
