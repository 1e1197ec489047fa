"""convert_checkpoint: a checkpoint of any kind into any format that is written, a tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit import _artifact, convert
from lowbit._progress import progress_bar
from lowbit._weight_error import weight_error
from lowbit.commands import _staging
from lowbit.commands._plan import Override, _Judge
from lowbit.errors import ArtifactError
from lowbit.formats._contents import Choice, open_contents, source_kind
from lowbit.formats._gguf_split import GGUFFiles
from lowbit.formats._record import PlannedTensor
from lowbit.formats._writer import Contents, PlannedLayer, WriteOptions, Writer
from lowbit.formats._writers import writer
from lowbit.report import LayerReport, Report, error_cells, format_bytes, format_shape, format_table
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["ConversionReport", "ConvertedLayer", "convert_checkpoint"]

#: Side files that say how the source was quantized, or that are written anew.
_REWRITTEN: Final = (
    "config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml", _artifact.MANIFEST,
    "model.safetensors.index.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ConvertedLayer(LayerReport):
    """One layer that was written; errors are against the weight in the source, 0 where nothing changed.

    Args:
        name, scheme, shape, bytes_before, bytes_after, relative_error: as in LayerReport.
        source: what the weight was: a scheme, or a dtype.
        largest_error: max |W - W'|.
    """

    source: str
    largest_error: float


@dataclasses.dataclass(frozen=True)
class ConversionReport(Report):
    """What convert_checkpoint did. `print(report)` shows a table; `to_dict()` is JSON.

    Args:
        source, path: what was read, and what was written.
        format: of what was written.
        layers: those written quantized.
        bytes_before, bytes_after: of the files with weights.
        notes: what was left out or made dense, and why.
    """

    source: str
    path: str
    format: str
    layers: tuple[ConvertedLayer, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                layer.source,
                layer.scheme,
                format_shape(layer.shape),
                format_bytes(layer.bytes_before),
                format_bytes(layer.bytes_after),
                *error_cells(layer.relative_error, layer.largest_error, layer.sqnr_db),
            )
            for layer in self.layers
        ]
        head = ("layer", "from", "to", "N x K", "before", "after", "error", "largest", "SQNR dB")
        lines = [format_table(head, rows, left=3), ""]
        lines += [f"note: {note}" for note in self.notes]
        exact = sum(layer.relative_error == 0 for layer in self.layers)
        lines.append(
            f"{self.path}: {self.format}, {len(self.layers)} layers, {exact} of them without any change; "
            f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        )
        return "\n".join(lines)


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    scheme: Scheme | str | None = None,
    overrides: Mapping[str, Scheme | str | None] | Sequence[Override] = (),
    importance: Mapping[str, Tensor] | None = None,
    metadata_from: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = _artifact.MAX_SHARD_BYTES,
    progress: bool | None = None,
) -> ConversionReport:
    """Write a checkpoint in another format, a tensor at a time.

    A quantized source keeps its codes, and its scales where the format has their dtype; what it cannot hold is refused by
    name before anything is written. With a scheme it is decoded and quantized again. The target appears when all of it
    is there.

    Args:
        source: a lowbit artifact, a checkpoint that another library quantized (a folder or a GGUF file), or a folder of
            fp32, bf16 or fp16 safetensors, which needs a scheme.
        target: the folder (for "gguf" the file) to make; it must not exist, or be an empty folder.
        to: "artifact", "compressed-tensors", "gptq", "awq" or "gguf".
        scheme: how to quantize.
        overrides: pattern -> Scheme, string, or None, as in `quantize_`.
        importance: layer -> [K], as `collect_importance` gives it.
        metadata_from: a GGUF file of the same model, whose keys are copied (for "gguf").
        max_shard_bytes: size above which another file is begun.
        progress: show a progress bar; by default on a terminal, when there is much to do.

    Raises:
        ArtifactError: the source cannot be read, the target exists, or the format cannot hold a layer; nothing is written.
        ValueError: an argument makes no sense.

    Example:
        >>> print(lowbit.convert_checkpoint("Llama-3.1-8B-AWQ", "Llama-3.1-8B-ct", "compressed-tensors"))
    """
    row = writer(to)
    src, dst = Path(source), Path(target)
    _check_target(src, dst, row)
    if metadata_from is not None and not row.is_file:
        raise ValueError(f"metadata_from is for gguf, not for {to}")
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    parsed = [(pattern, None if s is None else Scheme.parse(s)) for pattern, s in pairs]
    choice = Choice(None if scheme is None else Scheme.parse(scheme), parsed, importance or {}, row.scale_dtype)
    if choice.scheme is None and (choice.overrides or choice.importance):
        raise ValueError("overrides and importance are for quantizing: give a scheme as well")
    size = _weight_bytes(src)
    passes = 1 if source_kind(src) == "dense" else 2  # what is quantized is read once to be understood
    with (
        progress_bar("converting", passes * size, progress) as advance,
        open_contents(src, choice, advance) as contents,
    ):
        work = _Work(row, contents, _metadata_from(metadata_from))
        work.check()
        with _staged(dst, row) as path:
            options = WriteOptions(max_shard_bytes, advance, work.written, work.notes.append)
            row.write(work.contents, path, options)
            if not row.is_file:
                work.copy_side_files(src, dst, path)
            after = _weight_bytes(path)
    return ConversionReport(str(src), str(dst), to, tuple(work.rows()), size, after, tuple(work.notes))


def _check_target(source: Path, target: Path, row: Writer) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if row.is_file:
        raise ArtifactError(f"{target}: exists; nothing is overwritten")
    if not target.is_dir():
        raise ArtifactError(f"{target}: exists and is not a folder")
    if source.exists() and os.path.samefile(source, target):
        raise ArtifactError(f"{target}: is the source; choose another folder")
    if any(target.iterdir()):
        raise ArtifactError(f"{target}: the folder is not empty; nothing is overwritten")


def _metadata_from(path: str | os.PathLike[str] | None) -> tuple[Path, Mapping[str, Any]] | None:
    if path is None:
        return None
    file = GGUFFiles(path)
    try:
        return Path(path), dict(file.metadata)
    finally:
        file.close()


def _weight_bytes(path: Path) -> int:
    """Bytes of a file, or of the safetensors files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


@contextlib.contextmanager
def _staged(target: Path, row: Writer) -> Iterator[Path]:
    """Where to write: it becomes `target` when the block ends well, and vanishes when it does not."""
    if not row.is_file:
        with _staging.staged(target) as folder:
            yield folder
        return
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.lowbit-partial")
    try:
        yield temporary
        if target.exists():
            raise ArtifactError(f"{target}: exists; nothing is overwritten")
        os.replace(temporary, target)
        _artifact._sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


class _Work:
    """What is written, as the format can hold it, and what has been."""

    def __init__(self, row: Writer, contents: Contents, keys: tuple[Path, Mapping[str, Any]] | None) -> None:
        self.row = row
        self.notes: list[str] = []
        self._rows: dict[str, ConvertedLayer] = {}
        if keys is not None:
            contents = dataclasses.replace(contents, gguf=keys[0], metadata=keys[1])
        self.contents = self._without_dense(contents)

    def _without_dense(self, contents: Contents) -> Contents:
        """Layers that the format only has dense become tensors."""
        layers, tensors = dict(contents.layers), dict(contents.tensors)
        dtype = _float_dtype(contents)
        for name, layer in contents.layers.items():
            if not self._is_dense(name):
                continue
            del layers[name]
            tensors[f"{name}.weight"] = _decoded(layer, dtype)
            if layer.spec.bias is not None:
                tensors[f"{name}.bias"] = _bias_of(layer)
            kind = str(dtype).removeprefix("torch.")
            self.notes.append(f"{name} was {layer.about}; {self.row.name} has it dense, here in {kind}")
        return dataclasses.replace(contents, layers=layers, tensors=tensors)

    def _is_dense(self, name: str) -> bool:
        if "embeddings" in self.row.dense and _Judge._is_embedding(name):
            return True
        return "outputs" in self.row.dense and name.rpartition(".")[2] in convert._OUTPUT_LAYERS

    def check(self) -> None:
        """Refuse what the format cannot hold, before anything is written."""
        contents, row = self.contents, self.row
        if row.name != "artifact" and contents.layer_aliases:
            first, other = next(iter(contents.layer_aliases.items()))
            raise ArtifactError(
                f"{contents.where}: {first} and {other} are one layer, which {row.name} has no way to say"
            )
        refused = []
        for name, layer in contents.layers.items():
            try:
                row.target(layer.spec)
            except ValueError as error:
                refused.append(f"{name}: {error}")
        if refused:
            more = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
            raise ArtifactError(f"{contents.where}: {refused[0]}{more}; with a scheme they are quantized again")
        try:
            row.check(contents)
        except ValueError as error:
            raise ArtifactError(f"{contents.where}: {error}") from None

    def written(self, name: str, stored: QuantizedWeight, reference: Tensor | QuantizedWeight, nbytes: int) -> None:
        """A layer is done."""
        layer = self.contents.layers[name]
        lost = weight_error(reference, stored)
        self._rows[name] = ConvertedLayer(
            name, str(stored.scheme), layer.spec.shape, layer.nbytes, nbytes, lost.relative, layer.about, lost.largest
        )

    def rows(self) -> list[ConvertedLayer]:
        """In the order of the source."""
        return [self._rows[name] for name in self.contents.layers]

    def copy_side_files(self, source: Path, target: Path, folder: Path) -> None:
        """Tokenizer, licence and the like; configs are written by the writer."""
        root = self.contents.root
        if root is None:
            if self.row.name != "artifact":
                self.notes.append("config.json holds nothing but how the weights are stored, as the source has none")
            return
        copied, left = _staging.side_files(root, target)
        wanted = [name for name in copied if name not in _REWRITTEN]
        _staging.copy_files(root, wanted, folder)
        if left:
            self.notes.append(f"not copied: {', '.join(left[:8])}")


def _float_dtype(contents: Contents) -> torch.dtype:
    """What a layer becomes that is written dense: the model's dtype as its config has it, else fp16."""
    named = contents.config.get("dtype", contents.config.get("torch_dtype"))
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(str(named), torch.float16)


def _decoded(layer: PlannedLayer, dtype: torch.dtype) -> PlannedTensor:
    return PlannedTensor(dtype, layer.spec.shape, lambda: layer.read()[0].weight.dequantize(dtype))


def _bias_of(layer: PlannedLayer) -> PlannedTensor:
    assert layer.spec.bias is not None

    def read() -> Tensor:
        bias = layer.read()[0].bias
        assert bias is not None
        return bias

    return PlannedTensor(layer.spec.bias, (layer.spec.shape[0],), read)
