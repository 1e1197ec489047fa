"""The JSON file: what was done, and whether it still counts."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from device.cells import Cell

__all__ = ["ROOT", "Store", "sources_hash"]

ROOT: Final = Path(__file__).resolve().parents[2]
#: A change of these makes what was measured or tested before a statement about something else.
SOURCES: Final = ("CMakeLists.txt", "cmake", "csrc", "python", "tests/cuda", "tests/metal")
_FORMAT: Final = 1


def sources_hash(root: Path = ROOT) -> str:
    """Of every file that results depend on; git need not be there."""
    digest = hashlib.sha256()
    for name in SOURCES:
        top = root / name
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for file in files:
            # What a sweep writes is no other source for the next one.
            if "__pycache__" in file.parts or file.suffix in (".so", ".pyc") or file.name == "measured.inc":
                continue
            digest.update(f"{file.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


class Store:
    """Results by stage and cell; on disk after each one.

    Args:
        path: of the JSON file; what it holds is kept if it is about the same sources and the same device.
        sources: `sources_hash()`.
        device: its name.
    """

    def __init__(self, path: Path, sources: str, device: str):
        self.path = path
        self.dropped = ""  # why what the file held was not kept
        fresh: dict[str, Any] = {"format": _FORMAT, "sources": sources, "device": device, "machine": {}, "stages": {}}
        self.data = self._load(fresh)

    def _load(self, fresh: dict[str, Any]) -> dict[str, Any]:
        if not self.path.exists():
            return fresh
        try:
            held = json.loads(self.path.read_text())
            differs = [key for key in ("format", "sources", "device") if held.get(key) != fresh[key]]
        except (ValueError, AttributeError) as error:
            self.dropped = f"{self.path} is not a result file: {error}"
            return fresh
        if differs:
            self.dropped = f"{self.path} is about other {' and '.join(differs)}"
            return fresh
        return dict(held)

    def done(self, cell: Cell) -> bool:
        """Whether the cell has a result that need not be had again: what failed is tried again."""
        return bool(self.cells(cell.stage).get(cell.key, {}).get("ok"))

    def cells(self, stage: str) -> dict[str, Any]:
        return dict(self.data["stages"].get(stage, {}))

    def put(self, cell: Cell, result: dict[str, Any]) -> None:
        self.data["stages"].setdefault(cell.stage, {})[cell.key] = {
            **result,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(part, self.path)

    def left(self, cells: Iterable[Cell]) -> list[Cell]:
        return [cell for cell in cells if not self.done(cell)]
