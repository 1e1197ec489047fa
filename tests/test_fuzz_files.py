"""Ten thousand mutated files: always our exception, or a load that is right; never a crash, a hang or anything else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from artifacts import Tiny, edit_manifest, quantized_tiny, replace_shard, same, seal
from lowbit import ArtifactError, QuantizedWeight, load_quantized, save_quantized
from lowbit._safetensors import SafetensorsFile

# Values that have broken readers before.
_NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**53, 2**62, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, "", "x", "\0", "..",
    "../x", "/dev/zero", "F32", "U8", "F8_E4M3", "BOOL", "int4", "a" * 3000, "\ud800", [], [[]], {}, [0], [0, 0], [-1, 8],
    [2**62, 4], [1, 2**62], [2**40] * 3, [0, 2**62], [1] * 40, {"dtype": "U8"}, {"": {}},
]  # fmt: skip


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _nodes(child, (*path, key))


def _mutate_json(value: Any, rng: random.Random) -> Any:
    """Change one to three nodes: another value, one that stands elsewhere, a deletion, a new name."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        paths = list(_nodes(value))
        if not paths:
            return copy.deepcopy(rng.choice(_NASTY))
        *parents, key = rng.choice(paths)
        node = value
        for parent in parents:
            node = node[parent]
        action = rng.randrange(5)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[rng.choice(["", "x", "first.weight_packed", "__metadata__", "../../x"])] = node.pop(key)
        elif action == 2:
            *others, last = rng.choice(paths)
            try:
                source = value
                for other in others:
                    source = source[other]
                node[key] = json.loads(json.dumps(source[last]))
            except (KeyError, IndexError, TypeError):
                node[key] = None
        elif action == 3 and type(node[key]) is int:
            node[key] += rng.choice([-8, -1, 1, 8, 2**40])
        else:
            node[key] = copy.deepcopy(rng.choice(_NASTY))
    return value


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(made) + 1)
        action = rng.randrange(6)
        if action == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            made[at : at + rng.randrange(40)] = b""
        elif action == 2:
            made[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif action == 3:
            del made[at:]
        elif action == 4:
            made[0:8] = rng.choice([0, 1, 2, len(data), len(data) - 8, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
        else:
            source = rng.randrange(len(made) + 1)
            made[at : at + 16] = made[source : source + 16]
    return bytes(made)


def _mutate_header(data: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file changed as JSON, its length put right, the tensors' bytes as they were."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    raw = json.dumps(_mutate_json(header, rng)).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


Case = Callable[[random.Random], object]


def _attack(cases: int, seed: int, load: Case) -> dict[str, int]:
    """Run `load` with one random generator per case; it returns after a load that is right."""
    counts = {"refused": 0, "loaded": 0}
    for case in range(cases):
        rng = random.Random(f"{seed}/{case}")
        try:
            load(rng)
        except ArtifactError:
            counts["refused"] += 1
        except BaseException as error:
            error.args = (f"case {seed}/{case}: {error}",)
            raise
        else:
            counts["loaded"] += 1
    return counts


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    save_quantized(quantized_tiny(), tmp_path / "model")
    return tmp_path / "model"


class _Target:
    """A model to load into, made anew only when a load has changed it."""

    def __init__(self) -> None:
        self.model: nn.Module = Tiny()
        self.modules = list(self.model.modules())
        self.tensors = [*self.model.parameters(), *self.model.buffers()]

    def load(self, directory: Path) -> nn.Module:
        try:
            loaded = load_quantized(self.model, directory)
        except BaseException:
            tensors = [*self.model.parameters(), *self.model.buffers()]
            assert all(a is b for a, b in zip(self.modules, self.model.modules(), strict=True))
            assert all(a is b for a, b in zip(self.tensors, tensors, strict=True))
            raise
        self.__init__()  # type: ignore[misc]
        return loaded


def test_bytes_of_the_manifest(artifact: Path) -> None:
    path, original, target = artifact / "lowbit.json", quantized_tiny(), _Target()
    data = path.read_bytes()

    def load(rng: random.Random) -> None:
        path.write_bytes(_mutate_bytes(data, rng))
        assert same(target.load(artifact), original)

    assert _attack(2000, 1, load)["refused"] > 1900


def test_values_in_the_manifest_with_a_right_checksum(artifact: Path) -> None:
    path, original, target = artifact / "lowbit.json", quantized_tiny(), _Target()
    body = json.loads(path.read_bytes())

    def load(rng: random.Random) -> None:
        mutated = _mutate_json(body, rng)
        raw = seal(mutated) if isinstance(mutated, dict) else json.dumps(mutated).encode()
        path.write_bytes(raw)
        loaded = target.load(artifact)
        # Names, shapes and hashes are bound to the shard; what may differ is a detail that does not touch values.
        assert loaded.state_dict().keys() == original.state_dict().keys()

    assert _attack(3000, 2, load)["refused"] > 2700


def test_bytes_of_a_shard(artifact: Path) -> None:
    (shard,) = artifact.glob("*.safetensors")
    data, original, target = shard.read_bytes(), quantized_tiny(), _Target()

    def load(rng: random.Random) -> None:
        shard.write_bytes(_mutate_bytes(data, rng))
        assert same(target.load(artifact), original)

    assert _attack(1000, 3, load)["refused"] > 900


@pytest.mark.parametrize(("mutate", "seed"), [(_mutate_header, 4), (_mutate_bytes, 5)])
def test_a_shard_with_a_right_hash(artifact: Path, mutate: Callable[[bytes, random.Random], bytes], seed: int) -> None:
    (shard,) = artifact.glob("*.safetensors")
    data, original, target = shard.read_bytes(), quantized_tiny(), _Target()

    def load(rng: random.Random) -> None:
        replace_shard(artifact, mutate(data, rng))
        loaded = target.load(artifact)
        assert loaded.state_dict().keys() == original.state_dict().keys()
        assert torch.isfinite(loaded.first.quantized_weight().scales).all()

    assert _attack(1000, seed, load)["refused"] > 300


@pytest.mark.parametrize(("mutate", "seed"), [(_mutate_header, 6), (_mutate_bytes, 7)])
def test_a_single_weight(tmp_path: Path, mutate: Callable[[bytes, random.Random], bytes], seed: int) -> None:
    path = tmp_path / "w.safetensors"
    QuantizedWeight.quantize(torch.randn(8, 24, generator=torch.Generator().manual_seed(0)), "int4-g8-asym").save(path)
    data = path.read_bytes()

    def load(rng: random.Random) -> None:
        path.write_bytes(mutate(data, rng))
        with SafetensorsFile(path) as file:
            assert sum(file.read(name).nbytes for name in file) < len(data) + 1000
        assert torch.isfinite(QuantizedWeight.load(path).dequantize()).all()

    assert _attack(1000, seed, load)["refused"] > 300


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        "9" * 10_000,
        '{"format": ' + "9" * 10_000 + "}",
        '{"a": NaN}',
        "\xff",
        "{}",
        "3",
    ],
)
def test_json_bombs(artifact: Path, tmp_path: Path, text: str) -> None:
    raw = text.encode("latin-1")
    (artifact / "lowbit.json").write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"lowbit\.json"):
        load_quantized(Tiny, artifact)
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ArtifactError, match=r"bomb\.safetensors"):
        QuantizedWeight.load(path)


def test_repeated_keys(artifact: Path) -> None:
    path = artifact / "lowbit.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version": 1', b'"format_version": 1, "format_version": 1'))
    with pytest.raises(ArtifactError, match="'format_version' appears twice"):
        load_quantized(Tiny, artifact)


def test_an_edited_but_consistent_manifest_still_loads(artifact: Path) -> None:
    edit_manifest(artifact, lambda body: body["layers"]["first"]["scheme"].update(search=False))
    assert same(load_quantized(Tiny, artifact), quantized_tiny()) is False  # the scheme's string says so
    assert torch.equal(load_quantized(Tiny, artifact).first.weight, quantized_tiny().first.weight)
