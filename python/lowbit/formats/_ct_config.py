"""The config of compressed-tensors: groups of layers, which names belong to them, and how weights and inputs are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from lowbit.errors import ArtifactError
from lowbit.formats._codes import group_about
from lowbit.formats._pattern import Pattern, PatternError
from lowbit.formats._settings import Settings

__all__ = ["Group", "Targets", "read_config"]

_FORMATS: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_NOT_YET: Final = {"mxfp6-pack-quantized": "6-bit floats"}
#: Formats of small floats under scales of one byte: kind in _microscaling.py, and what the weights of the config must say.
_MICROSCALING: Final = {
    "nvfp4-pack-quantized": ("nvfp4", 4, "tensor_group", 16),
    "mxfp4-pack-quantized": ("mxfp4", 4, "group", 32),
    "mxfp8-quantized": ("mxfp8", 8, "group", 32),
    "mxfp8-pack-quantized": ("mxfp8", 8, "group", 32),
}
_BITS: Final = (2, 3, 4, 5, 6, 8)
# Long enough for any model; a bound on the work of matching names against patterns.
_MAX_NAME: Final = 1000


@dataclasses.dataclass(frozen=True)
class Group:
    """How the layers of one config group are stored.

    Args:
        kind: "int", "float", or a kind of _microscaling.py.
        bits: of a code.
        strategy: "tensor", "channel", "group" or "block".
        group_size: -1 unless the strategy is "group".
        activation: of a Scheme.
        about: for people.
    """

    kind: str
    bits: int
    strategy: str
    group_size: int
    activation: str | None
    about: str


class Targets:
    """Which layer belongs to which group, and which to none.

    A target is the name of a layer, a regular expression behind "re:" that fits the beginning of one, or the class of a
    module. Names go before expressions, those in alphabetical order before classes. A checkpoint does not say of what class
    a layer was: every quantized one counts as Linear, or as Embedding when it is called so and a group asks for that.
    """

    def __init__(self, where: str, version: str, groups: Sequence[tuple[list[str], Group | None]], ignore: list[str]):
        self.where = where
        self.version = version
        self._groups: dict[str, Group | None] = {target: group for targets, group in groups for target in targets}
        self._ignore = ignore
        self._patterns = {text: self._compile(text) for text in sorted({*self._groups, *ignore}) if text[:3] == "re:"}

    def _compile(self, text: str) -> Pattern:
        try:
            return Pattern(text[3:])
        except PatternError as error:
            raise ArtifactError(f"{self.where}: {text[:200]!r} is not a pattern that is understood: {error}") from None

    def ignored(self, path: str) -> str | None:
        """The entry of `ignore` that names a layer, or None."""
        self._check_name(path)
        return next(
            (t for t in self._ignore if t == path or (t in self._patterns and self._patterns[t].match(path))), None
        )

    def group_of(self, path: str) -> Group | None:
        """The group of a quantized layer; None when there is none."""
        self._check_name(path)
        if path in self._groups:
            return self._groups[path]
        for text, pattern in self._patterns.items():
            if text in self._groups and pattern.match(path):
                return self._groups[text]
        classes = [t for t in self._groups if t not in self._patterns and "." not in t]
        if "Embedding" in classes and "embed" in path.rpartition(".")[2]:
            return self._groups["Embedding"]
        return self._groups["Linear"] if "Linear" in classes else None

    def _check_name(self, path: str) -> None:
        if len(path) > _MAX_NAME:
            raise ArtifactError(f"{self.where}: a layer's name of {len(path)} characters is too long: {path[:80]!r}")


def read_config(config: Settings) -> Targets:
    """What a quantization_config of compressed-tensors says; ArtifactError for anything that is not read."""
    _refuse_unread(config)
    sections = config.section("config_groups")
    if sections is None or not sections.values:
        raise config.fail("config_groups", "an object with a group of layers")
    default = config.text("format", "")
    groups = []
    for name in sections.values:
        section = sections.section(name)
        if section is None:
            raise sections.fail(name, "an object")
        groups.append((section.strings("targets"), _group(section, default)))
    return Targets(config.where, config.text("version", ""), groups, config.strings("ignore"))


def _refuse_unread(config: Settings) -> None:
    sparsity = config.section("sparsity_config")
    if sparsity is not None and sparsity.values and sparsity.text("format", "dense") != "dense":
        raise ArtifactError(f"{sparsity.where}: sparse format {sparsity.text('format')[:80]!r} is not read")
    transform = config.section("transform_config")
    if transform is not None and transform.values.get("config_groups"):
        raise ArtifactError(f"{transform.where}: rotations of inputs (transforms) are not applied, so this is not read")


def _group(section: Settings, default: str) -> Group | None:
    """None for a group whose weights are not quantized."""
    format = section.text("format", default)
    if format in _NOT_YET:
        raise ArtifactError(f"{section.where}: {format} is not read yet: it has {_NOT_YET[format]}")
    if format not in (*_FORMATS, *_MICROSCALING, "mixed-precision", ""):
        raise ArtifactError(f"{section.where}: format {format[:80]!r} is not read")
    if "output_activations" in section:
        raise ArtifactError(
            f"{section.where}: output_activations (quantized outputs) are not computed, so this is not read"
        )
    weights = section.section("weights")
    if weights is None:
        return None
    if format in _MICROSCALING:
        return _small_floats(weights, format)
    kind, strategy = weights.text("type", "int"), weights.text("strategy", "tensor")
    group_size = -1
    if strategy == "group":
        group_size = weights.integer("group_size")
        if group_size != -1 and group_size < 1:
            raise weights.fail("group_size", "-1 or above 0")
    activation = _activation(section.section("input_activations"))
    suffix = "" if activation is None else f", inputs {activation}"
    if kind == "int":
        if strategy not in ("tensor", "channel", "group"):
            raise weights.fail("strategy", "tensor, channel or group for integers")
        bits = weights.integer("num_bits", _BITS)
        return Group(kind, bits, strategy, group_size, activation, group_about(bits, group_size) + suffix)
    if kind != "float" or weights.integer("num_bits") != 8 or strategy not in ("tensor", "channel", "block"):
        what = f"{weights.values.get('num_bits')}-bit {kind[:20]} weights with strategy {strategy[:20]!r}"
        raise ArtifactError(f"{weights.where}: {what} are not read: scales of this kind are not supported yet")
    if strategy == "block" and weights.values.get("block_structure") not in ([128, 128], "128x128"):
        raise weights.fail("block_structure", "[128, 128]")
    about = {"tensor": "one scale", "channel": "one scale per row", "block": "blocks of 128 x 128"}[strategy]
    return Group(kind, 8, strategy, -1, activation, f"fp8, {about}{suffix}")


def _small_floats(weights: Settings, format: str) -> Group:
    """Inputs, which the checkpoint has rounded to 4 or 8 bits in small groups, stay as they are: that rounds less."""
    kind, bits, strategy, group_size = _MICROSCALING[format]
    if weights.text("type") != "float":
        raise weights.fail("type", f"'float' in {format}")
    weights.integer("num_bits", (bits,))
    if weights.text("strategy") != strategy:
        raise weights.fail("strategy", f"{strategy!r} in {format}")
    weights.integer("group_size", (group_size,))
    return Group(kind, bits, strategy, group_size, None, f"{kind}, groups of {group_size}")


def _activation(section: Settings | None) -> str | None:
    """The activation of a Scheme that does what `input_activations` says, or closer to the unquantized input."""
    if section is None:
        return None
    kind, strategy = section.text("type", "int"), section.text("strategy", "tensor")
    dynamic, symmetric = section.boolean("dynamic", False), section.boolean("symmetric", True)
    refused = ArtifactError(
        f"{section.where}: {section.values.get('num_bits')}-bit {kind[:20]} inputs, strategy {strategy[:20]!r}, "
        f"{'dynamic' if dynamic else 'static'}, {'' if symmetric else 'a'}symmetric: not supported"
    )
    if section.integer("num_bits", default=8) != 8 or kind not in ("int", "float"):
        raise refused
    if kind == "float" and symmetric and dynamic and strategy == "group" and section.integer("group_size") == 128:
        return "fp8_g128"
    # A scale per token where the checkpoint was made for one per tensor rounds less, never more.
    if (
        strategy not in ("token", "tensor")
        or (not dynamic and strategy != "tensor")
        or (kind == "float" and not symmetric)
    ):
        raise refused
    name = ("int8" if kind == "int" else "fp8") + ("" if dynamic else "_static")
    return name if symmetric else name + "_asym"
