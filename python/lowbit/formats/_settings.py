"""The part of a checkpoint's configs that says how it is quantized: JSON from anywhere, read with types."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lowbit.errors import ArtifactError
from lowbit.formats._source import Source

__all__ = ["Settings", "agreed", "quantization_settings"]

# Where they stand: file, then keys. auto-gptq, GPTQModel and AutoAWQ write a file of their own, and so does modelopt.
_PLACES = (
    ("config.json", "quantization_config"),
    ("config.json", "compression_config"),
    ("config.json", "quantization"),
    ("config.json", "text_config", "quantization_config"),
    ("quantize_config.json",),
    ("quant_config.json",),
    ("hf_quant_config.json",),
)
_MISSING = object()


class Settings:
    """A JSON object from a config. Every getter checks the type, and errors name file, key and value.

    Args:
        values: the object.
        where: file and keys, for messages: "model/config.json: quantization_config".

    Example:
        >>> settings.integer("bits", (2, 3, 4, 8))
        4
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def fail(self, key: str, expected: str) -> ArtifactError:
        """The error for a value that is not what it must be; raise it."""
        if key not in self.values:
            return ArtifactError(f"{self.where}: has no {key!r}, which must be {expected}")
        return ArtifactError(f"{self.where}: {key!r} is {str(self.values[key])[:120]!r}, it must be {expected}")

    def integer(self, key: str, allowed: Collection[int] | None = None, default: int | None = None) -> int:
        """An integer; `default` where it is absent or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or (allowed is not None and value not in allowed):
            raise self.fail(key, "an integer" if allowed is None else f"one of {', '.join(map(str, allowed))}")
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """A bool; `default` where it is absent or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; `default` where it is absent or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings; [] where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(key, "a list of strings")
        return value

    def section(self, key: str) -> Settings | None:
        """The object under a key; None where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return Settings(value, f"{self.where}.{key}")


def quantization_settings(source: Source) -> list[Settings]:
    """Every quantization config of a checkpoint, config.json's first; [] when there is none."""
    found = []
    for file, *keys in _PLACES:
        value: Any = source.config if file == "config.json" else source.json(file)
        where = f"{source.root / file}"
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if keys:
            where += f": {'.'.join(keys)}"
        if value is None or (value == {} and not keys):
            continue
        if not isinstance(value, dict):
            raise ArtifactError(f"{where} is {str(value)[:120]!r}, it must be an object")
        found.append(Settings(value, where))
    return found


def agreed(settings: list[Settings], keys: Collection[str]) -> Settings:
    """The first of several configs, filled up from the others.

    Raises:
        ArtifactError: two of them give one of `keys` different values; both are named.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for one in settings:
        for key, value in one.values.items():
            if value is None:
                continue
            if key not in merged:
                merged[key], origin[key] = value, one.where
            elif key in keys and (merged[key] != value or type(merged[key]) is not type(value)):
                raise ArtifactError(
                    f"{origin[key]} says {key}={str(merged[key])[:80]!r}, but {one.where} says {str(value)[:80]!r}"
                )
    return Settings(merged, settings[0].where if settings else "(no config)")
