"""Running two models of transformers on the same token ids, and how far their outputs are apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ArtifactError
from lowbit.formats import load_checkpoint
from lowbit.formats._contents import source_kind
from lowbit.serialize import load_quantized

__all__ = ["OutputComparison", "compare_outputs", "load_model"]


@dataclasses.dataclass(frozen=True)
class OutputComparison:
    """How far the outputs of B are from those of A.

    Args:
        sequences, positions: what was run.
        top1: share of positions with the same most likely next token; None for an encoder.
        kl_mean, kl_largest: Kullback-Leibler divergence of B's distribution from A's, in nats; None for an encoder.
        nll_a, nll_b: mean negative log likelihood of the next token of the sequences; None without next tokens.
        cosine_mean, cosine_least: similarity of the last hidden states of an encoder; None for a language model.
    """

    sequences: int
    positions: int
    top1: float | None = None
    kl_mean: float | None = None
    kl_largest: float | None = None
    nll_a: float | None = None
    nll_b: float | None = None
    cosine_mean: float | None = None
    cosine_least: float | None = None

    def __str__(self) -> str:
        head = f"outputs at {self.positions} positions of {self.sequences} sequences: "
        if self.cosine_mean is not None:
            return head + f"cosine similarity {self.cosine_mean:.5f} (least {self.cosine_least:.5f})"
        text = (
            head + f"top-1 agreement {self.top1:.2%}, KL divergence {self.kl_mean:.3e} (largest {self.kl_largest:.3e})"
        )
        if self.nll_a is not None and self.nll_b is not None:
            text += f"; perplexity {math.exp(min(self.nll_a, 700)):.4g} -> {math.exp(min(self.nll_b, 700)):.4g}"
        return text


def load_model(path: Path, root: Path) -> nn.Module:
    """A model of transformers in fp32 (what is quantized stays packed), with the weights of any source.

    Args:
        path: an artifact, a checkpoint that another library quantized, or a dense one.
        root: the folder of config.json.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ArtifactError: there is no such architecture, or the source does not fit it.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "comparing outputs needs transformers: pip install transformers", name=error.name
        ) from None
    config = transformers.AutoConfig.from_pretrained(root)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ArtifactError(
            f"{root}: transformers {transformers.__version__} has no architecture {names or 'that it names'}"
        )
    config.dtype = torch.float32
    source = source_kind(path)
    if source == "dense":
        return kind.from_pretrained(path, config=config, dtype=torch.float32).eval()

    def make() -> nn.Module:
        model: nn.Module = kind(config)
        return model

    if source == "artifact":
        return load_quantized(make, path).float().eval()
    loaded = load_checkpoint(path, make, dtype=torch.float32, progress=False).model
    assert loaded is not None
    return loaded.eval()


def compare_outputs(a: nn.Module, b: nn.Module, tokens: Sequence[Sequence[int]]) -> OutputComparison:
    """Run both models on each sequence alone, so that nothing is padded.

    Args:
        a, b: called with input_ids int64 [1, T]; they return an object with `logits` [1, T, vocabulary] or
            `last_hidden_state` [1, T, hidden].
        tokens: sequences of token ids.

    Raises:
        ValueError: there is no token, or an output is not finite.

    Example:
        >>> compare_outputs(model, quantized, [[1, 5, 7, 9]]).top1
        1.0
    """
    if not tokens or not all(len(sequence) for sequence in tokens):
        raise ValueError("there must be at least one sequence, and each needs a token")
    found: list[dict[str, Tensor]] = []
    with torch.inference_mode():
        for number, sequence in enumerate(tokens):
            ids = torch.tensor([list(sequence)], dtype=torch.int64)
            outputs = [_output(model(input_ids=ids)) for model in (a, b)]
            for name, (_, value) in zip("AB", outputs, strict=True):
                if not torch.isfinite(value).all():
                    raise ValueError(f"the output of {name} on sequence {number} is not finite")
            (kind, first), (_, second) = outputs
            found.append(_language(first, second, ids[0]) if kind == "logits" else _encoder(first, second))
    return _summary(found, len(tokens))


def _output(result: Any) -> tuple[str, Tensor]:
    for name in ("logits", "last_hidden_state"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            return name, value[0].float()
    raise ValueError(f"a model returned {type(result).__name__}, which has neither logits nor last_hidden_state")


def _language(a: Tensor, b: Tensor, ids: Tensor) -> dict[str, Tensor]:
    p, q = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
    following = ids[1:, None]
    return {
        "top1": (a.argmax(-1) == b.argmax(-1)).double(),
        "kl": (p.exp() * (p - q)).sum(-1).clamp(min=0),  # rounding may leave -1e-17
        "nll_a": -p[:-1].gather(-1, following)[:, 0],
        "nll_b": -q[:-1].gather(-1, following)[:, 0],
    }


def _encoder(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {"cosine": torch.cosine_similarity(a.double(), b.double(), dim=-1)}


def _summary(found: Sequence[dict[str, Tensor]], sequences: int) -> OutputComparison:
    joined = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    mean: Callable[[str], float | None] = lambda name: float(joined[name].mean()) if joined[name].numel() else None  # noqa: E731
    if "cosine" in joined:
        cosine = joined["cosine"]
        return OutputComparison(
            sequences, cosine.numel(), cosine_mean=float(cosine.mean()), cosine_least=float(cosine.min())
        )
    return OutputComparison(
        sequences,
        joined["kl"].numel(),
        mean("top1"),
        mean("kl"),
        float(joined["kl"].max()),
        mean("nll_a"),
        mean("nll_b"),
    )
