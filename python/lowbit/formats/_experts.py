"""Checkpoints keep each expert's layers by themselves, models the same layer of all experts in one Parameter: joining them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Final

from torch import nn

from lowbit._places import experts_at
from lowbit.experts import ExpertWeights, QuantizedExperts
from lowbit.formats._record import ExpertsRecord, LinearRecord, Plan, PlannedLinear
from lowbit.weight import QuantizedWeight

__all__ = ["ExpertRows", "Groups", "expert_rows", "experts_shape", "join", "known_groups", "take_apart", "with_experts"]

#: Name of the joined layer -> for each part along N, the layers of experts 0, 1, ...
Groups = Mapping[str, Sequence[Sequence[str]]]

# Names of one expert's layers -> what holds them for all experts, and which part along N it is.
_PARTS: Final = {
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
}  # fmt: skip
_EXPERT: Final = re.compile(rf"(.{{1,500}}\.)experts\.([0-9]{{1,6}})\.({'|'.join(_PARTS)})")
# Where gate and up have a tensor each, of all experts: MLX.
_SWITCH: Final = re.compile(r"(.{1,500}\.)switch_mlp\.(gate_proj|up_proj|down_proj)")

# The other way: what holds a layer of all experts, and the layers of one expert whose rows it has.
_WHOLE: Final = re.compile(r"(.{1,500}\.)(?:experts|switch_mlp)\.(gate_up_proj|gate_proj|up_proj|down_proj)")
_LEAVES: Final = {"gate_up_proj": ("gate_proj", "up_proj")}
_MIXTRAL: Final = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclasses.dataclass(frozen=True)
class ExpertRows:
    """A layer of one expert, as the rows of a weight of all experts: name, expert, rows [begin, end)."""

    name: str
    expert: int
    begin: int
    end: int

    def of(self, weight: ExpertWeights) -> QuantizedWeight:
        """The layer's weight; ValueError where it cannot be cut out."""
        mine = weight[self.expert]
        return mine if self.end - self.begin == mine.N else mine.rows(self.begin, self.end)


def expert_rows(name: str, shape: Sequence[int], tensors: Container[str]) -> list[ExpertRows]:
    """The layers of single experts that a weight of all experts stands for, by the names that checkpoints on the hub have.

    Args:
        name: "....experts.gate_up_proj", which becomes "....experts.0.gate_proj" (w1 in a block_sparse_moe), and so on.
        shape: (E, N, K).
        tensors: names of the others. A bias beside it says that gate and up projection alternate (gpt-oss).

    Raises:
        ValueError: they do, or the name is not known.
    """
    match = _WHOLE.fullmatch(name)
    leaves = () if match is None else _LEAVES.get(match[2], (match[2],))
    if match is None or f"{name}_bias" in tensors or shape[1] % len(leaves):
        raise ValueError("holds the weights of experts in an order that no other format has: not converted or compared")
    called = _MIXTRAL if match[1].endswith("block_sparse_moe.") else {}
    rows = shape[1] // len(leaves)
    return [
        ExpertRows(f"{match[1]}experts.{e}.{called.get(leaf, leaf)}", e, i * rows, (i + 1) * rows)
        for e in range(shape[0])
        for i, leaf in enumerate(leaves)
    ]


def take_apart(plan: Plan) -> Plan:
    """The plan with a layer for each expert in place of those for all of them, as other formats have them.

    Raises:
        ArtifactError: as `expert_rows`.
    """
    whole = [name for name, planned in plan.layers.items() if len(planned.shape) == 3]
    if not whole:
        return plan

    @functools.lru_cache(maxsize=3)  # of one module: layers are read in the order of their names
    def experts(name: str) -> ExpertWeights:
        record = plan.layers[name].read()
        assert isinstance(record, ExpertsRecord)
        return record.weight

    def read(name: str, part: ExpertRows) -> LinearRecord:
        return LinearRecord(part.of(experts(name)))

    layers = {name: planned for name, planned in plan.layers.items() if name not in whole}
    for name in whole:
        planned = plan.layers[name]
        try:
            parts = expert_rows(name, planned.shape, plan.tensors)
        except ValueError as error:
            raise plan.fail(f"{name}: {error}") from None
        for part in parts:
            shape, nbytes = (part.end - part.begin, planned.shape[2]), planned.nbytes // len(parts)
            one = functools.partial(read, name, part)
            layers[part.name] = PlannedLinear(shape, planned.about, planned.sources, nbytes, one)
    return Plan(plan.where, plan.format, plan.variant, layers, plan.tensors)


def known_groups(names: Iterable[str], wanted: Callable[[str], bool]) -> dict[str, list[list[str]]]:
    """The layers "....experts.3.up_proj" (or w1, w2, w3), and "....switch_mlp.up_proj", that a model keeps in one Parameter.

    Args:
        names: of layers, as the model has them.
        wanted: whether the model has the weights of experts under a name, in which the parts are joined.

    Returns:
        Only complete ones: experts 0..E-1, each with every part.
    """
    found: dict[str, list[dict[int, str]]] = {}
    for name in names:
        if (match := _EXPERT.fullmatch(name)) is not None:
            prefix, index, leaf = match[1], int(match[2]), match[3]
        elif (match := _SWITCH.fullmatch(name)) is not None:
            prefix, index, leaf = match[1], 0, match[2]
        else:
            continue
        target, part = _PARTS[leaf]
        full = f"{prefix}experts.{target}"
        if wanted(full):
            parts = found.setdefault(full, [{}, {}] if target == "gate_up_proj" else [{}])
            parts[part].setdefault(index, name)
    return {
        full: [[part[e] for e in range(len(part))] for part in parts]
        for full, parts in found.items()
        if parts[0] and all(part.keys() == set(range(len(parts[0]))) for part in parts)
    }


def join(plan: Plan, groups: Groups) -> Plan:
    """The plan with the layers of experts joined; they are still read one at a time.

    Raises:
        ArtifactError: shapes differ between experts, or they are more than weights.
    """
    layers = dict(plan.layers)
    for name, parts in groups.items():
        members = [[layers.pop(one) for one in part] for part in parts]
        layers[name] = _joined(plan, name, parts, members)
    return Plan(plan.where, plan.format, plan.variant, layers, plan.tensors)


def with_experts(plan: Plan, names: dict[str, str], model: nn.Module) -> tuple[Plan, dict[str, str]]:
    """The plan with the layers of experts joined that the model keeps in one Parameter, and the names that go with it."""
    old = {new: name for name, new in names.items() if name in plan.layers}
    groups = known_groups(old, lambda path: path not in old and experts_shape(model, path) is not None)
    members = {new for parts in groups.values() for part in parts for new in part}
    joined = join(plan, {path: [[old[new] for new in part] for part in parts] for path, parts in groups.items()})
    kept = {name: new for name, new in names.items() if new not in members}
    return joined, kept | {path: path for path in groups}


def experts_shape(model: nn.Module, path: str) -> tuple[int, ...] | None:
    """(E, N, K) of the experts at a path, quantized or not; None where there are none."""
    if (found := experts_at(model, path)) is not None:
        return found.shape
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module._shape if isinstance(module, QuantizedExperts) else None


def _joined(
    plan: Plan, name: str, parts: Sequence[Sequence[str]], members: Sequence[Sequence[PlannedLinear]]
) -> PlannedLinear:
    counts = [_count(part) for part in members]
    if len(set(counts)) != 1 or counts[0] < 1:
        raise plan.fail(f"{name}: its parts are of {' and '.join(map(str, counts))} experts")
    rows, columns = 0, members[0][0].shape[-1]
    for part in members:
        for one in part:
            if one.shape[-2:] != (part[0].shape[-2], columns) or (len(one.shape) == 3 and len(part) > 1):
                raise plan.fail(f"{name}: its experts are {list(part[0].shape)} and {list(one.shape)}")
        rows += part[0].shape[-2]
    sources = tuple(source for part in members for one in part for source in one.sources)
    nbytes = sum(one.nbytes for part in members for one in part)

    def weights() -> Iterator[QuantizedWeight]:
        each = [_weights(plan, part, read) for part, read in zip(parts, members, strict=True)]
        for index, expert in enumerate(zip(*each, strict=True)):
            try:
                yield expert[0] if len(expert) == 1 else QuantizedWeight.cat(expert)
            except ValueError as error:
                called = ", ".join(part[min(index, len(part) - 1)] for part in parts)
                raise plan.fail(f"{called}: the model keeps them in one weight, and {error}") from None

    def read() -> ExpertsRecord:
        return ExpertsRecord(ExpertWeights.stack(weights(), counts[0]))

    return PlannedLinear((counts[0], rows, columns), members[0][0].about, sources, nbytes, read)


def _count(part: Sequence[PlannedLinear]) -> int:
    """Experts of one part: a layer for each, or one for all of them."""
    return part[0].shape[0] if len(part) == 1 and len(part[0].shape) == 3 else len(part)


def _weights(plan: Plan, names: Sequence[str], members: Sequence[PlannedLinear]) -> Iterator[QuantizedWeight]:
    for name, planned in zip(names, members, strict=True):
        record = planned.read()
        if isinstance(record, ExpertsRecord):
            yield from record.weight
        else:
            yield _weight(plan, name, record)


def _weight(plan: Plan, name: str, record: object) -> QuantizedWeight:
    assert isinstance(record, LinearRecord)
    if record.bias is not None and bool((record.bias != 0).any()):
        raise plan.fail(f"{name}: has a bias, which the model has no place for beside the weights of experts")
    for beside in ("input_scale", "input_zero", "input_pre_scale"):
        if getattr(record, beside) is not None:
            raise plan.fail(f"{name}: has {beside}, of each expert another; experts in one weight take none")
    return record.weight
