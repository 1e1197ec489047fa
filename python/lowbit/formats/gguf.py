"""GGUF, the files of llama.cpp: quantized weights as they are, under the names that Transformers has for them.

    with lowbit.load_gguf("Llama-3.2-1B-Q4_K_M.gguf") as model:
        for name, record in model:            # "model.layers.0.mlp.up_proj", LinearRecord
            ...

Every type of _gguf_blocks.py is read without changing a value. Llama's rows of Q and K, which GGUF keeps in pairs, are put
back into the order of Transformers.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from lowbit import _C
from lowbit._canonical import canonical_tensors
from lowbit.errors import ArtifactError
from lowbit.formats._bits import pack_codes
from lowbit.formats._format import Container
from lowbit.formats._gguf_blocks import BlockType
from lowbit.formats._gguf_file import MAGIC, GGUFTensor
from lowbit.formats._gguf_names import hugging_face_name
from lowbit.formats._gguf_split import GGUFFiles
from lowbit.formats._record import LinearRecord, Plan, PlannedLinear, PlannedTensor
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["CONTAINER", "GGUFModel", "load_gguf"]

# Weights decoded at a time: few enough for what is made on the way to stay in a cache.
_CHUNK: Final = 1 << 19
_MAX_EXPERTS: Final = 1 << 16
#: Parts of a block that may be codes, and how wide those are.
_CODES: Final = ("scales", "offsets")
_CODE_BITS: Final = {row["name"]: row["bits"] for row in _C.scale_table()}
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


class GGUFModel(Plan):
    """A GGUF file that has been understood and not yet read: a Plan with the file's metadata.

    Iterating gives (name, LinearRecord) for a quantized layer or embedding and (name, Tensor) for everything else.
    Close it, or use it in a `with` statement, when it is no longer read from.

    Attributes:
        metadata: every key of the file with its value: "llama.rope.freq_base", "tokenizer.ggml.tokens", ....

    Example:
        >>> with lowbit.load_gguf("model.gguf") as model:
        ...     model.metadata["general.architecture"], len(model.layers)
        ('llama', 113)
    """

    def __init__(self, file: GGUFFiles) -> None:
        self._gguf = file
        self.metadata: Mapping[str, Any] = file.metadata
        layers, tensors = _Mapper(file).map()
        super().__init__(file.path, CONTAINER.name, _variant(file), layers, tensors)

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        self._gguf.close()

    def __enter__(self) -> GGUFModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def load_gguf(path: str | os.PathLike[str]) -> GGUFModel:
    """Open a GGUF file: its weights, one at a time, and its metadata.

    Names are those of Transformers for the architectures llama (Llama, Mistral, Mixtral), qwen2, qwen3, qwen2moe and
    qwen3moe, experts one by one; for others they are the file's, and nothing is reordered. Values are the file's exactly:
    w = dequantize() equals what llama.cpp computes in fp32.

    Args:
        path: the file; of a model split over several (model-00001-of-00003.gguf) the first one.

    Raises:
        ArtifactError: the file is missing, not well-formed (FormatError), or has a tensor of a type that is not read.

    Example:
        >>> with lowbit.load_gguf("model.gguf") as model:
        ...     weight = model.read("model.layers.0.mlp.up_proj").weight
    """
    file = GGUFFiles(path)
    try:
        return GGUFModel(file)
    except BaseException:
        file.close()
        raise


@contextlib.contextmanager
def _open_plan(path: Path) -> Iterator[Plan]:
    with load_gguf(path) as model:
        yield model


CONTAINER = Container("gguf", "GGUF files of llama.cpp", MAGIC, _open_plan)


def _variant(file: GGUFFiles) -> str:
    types = Counter(tensor.type_name for tensor in file.tensors.values())
    parts = [f"{count} {name}" for name, count in types.most_common()]
    return ", ".join([str(file.metadata.get("general.architecture", "no architecture"))[:80], *parts])


class _Mapper:
    """Gives every tensor of a file its name and its place."""

    def __init__(self, file: GGUFFiles) -> None:
        self.file = file
        self.left = dict(file.tensors)
        self.layers: dict[str, PlannedLinear] = {}
        self.tensors: dict[str, PlannedTensor] = {}
        architecture = file.metadata.get("general.architecture")
        # A LoRA adapter has names of its own.
        known = isinstance(architecture, str) and file.metadata.get("general.type", "model") == "model"
        self.architecture: str = architecture if known and isinstance(architecture, str) else ""

    def fail(self, message: str) -> ArtifactError:
        return ArtifactError(f"{self.file.path}: {message}")

    def map(self) -> tuple[dict[str, PlannedLinear], dict[str, PlannedTensor]]:
        """Layers and tensors by the names they get."""
        weights = [tensor for tensor in self.left.values() if _is_quantized(tensor)]
        for tensor in weights:  # first, because they take biases and scales
            del self.left[tensor.name]
            self._quantized(tensor)
        for tensor in self.left.values():
            self._plain(tensor)
        return self.layers, self.tensors

    # -- names ------------------------------------------------------------------------------------------------------------

    def _names(self, tensor: GGUFTensor, base: str, experts: int) -> list[str]:
        """The name of a module, or of each of its experts; 0 experts: it is not made of experts."""
        found = hugging_face_name(self.architecture, base)
        if found is not None and ("{}" in found) != (experts > 0):
            raise self.fail(f"{tensor.name} has shape {list(tensor.shape)}, which {found} cannot have")
        if experts > _MAX_EXPERTS:
            raise self.fail(f"{tensor.name[:200]}: {experts} experts are more than the {_MAX_EXPERTS} that can be")
        if experts == 0:
            return [found or base]
        return [f"{base}.{i}" if found is None else found.format(i) for i in range(experts)]

    def _rows(self, tensor: GGUFTensor) -> Tensor | None:
        """Where each row belongs, int64 [N]: row n of the file is row rows[n] of the weight; None: where it is.

        GGUF has the two halves of a rotary pair side by side, Transformers half a head apart.
        """
        base, _, _ = tensor.name.rpartition(".")
        part = base.rpartition(".")[2]
        if self.architecture != "llama" or part not in ("attn_q", "attn_k"):
            return None
        if hugging_face_name("llama", base) is None:
            return None
        block = int(base.split(".")[1])
        heads = self._heads("head_count_kv" if part == "attn_k" else "head_count", block)
        N = tensor.shape[0]
        if N % (2 * heads):
            raise self.fail(f"{tensor.name}: N={N} rows are not {heads} heads of an even size")
        return torch.arange(N).view(heads, 2, N // heads // 2).transpose(1, 2).reshape(-1)

    def _heads(self, key: str, block: int) -> int:
        full = f"{self.architecture}.attention.{key}"
        value: Any = self.file.metadata.get(full)
        if value is None and key == "head_count_kv":
            return self._heads("head_count", block)
        if isinstance(value, (list, array.array)):
            value = value[block] if block < len(value) else None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 20:
            raise self.fail(f"{full} is {str(value)[:80]}; the rows of Q and K cannot be put in order without it")
        return value

    def _add(self, name: str, entry: PlannedLinear | PlannedTensor, origin: str) -> None:
        if name in self.layers or name in self.tensors:
            raise self.fail(f"tensor {origin[:200]!r} is {name[:200]!r}, and so is another one")
        if isinstance(entry, PlannedLinear):
            self.layers[name] = entry
        else:
            self.tensors[name] = entry

    # -- tensors that are not quantized -------------------------------------------------------------------------------------

    def _plain(self, tensor: GGUFTensor) -> None:
        base, dot, leaf = tensor.name.rpartition(".")
        template = hugging_face_name(self.architecture, base) if leaf in ("weight", "bias") else None
        if template is None:
            self._add(tensor.name, _planned_tensor(tensor.type, tensor.shape, self._reader(tensor)), tensor.name)
        elif "{}" in template:
            if len(tensor.shape) < 2:
                raise self.fail(f"{tensor.name} has shape {list(tensor.shape)}, without a dimension for experts")
            self._plain_experts(tensor, base, dot + leaf)
        else:
            shape = tensor.shape
            if template.endswith("shared_expert_gate") and leaf == "weight" and len(shape) == 1:
                shape = (1, *shape)  # a Linear with one output
            rows = self._rows(tensor)
            self._add(
                template + dot + leaf,
                _planned_tensor(tensor.type, shape, self._reader(tensor, shape, rows)),
                tensor.name,
            )

    def _plain_experts(self, tensor: GGUFTensor, base: str, suffix: str) -> None:
        shape = tensor.shape[1:]
        for expert, name in enumerate(self._names(tensor, base, tensor.shape[0])):
            one = GGUFTensor(
                tensor.name, tensor.type, shape, tensor.begin + expert * (tensor.nbytes // tensor.shape[0])
            )
            self._add(name + suffix, _planned_tensor(tensor.type, shape, self._reader(one)), tensor.name)

    def _reader(
        self, tensor: GGUFTensor, shape: tuple[int, ...] | None = None, rows: Tensor | None = None
    ) -> Callable[[], Tensor]:
        def read() -> Tensor:
            value = self.file.read(tensor).reshape(shape or tensor.shape)
            return value if rows is None else value[torch.argsort(rows)]

        return read

    # -- quantized tensors ----------------------------------------------------------------------------------------------------

    def _quantized(self, tensor: GGUFTensor) -> None:
        base = tensor.name.removesuffix(".weight")
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 0
        if len(tensor.shape) not in (2, 3):
            raise self.fail(
                f"{tensor.name} is {tensor.type_name} {list(tensor.shape)}; a quantized tensor has 2 or 3 dimensions"
            )
        names = self._names(tensor, base, experts)
        scale = self._companion(base + ".scale", (max(experts, 1),), (torch.float32,))
        bias = self._companion(base + ".bias", tensor.shape[:1], _FLOATS) if experts == 0 else None
        size = tensor.nbytes // max(experts, 1)
        for expert, name in enumerate(names):
            one = GGUFTensor(tensor.name, tensor.type, tensor.shape[-2:], tensor.begin + expert * size)
            self._add(name, self._planned_linear(one, expert, scale, bias), tensor.name)

    def _companion(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> GGUFTensor | None:
        """A bias or a scale that belongs to a weight."""
        found = self.left.get(name)
        if found is None:
            return None
        if found.type not in dtypes or found.shape != shape:
            raise self.fail(f"{name[:200]} is {found.type_name} {list(found.shape)}, its weight asks for {list(shape)}")
        del self.left[name]
        return found

    def _planned_linear(
        self, tensor: GGUFTensor, expert: int, scale: GGUFTensor | None, bias: GGUFTensor | None
    ) -> PlannedLinear:
        rows = self._rows(tensor)
        parts = [part for part in (tensor, scale, bias) if part is not None]

        def read() -> LinearRecord:
            factor = None if scale is None else self.file.read(scale)[expert]
            values = None if bias is None else self._reader(bias, rows=self._rows(bias))()
            return LinearRecord(_read_weight(self.file, tensor, rows, factor), values)

        assert isinstance(tensor.type, BlockType)
        about = f"{tensor.type.name} as {tensor.type.scheme}"
        shape = (tensor.shape[0], tensor.shape[1])
        return PlannedLinear(shape, about, tuple(part.name for part in parts), sum(part.nbytes for part in parts), read)


def _is_quantized(tensor: GGUFTensor) -> bool:
    return isinstance(tensor.type, BlockType)


def _planned_tensor(
    dtype: BlockType | torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]
) -> PlannedTensor:
    assert isinstance(dtype, torch.dtype)
    return PlannedTensor(dtype, shape, read)


def _read_weight(file: GGUFFiles, tensor: GGUFTensor, rows: Tensor | None, factor: Tensor | None) -> QuantizedWeight:
    """The canonical weight of a tensor [N, K], decoded some rows at a time.

    Args:
        rows: as `_Mapper._rows` gives it.
        factor: fp32, one element: every weight is multiplied by it.
    """
    kind = tensor.type
    assert isinstance(kind, BlockType)
    N, K = tensor.shape
    scheme = kind.scheme if factor is None else _scaled(kind.scheme)
    made = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in canonical_tensors(scheme, N, K).items()}
    if factor is not None and scheme.super_groups == -1:
        made["super_scales"], factor = factor.reshape(1).clone(), None
    step = max(1, _CHUNK // K)
    for begin in range(0, N, step):
        count = min(step, N - begin)
        decoded = kind.decode(file.read_rows(tensor, begin, count).reshape(-1, kind.nbytes))._asdict()
        codes = decoded.pop("codes")
        to: Tensor | slice = slice(begin, begin + count) if rows is None else rows[begin : begin + count]
        made["packed"][to] = pack_codes(codes.reshape(count, K), scheme.bits)
        levels = ("super_scales", "super_offsets") if scheme.super_groups > 0 else ("scales", "offsets")
        for name, values in decoded.items():
            if values is None:
                continue
            if factor is not None and name in levels:
                values = values.float() * factor
            values = values.reshape(count, -1)
            if values.dtype == torch.uint8 and name in _CODES:
                values = pack_codes(values, _CODE_BITS[str(scheme.scale_dtype)])
            _put(made[name], to, values)
    return QuantizedWeight.from_tensors(made, scheme, (N, K))


def _put(table: Tensor, to: Tensor | slice, values: Tensor) -> None:
    if table.dtype.itemsize == 1:  # torch puts no float8 into places
        table, values = table.view(torch.uint8), values.view(torch.uint8)
    table[to] = values


def _scaled(scheme: Scheme) -> Scheme:
    """The scheme of such weights times one number: above all scales, in the super scales, or in the scales."""
    change = functools.partial(dataclasses.replace, scheme)
    if scheme.scale_dtype == "e4m3":
        return change(scaling="two_level", super_groups=-1)
    return change(super_dtype="float32") if scheme.super_groups else change(scale_dtype="float32")
