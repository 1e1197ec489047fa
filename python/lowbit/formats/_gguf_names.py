"""What GGUF calls a tensor, and what Transformers calls it: the Llama, Mistral and Qwen families."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["FAMILIES", "gguf_name", "hugging_face_name"]

_GLOBAL: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN_EXPERTS: Final = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# Mistral models are of architecture "llama", Mixtral too.
FAMILIES: Final = {
    "llama": {
        **_BLOCK,
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    "qwen2": _BLOCK,
    "qwen3": _BLOCK,
    "qwen2moe": {**_BLOCK, **_QWEN_EXPERTS},
    "qwen3moe": {**_BLOCK, **_QWEN_EXPERTS},
}


def hugging_face_name(architecture: str, base: str) -> str | None:
    """The name of a module in Transformers, or None where it is not known; "{}" stands for the number of an expert.

    Args:
        architecture: `general.architecture` of the file.
        base: name of a tensor without ".weight" or ".bias".

    Example:
        >>> hugging_face_name("llama", "blk.3.ffn_up")
        'model.layers.3.mlp.up_proj'
    """
    family = FAMILIES.get(architecture)
    if family is None:
        return None
    if base in _GLOBAL:
        return _GLOBAL[base]
    # An expert alone ("blk.0.ffn_up.3") is how Mixtral was first written.
    match = re.fullmatch(r"blk\.([0-9]{1,6})\.([a-z_]+)(?:\.([0-9]{1,6}))?", base)
    if match is None:
        return None
    block, part, expert = match.groups()
    found = family.get(part if expert is None else f"{part}_exps")
    if found is None:
        return None
    return f"model.layers.{block}." + (found if expert is None else found.format(expert))


def gguf_name(architecture: str, module: str) -> str | None:
    """The inverse for what is not an expert: "model.layers.3.mlp.up_proj" -> "blk.3.ffn_up", None where it is not known."""
    for base, name in _GLOBAL.items():
        if module == name:
            return base
    match = re.fullmatch(r"model\.layers\.([0-9]{1,6})\.(.+)", module)
    if match is None:
        return None
    block, part = match.groups()
    found = {name: base for base, name in FAMILIES.get(architecture, {}).items()}.get(part)
    return None if found is None else f"blk.{block}.{found}"
