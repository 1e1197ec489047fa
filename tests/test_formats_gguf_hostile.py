"""GGUF files that are not what they say: refused by name, whatever is wrong, before anything is believed."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import gguf_files as G
from gguf_files import LLAMA, rng, write
from lowbit import ArtifactError, FormatError
from lowbit.formats import LinearRecord
from lowbit.formats.gguf import load_gguf


def _file(change: dict[str, Any] | None = None, **tensors: G.Tensor) -> bytes:
    return G.gguf_bytes({**LLAMA, **(change or {})}, {name.replace("__", "."): one for name, one in tensors.items()})


_W = G.block_tensor("Q4_0", (8, 32), rng())
_BIAS = G.float_tensor((7,), rng())
_Q = G.block_tensor("Q4_0", (12, 32), rng())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "4 bytes where 0 are left"),
        (b"GGML" + bytes(40), "begins with b'GGML'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "1099511627776 tensors do not fit"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "keys do not fit"),
        (_file(w=_W)[:-17], "truncated"),
        (_file(w=_W) + b"\0", "1 bytes follow the last tensor"),
        (_file({"general.alignment": 48}, w=_W), "general.alignment is 48"),
        (_file({"general.alignment": 0}, w=_W), "general.alignment is 0"),
        (_file({"general.alignment": ("u64", 32)}, w=_W), "general.alignment is 32"),
        (_file({"x": [[1]]}), "an array of arrays"),
        (_file({"split.count": ("u32", 3)}, w=_W), "one of 3 files of a model"),
        (_file({"split.count": "x"}, w=_W), "split.count is x"),
        (_file(w=("19", (8, 256), bytes(64))), r"type 19 \(IQ1_S\), which is not read"),
        (_file(w=("99", (8, 256), bytes(64))), r"type 99 \(unknown\)"),
        (_file(w=("Q4_0", (8, 33), bytes(160))), "K=33 is not a multiple of 32, the block of Q4_0"),
        (_file(w=("F32", (0, 4), b"")), r"shape \[0, 4\]"),
        (_file(w=("F32", (2**41, 4), b"")), "shape"),
        (_file(w=("F32", (1, 1, 1, 1, 1), bytes(4))), "5 dimensions"),
        (_file(w=("F32", (), bytes(4))), "0 dimensions"),
        (_file(w=("Q4_0", (32,), bytes(18))), "a quantized tensor has 2 or 3 dimensions"),
        (_file(w=("Q4_0", (1, 1, 1, 32), bytes(18))), "a quantized tensor has 2 or 3 dimensions"),
        (_file(blk__0__attn_q__weight=_Q), "N=12 rows are not 4 heads of an even size"),
        (_file({"llama.attention.head_count": "x"}, blk__0__attn_q__weight=_Q), "head_count is x"),
        (_file({"llama.attention.head_count": [4]}, blk__1__attn_q__weight=_Q), "head_count is None"),
        (_file({"llama.attention.head_count": 0}, blk__1__attn_q__weight=_Q), "head_count is 0"),
        (_file(blk__0__ffn_up__weight=_W, blk__0__ffn_up__bias=_BIAS), r"ffn_up.bias is float32 \[7\]"),
        (_file(output__weight=_W, lm_head=_W), "is 'lm_head', and so is another one"),
        (_file(blk__0__ffn_up_exps__weight=_W), r"shape \[8, 32\], which model.layers.0.* cannot have"),
        (_file(blk__0__ffn_up__weight=G.block_tensor("Q4_0", (2, 8, 32), rng())), "cannot have"),
        (_file(blk__0__ffn_up_exps__weight=_BIAS), "without a dimension for experts"),
        (_file(e=("I32", (1,), bytes(4))).replace(G.text("e"), G.text("")), "has 0 bytes"),
        (_file(ee=("I32", (1,), bytes(4))).replace(G.text("ee"), G.text(b"\xff\xff")), "is not UTF-8"),
    ],
)
def test_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)


def test_repeated_names_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    data = G.gguf_bytes({"ab": 1, "ac": 2}, {"tu": _W, "tv": _W})
    for old, new, message in (
        (b"ac", b"ab", "key 'ab' appears twice"),
        (b"tv", b"tu", "tensor 'tu' appears twice"),
        (struct.pack("<IQ", 2, 160), struct.pack("<IQ", 2, 0), "is at 0, the tensor before it ends at 160"),
        (struct.pack("<IQ", 2, 160), struct.pack("<IQ", 2, 2**63), "is at 9223372036854775808"),
        (struct.pack("<IQ", 2, 160), struct.pack("<IQ", 2, 192), "is at 192, the tensor before it ends at 160"),
    ):
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
        with pytest.raises(FormatError, match=message):
            load_gguf(path)


@pytest.mark.parametrize(
    ("kind", "shape", "raw", "message"),
    [
        ("Q4_0", (8, 32), b"\x00\x7c" + _W[2][2:], "1 values are not finite"),
        ("MXFP4", (1, 32), b"\xff" * 17, "1 values are not finite"),
        ("NVFP4", (1, 64), b"\x80" * 36, "scale is 0x80"),
    ],
)
def test_scales_that_are_no_scales(kind: str, shape: tuple[int, int], raw: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "w.gguf", {}, {"w": (kind, shape, raw)})
    with load_gguf(path) as model, pytest.raises(ArtifactError, match=rf"w\.gguf: w: .*{message}"):
        model.read("w")


def test_a_split_model_whose_files_do_not_fit(tmp_path: Path) -> None:
    def part(i: int, of: int = 2, tensor: str = "", **more: int) -> Path:
        metadata = {**LLAMA, "split.no": i, "split.count": of, **{key.replace("_", "."): n for key, n in more.items()}}
        return write(tmp_path / f"m-{i + 1:05}-of-00002.gguf", metadata, {tensor or f"w{i}": _W})

    first = part(0)
    for message, change in (
        (r"m-00002-of-00002.gguf: no such file", lambda: None),
        (r"m-00002-of-00002.gguf: tensor 'w0' is also in .*m-00001", lambda: part(1, tensor="w0")),
        (r"says that it is file 1 of 3, not 1 of 2", lambda: part(1, of=3)),
        (r"the 2 files have 2 tensors, not 3", lambda: (part(1), part(0, split_tensors_count=3))),
        (r"is one of 3 files of a model", lambda: part(0, of=3)),
    ):
        change()
        with pytest.raises(ArtifactError, match=message):
            load_gguf(first)
    part(0)
    second = part(1)
    with pytest.raises(ArtifactError, match=r"is not the first file of its model; open m-00001-of-00002\.gguf"):
        load_gguf(second)


def test_a_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    path = write(tmp_path / "w.gguf", {}, {"v": G.float_tensor((64,), rng()), "w": _W})
    with load_gguf(path) as model:
        os.truncate(path, path.stat().st_size - 100)
        assert model.read("v").numel() == 64
        with pytest.raises(FormatError, match=r"w\.gguf: tensor 'w': truncated"):
            model.read("w")


def test_things_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(ArtifactError, match="not a regular file"):
        load_gguf(tmp_path)


def test_a_header_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.formats._gguf_file._MAX_HEADER", 200)
    with pytest.raises(FormatError, match="more than 200 bytes"):
        load_gguf(write(tmp_path / "w.gguf", {"a": "x" * 150}, {"w" * 40: _W}))


# -- fuzzing -----------------------------------------------------------------------------------------------------------------


def _mutate(data: bytes, header: int, rng: random.Random) -> bytes:
    """Some bytes changed, mostly in the header, where numbers of 4 and 8 bytes are the likely prey."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 6))):
        at = rng.randrange(header if rng.random() < 0.9 else len(made))
        action = rng.randrange(7)
        if action == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            made[at : at + rng.randrange(1, 24)] = b""
        elif action == 2:
            made[at:at] = rng.randbytes(rng.randrange(1, 24))
        elif action == 3:
            del made[at:]
        elif action == 4:
            made[at : at + 8] = rng.choice([0, 1, 2, 31, len(data), 2**31, 2**40, 2**63, 2**64 - 1]).to_bytes(
                8, "little"
            )
        elif action == 5:
            made[at : at + 4] = rng.choice([0, 1, 4, 8, 9, 12, 14, 40, 2**31, 2**32 - 1]).to_bytes(4, "little")
        else:
            source = rng.randrange(header)
            made[at : at + 16] = made[source : source + 16]
        if not made:
            return b""
        header = min(header, len(made))
    return bytes(made)


def test_mutated_files(tmp_path: Path) -> None:
    tensors = {f"blk.0.{part}.weight": G.block_tensor(kind, (8, 256), rng()) for part, kind in (
        ("attn_q", "Q4_0"), ("attn_k", "Q2_K"), ("ffn_up", "MXFP4"), ("ffn_down", "IQ4_XS"))}  # fmt: skip
    tensors["blk.0.ffn_up_exps.weight"] = G.block_tensor("NVFP4", (2, 4, 64), rng())
    tensors["blk.0.ffn_up_exps.scale"] = G.float_tensor((2,), rng())
    tensors["blk.0.ffn_up.bias"] = tensors["output_norm.weight"] = G.float_tensor((8,), rng())
    metadata = {
        **LLAMA,
        "general.alignment": 32,
        "tokens": ["a", "bc", ""],
        "scores": [1.0, 2.0],
        "flags": [True],
        "n": "x",
    }
    data = G.gguf_bytes(metadata, tensors)
    body = sum(len(raw) + -len(raw) % 32 for _, _, raw in tensors.values())
    path = tmp_path / "fuzz.gguf"
    refused = 0
    for case in range(1000):
        made = _mutate(data, len(data) - body, random.Random(f"gguf/{case}"))
        path.write_bytes(made)
        try:
            with load_gguf(path) as model:
                found = dict(model)
        except ArtifactError:
            refused += 1
            continue
        except BaseException as error:
            error.args = (f"case {case}: {error}",)
            raise
        records = [one for one in found.values() if isinstance(one, LinearRecord)]
        assert all(torch.isfinite(record.weight.scales.float()).all() for record in records)
        assert sum(record.weight.nbytes for record in records) < 8 * len(made)
    assert 500 < refused < 1000
