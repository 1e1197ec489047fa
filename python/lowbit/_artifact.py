"""Artifacts on disk: a folder of safetensors shards and one JSON manifest. No modules here, only tensors.

    lowbit.json                          the manifest: names, schemes, shapes, SHA-256 of every shard and of itself
    lowbit-<first 16 of sha256>.safetensors      one or more shards

The manifest's rename is the commit: shards are complete and flushed before it, and their names come from their contents,
so that a new artifact never overwrites a shard that the old manifest names. Killed at any moment, the folder holds the
old artifact or the new one; what an interrupted save left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit import _safetensors
from lowbit._canonical import stored_tensors
from lowbit._experts import ExpertWeights
from lowbit._progress import Advance
from lowbit.errors import ArtifactError, FormatError
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "MAX_SHARD_BYTES",
    "Item",
    "Layer",
    "Manifest",
    "check_files",
    "layer_item",
    "read_manifest",
    "read_tensors",
    "tensor_item",
    "verify_file",
    "write_artifact",
]

FORMAT_VERSION: Final = 1
MANIFEST: Final = "lowbit.json"
MAX_SHARD_BYTES: Final = 5_000_000_000

_MAX_MANIFEST: Final = 256 << 20
_SHARD: Final = re.compile(r"lowbit-[0-9a-f]{16}\.safetensors")
_TEMPORARY: Final = ".lowbit-tmp-"
#: "tensor" comes from a checkpoint, which does not say whether it was a parameter or a buffer.
_KINDS: Final = ("parameter", "buffer", "transient", "quantized", "tensor")

Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Item:
    """Tensors that are made together, when their turn to be written comes, so that few are alive at a time.

    Args:
        specs: dtype and shape of each tensor, known before any is made.
        produce: makes them all.
        kind: "parameter", "buffer", "transient" (a non-persistent buffer), "quantized", or "tensor" (from a checkpoint,
            which does not say whether it is a parameter or a buffer).
    """

    specs: Mapping[str, Spec]
    produce: Callable[[], Mapping[str, Tensor]]
    kind: str = "parameter"

    @property
    def nbytes(self) -> int:
        return sum(_safetensors.TensorInfo(*spec).nbytes for spec in self.specs.values())


@dataclasses.dataclass(frozen=True)
class Layer:
    """A quantized layer in the manifest: its scheme, (N, K) or (E, N, K), and whether its weight has a permutation."""

    scheme: Scheme
    shape: tuple[int, ...]
    has_perm: bool = False

    def specs(self, name: str) -> dict[str, Spec]:
        """The canonical tensors, as they are called in files and in state_dict."""
        tensors = stored_tensors(self.scheme, self.shape, self.has_perm)
        return {f"{name}.weight_{part}": spec for part, spec in tensors.items()}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A manifest that has been checked. `tensors` maps a name to (file, dtype name, shape, kind)."""

    directory: Path
    files: dict[str, tuple[int, str]]
    tensors: dict[str, tuple[str, str, tuple[int, ...], str]]
    layers: dict[str, Layer]
    aliases: dict[str, str]
    layer_aliases: dict[str, str]
    sha256: str


def tensor_item(name: str, tensor: Tensor, kind: str = "parameter") -> Item:
    """An Item of one tensor that is stored as it is."""
    return Item({name: (tensor.dtype, tuple(tensor.shape))}, lambda: {name: tensor}, kind)


def layer_item(name: str, layer: Layer, produce: Callable[[], QuantizedWeight | ExpertWeights]) -> Item:
    """An Item of the canonical tensors of one quantized weight, or of the weights of experts."""

    def tensors() -> dict[str, Tensor]:
        return {f"{name}.weight_{part}": tensor for part, tensor in produce().tensors().items()}

    return Item(layer.specs(name), tensors, "quantized")


# -- writing ---------------------------------------------------------------------------------------------------------------


def write_artifact(
    directory: str | os.PathLike[str],
    items: Sequence[Item],
    layers: Mapping[str, Layer],
    *,
    aliases: Mapping[str, str] | None = None,
    layer_aliases: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Advance | None = None,
) -> str:
    """Write an artifact, atomically, item by item; returns the SHA-256 of its manifest.

    Args:
        directory: made if it does not exist; an artifact already there is replaced, other files are left alone.
        items: what to write. An item is never split over shards.
        layers: the quantized layers among them.
        aliases: further name -> name of the tensor it shares.
        layer_aliases: further path -> path of the layer it is.
        max_shard_bytes: a new shard is begun before this is passed (one larger item makes a larger shard).
        advance: told of each item written.

    Raises:
        ValueError: two items share a name, or an item produced something else than it announced.
        ArtifactError: somebody else is saving to the same folder.
        OSError: from the file system; the old artifact is then untouched.
    """
    root = Path(directory)
    names = [name for item in items for name in item.specs]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"tensors {twice[:5]} are to be written twice")
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root), _cleaned(root):
        files: dict[str, dict[str, Any]] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for group in _shards(items, max_shard_bytes):
            file, size, sha256 = _write_shard(root, group, advance)
            files[file] = {"size": size, "sha256": sha256}
            for item in group:
                for name, (dtype, shape) in item.specs.items():
                    about = {"dtype": _safetensors.dtype_name(dtype), "shape": list(shape), "kind": item.kind}
                    tensors[name] = {"file": file, **about}
        body = {"format": "lowbit", "format_version": FORMAT_VERSION, "files": files, "tensors": tensors}
        body["layers"] = {
            name: {"scheme": layer.scheme.to_dict(), "shape": list(layer.shape), "has_perm": layer.has_perm}
            for name, layer in layers.items()
        }
        body |= {"aliases": dict(aliases or {}), "layer_aliases": dict(layer_aliases or {})}
        sha256 = _seal(body)
        text = json.dumps({**body, "sha256": sha256}, indent=1, sort_keys=True) + "\n"
        _sync(root)  # the shards' names must be on disk before the manifest that refers to them
        _replace_file(root / MANIFEST, text.encode())
        _remove_stale(root, keep=set(files))
    return sha256


def _shards(items: Sequence[Item], limit: int) -> Iterator[list[Item]]:
    group: list[Item] = []
    size = 0
    for item in items:
        if group and size + item.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += item.nbytes
    yield group  # a model without tensors still has one (empty) shard


def _write_shard(root: Path, group: list[Item], advance: Advance | None) -> tuple[str, int, str]:
    specs = {name: spec for item in group for name, spec in item.specs.items()}
    head, placed = _safetensors.plan_file(specs)
    temporary = root / f"{_TEMPORARY}{secrets.token_hex(8)}"
    with open(temporary, "xb+", buffering=0) as file:
        _write_at(file.fileno(), memoryview(head), 0)
        for item in group:
            made = item.produce()
            for name, spec in item.specs.items():
                if (made[name].dtype, tuple(made[name].shape)) != spec:
                    raise ValueError(f"{name} was announced as {spec}, got {made[name].dtype} {list(made[name].shape)}")
                tensor = made[name].detach().cpu().contiguous()
                _write_at(file.fileno(), _safetensors.tensor_bytes(tensor), len(head) + placed[name].begin)
            if advance is not None:
                advance(next(iter(item.specs), ""), item.nbytes)
        os.fsync(file.fileno())
        # Tensors are not written in file order, so the hash takes a second pass, over what is in the page cache.
        file.seek(0)
        digest = hashlib.sha256()
        size = 0
        while part := file.read(1 << 22):
            digest.update(part)
            size += len(part)
    final = f"lowbit-{digest.hexdigest()[:16]}.safetensors"
    os.replace(temporary, root / final)
    return final, size, digest.hexdigest()


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(fd, data[: 1 << 30], offset)
        data, offset = data[count:], offset + count


def write_single(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file under a temporary name and rename it."""
    made = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    head, placed = _safetensors.plan_file({n: (t.dtype, tuple(t.shape)) for n, t in made.items()}, metadata)
    ordered = sorted(placed, key=lambda name: (placed[name].begin, placed[name].end))
    _replace_file(Path(path), head, *(_safetensors.tensor_bytes(made[name]) for name in ordered))


def _replace_file(path: Path, *parts: bytes | memoryview) -> None:
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb", buffering=0) as file:
            offset = 0
            for part in parts:
                _write_at(file.fileno(), memoryview(part), offset)
                offset += len(part)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync(path.parent)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    fd = os.open(root, os.O_RDONLY)  # the folder is its own lock: nothing to leave behind, and a kill releases it
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{root}: another process is saving to this folder") from None
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _cleaned(root: Path) -> Iterator[None]:
    """After a failure, remove what this save has written and the manifest in place does not name."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            keep = set(read_manifest(root).files) if (root / MANIFEST).exists() else set()
            _remove_stale(root, keep)
        raise


def _remove_stale(root: Path, keep: set[str]) -> None:
    for entry in os.scandir(root):
        ours = entry.name.startswith(_TEMPORARY) or _SHARD.fullmatch(entry.name)
        if ours and entry.name not in keep and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# -- reading ---------------------------------------------------------------------------------------------------------------


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of an artifact, every field checked. Shards are not opened.

    Raises:
        ArtifactError: there is no artifact, or the manifest contradicts itself.
        FormatError: the manifest is not one, was altered, or is of a later format version.
    """
    root = Path(directory)
    where = str(root / MANIFEST)
    try:
        with _safetensors._open_regular(where) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_MANIFEST:
                raise FormatError(f"{where}: {size} bytes is too long for a manifest")
            raw = _safetensors._read_exactly(file, size, where)
    except FormatError:
        raise
    except ArtifactError as error:
        raise ArtifactError(f"{root}: not a lowbit artifact: {error}") from None
    body = _safetensors.parse_json(raw, where)
    if body.get("format") != "lowbit":
        raise FormatError(f"{where}: not a lowbit manifest: format is {str(body.get('format'))[:80]!r}")
    version = body.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise FormatError(f"{where}: format version {str(version)[:80]}; this lowbit reads version {FORMAT_VERSION}")
    fields = {"format", "format_version", "files", "tensors", "layers", "aliases", "layer_aliases", "sha256"}
    if set(body) != fields:
        raise FormatError(f"{where}: fields {sorted(set(body) ^ fields)[:5]} are missing or unknown")
    sha256 = body.pop("sha256")
    if sha256 != _sealed(body, where):
        raise FormatError(f"{where}: corrupted: its contents do not have the sha256 it states")
    for field in ("files", "tensors", "layers", "aliases", "layer_aliases"):
        if not isinstance(body[field], dict):
            raise FormatError(f"{where}: {field} must be an object")
    files = {name: _parse_file(name, entry, where) for name, entry in body["files"].items()}
    tensors = {name: _parse_tensor(name, entry, files, where) for name, entry in body["tensors"].items()}
    layers = {name: _parse_layer(name, entry, where) for name, entry in body["layers"].items()}
    manifest = Manifest(root, files, tensors, layers, body["aliases"], body["layer_aliases"], sha256)
    _check_names(manifest, where)
    return manifest


def _sealed(body: Mapping[str, Any], where: str) -> str:
    try:
        return _seal(body)
    except (ValueError, RecursionError) as error:  # lone surrogates, depth
        raise FormatError(f"{where}: not valid: {error}") from None


def _fields(entry: Any, names: set[str], label: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or set(entry) != names:
        raise FormatError(f"{label} must have exactly {', '.join(sorted(names))}")
    return entry


def _parse_file(name: str, entry: Any, where: str) -> tuple[int, str]:
    label = f"{where}: file {name[:200]!r}"
    entry = _fields(entry, {"size", "sha256"}, label)
    size, sha256 = entry["size"], entry["sha256"]
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise FormatError(f"{label} has an invalid sha256")
    if name != f"lowbit-{sha256[:16]}.safetensors":  # also keeps names such as ../x out
        raise FormatError(f"{label} must be called lowbit-{sha256[:16]}.safetensors")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62:
        raise FormatError(f"{label} has an invalid size {str(size)[:80]}")
    return size, sha256


def _parse_tensor(name: str, entry: Any, files: Mapping[str, Any], where: str) -> tuple[str, str, tuple[int, ...], str]:
    label = f"{where}: tensor {name[:200]!r}"
    entry = _fields(entry, {"file", "dtype", "shape", "kind"}, label)
    file, dtype, shape, kind = entry["file"], entry["dtype"], entry["shape"], entry["kind"]
    if not isinstance(file, str) or file not in files:
        raise FormatError(f"{label} is in file {str(file)[:200]!r}, which is not listed")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
        raise FormatError(f"{label} has an invalid dtype or shape")
    if kind not in _KINDS:
        raise FormatError(f"{label} has unknown kind {str(kind)[:80]!r}")
    return file, dtype, tuple(shape), kind


def _parse_layer(name: str, entry: Any, where: str) -> Layer:
    label = f"{where}: layer {name[:200]!r}"
    entry = _fields(entry, {"scheme", "shape", "has_perm"}, label)
    shape, has_perm = entry["shape"], entry["has_perm"]
    if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(type(d) is int for d in shape):
        raise FormatError(f"{label} has an invalid shape {str(shape)[:200]}")
    if not isinstance(has_perm, bool):
        raise FormatError(f"{label} has an invalid has_perm")
    try:
        layer = Layer(Scheme.from_dict(entry["scheme"]), tuple(shape), has_perm)
        layer.scheme.check_shape(*layer.shape[-2:])
        if len(shape) == 3 and shape[0] < 1:
            raise ValueError(f"{shape[0]} experts")
        if len(shape) == 3 and layer.scheme.activation_static:
            raise ValueError(f"experts of scheme {layer.scheme}, whose input scales would be static")
        layer.specs(name)  # the core has limits of its own
    except (ValueError, TypeError) as error:
        raise FormatError(f"{label}: {error}") from None
    return layer


def _check_names(manifest: Manifest, where: str) -> None:
    expected = {name: spec for path, layer in manifest.layers.items() for name, spec in layer.specs(path).items()}
    for name, (dtype, shape) in expected.items():
        entry = manifest.tensors.get(name)
        if entry is None:
            raise FormatError(f"{where}: tensor {name[:200]!r} of a quantized layer is missing")
        if entry[1:] != (_safetensors.dtype_name(dtype), shape, "quantized"):
            raise FormatError(f"{where}: tensor {name[:200]!r} is {entry[1:]}, its layer needs {dtype} {list(shape)}")
    for name, entry in manifest.tensors.items():
        if entry[3] == "quantized" and name not in expected:
            raise FormatError(f"{where}: tensor {name[:200]!r} is marked quantized but belongs to no layer")
    for kind, aliases, targets in (
        ("alias", manifest.aliases, manifest.tensors),
        ("layer alias", manifest.layer_aliases, manifest.layers),
    ):
        for name, target in aliases.items():
            if not isinstance(target, str) or target not in targets or name in targets:
                raise FormatError(
                    f"{where}: {kind} {name[:200]!r} refers to {str(target)[:200]!r}, which does not exist"
                )


def check_files(manifest: Manifest) -> None:
    """That every shard is there and as long as the manifest says, and no other safetensors file is; contents are not read.

    Raises:
        ArtifactError: a shard is missing, extra, renamed, or of another size.
    """
    root = manifest.directory
    for path in sorted(root.glob("*.safetensors")):
        # Shards of an interrupted save are named by their contents, and harmless; any other name was put there by hand.
        if path.name not in manifest.files and not _SHARD.fullmatch(path.name):
            raise ArtifactError(f"{path}: not part of the artifact: {MANIFEST} does not list it")
    for name, (size, _) in manifest.files.items():
        try:
            actual = (root / name).stat().st_size
        except OSError:
            raise ArtifactError(f"{root / name}: listed in {MANIFEST}, but missing or renamed") from None
        if actual != size:
            raise ArtifactError(f"{root / name}: {actual} bytes, {MANIFEST} says {size}: truncated or altered")


def read_tensors(manifest: Manifest, advance: Advance | None = None) -> dict[str, Tensor]:
    """Every tensor of an artifact, on the CPU, read once and verified against the manifest.

    Raises:
        ArtifactError: a shard is missing, extra, renamed or altered.
        FormatError: a shard is not a well-formed safetensors file.
    """
    check_files(manifest)
    root = manifest.directory
    found: dict[str, Tensor] = {}
    for file, (size, sha256) in manifest.files.items():
        expected = {name: (entry[1], entry[2]) for name, entry in manifest.tensors.items() if entry[0] == file}
        found.update(_safetensors.read_verified(root / file, expected, sha256))
        if advance is not None:
            advance(file, size)
    return found


def verify_file(manifest: Manifest, shard: str, advance: Advance) -> None:
    """Compare one shard with the manifest, in little memory: header, then hash.

    Raises:
        ArtifactError: it was altered.
        FormatError: it is not a well-formed safetensors file.
    """
    path = manifest.directory / shard
    _, sha256 = manifest.files[shard]
    with _safetensors.SafetensorsFile(path) as file:
        found = {tensor: (info.dtype_name, info.shape) for tensor, info in file.tensors.items()}
    wanted = {tensor: entry[1:3] for tensor, entry in manifest.tensors.items() if entry[0] == shard}
    if found != wanted:
        different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise ArtifactError(f"{path}: tensor {different[0][:200]!r} is not what {MANIFEST} says")
    digest = hashlib.sha256()
    with _safetensors._open_regular(path) as raw:
        while part := raw.read(1 << 22):
            digest.update(part)
            advance(shard, len(part))
    if digest.hexdigest() != sha256:
        raise ArtifactError(f"{path}: corrupted: sha256 is {digest.hexdigest()}, {MANIFEST} says {sha256}")
