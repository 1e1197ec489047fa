"""The formats that are read, one row each, and the choice between them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lowbit import _safetensors
from lowbit.errors import ArtifactError
from lowbit.formats import (
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    gpt_oss,
    gptq,
    hqq,
    mlx,
    modelopt,
    native,
    quanto,
    torchao,
)
from lowbit.formats._format import Container, Format
from lowbit.formats._record import Plan
from lowbit.formats._settings import Settings, quantization_settings
from lowbit.formats._source import Source, open_source

__all__ = ["CONTAINERS", "FORMATS", "choose", "open_plan"]

FORMATS: Final[tuple[Format, ...]] = (
    gptq.FORMAT,
    awq.FORMAT,
    compressed_tensors.FORMAT,
    fp8.FORMAT,
    modelopt.FORMAT,
    bitsandbytes.FORMAT,
    mlx.FORMAT,
    gpt_oss.FORMAT,
    torchao.FORMAT,
    hqq.FORMAT,
    quanto.FORMAT,
    native.FORMAT,
)
CONTAINERS: Final[tuple[Container, ...]] = (gguf.CONTAINER,)


def choose(source: Source, settings: list[Settings]) -> tuple[Format, str]:
    """The format of a checkpoint, and why it is that one.

    Config and tensors must agree. Where the tensors fit several formats the config decides; without a config the tensors
    must fit exactly one.

    Raises:
        ArtifactError: nothing is quantized, nothing here reads it, or config and tensors contradict each other; the
            message gives both sides.
    """
    if (source.root / "lowbit.json").is_file() and source.path == source.root:
        raise ArtifactError(f"{source.path}: is a lowbit artifact: use load_quantized")
    claims = {}
    for format in FORMATS:
        found = [f"{one.where}: {said}" for one in settings if (said := format.by_config(one))]
        if found:
            claims[format.name] = found[0]
    evidence = {format.name: said for format in FORMATS if (said := format.by_tensors(source))}
    if len(claims) > 1:
        raise ArtifactError("the configs contradict each other: " + "; ".join(f"{c} ({n})" for n, c in claims.items()))
    if not claims:
        return _by_tensors_alone(source, settings, evidence)
    ((name, said),) = claims.items()
    if name not in evidence:
        seen = "; ".join(f"{e} ({n})" for n, e in evidence.items()) or f"no tensor of the {_count(source)} is {name}'s"
        raise ArtifactError(f"{said}, but the tensors say otherwise: {seen}")
    return _row(name), f"{said}; {evidence[name]}"


def _by_tensors_alone(source: Source, settings: list[Settings], evidence: dict[str, str]) -> tuple[Format, str]:
    readable = ", ".join(format.name for format in FORMATS)
    if settings:
        where, values = settings[0].where, settings[0].values
        said = str(values.get("quant_method", sorted(values)[:8]))[:200]
        seen = "; ".join(f"{e} ({n})" for n, e in evidence.items())
        raise ArtifactError(
            f"{where}: {said!r} is not a format that this lowbit reads ({readable})" + (f"; {seen}" if seen else "")
        )
    if not evidence:
        raise ArtifactError(
            f"{source.path}: nothing in it is quantized in a format that lowbit reads ({readable}): there is no "
            f"quantization config, and none of the {_count(source)} looks like one; for a model that is not quantized, "
            "see quantize_"
        )
    if len(evidence) > 1:
        seen = "; ".join(f"{e} ({n})" for n, e in evidence.items())
        raise ArtifactError(f"{source.path}: there is no quantization config, and the tensors fit several: {seen}")
    ((name, said),) = evidence.items()
    return _row(name), f"{said}; there is no config"


def _count(source: Source) -> str:
    return f"{len(source.tensors)} tensors"


def _row(name: str) -> Format:
    return next(format for format in FORMATS if format.name == name)


@contextlib.contextmanager
def open_plan(path: str | os.PathLike[str], format: str | None = None) -> Iterator[tuple[Plan, str]]:
    """The plan of a checkpoint, and why it was read as what it is; `format` skips the choice."""
    known = [row.name for row in FORMATS] + [row.name for row in CONTAINERS]
    if format is not None and format not in known:
        raise ValueError(f"unknown format {format!r}; the formats are {', '.join(known)}")
    path = Path(path)
    container = _container(path)
    if container is not None:
        if format not in (None, container.name):
            raise ArtifactError(f"{path}: is a {container.name} file, not {format}")
        with container.open_plan(path) as plan:
            yield plan, f"it begins with {container.magic!r}"
        return
    with open_source(path) as source:
        settings = quantization_settings(source)
        if format is None:
            row, why = choose(source, settings)
        else:
            row, why = _row(format), "it was asked for"
        yield row.plan(source, settings), why


def _container(path: Path) -> Container | None:
    if not path.is_file():
        return None
    with _safetensors._open_regular(path) as file:
        head = file.read(16)
    return next((row for row in CONTAINERS if head.startswith(row.magic)), None)
