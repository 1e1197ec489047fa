"""What Apple's compiler would reject, as far as it can be known without it: the checklist of docs/metal.md, enforced.

Shaders are looked at as they reach Metal's compiler, headers and all. Where clang is installed (`pip install libclang`), it
parses every shader and variant as C++14 with real address spaces, against declarations of what Metal has (apple/metal_stdlib): a
pointer that lacks or mixes them, a builtin that Metal lacks, or a missing overload is an error there as it would be on a Mac.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from reference import exact16

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "cmake"))

import embed_shaders  # noqa: E402

SHADERS = sorted((CSRC / "metal" / "shaders").glob("*.metal"))
NAMES = [path.stem for path in SHADERS]
FORMATS = {
    "int2": "kInt2",
    "int3": "kInt3",
    "int4": "kInt4",
    "int6": "kInt6",
    "int8": "kInt8",
    "fp8_e4m3": "kFp8E4m3",
    "fp8_e5m2": "kFp8E5m2",
    "fp4_e2m1": "kFp4E2m1",
    "nf4": "kNf4",
    "iq4_nl": "kIq4Nl",
    "bnb_fp4": "kBnbFp4",
}
ELEMENTS = {"half": "f16", "bfloat": "bf16", "float": "f32"}
SPACES = ("device", "constant", "threadgroup", "thread")


def source(name: str) -> str:
    return embed_shaders.source(CSRC / "metal" / "shaders" / f"{name}.metal", CSRC)


def metal_part(name: str) -> str:
    """Without the branch that only the emulator takes."""
    return re.sub(r"#if defined\(LOWBIT_EMULATOR\)\n#else\n", "", source(name))


def variant(format: str, element: str) -> str:
    integer = int(format.startswith("int"))
    return (
        f'#define LOWBIT_FORMAT ::lowbit::Format::{FORMATS[format]}\n#define LOWBIT_FORMAT_NAME "{format}"\n'
        f"#define LOWBIT_FORMAT_IS_INTEGER {integer}\n"
        f'#define LOWBIT_ELEMENT {element}\n#define LOWBIT_ELEMENT_NAME "{ELEMENTS[element]}"\n'
    )


# ---- by clang --------------------------------------------------------------------------------------------------------


def as_clang_takes_it(text: str) -> str:
    """Metal's own syntax that clang does not know: attributes of instantiations, memory of a kernel, vectors from numbers."""
    replaced = text.replace("template [[host_name(name)]] [[kernel]] decltype", "template decltype").replace(
        "#define LOWBIT_SHARED(Type, name) threadgroup Type name",
        "#define LOWBIT_SHARED(Type, name) threadgroup Type& name = *(threadgroup Type*)lowbit_memory",
    )
    return re.sub(r"\b(float2|float4|half2|half4|uint4|ulong2|vec<T, 4>)\(", r"lowbit_make<\1>(", replaced)


def diagnostics(text: str) -> list[str]:
    cindex = pytest.importorskip("clang.cindex", reason="needs clang: pip install libclang")
    arguments = ["-x", "c++", "-std=c++14", "-nostdinc", "-nostdinc++", "-ffreestanding", "-Wall", "-Wextra"]
    arguments += ["-Wno-unknown-attributes", "-Wno-unused-parameter", "-isystem", str(Path(__file__).parent / "apple")]
    unit = cindex.Index.create().parse("shader.cpp", args=arguments, unsaved_files=[("shader.cpp", text)])
    lines = text.splitlines()
    return [f"{d.spelling}: {lines[d.location.line - 1].strip()}" for d in unit.diagnostics]


@pytest.mark.parametrize("name", NAMES)
def test_clang_takes_every_shader(name: str) -> None:
    text = as_clang_takes_it(source(name))
    formats = FORMATS if "LOWBIT_FORMAT," in text or "<LOWBIT_FORMAT>" in text else ["int4"]
    for i, format in enumerate(formats):
        if name == "matrix_exact" and not exact16(format):
            continue
        for element in list(ELEMENTS)[i % 3 :][:1] if len(list(formats)) > 1 else ELEMENTS:
            assert diagnostics(variant(format, element) + text) == [], (format, element)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("void f(device float* a, threadgroup float* b) { a = b; }", "assigning"),
        ("void g(thread float& x); void f(device float* a) { g(a[0]); }", "no matching function"),
        ("void g(device float* x); void f(threadgroup float* a) { g(a); }", "no matching function"),
        ("float f(device const float* a) { float* b = a; return *b; }", "cannot initialize"),
        ("float f(float x) { return double(x); }", "lowbit_Metal_has_no_double"),
        ("float f(float x) { return tanh(x); }", "tanh"),
        ("void f() { simd_prefix(1.0f); }", "simd_prefix"),
        ("void f(device const half* a) { a[0] = half(1.0f); }", "const"),
        ("#include <cstdint>", "not found"),
    ],
)
def test_clang_finds_what_is_planted(wrong: str, words: str) -> None:
    """The check can fail, in each of the ways it is for."""
    head = "#include <metal_stdlib>\nusing namespace metal;\n"
    found = diagnostics(head + "namespace lowbit {\n" + wrong + "\n}")
    assert any(words in line for line in found), found
    assert diagnostics(head + "float f(device const float* a) { return fabs(*a); }") == []


# ---- by reading ------------------------------------------------------------------------------------------------------

#: What the shading language lacks (specification 1.5.4), or what its C++14 does, with what would be written by mistake.
ABSENT = {
    "double": r"\bdouble\b",
    "lambdas": r"\[[&=]?\]\s*\(",
    "if constexpr": r"\bif\s+constexpr\b",
    "exceptions": r"\b(?:throw|try|catch)\b",
    "new and delete": r"\b(?:new|delete)\b(?!\w)",
    "virtual functions": r"\bvirtual\b",
    "goto": r"\bgoto\b",
    "the standard library": r"\bstd::",
    "dynamic casts": r"\b(?:dynamic_cast|typeid)\b",
    "nested namespaces in one (C++17)": r"\bnamespace\s+\w+::",
    "inline variables (C++17)": r"\binline\s+(?:constexpr|const)\b",
    "hexadecimal floats (C++17)": r"\b0x[0-9a-f]*\.?[0-9a-f]*p[-+]?\d",
    "structured bindings (C++17)": r"\bauto\s*&?\s*\[",
    "bfloat by name: only as LOWBIT_ELEMENT, which the host chooses": r"\bbfloat\d?\b",
    "8-byte atomics and other atomics: sums have a fixed order": r"\batomic",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_language_has_it(name: str) -> None:
    for what, pattern in ABSENT.items():
        found = re.search(pattern, metal_part(name))
        assert found is None, f"{name}: {what}: {found and found[0]}"


@pytest.mark.parametrize("name", NAMES)
def test_every_pointer_and_reference_names_its_address_space(name: str) -> None:
    """In parameters, locals and casts. Clang counts a missing one as thread; Apple's compiler does not guess."""
    text = re.sub(r"//.*", "", metal_part(name))
    text = re.sub(r'"[^"]*"', '""', text)
    scalars = r"float|half|u?int|u?char|u?short|u?long|bool|T"
    types = rf"(?:{scalars}|vec<[^>]*>|[A-Z]\w*(?:<[^<>;]*>)?|(?:u?int|float|half|uchar|ushort)[234])"
    for match in re.finditer(rf"(\w+\s+)?(const\s+)?\b{types}\s*(?:\*|&(?!&)|\(&)\s*(?=[\w)>])", text):
        before = text[max(0, match.start() - 40) : match.start()] + (match[1] or "")
        line = text[: match.start()].count("\n")
        words = re.findall(r"\w+", before)[-2:]
        declared = any(word in SPACES for word in words)
        arithmetic = re.search(r"[=+\-*/(,<>?:&|]\s*$|\breturn\s*$", text[: match.start()].rstrip(" ")) and not match[1]
        assert (
            declared
            or arithmetic
            or not re.match(rf"(?:const\s+)?{types}\s*[*&(]", match[0].strip())
            or (match[1] is not None and match[1].strip() not in ("const", "inline", "static"))
        ), f"{name}, line {line}: {text.splitlines()[line].strip()}"


@pytest.mark.parametrize("name", NAMES)
def test_variables_of_namespaces_are_constant(name: str) -> None:
    """Program scope knows one address space."""
    depth_of_code = 0
    for line in metal_part(name).splitlines():
        if re.match(r"(?:constexpr|const|static|float|int|uint)\b[^()]*=", line):
            raise AssertionError(f"{name}: {line} is not in the constant address space")
        depth_of_code += line.count("{") - line.count("}")
    assert depth_of_code == 0, f"{name}: braces do not match"


def test_headers_are_metals_own() -> None:
    for name in NAMES:
        assert set(re.findall(r"#include (\S+)", source(name))) == {"<metal_stdlib>", "<metal_simdgroup_matrix>"}, name
        assert "#pragma once" not in source(name)
        assert source(name).isascii(), f"{name}: torch hands the text to Metal as ASCII"


@pytest.mark.parametrize("name", NAMES)
def test_buffers_are_counted_without_gaps(name: str) -> None:
    """Host and emulator give arguments by position: buffer i is the i-th parameter, and there are 31 at most."""
    text = metal_part(name)
    for macro in ("GEMM", "PARAMS"):
        arguments = re.search(rf"#define LOWBIT_{macro}_ARGUMENTS((?:.*\\\n)*.*)\n", text)
        if arguments is None:
            continue
        words = [int(i) for i in re.findall(r"\[\[buffer\((\d+)\)\]\]", arguments[1])]
        count = re.search(rf"#define LOWBIT_{macro}_WORDS (\d+)", text)
        assert count is not None and words == list(range(int(count[1]))), macro
        text = text.replace(f"LOWBIT_{macro}_ARGUMENTS,", ", ".join(f"long [[buffer({i})]]" for i in words) + ",")
    kernels = re.findall(r"\[\[kernel\]\] void (\w+)\(([^{]*)\) \{", text)
    assert kernels, name
    for kernel, parameters in kernels:
        found = [int(i) for i in re.findall(r"\[\[buffer\((\d+)\)\]\]", parameters)]
        assert found == list(range(len(found))) and len(found) <= 31, (kernel, found)
        assert parameters.rstrip().endswith("LOWBIT_POSITION"), kernel


def test_vector_loads_are_where_alignment_is_known() -> None:
    """16 bytes at once only from what the layout or a flag of the host aligns; the emulator checks each address."""
    allowed = {"codec.h", "weight.h", "rows.h", "tiles.h", "canonical.h"}
    for header in sorted((CSRC / "metal" / "shaders").glob("*.h")):
        if re.search(r"\((?:device|threadgroup)(?: const)? (?:vec<|\w+[24]\*)", header.read_text()):
            assert header.name in allowed, header.name


def test_both_math_modes_give_the_contracts_bits() -> None:
    """Products that must be rounded before they are added stand in functions that say so."""
    for function in ("affine_weights", "affine_of", "weight_of"):
        texts = [h.read_text() for h in (CSRC / "metal" / "shaders").glob("*.h")]
        bodies = [m for t in texts for m in re.findall(rf"inline \w+ {function}\([^{{]*\) \{{\n(.*)\n", t)]
        assert bodies and all(body.strip() == "LOWBIT_EXACT" for body in bodies), function
