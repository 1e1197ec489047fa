"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lowbit import _artifact
from lowbit.errors import ArtifactError
from lowbit.formats._source import is_weight_file

__all__ = ["check_target", "copy_files", "side_files", "staged"]

# Beside a model there may be anything; these are what a model needs to be used.
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".md", ".py")
_SIDE_NAMES = ("license", "notice", "use_policy", "readme")


def check_target(out: Path, source: Path, force: bool) -> None:
    """Refuse, before any work, a target that must not be written to.

    Raises:
        ArtifactError: it is the source, a file, a folder with something in it (with `force`: something else than an
            artifact).
    """
    if out.exists() and source.exists() and os.path.samefile(out, source):
        raise ArtifactError(f"{out}: is the model's own folder; choose another one")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise ArtifactError(f"{out}: exists and is not a folder")
    if not any(out.iterdir()):
        return
    if not (out / _artifact.MANIFEST).exists():
        raise ArtifactError(f"{out}: the folder is not empty, and what is in it is not a lowbit artifact")
    if not force:
        raise ArtifactError(f"{out}: holds an artifact already; --force replaces it")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes `out` when the block ends well and vanishes when it does not.

    It stands beside `out` under a hidden name, which the next run cleans up, should this one be killed. Where `out` holds
    an artifact already, files are renamed into it, the manifest last: until then the old artifact is whole.

    Raises:
        ArtifactError: another process is writing to the same `out`.
    """
    out = Path(os.path.realpath(out))  # what a link leads to: a folder cannot be renamed over the link
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.lowbit-partial"
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{out}: another process is writing to it") from None
        try:
            folder = partial / "model"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
            _publish(folder, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _publish(folder: Path, out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        _artifact._sync(folder)
        os.replace(folder, out)  # an empty folder may be replaced by another
        _artifact._sync(out.parent)
        return
    keep = set(_artifact.read_manifest(folder).files)
    manifest = folder / _artifact.MANIFEST
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != manifest]
    for path in files:
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    _artifact._sync(out)
    os.replace(manifest, out / _artifact.MANIFEST)
    _artifact._sync(out)
    _artifact._remove_stale(out, keep)


def copy_files(source: Path, names: list[str], target: Path) -> None:
    """Copy side files: config, tokenizer and the like. Links are followed, as the Hub's cache needs."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
        with open(target / name, "rb") as file:
            os.fsync(file.fileno())


def side_files(root: Path, out: Path) -> tuple[list[str], list[str]]:
    """What is copied, and what is not but might be missed. An artifact made inside the model's folder is no part of it."""
    copied: list[str] = []
    left: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [
            f for f in sorted(folders)
            if f[0] != "." and not Path(folder, f, _artifact.MANIFEST).exists() and not _same_folder(out, Path(folder, f))
        ]  # fmt: skip
        for name in sorted(files):
            path = Path(folder, name)
            relative = str(path.relative_to(root))
            if name[0] == "." or not path.is_file() or (is_weight_file(name) and Path(folder) == root):
                continue
            wanted = name.lower().endswith(_SIDE_SUFFIXES) or name.lower().startswith(_SIDE_NAMES)
            (copied if wanted and not is_weight_file(name) else left).append(relative)
    return copied, left


def _same_folder(a: Path, b: Path) -> bool:
    """Whether two paths lead to one folder."""
    return os.path.realpath(a) == os.path.realpath(b)
