"""Writes minilm_reference.safetensors: what transformers' BERT makes of some sentences, for tests of minilm.py.

pip install transformers && python examples/make_reference.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers  # type: ignore[import-not-found, unused-ignore]
from minilm import load_tokenizer, model_folder, read_sentences, tokenize
from safetensors.torch import save_file

FILE = Path(__file__).with_name("minilm_reference.safetensors")


def main() -> None:
    """Every fifteenth sentence, together, so that some are padded."""
    sentences = read_sentences()[::15]
    model = transformers.BertModel.from_pretrained(model_folder(), attn_implementation="eager").eval()
    ids, mask = tokenize(load_tokenizer(), sentences)
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    weights = mask[:, :, None].float()
    vectors = F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
    metadata = {"sentences": json.dumps(sentences), "made with": f"transformers {transformers.__version__}"}
    save_file({"embeddings": vectors.contiguous()}, FILE, metadata)
    print(f"{FILE.name}: {list(vectors.shape)}, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
