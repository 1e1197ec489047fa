"""What is measured: the linear layers of known models, and the standard cases. Read by `lowbit bench` and by bench/."""

from __future__ import annotations

import dataclasses
from typing import Final

__all__ = [
    "MODELS",
    "OTHER_SCHEMES",
    "SMALL_SHAPES",
    "STANDARD_A8_SCHEMES",
    "STANDARD_MS",
    "STANDARD_SCHEMES",
    "STANDARD_SHAPES",
    "Model",
    "Shape",
    "model_shapes",
]


@dataclasses.dataclass(frozen=True)
class Shape:
    """W[N, K] and the layers that have it."""

    N: int
    K: int
    label: str = ""

    def __str__(self) -> str:
        return f"{self.N}x{self.K}"


@dataclasses.dataclass(frozen=True)
class Model:
    """The numbers of a decoder's config.json that give the shapes of its linear layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS: Final = {
    "llama-3.2-1b": Model(2048, 8192, 32, 8, 64),
    "llama-3.2-3b": Model(3072, 8192, 24, 8, 128),
    "llama-3.1-8b": Model(4096, 14336, 32, 8, 128),
    "llama-3.1-70b": Model(8192, 28672, 64, 8, 128),
    "llama-3.1-405b": Model(16384, 53248, 128, 8, 128),
    "qwen2.5-0.5b": Model(896, 4864, 14, 2, 64),
    "qwen2.5-1.5b": Model(1536, 8960, 12, 2, 128),
    "qwen2.5-7b": Model(3584, 18944, 28, 4, 128),
    "qwen2.5-14b": Model(5120, 13824, 40, 8, 128),
    "qwen2.5-32b": Model(5120, 27648, 40, 8, 128),
    "qwen2.5-72b": Model(8192, 29568, 64, 8, 128),
    "mistral-7b": Model(4096, 14336, 32, 8, 128),
    "gemma-2-9b": Model(3584, 14336, 16, 8, 256),
    "phi-3-mini": Model(3072, 8192, 32, 32, 96),
}

#: Where nothing else is asked for. N x K, so the second one is Llama-3.1-8B's gate_proj and the third its down_proj.
STANDARD_SHAPES: Final = (Shape(4096, 4096), Shape(14336, 4096), Shape(4096, 14336))
STANDARD_MS: Final = (1, 4, 16, 64, 256)
STANDARD_SCHEMES: Final = ("int4-g128", "int4-g32", "int8", "fp8", "nf4-g64")
STANDARD_A8_SCHEMES: Final = ("int4-g128-a8", "int8-a8")
#: The other widths and forms: what they cost beside their own bytes.
OTHER_SCHEMES: Final = (
    "int2-g32-offset", "int3-g64-offset", "int4-g32-asym", "int5-g64", "int6-g64", "fp8-b128",
)  # fmt: skip
#: Of a small encoder, all-MiniLM-L6-v2: attention, and the two halves of its MLP.
SMALL_SHAPES: Final = (Shape(384, 384), Shape(1536, 384), Shape(384, 1536))


def model_shapes(name: str) -> list[Shape]:
    """The distinct shapes of one decoder layer.

    Example:
        >>> [str(shape) for shape in model_shapes("llama-3.1-8b")]
        ['4096x4096', '1024x4096', '14336x4096', '4096x14336']
    """
    model = MODELS[name]
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layers = {
        "q_proj": (q, model.hidden),
        "k_proj": (kv, model.hidden),
        "v_proj": (kv, model.hidden),
        "o_proj": (model.hidden, q),
        "gate_proj": (model.intermediate, model.hidden),
        "up_proj": (model.intermediate, model.hidden),
        "down_proj": (model.hidden, model.intermediate),
    }
    named: dict[tuple[int, int], list[str]] = {}
    for layer, shape in layers.items():
        named.setdefault(shape, []).append(layer)
    return [Shape(N, K, f"{name} {', '.join(labels)}") for (N, K), labels in named.items()]
