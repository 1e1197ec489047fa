"""The keys of a GGUF file made from config.json and a tokenizer's files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import load_gguf
from lowbit.formats._gguf_metadata import metadata_of, rope_factors
from lowbit.formats._gguf_tokenizer import _LETTERS, _REST, TokenizerLeftOut, tokenizer_metadata
from lowbit.formats._gguf_write import flag, number, numbers, text, texts, write_gguf
from writers import CONFIG


def keys(metadata: dict[str, bytes], folder: Path) -> dict[str, Any]:
    """What our reader, which is tested against other files, finds in a file with these keys."""
    write_gguf(folder / "keys.gguf", metadata, [])
    with load_gguf(folder / "keys.gguf") as found:
        return {k: list(v) if hasattr(v, "typecode") else v for k, v in found.metadata.items()}


def test_values(tmp_path: Path) -> None:
    made = {
        "a": number("u32", 7), "b": number("i32", -7), "c": number("f32", 0.5), "d": number("u64", 1 << 40), "e": flag(True),
        "f": text("å"), "g": texts(["", "x", "\u2581y"]), "h": numbers("i32", [1, -2]), "i": numbers("f32", []),
    }  # fmt: skip
    wanted = {"a": 7, "b": -7, "c": 0.5, "d": 1 << 40, "e": True, "f": "å", "g": ["", "x", "▁y"], "h": [1, -2], "i": []}
    assert keys(made, tmp_path) == wanted


def test_llama(tmp_path: Path) -> None:
    config = {**CONFIG, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    found = keys(metadata_of(config, "tiny"), tmp_path)
    assert found.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 5e5,
        "llama.vocab_size": 320,
    }


@pytest.mark.parametrize(("kind", "name"), [("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_families(tmp_path: Path, kind: str, name: str) -> None:
    config = {**CONFIG, "model_type": kind, "head_dim": 32, "rope_theta": 1e6}
    found = keys(metadata_of(config, "m"), tmp_path)
    assert found["general.architecture"] == name and found[f"{name}.attention.key_length"] == 32
    assert found[f"{name}.rope.freq_base"] == 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size of config.json is None, a whole number is needed"),
        ({"num_hidden_layers": True}, "num_hidden_layers of config.json is True"),
        ({"vocab_size": -3}, "vocab_size of config.json is -3"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps of config.json is 1e-6"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rotary scaling of kind 'longrope' is not written"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor of the rotary scaling is 0"),
        ({"rope_scaling": [1]}, r"the rotary embedding of config.json is \[1\]"),
        ({"rope_theta": "big"}, "rope_theta of config.json is big"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' of config.json is not one of llama, mistral, qwen2, qwen3"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metadata_of({**CONFIG, **change}, "m")


def test_rotary_scaling(tmp_path: Path) -> None:
    linear = keys(metadata_of({**CONFIG, "rope_scaling": {"type": "linear", "factor": 4.0}}, "m"), tmp_path)
    assert linear["llama.rope.scaling.type"] == "linear" and linear["llama.rope.scaling.factor"] == 4
    (tmp_path / "keys.gguf").unlink()
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    found = keys(metadata_of({**CONFIG, "rope_parameters": yarn}, "m"), tmp_path)
    assert found["llama.rope.scaling.original_context_length"] == 64 and found["llama.rope.scaling.type"] == "yarn"
    assert rope_factors(CONFIG) is None


def test_llama_3_factors() -> None:
    """Short waves keep their frequency, long ones are stretched by the factor, and it grows in between."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    factors = rope_factors({**CONFIG, "head_dim": 128, "rope_parameters": scaling})
    assert factors is not None and factors.shape == (64,) and factors.dtype == torch.float32
    waves = [2 * math.pi * 5e5 ** (2 * i / 128) for i in range(64)]
    for wave, factor in zip(waves, factors.tolist(), strict=True):
        if wave < 8192 / 4:
            assert factor == 1
        elif wave > 8192:
            assert factor == 8
        else:
            smooth = (8192 / wave - 1) / 3
            assert factor == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-6)
    assert torch.equal(factors, factors.sort().values)


# -- tokenizers ----------------------------------------------------------------------------------------------------------------


def bpe(pre: dict[str, Any], **more: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], **more}
    added = [{"id": 4, "content": "<eos>", "special": True}, {"id": 3, "content": "<tool>", "special": False}]
    return {"model": model, "pre_tokenizer": pre, "added_tokens": added}


def split(expression: str) -> dict[str, Any]:
    steps = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": steps}


LLAMA3 = split(_LETTERS + r"\p{N}{1,3}" + _REST)


def folder(path: Path, tokenizer: dict[str, Any] | None, **files: dict[str, Any]) -> Path:
    for name, content in {**({"tokenizer": tokenizer} if tokenizer else {}), **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (LLAMA3, "llama-bpe"),
        (split(_LETTERS + r"\p{N}" + _REST), "qwen2"),
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "gpt-2"),
    ],
)
def test_byte_level_bpe(tmp_path: Path, pre: dict[str, Any], name: str) -> None:
    settings = {"add_bos_token": True, "chat_template": "{{ messages }}"}
    config = {"eos_token_id": [4, 5], "bos_token_id": 3, "pad_token_id": None}
    found = keys(tokenizer_metadata(folder(tmp_path, bpe(pre), tokenizer_config=settings, config=config), 6), tmp_path)
    assert found == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<tool>", "<eos>", "[PAD5]"],
        "tokenizer.ggml.token_type": [1, 1, 1, 4, 3, 5],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "there is no tokenizer.json and no tokenizer.model"),
        (bpe(LLAMA3, type="WordLevel"), "tokenizer.json is of type 'WordLevel', not byte-level BPE"),
        (bpe(LLAMA3, byte_fallback=True), "not byte-level BPE"),
        (bpe(split("\\w+")), "how tokenizer.json splits text has no name in llama.cpp"),
        (bpe({"type": "Whitespace"}), "how tokenizer.json splits text has no name"),
        (bpe(LLAMA3, vocab={"a": 9}), "token 'a' has id 9, the model has 6 tokens"),
        ({**bpe(LLAMA3), "added_tokens": [{"id": 6, "content": "x"}]}, "added token 'x' has id 6 of 6"),
    ],
)
def test_tokenizers_that_are_left_out(tmp_path: Path, tokenizer: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(TokenizerLeftOut, match=message):
        tokenizer_metadata(folder(tmp_path, tokenizer), 6)


def piece(content: str, score: float, kind: int | None = None) -> bytes:
    raw = content.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score)
    body += b"" if kind is None else b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


def test_sentencepiece(tmp_path: Path) -> None:
    pieces = piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("<0x0A>", 0, 6) + piece("▁the", -1.5)
    trainer = b"\x12\x04\x0a\x02hi"  # another field, with a message of its own
    (tmp_path / "tokenizer.model").write_bytes(pieces + trainer)
    added = {"added_tokens": [{"id": 4, "content": "<pad>", "special": True}]}
    found = keys(tokenizer_metadata(folder(tmp_path, added), 6), tmp_path)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"] == ["<unk>", "<s>", "<0x0A>", "▁the", "<pad>", "[PAD5]"]
    assert found["tokenizer.ggml.scores"] == [0, 0, 0, -1.5, -10000, -10000]
    assert found["tokenizer.ggml.token_type"] == [2, 3, 6, 1, 3, 5]


@pytest.mark.parametrize("cut", range(2, 30))
def test_damaged_sentencepiece_is_left_out(tmp_path: Path, cut: int) -> None:
    data = piece("<unk>", 0, 2) + piece("▁the", -1.5)
    (tmp_path / "tokenizer.model").write_bytes(data[:-cut] + b"\xff")
    with pytest.raises(TokenizerLeftOut):
        tokenizer_metadata(tmp_path, 6)
