"""A tokenizer's keys in a GGUF file, from the files of Transformers.

Two kinds are understood: byte-level BPE in tokenizer.json, where the splitting is one that llama.cpp has a name for, and
SentencePiece in tokenizer.model. Any other is left out, with the reason: a file without a tokenizer is refused by llama.cpp, one
with the wrong splitting would give other tokens without a word.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lowbit.formats._gguf_write import flag, number, numbers, text, texts
from lowbit.formats._source import read_json

__all__ = ["TokenizerLeftOut", "tokenizer_metadata"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LETTERS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: The expression that splits text -> llama.cpp's name for it.
_SPLITS: Final = {_LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe", _LETTERS + r"\p{N}" + _REST: "qwen2"}
_MAX_MODEL: Final = 64 << 20


class TokenizerLeftOut(Exception):
    """Why a tokenizer cannot be written."""


def tokenizer_metadata(root: Path, vocab_size: int) -> dict[str, bytes]:
    """Keys "tokenizer.*" for the files in a model's folder.

    Raises:
        TokenizerLeftOut: it is of a kind that is not understood; the message says which.
        ArtifactError: a file is not what it should be.
    """
    settings, config = read_json(root / "tokenizer_config.json"), read_json(root / "config.json")
    described = read_json(root / "tokenizer.json")
    if (root / "tokenizer.model").is_file():
        found = _sentencepiece(root / "tokenizer.model", described, vocab_size)
    elif described:
        found = _byte_level(described, vocab_size)
    else:
        raise TokenizerLeftOut("there is no tokenizer.json and no tokenizer.model")
    for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        value = config.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size:
            found[f"tokenizer.ggml.{key}_token_id"] = number("u32", value)
    for name in ("add_bos_token", "add_eos_token"):
        if isinstance(settings.get(name), bool):
            found[f"tokenizer.ggml.{name}"] = flag(settings[name])
    template = settings.get("chat_template")
    if isinstance(template, str):
        found["tokenizer.chat_template"] = text(template)
    elif (root / "chat_template.jinja").is_file():
        found["tokenizer.chat_template"] = text((root / "chat_template.jinja").read_text(encoding="utf-8"))
    return found


def _entries(tokens: list[str], types: list[int]) -> dict[str, bytes]:
    return {"tokenizer.ggml.tokens": texts(tokens), "tokenizer.ggml.token_type": numbers("i32", types)}


def _added(described: Mapping[str, Any], tokens: list[str], types: list[int]) -> None:
    """Put the added tokens where their ids say."""
    for entry in described.get("added_tokens", []):
        where, content = entry.get("id"), entry.get("content")
        if not isinstance(where, int) or not isinstance(content, str) or not 0 <= where < len(tokens):
            raise TokenizerLeftOut(f"added token {str(content)[:80]!r} has id {str(where)[:40]} of {len(tokens)}")
        tokens[where], types[where] = content, _CONTROL if entry.get("special") else _USER


# -- byte-level BPE ----------------------------------------------------------------------------------------------------------


def _byte_level(described: Mapping[str, Any], vocab_size: int) -> dict[str, bytes]:
    model = described.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise TokenizerLeftOut(f"tokenizer.json is of type {str(model.get('type'))[:40]!r}, not byte-level BPE")
    split = _split(described.get("pre_tokenizer") or {})
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, where in model.get("vocab", {}).items():
        if not isinstance(where, int) or not 0 <= where < vocab_size:
            raise TokenizerLeftOut(f"token {token[:80]!r} has id {str(where)[:40]}, the model has {vocab_size} tokens")
        tokens[where], types[where] = token, _NORMAL
    _added(described, tokens, types)
    merges = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges", [])]
    about = {"tokenizer.ggml.model": text("gpt2"), "tokenizer.ggml.pre": text(split)}
    return {**about, **_entries(tokens, types), "tokenizer.ggml.merges": texts(merges)}


def _split(pre: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split before it is merged."""
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        expression = (steps[0].get("pattern") or {}).get("Regex")
        if expression in _SPLITS and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return _SPLITS[expression]
    raise TokenizerLeftOut("how tokenizer.json splits text has no name in llama.cpp that is known here")


# -- SentencePiece -----------------------------------------------------------------------------------------------------------


def _sentencepiece(path: Path, described: Mapping[str, Any], vocab_size: int) -> dict[str, bytes]:
    if path.stat().st_size > _MAX_MODEL:
        raise TokenizerLeftOut(f"tokenizer.model has {path.stat().st_size} bytes")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    scores, types = [-10000.0] * vocab_size, [_UNUSED] * vocab_size
    pieces = _pieces(path.read_bytes())
    if not pieces or len(pieces) > vocab_size:
        raise TokenizerLeftOut(f"tokenizer.model has {len(pieces)} pieces, the model {vocab_size} tokens")
    for i, (piece, score, kind) in enumerate(pieces):
        tokens[i], scores[i], types[i] = piece, score, kind
    _added(described, tokens, types)
    about = {"tokenizer.ggml.model": text("llama"), "tokenizer.ggml.pre": text("default")}
    return {**about, **_entries(tokens, types), "tokenizer.ggml.scores": numbers("f32", scores)}


def _pieces(data: bytes) -> list[tuple[str, float, int]]:
    """(text, score, type) of every piece: field 1 of the model, whose fields 1, 2 and 3 these are."""
    found = []
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            parts = dict(_fields(value))
            piece, score, kind = parts.get(1, b""), parts.get(2, 0.0), parts.get(3, _NORMAL)
            if not isinstance(piece, bytes) or not isinstance(score, float) or kind not in range(1, 7):
                raise TokenizerLeftOut("tokenizer.model is not a SentencePiece model")
            found.append((piece.decode("utf-8", "backslashreplace"), score, int(kind)))
    return found


def _fields(data: bytes) -> list[tuple[int, int | float | bytes]]:
    """The fields of a protocol buffer: number and value; a nested message is its bytes."""
    found: list[tuple[int, int | float | bytes]] = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            found.append((tag >> 3, value))
            continue
        size, begin = ({1: 8, 5: 4}[kind], at) if kind in (1, 5) else _varint(data, at) if kind == 2 else (-1, at)
        if size < 0 or begin + size > len(data):
            raise TokenizerLeftOut("tokenizer.model is not a protocol buffer")
        raw, at = data[begin : begin + size], begin + size
        found.append((tag >> 3, struct.unpack("<f", raw)[0] if kind == 5 else raw))
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise TokenizerLeftOut("tokenizer.model is not a protocol buffer")
