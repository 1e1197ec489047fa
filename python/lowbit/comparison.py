"""compare_checkpoints: how far two forms of one model are apart, layer by layer and, with transformers, in their outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit._outputs import OutputComparison, compare_outputs, load_model
from lowbit._progress import progress_bar
from lowbit._weight_error import weight_error
from lowbit.errors import ArtifactError
from lowbit.formats._contents import open_artifact, open_dense, source_kind
from lowbit.formats._experts import take_apart
from lowbit.formats._record import LinearRecord, PlannedTensor
from lowbit.formats._registry import open_plan
from lowbit.formats._writer import Contents
from lowbit.report import Report, error_cells, format_bytes, format_shape, format_table
from lowbit.weight import QuantizedWeight

__all__ = ["Comparison", "LayerComparison", "compare_checkpoints"]

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """A weight W[N, K] of A, and W' of B.

    Args:
        name: path of the module.
        a, b: what it is in each: a scheme, or a dtype.
        shape: (N, K).
        bytes_a, bytes_b: of the weight.
        relative_error: ||W - W'|| / ||W|| (Frobenius).
        largest_error: max |W - W'|.
        sqnr_db: -20 log10(relative_error); infinite when equal.
    """

    name: str
    a: str
    b: str
    shape: tuple[int, int]
    bytes_a: int
    bytes_b: int
    relative_error: float
    largest_error: float
    sqnr_db: float


@dataclasses.dataclass(frozen=True)
class Comparison(Report):
    """What compare_checkpoints found. `print(comparison)` shows tables; `to_dict()` is JSON.

    Args:
        a, b: the paths.
        layers: every weight that is quantized in one of them, in the order of A.
        equal, different: other tensors of both: how many are the same to the bit, and max |difference| of those that are not.
        only_a, only_b: names that the other does not have.
        bytes_a, bytes_b: of everything.
        outputs: how far the models' outputs are apart, where they were run.
    """

    a: str
    b: str
    layers: tuple[LayerComparison, ...]
    equal: int
    different: Mapping[str, float]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    bytes_a: int
    bytes_b: int
    outputs: OutputComparison | None = None

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                layer.a,
                layer.b,
                format_shape(layer.shape),
                format_bytes(layer.bytes_a),
                format_bytes(layer.bytes_b),
                *error_cells(layer.relative_error, layer.largest_error, layer.sqnr_db),
            )
            for layer in self.layers
        ]
        head = ("layer", "A", "B", "N x K", "bytes A", "bytes B", "error", "largest", "SQNR dB")
        lines = [format_table(head, rows, left=3), ""]
        for name, difference in self.different.items():
            lines.append(f"{name}: differs by up to {difference:.3g}")
        for which, names in (("A", self.only_a), ("B", self.only_b)):
            if names:
                lines.append(f"only in {which}: {', '.join(names[:8])}" + (" ..." if len(names) > 8 else ""))
        if self.outputs is not None:
            lines += [str(self.outputs), ""]
        worst = max(self.layers, key=lambda layer: layer.relative_error, default=None)
        what = "no layer is quantized" if worst is None else f"largest error {worst.relative_error:.2e} in {worst.name}"
        lines.append(
            f"A {self.a}: {format_bytes(self.bytes_a)}; B {self.b}: {format_bytes(self.bytes_b)}; {len(self.layers)} layers "
            f"compared, {what}; {self.equal} other tensors are equal"
        )
        return "\n".join(lines)


def compare_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    tokens: Sequence[Sequence[int]] | None = None,
    config_from: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Compare two forms of a model: artifacts, checkpoints of other libraries, or dense safetensors, in any combination.

    Layers are read one at a time. With token ids both models are built with transformers, run in fp32, and their outputs
    compared: for a language model the share of positions whose most likely next token is the same, and the
    Kullback-Leibler divergence of B from A; for an encoder the cosine similarity of the last hidden states.

    Args:
        a: what errors are measured against.
        b: the other one.
        tokens: sequences of token ids to run.
        config_from: a folder whose config.json says what model it is; by default that of A, else of B.
        progress: show a progress bar; by default on a terminal, when there is much to read.

    Raises:
        ArtifactError: one of them cannot be read, or they have no layer in common.
        ModuleNotFoundError: tokens are given and transformers is not installed.

    Example:
        >>> print(lowbit.compare_checkpoints("Llama-3.1-8B", "Llama-3.1-8B-int4"))
    """
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(_open(Path(path))) for path in (a, b))
        shared = [name for name in first.weights if name in second.weights]
        if not shared:
            some = (next(iter(side.weights), "none") for side in (first, second))
            raise ArtifactError("{} and {} have no layer in common; layers are called {} and {}".format(a, b, *some))
        total = sum(first.weights[name].nbytes + second.weights[name].nbytes for name in shared)
        with progress_bar("comparing", total, progress) as advance:
            rows, equal, different = _compare_weights(first, second, shared, advance)
        more_equal, more_different = _compare_tensors(first, second)
        only_a, only_b = _only(first, second), _only(second, first)
    outputs = None
    if tokens is not None:
        root = _config_root(config_from, Path(a), Path(b))
        outputs = compare_outputs(load_model(Path(a), root), load_model(Path(b), root), tokens)
    return Comparison(
        str(a),
        str(b),
        tuple(rows),
        equal + more_equal,
        different | more_different,
        only_a,
        only_b,
        first.nbytes,
        second.nbytes,
        outputs,
    )


# -- one side ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight [N, K], quantized or not, not read yet."""

    about: str
    quantized: bool
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Tensor | QuantizedWeight]


@dataclasses.dataclass(frozen=True)
class _Side:
    weights: dict[str, _Weight]
    tensors: Mapping[str, PlannedTensor]
    nbytes: int


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_Side]:
    kind = source_kind(path)
    with contextlib.ExitStack() as stack:
        if kind == "checkpoint":
            plan, _ = stack.enter_context(open_plan(path))
            plan = take_apart(plan)

            def reader(name: str) -> Callable[[], QuantizedWeight]:
                def read() -> QuantizedWeight:
                    record = plan.read(name)
                    assert isinstance(record, LinearRecord)
                    return record.weight

                return read

            layers = {
                name: _Weight(layer.about, True, layer.shape, layer.nbytes, reader(name))
                for name, layer in plan.layers.items()
            }
            tensors: Mapping[str, PlannedTensor] = plan.tensors
        else:
            contents: Contents = stack.enter_context(open_artifact(path) if kind == "artifact" else open_dense(path))
            layers = {
                name: _Weight(layer.about, True, layer.spec.shape, layer.nbytes, _weight_of(layer.read))
                for name, layer in contents.layers.items()
            }
            tensors = contents.tensors
        nbytes = sum(x.nbytes for x in layers.values()) + sum(x.nbytes for x in tensors.values())
        dense, rest = _split(tensors)
        yield _Side({**layers, **dense}, rest, nbytes)


def _weight_of(read: Callable[[], tuple[LinearRecord, Any]]) -> Callable[[], QuantizedWeight]:
    return lambda: read()[0].weight


def _split(tensors: Mapping[str, PlannedTensor]) -> tuple[dict[str, _Weight], dict[str, PlannedTensor]]:
    """Weights that may be quantized in the other one, by the names of their modules; and the rest."""
    dense, rest = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in _FLOATS:
            about = str(tensor.dtype).removeprefix("torch.")
            dense[name.removesuffix(".weight")] = _Weight(about, False, tensor.shape, tensor.nbytes, tensor.read)
        else:
            rest[name] = tensor
    return dense, rest


# -- comparing -----------------------------------------------------------------------------------------------------------------


def _compare_weights(
    first: _Side, second: _Side, shared: Sequence[str], advance: Callable[[str, int], None]
) -> tuple[list[LayerComparison], int, dict[str, float]]:
    rows, equal, different = [], 0, {}
    for name in shared:
        a, b = first.weights[name], second.weights[name]
        if a.shape != b.shape:
            raise ArtifactError(f"{name} is {list(a.shape)} in A and {list(b.shape)} in B")
        error = weight_error(a.read(), b.read())
        advance(name, a.nbytes + b.nbytes)
        if a.quantized or b.quantized:
            shape = (a.shape[0], a.shape[1])
            rows.append(
                LayerComparison(
                    name, a.about, b.about, shape, a.nbytes, b.nbytes, error.relative, error.largest, error.sqnr_db
                )
            )
        elif error.largest == 0:
            equal += 1
        else:
            different[f"{name}.weight"] = error.largest
    return rows, equal, different


def _compare_tensors(first: _Side, second: _Side) -> tuple[int, dict[str, float]]:
    """Everything that is not a matrix."""
    equal, different = 0, {}
    for name, planned in first.tensors.items():
        if name not in second.tensors:
            continue
        a, b = planned.read(), second.tensors[name].read()
        if a.shape != b.shape:
            raise ArtifactError(f"{name} is {list(a.shape)} in A and {list(b.shape)} in B")
        distance = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        if distance == 0:
            equal += 1
        else:
            different[name] = distance
    return equal, different


def _only(mine: _Side, other: _Side) -> tuple[str, ...]:
    layers = [name for name in mine.weights if name not in other.weights]
    # A bias belongs to its layer where that is quantized, and is a tensor where it is not.
    tensors = [
        name for name in mine.tensors if name not in other.tensors and name.removesuffix(".bias") not in other.weights
    ]
    return (*layers, *tensors)


def _config_root(given: str | os.PathLike[str] | None, *paths: Path) -> Path:
    """The folder whose config.json says what model it is."""
    if given is not None:
        return Path(given)
    for path in paths:
        root = path if path.is_dir() else path.parent
        if (root / "config.json").is_file() and "architectures" in json.loads((root / "config.json").read_text()):
            return root
    raise ArtifactError(
        f"neither {paths[0]} nor {paths[1]} has a config.json with the architecture: name one (--config-from)"
    )
