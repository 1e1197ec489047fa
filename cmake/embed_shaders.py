"""Write a C++ file that holds every shader as a string, with the headers that it includes in it.

Shaders are compiled on the user's machine, where there is no include path. A quoted #include is replaced by the file, the first
time that a shader names it, or every time, if it ends in -inl.h; `#pragma once` and <cstdint>, which Metal does not have, go.

    python embed_shaders.py CSRC OUTPUT.cpp
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'^#include "([^"]+)"$')


def flatten(path: Path, csrc: Path, seen: set[Path]) -> list[str]:
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        include = INCLUDE.match(line)
        if include is None:
            if line not in ("#pragma once", "#include <cstdint>"):
                lines.append(line)
        elif not include[1].startswith("emulator/"):  # of a branch that Metal does not take
            header = csrc / include[1]
            if header not in seen or header.name.endswith("-inl.h"):
                seen.add(header)
                lines += flatten(header, csrc, seen)
    return lines


def without_comments(lines: list[str]) -> list[str]:
    """Whole-line comments are for people; Metal's compiler need not read them on every start."""
    return [line for line in lines if line.strip() and not line.lstrip().startswith("//")]


#: First of all, for headers that are shared with the host take their integers from <cstdint> there.
HEAD = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"


def source(shader: Path, csrc: Path) -> str:
    return HEAD + "\n".join(without_comments(flatten(shader, csrc, set()))) + "\n"


def main() -> None:
    csrc, output = Path(sys.argv[1]), Path(sys.argv[2])
    shaders = sorted((csrc / "metal" / "shaders").glob("*.metal"))
    rows = []
    for shader in shaders:
        text = source(shader, csrc)
        if ')metal"' in text:
            sys.exit(f"{shader.name} holds the end of its own string")
        rows.append(f'    {{"{shader.stem}", R"metal({text})metal"}},\n')
    output.write_text(
        '#include "metal/shaders.h"\n\nnamespace lowbit::metal {\n\n'
        f"const ShaderSource kShaderSources[] = {{\n{''.join(rows)}}};\n"
        f"const int kShaderSourceCount = {len(shaders)};\n\n}}  // namespace lowbit::metal\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
