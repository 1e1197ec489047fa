"""`lowbit inspect`: what is in an artifact, a checkpoint of another library, a safetensors file or a folder of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowbit import _artifact, _safetensors
from lowbit._progress import progress_bar
from lowbit._safetensors import SafetensorsFile, TensorInfo, dtype_name
from lowbit.commands import _output
from lowbit.errors import ArtifactError
from lowbit.formats._record import Plan
from lowbit.formats._registry import FORMATS, open_plan
from lowbit.formats._settings import quantization_settings
from lowbit.formats._source import open_source
from lowbit.report import format_bytes
from lowbit.scheme import Scheme
from lowbit.weight import _METADATA_KEY

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
List what is in a lowbit artifact, a safetensors file, a folder of them, or a GGUF file: layers with their schemes,
tensors with dtype, shape and bytes, and for a quantized checkpoint of another library what it is and why. Only headers are
read; --verify reads everything. Nothing is executed, and a file that contradicts itself is refused by name.
"""
_EXAMPLE = """\
examples:
  lowbit inspect Llama-3.1-8B-int4 --verify
  lowbit inspect Llama-3.1-8B-GPTQ
  lowbit inspect model-00001-of-00004.safetensors --json
"""
Tensors = list[dict[str, Any]]


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "inspect",
        help="list what is in an artifact, a checkpoint or a file of one",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=_output.HelpFormatter,
    )
    parser.add_argument("path", metavar="FILE_OR_DIR", type=Path)
    parser.add_argument("--verify", action="store_true", help="read every byte of an artifact and compare SHA-256")
    _output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    path: Path = args.path
    if path.name == _artifact.MANIFEST and path.is_file():
        path = path.parent
    if (path / _artifact.MANIFEST).exists():
        found = _inspect_artifact(path, args.verify)
    elif args.verify:
        raise ArtifactError(f"{path}: not a lowbit artifact, so there are no hashes to verify")
    else:
        found = (
            _inspect_folder(path) if path.is_dir() else _inspect_gguf(path) if _is_gguf(path) else _inspect_file(path)
        )
        if not found["layers"] and "format" not in found:
            found |= _foreign(path, found["tensors"])
    if args.json:
        _output.print_json(found)
    else:
        _show(found)
    return 0


# -- an artifact -----------------------------------------------------------------------------------------------------------


def _inspect_artifact(root: Path, verify: bool) -> dict[str, Any]:
    manifest = _artifact.read_manifest(root)
    _artifact.check_files(manifest)
    if verify:
        with progress_bar("verifying", sum(size for size, _ in manifest.files.values()), None) as advance:
            for file in manifest.files:
                _artifact.verify_file(manifest, file, advance)
    tensors: Tensors = [
        {"name": name, "dtype": dtype, "shape": list(shape), "kind": kind, "file": file, "bytes": _nbytes(dtype, shape)}
        for name, (file, dtype, shape, kind) in manifest.tensors.items()
    ]
    sizes = {tensor["name"]: tensor["bytes"] for tensor in tensors}
    layers = []
    for name, layer in manifest.layers.items():
        stored = sum(sizes[part] for part in layer.specs(name))
        layers.append(_layer(name, layer.scheme, layer.shape, layer.has_perm, stored))
    return {
        "path": str(root),
        "kind": "artifact",
        "sha256": manifest.sha256,
        "verified": verify,
        "files": [{"name": n, "bytes": size, "sha256": sha} for n, (size, sha) in manifest.files.items()],
        "layers": layers,
        "tensors": tensors,
        "aliases": {**manifest.aliases, **manifest.layer_aliases},
        "bytes": sum(sizes.values()),
    }


def _nbytes(dtype: str, shape: Iterable[int]) -> int:
    known = _safetensors._DTYPES.get(dtype)
    return 0 if known is None else TensorInfo(known, tuple(shape)).nbytes


def _layer(name: str, scheme: Scheme, shape: Iterable[int], has_perm: bool, stored: int) -> dict[str, Any]:
    about = {"name": name, "scheme": str(scheme), "shape": list(shape), "perm": has_perm, "bytes": stored}
    return {**about, "bits_per_weight": stored * 8 / math.prod(shape)}


# -- other files -------------------------------------------------------------------------------------------------------------


def _inspect_folder(root: Path) -> dict[str, Any]:
    with open_source(root) as checkpoint:
        homes = {name: checkpoint.file_of(name) for name in checkpoint.tensors}
        tensors = _entries(checkpoint.tensors, homes)
        sizes = {name: (root / name).stat().st_size for name in dict.fromkeys(homes.values())}
    files = [{"name": name, "bytes": size} for name, size in sorted(sizes.items())]
    about = {"path": str(root), "kind": "folder", "files": files}
    return {**about, "layers": [], "tensors": tensors, "bytes": sum(t["bytes"] for t in tensors)}


def _inspect_file(path: Path) -> dict[str, Any]:
    with SafetensorsFile(path) as file:
        tensors = _entries(file.tensors, dict.fromkeys(file.tensors, path.name))
        metadata = dict(file.metadata)
    total = sum(t["bytes"] for t in tensors)
    layers = []
    if _METADATA_KEY in metadata:
        about = _safetensors.parse_json(metadata[_METADATA_KEY].encode(errors="replace"), f"{path}: metadata")
        try:
            scheme, (N, K) = Scheme.from_dict(about.get("scheme", {})), about.get("shape", ())
            scheme.check_shape(N, K)
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path}: {error}") from None
        layers.append(_layer("(this file)", scheme, (N, K), "perm" in file.tensors, total))
    files = [{"name": path.name, "bytes": path.stat().st_size}]
    about = {"path": str(path), "kind": "file", "files": files, "metadata": metadata}
    return {**about, "layers": layers, "tensors": tensors, "bytes": total}


def _is_gguf(path: Path) -> bool:
    with _safetensors._open_regular(path) as raw:
        return raw.read(4) == b"GGUF"


def _inspect_gguf(path: Path) -> dict[str, Any]:
    with open_plan(path) as (plan, why):
        layers = _planned(plan)
        tensors: Tensors = [
            {"name": name, "dtype": dtype_name(t.dtype), "shape": list(t.shape), "file": path.name, "bytes": t.nbytes}
            for name, t in plan.tensors.items()
        ]
        about = {"format": plan.format, "variant": plan.variant, "why": why}
    files = [{"name": path.name, "bytes": path.stat().st_size}]
    total = sum(entry["bytes"] for entry in (*layers, *tensors))
    return {
        "path": str(path),
        "kind": "file",
        "files": files,
        "layers": layers,
        "tensors": tensors,
        "bytes": total,
        **about,
    }


def _planned(plan: Plan) -> Tensors:
    """The quantized layers of a checkpoint: how they are stored stands in place of a scheme."""
    found = []
    for name, layer in plan.layers.items():
        shape, stored = layer.shape, layer.nbytes
        about = {"name": name, "scheme": layer.about, "shape": list(shape), "perm": False, "bytes": stored}
        found.append({**about, "bits_per_weight": stored * 8 / math.prod(shape)})
    return found


def _foreign(path: Path, tensors: Tensors) -> dict[str, Any]:
    """What a quantized checkpoint of another library is, or why it cannot be read as one; {} where nothing is quantized."""
    try:
        with open_source(path) as source:
            if not quantization_settings(source) and not any(row.by_tensors(source) for row in FORMATS):
                return {}
        with open_plan(path) as (plan, why):
            taken = {name for layer in plan.layers.values() for name in layer.sources}
            for entry in tensors:
                if entry["name"] in taken:
                    entry["kind"] = "quantized"  # part of a layer, which is listed
            return {"format": plan.format, "variant": plan.variant, "why": why, "layers": _planned(plan)}
    except ArtifactError as error:
        return {"not_read": str(error)}


def _entries(tensors: Mapping[str, TensorInfo], files: Mapping[str, str]) -> Tensors:
    return [
        {"name": name, "dtype": t.dtype_name, "shape": list(t.shape), "file": files[name], "bytes": t.nbytes}
        for name, t in tensors.items()
    ]


# -- for people --------------------------------------------------------------------------------------------------------------


def _show(found: Mapping[str, Any]) -> None:
    if found["layers"]:
        rows = [
            (layer["name"], layer["scheme"] + (" perm" if layer["perm"] else ""), _by(layer["shape"]),
             format_bytes(layer["bytes"]), f"{layer['bits_per_weight']:.3f}")
            for layer in found["layers"]
        ]  # fmt: skip
        _output.print_table(("layer", "scheme", "N x K", "size", "bits/weight"), rows, left=2)
    shown = [tensor for tensor in found["tensors"] if tensor.get("kind") != "quantized"]
    if shown:
        plain = [(t["name"], t["dtype"], _by(t["shape"]), format_bytes(t["bytes"])) for t in shown]
        _output.print_table(("tensor", "dtype", "shape", "size"), plain, left=2)
    for name, target in found.get("aliases", {}).items():
        print(_output.clean(f"{name} is {target}"))
    files = found["files"]
    counts = f"{len(found['layers'])} quantized layers, " if found["layers"] else ""
    print(
        _output.clean(
            f"{found['path']}: {counts}{len(found['tensors'])} tensors, {format_bytes(found['bytes'])} "
            f"in {len(files)} file{'s' if len(files) != 1 else ''}"
        )
    )
    if "format" in found:
        print(_output.clean(f"{found['format']}: {found['variant']}; load_checkpoint reads it"))
        print(_output.clean(f"({found['why']})"))
    if "not_read" in found:
        print(_output.clean(f"load_checkpoint does not read it: {found['not_read']}"))
    if "sha256" in found:
        state = "verified" if found["verified"] else "not verified: sizes fit, contents were not read (--verify)"
        print(f"sha256 {found['sha256']}, {state}")


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
