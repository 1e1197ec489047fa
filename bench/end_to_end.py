"""Tokens per second of a Transformers model of Llama's shape with random weights, dense and quantized, in turns in one run.

    python bench/end_to_end.py                                    a GPU: Llama 3.1 8B, bf16 beside int4-g128 and fp8
    python bench/end_to_end.py --layers 2 --batch 1 --device cpu  the same layers, two of thirty-two
    python bench/end_to_end.py --schemes bf16,nf4-g64 --out FILE.json

Decoding is greedy over a static cache that holds --context tokens already; on CUDA a step is one CUDA graph, so that what is
timed is kernels. Each contender takes its turn in every round, and the median over rounds counts. What a model of random
weights says is nonsense, and its speed is that of a trained one. Times, tokens per second, the bytes of all weights
(embedding and output layer, which stay in bf16, included) and on CUDA the peak of memory go to the JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from device import machine

import lowbit

RESULTS: Final = Path(__file__).parent / "results"
#: hidden, intermediate, layers, heads, heads of keys and values, vocabulary.
SHAPES: Final = {
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (64, 128, 2, 4, 2, 256),
}
#: Weights are random: what the search for better scales would gain is not measured here, and it takes minutes.
DEFAULT_SCHEMES: Final = "bf16,int4-g128-rtn,fp8-rtn"


def make_model(shape: str, layers: int | None, scheme: str, device: str) -> nn.Module:
    """A causal model of that shape in bf16, its linear layers quantized unless `scheme` is bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, depth, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: nn.Module = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    if scheme != "bf16":
        lowbit.quantize_(model, scheme, progress=False)
    return model


class Decoding:
    """One model, its cache at `context` tokens, and one step of greedy decoding for `batch` sequences.

    Args:
        model: in bf16, on `device`.
        batch, context, tokens: sequences, tokens of each in the cache at the start, and how many steps there will be room for.
    """

    def __init__(self, model: nn.Module, batch: int, context: int, tokens: int, device: str) -> None:
        from transformers import StaticCache

        self.model, self.context, self.device = model, context, device
        room = context + tokens
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.ids = torch.randint(model.config.vocab_size, (batch, 1), device=device)
        self.position = torch.tensor([context], device=device)
        self.columns = torch.arange(room, device=device)
        started = self._now()
        prompt = torch.randint(model.config.vocab_size, (batch, context), device=device)
        model(input_ids=prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.prefill_seconds = self._now() - started
        self.graph: Any = self._captured() if device == "cuda" else None

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def rewind(self) -> None:
        """Back to `context` tokens: what follows them in the cache is masked."""
        self.position.fill_(self.context)
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):  # Transformers from 5.3 on; before that, positions say it all
                layer.cumulative_length.fill_(self.context)

    def _step(self) -> None:
        """Nothing here waits for the device, and every tensor that outlives a step is written in place."""
        mask = (self.columns <= self.position)[None, None, None, :].expand(self.ids.shape[0], 1, 1, -1)
        logits: Tensor = self.model(
            input_ids=self.ids,
            position_ids=self.position[None].expand(self.ids.shape[0], -1),
            cache_position=self.position,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)

    def _captured(self) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.rewind()
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def seconds(self, steps: int) -> float:
        """Per step, of `steps` in a row from the same cache."""
        self.rewind()
        step: Callable[[], None] = self._step if self.graph is None else self.graph.replay
        started = self._now()
        for _ in range(steps):
            step()
        return (self._now() - started) / steps


def weight_bytes(model: nn.Module) -> int:
    """Each storage once: of parameters and of buffers, in which packed weights are."""
    tensors = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


def allocated(device: str) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def run_batch(models: dict[str, nn.Module], batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per model; in turns."""
    decodings, peaks = {}, {}
    for name, model in models.items():
        others = allocated(options.device) - weight_bytes(model)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        decodings[name] = Decoding(model, batch, options.context, options.tokens, options.device)
        decodings[name].seconds(1)
        if options.device == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated() - others
    rounds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds):
        order = list(models)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            rounds[name].append(decodings[name].seconds(options.tokens))
    rows = []
    for name, model in models.items():
        step = statistics.median(rounds[name])
        rows.append(
            {
                "scheme": name,
                "batch": batch,
                "step_seconds": step,
                "rounds": rounds[name],
                "tokens_per_second": batch / step,
                "prefill_seconds": decodings[name].prefill_seconds,
                "weight_bytes": weight_bytes(model),
                **({"peak_bytes": peaks[name]} if name in peaks else {}),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the first scheme of a batch is what the others are compared with."""
    lines = [
        "| batch | scheme | tokens/s | times as fast | ms per token | weights, GB | peak, GB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        first = next(other for other in rows if other["batch"] == row["batch"])
        peak = f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else ""
        lines.append(
            f"| {row['batch']} | `{row['scheme']}` | {row['tokens_per_second']:.1f} | "
            f"{first['step_seconds'] / row['step_seconds']:.2f} | {row['step_seconds'] * 1e3:.2f} | "
            f"{row['weight_bytes'] / 1e9:.2f} | {peak} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("end_to_end.py", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the model has; the result says so")
    parser.add_argument("--schemes", default=DEFAULT_SCHEMES, help=f"bf16 or schemes of lowbit ({DEFAULT_SCHEMES})")
    parser.add_argument("--batch", default="1,8,64", help="sequences at a time (1,8,64)")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache at the start (512)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in a turn (32)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON (bench/results/end-to-end-DEVICE.json)")
    options = parser.parse_args(arguments)
    options.batch = [int(text) for text in options.batch.split(",")]
    options.schemes = options.schemes.split(",")
    if (
        min(
            *options.batch,
            options.context,
            options.tokens,
            options.rounds,
            1 if options.layers is None else options.layers,
        )
        < 1
    ):
        parser.error("batch, context, tokens, rounds and layers are at least 1")
    for scheme in options.schemes:
        if scheme != "bf16":
            lowbit.Scheme.parse(scheme)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; --device cpu")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.manual_seed(0)
    record: dict[str, Any] = {
        **machine.facts(options.device),
        "date": time.strftime("%Y-%m-%d"),
        "shape": options.shape,
        "layers": options.layers or SHAPES[options.shape][2],
        "layers_of_the_model": SHAPES[options.shape][2],
        "context": options.context,
        "tokens": options.tokens,
        "threads": torch.get_num_threads(),
        "cuda_graph": options.device == "cuda",
        "rows": [],
    }
    models = {name: make_model(options.shape, options.layers, name, options.device) for name in options.schemes}
    for batch in options.batch:
        record["rows"] += run_batch(models, batch, options)
    device = "".join(c if c.isalnum() else "-" for c in record["device"].lower())
    out = options.out or RESULTS / f"end-to-end-{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, out)
    print(table(record["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
