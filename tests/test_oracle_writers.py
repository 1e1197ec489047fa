"""The libraries that load what lowbit writes, run again: they decode what written.json says, and whole models come out right.

pytest -m oracle tests/test_oracle_writers.py, with what `make oracles` installs; skipped without.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lowbit import convert_checkpoint, formats
from lowbit.formats import LinearRecord
from test_writers_recorded import RECORDED, make

pytestmark = pytest.mark.oracle
PACKAGES = {"ct": "compressed_tensors", "gptq": "auto_gptq", "awq": "awq", "gguf": "gguf"}
IDS = torch.arange(5, 37)[None]


def _need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("case", RECORDED)
def test_decoded_again(tmp_path: Path, case: str) -> None:
    _need(PACKAGES[case.partition("-")[0]])
    assert make.decoded(case, make.write(case, tmp_path)) == RECORDED[case]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, as transformers saves it."""
    _need("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _logits(folder: Path, **options: object) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.inference_mode():
        return model(IDS).logits


def _wanted(llama: Path, written: Path) -> torch.Tensor:
    """The logits of the model with each weight replaced by what our reader decodes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    count = 0
    for name, record in formats.read(written):
        if isinstance(record, LinearRecord):
            model.get_submodule(name).weight.data = record.weight.dequantize()
            count += 1
    assert count == 14
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("scheme", ["int4-g32", "int8", "fp8", "fp8-b128"])
def test_transformers_loads_compressed_tensors(tmp_path: Path, llama: Path, scheme: str) -> None:
    """Without quantized inputs, so that the logits are those of the decoded weights."""
    _need("compressed_tensors")
    convert_checkpoint(llama, tmp_path / "out", "compressed-tensors", scheme=scheme)
    torch.testing.assert_close(_logits(tmp_path / "out"), _wanted(llama, tmp_path / "out"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-offset", "int5-g32", "int5-g32-offset", "int8-g32"])
def test_transformers_loads_gguf(tmp_path: Path, llama: Path, scheme: str) -> None:
    """Names, keys and the order of the rows of Q and K."""
    _need("gguf")
    convert_checkpoint(llama, tmp_path / "model.gguf", "gguf", scheme=scheme)
    found = _logits(tmp_path, gguf_file="model.gguf")
    torch.testing.assert_close(found, _wanted(llama, tmp_path / "model.gguf"), rtol=1e-4, atol=1e-5)


def test_transformers_loads_the_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    """Byte-level BPE: the same ids for the same text."""
    _need("transformers", "gguf", "tokenizers")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from lowbit.formats._gguf_tokenizer import _LETTERS, _REST

    tokenizer = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Split(Regex(_LETTERS + r"\p{N}" + _REST), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    text = [path.read_text() for path in Path(__file__).parent.glob("test_writers*.py")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(text, trainer)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=400,
        max_position_embeddings=64,
        eos_token_id=0,
    )
    folder = tmp_path / "qwen"
    Qwen2ForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    report = convert_checkpoint(folder, tmp_path / "qwen.gguf", "gguf", scheme="int8-g32")
    assert not any("tokenizer" in note for note in report.notes)
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="qwen.gguf")
    for line in ("def test_it(): return 42  # å, ü", "  two\n\nlines's", "weights = torch.randn(64, 256)"):
        assert found(line)["input_ids"] == tokenizer.encode(line).ids
