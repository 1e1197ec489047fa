"""What quantizing does to the encoder: size on disk, latency, and how far its embeddings move."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from minilm import Encoder, encode, tokenize
from torch import Tensor, nn

import lowbit
from lowbit.commands._measure import Call, Others, interleave

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Scheme -> the mean cosine similarity to fp32 below which the demo fails.
REQUIRED: Mapping[str, float] = {"int8": 0.999, "int4-g32": 0.97, "fp8": 0.99}
BASELINE = "torch fp32"
BATCHES = (1, 32)


@dataclasses.dataclass(frozen=True)
class Variant:
    """The encoder in one precision.

    Args:
        name: a scheme, or torch's dtype.
        model: as loaded from disk.
        disk_bytes: its files, all of them.
        linear_bytes: the weights of its linear layers.
        reloaded: whether the loaded model gives the embeddings of the saved one to the bit.
    """

    name: str
    model: Encoder
    disk_bytes: int
    linear_bytes: int
    embeddings: Tensor
    reloaded: bool


@dataclasses.dataclass(frozen=True)
class Quality:
    """How near the embeddings are to those of the fp32 model.

    Args:
        mean, least: cosine similarity, over the sentences.
        neighbours: share of the sentences whose most similar other sentence is the same as with fp32.
    """

    mean: float
    least: float
    neighbours: float


def make_variants(
    load: Callable[[], Encoder], tokenizer: Tokenizer, sentences: Sequence[str], schemes: Sequence[str]
) -> Iterator[Variant]:
    """fp32, bf16, then each scheme: quantized, saved, loaded again."""
    yield _through_disk(BASELINE, load(), tokenizer, sentences)
    yield _through_disk("torch bf16", load().bfloat16(), tokenizer, sentences)
    for scheme in schemes:
        model = load()
        lowbit.quantize_(model, scheme)
        yield _through_disk(scheme, model, tokenizer, sentences)


def _through_disk(name: str, model: Encoder, tokenizer: Tokenizer, sentences: Sequence[str]) -> Variant:
    before = encode(model, tokenizer, sentences)
    with tempfile.TemporaryDirectory(prefix="lowbit-demo-") as folder:
        lowbit.save_quantized(model, folder)
        disk = sum(file.stat().st_size for file in Path(folder).iterdir())
        loaded = lowbit.load_quantized(Encoder, folder).eval()
    after = encode(loaded, tokenizer, sentences)
    linear = sum(
        module.weight.nbytes for module in loaded.modules() if isinstance(module, nn.Linear | lowbit.QuantizedLinear)
    )
    return Variant(name, loaded, disk, linear, after, torch.equal(before, after))


def compare(embeddings: Tensor, reference: Tensor) -> Quality:
    """Embeddings [sentences, hidden] of length 1 against those of the fp32 model."""
    cosine = (embeddings * reference).sum(-1)
    same = _nearest(embeddings) == _nearest(reference)
    return Quality(cosine.mean().item(), cosine.min().item(), same.float().mean().item())


def _nearest(embeddings: Tensor) -> Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-1.0).argmax(-1)


@dataclasses.dataclass(frozen=True)
class Latency:
    """Forwards of one batch size.

    Args:
        batch: sentences at once.
        seconds: name of a variant -> median of one forward.
        others: cores that other programs kept busy meanwhile; None where the system does not say.
    """

    batch: int
    seconds: Mapping[str, float]
    others: float | None


def latencies(
    variants: Sequence[Variant], tokenizer: Tokenizer, sentences: Sequence[str], seconds: float
) -> list[Latency]:
    """For each of BATCHES; the variants take turns for `seconds`."""
    found = []
    for size in BATCHES:
        ids, mask = tokenize(tokenizer, sentences[:size])
        others = Others()
        with torch.inference_mode():
            samples = interleave({v.name: _call(v.model, ids, mask) for v in variants}, seconds)
        found.append(Latency(size, {name: sample.median for name, sample in samples.items()}, others.cores()))
    return found


def _call(model: Encoder, ids: Tensor, mask: Tensor) -> Call:
    return lambda i: model(ids, mask)


def failures(variants: Sequence[Variant], qualities: Mapping[str, Quality]) -> list[str]:
    """What does not hold, in words; empty when all is well."""
    found = [
        f"{v.name}: the loaded model gives other embeddings than the saved one" for v in variants if not v.reloaded
    ]
    for name, required in REQUIRED.items():
        if name in qualities and not qualities[name].mean >= required:  # so that NaN fails
            found.append(f"{name}: mean cosine similarity {qualities[name].mean:.5f}, required {required}")
    return found
