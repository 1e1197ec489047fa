"""Checkpoints for the tests of the command line, and a way to run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class Rotary(nn.Module):
    """A buffer that no checkpoint holds: it is computed when the module is made."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16), persistent=False)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=True)
        self.k_proj = nn.Linear(width, width // 2, bias=False)
        self.v_proj = nn.Linear(width, width // 2, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = Attention(width)
        self.mlp = Mlp(width)
        self.input_layernorm = nn.RMSNorm(width)
        self.register_buffer("steps", torch.tensor(3))


class Decoder(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.rotary_emb = Rotary()


class Llama(nn.Module):
    """The names and shapes of a Llama, and nothing of what it does: a tied head if asked for."""

    def __init__(self, width: int = 64, layers: int = 2, tie: bool = False) -> None:
        super().__init__()
        self.model = Decoder(width, layers)
        self.lm_head = nn.Linear(width, 40, bias=False)
        if tie:
            self.lm_head.weight = self.model.embed_tokens.weight


def make_llama(dtype: torch.dtype = torch.bfloat16, **options: object) -> Llama:
    torch.manual_seed(7)
    model = Llama(**options).to(dtype)  # type: ignore[arg-type]
    model.model.rotary_emb = Rotary()  # stays fp32, as in a model that is loaded
    return model


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, config: Mapping[str, object] | None = None
) -> Path:
    """What the Hub has: safetensors, with an index when there are several, and files around them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name].detach().contiguous() for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama", "vocab_size": 40}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def llama_checkpoint(folder: Path, shards: int = 1, **options: object) -> Path:
    model = make_llama(**options)  # type: ignore[arg-type]
    tensors = model.state_dict()
    if options.get("tie"):
        del tensors["lm_head.weight"]  # as transformers writes it
    return write_checkpoint(folder, tensors, shards)


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **extra}


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "lowbit", *args]


def run(args: Sequence[str], **extra: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        command(*args), capture_output=True, text=True, env=environment(**extra), timeout=120, check=False
    )
