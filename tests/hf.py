"""Tiny Transformers models for the tests of the integrations, made from configs: no hub is asked for anything."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="needs Transformers 5, accelerate and peft: pip install 'lowbit[test]'"
)
transformers.logging.disable_progress_bar()

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# What mixtures of experts have, and DeepSeek's attention.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip


def config(family: str = "llama", **more: Any) -> Any:
    """The config of a tiny model of a family."""
    made = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "mixtral": transformers.MixtralConfig,
        "qwen2": transformers.Qwen2Config,  # with biases
        "qwen2_moe": functools.partial(transformers.Qwen2MoeConfig, **EXPERTS, shared_expert_intermediate_size=32),
        "qwen3_moe": functools.partial(transformers.Qwen3MoeConfig, **EXPERTS, head_dim=16),
        "deepseek_v2": functools.partial(transformers.DeepseekV2Config, **EXPERTS, **LATENT),
        "deepseek_v3": functools.partial(transformers.DeepseekV3Config, **EXPERTS, **LATENT),
        "gpt_oss": functools.partial(transformers.GptOssConfig, num_local_experts=4, head_dim=16),
        "qwen3": functools.partial(transformers.Qwen3Config, head_dim=16),
    }[family]
    fixed = getattr(made, "keywords", {})
    return made(**{"tie_word_embeddings": False, **SIZES, **fixed, **more})


def save(folder: Path, family: str = "llama", **more: Any) -> Path:
    """A folder with a dense model of random weights, spread out so that greedy tokens are not close calls."""
    model = transformers.AutoModelForCausalLM.from_config(config(family, **more))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            elif parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
    model.save_pretrained(folder)
    return folder


def store(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, as Transformers wants it."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def load(folder: Path | str, **more: Any) -> Any:
    """AutoModelForCausalLM.from_pretrained."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **more)


def ids(batch: int = 2, length: int = 8) -> Tensor:
    """Random tokens, always the same."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    """What a model says to `ids()`."""
    with torch.no_grad():
        found: Tensor = model(ids()).logits
    return found


def greedy(model: Any, tokens: int = 12) -> Tensor:
    """The tokens that a model goes on with."""
    prompt = ids()
    found: Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return found[:, prompt.shape[1] :]


def same_state(one: nn.Module, other: nn.Module) -> None:
    """Both hold the same tensors, bit by bit."""
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name
