"""A tensor-parallel decoder on the ops of lowbit, top down: what an engine does, in the order in which it does it.

    python examples/engine/engine.py                      # on the CPU
    python examples/engine/engine.py --device cuda        # in a CUDA graph

1. allocate  empty canonical tensors of each rank's part, on meta: their shapes and dtypes, no memory
2. load      every rank copies its shard of the checkpoint, and nothing else
3. pack      into the layout that the device's kernels read
4. buffers   outputs and one workspace, made once
5. capture   a step as a CUDA graph
6. decode    replay it

Both ranks live in this process and the all-reduce is a sum; attention is left out, so that what remains is lowbit's
part. The program checks that two ranks compute what one does, within the bound of docs/numerics.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from agreement import check
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from lowbit import _C, QuantizedWeight, Scheme

LAYERS, HIDDEN, INNER, VOCABULARY = 2, 512, 1024, 1024
BATCH = 4

# A projection joins linears that read the same input, and is cut along N (0) or K (1). Cut along N ("column parallel")
# each rank computes outputs of its own; cut along K ("row parallel") each computes a partial sum of all outputs.
PROJECTIONS = {"qkv": (("q", "k", "v"), 0), "o": (("o",), 1), "gate_up": (("gate", "up"), 0), "down": (("down",), 1)}
SHAPES = dict.fromkeys("qkvo", (HIDDEN, HIDDEN)) | {
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}

Checkpoint = dict[str, QuantizedWeight]  # by layer and name, such as "0.gate"


class Linear:
    """One rank's part of one projection: W[N, K]."""

    def __init__(self, scheme: Scheme, projection: str, world: int) -> None:
        parts, dim = PROJECTIONS[projection]
        N, K = sum(SHAPES[part][0] for part in parts), SHAPES[parts[0]][1]
        self.N, self.K = (N // world, K) if dim == 0 else (N, K // world)
        self.scheme = scheme
        # On meta an op only works out the shapes and dtypes of its results: packed, scales, and zeros (or none: [0]).
        dense = torch.empty(self.N, self.K, device="meta")
        self.canonical = torch.ops.lowbit.quantize(dense, scheme.desc(), False, None)

    def load(self, shards: list[QuantizedWeight], device: torch.device) -> None:
        """Fill the canonical tensors with shards, one below the other, and pack them; only the packed bytes stay."""
        filled = [torch.empty_like(tensor, device=device) for tensor in self.canonical]
        for name, tensor in zip(("packed", "scales", "zeros"), filled, strict=True):
            row = 0
            for shard in shards:
                if (part := getattr(shard, name)) is not None:
                    tensor[row : row + len(part)].copy_(part)
                    row += len(part)
            assert row == len(tensor), f"{name}: {row} of {len(tensor)} rows were loaded"
        packed, scales, zeros = filled
        self.desc = self.scheme.desc(layout=_C.preferred_layout(device.type, self.scheme.desc()))
        third = zeros if zeros.numel() else None
        self.w = torch.ops.lowbit.pack(packed, scales, third, None, self.N, self.K, self.desc)

    def workspace_size(self, M: int) -> int:
        """Bytes of scratch that gemm_out takes for M rows on this device."""
        device = []
        if self.w.is_cuda:  # how work is split, and so what is added up afterwards, depends on the multiprocessors
            about = torch.cuda.get_device_properties(self.w.device)
            device = [f"sm_{about.major}{about.minor}:{about.multi_processor_count}"]
        return _C.workspace_size("gemm_out", M, self.N, self.K, self.desc, *device)

    def __call__(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        """out[M, N] = x[M, K] @ W.T. Allocates nothing."""
        torch.ops.lowbit.gemm_out(x, self.w, None, self.N, self.K, self.desc, 0, out, workspace)


class Rank:
    """What one rank holds. In an engine each is a process with a device of its own."""

    def __init__(self, rank: int, world: int, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        scheme = next(iter(checkpoint.values())).scheme
        self.linears = {(i, name): Linear(scheme, name, world) for i in range(LAYERS) for name in PROJECTIONS}
        for (i, name), linear in self.linears.items():
            parts, dim = PROJECTIONS[name]
            linear.load([checkpoint[f"{i}.{part}"].shard(dim, rank, world) for part in parts], device)
        # Layers follow one another on one stream, so one workspace and one buffer per kind of projection serve them all.
        # CUDA kernels want it zeroed before its first use, and leave it ready for the next: nobody zeroes it again.
        size = max(linear.workspace_size(BATCH) for linear in self.linears.values())
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self.outputs = {
            name: torch.empty(BATCH, self.linears[0, name].N, dtype=dtype, device=device) for name in PROJECTIONS
        }

    def run(self, layer: int, projection: str, x: Tensor) -> Tensor:
        """This rank's outputs of a projection, or its partial sums; in a buffer that the next layer writes again."""
        out = self.outputs[projection]
        self.linears[layer, projection](x, out, self.workspace)
        return out


class Decoder:
    """`world` ranks, and the greedy decoding of BATCH sequences."""

    def __init__(self, world: int, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.ranks = [Rank(rank, world, checkpoint, device, dtype) for rank in range(world)]
        seeded = torch.Generator().manual_seed(1)
        embed, head = (torch.randn(VOCABULARY, HIDDEN, generator=seeded) for _ in range(2))
        self.embed, self.head = embed.to(device, dtype), head.to(device, dtype)
        self.token = torch.arange(BATCH, device=device)
        self.h = torch.empty(BATCH, HIDDEN, device=device, dtype=dtype)

    def step(self) -> None:
        """self.token[BATCH] becomes the next token of each sequence: always the same memory, as a graph needs."""
        torch.index_select(self.embed, 0, self.token, out=self.h)
        for layer in range(LAYERS):
            x = rms_norm(self.h, (HIDDEN,))
            for rank in self.ranks:
                q, k, v = rank.run(layer, "qkv", x).chunk(3, -1)
                rank.run(layer, "o", torch.sigmoid(q * k) * v)
            self.all_reduce("o")
            x = rms_norm(self.h, (HIDDEN,))
            for rank in self.ranks:
                gate, up = rank.run(layer, "gate_up", x).chunk(2, -1)
                rank.run(layer, "down", silu(gate) * up)
            self.all_reduce("down")
        torch.argmax(rms_norm(self.h, (HIDDEN,)) @ self.head.T, -1, out=self.token)

    def all_reduce(self, projection: str) -> None:
        """self.h += the partial sums of all ranks."""
        for rank in self.ranks:
            self.h += rank.outputs[projection]

    def capture(self) -> Callable[[], None]:
        """A step, in a CUDA graph where there is CUDA."""
        if self.token.device.type != "cuda":
            return self.step
        self.step()  # what is loaded or allocated at first use must not be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def decode(self, step: Callable[[], None], steps: int) -> Tensor:
        """The next tokens [steps, BATCH] of sequences that start with tokens 0..BATCH-1."""
        self.token.copy_(torch.arange(BATCH))
        tokens = []
        for _ in range(steps):
            step()
            tokens.append(self.token.clone())
        return torch.stack(tokens).cpu()


def make_checkpoint(scheme: Scheme) -> Checkpoint:
    """A random model in canonical form. A real one comes from files, and a rank reads no more than its shards."""
    seeded = torch.Generator().manual_seed(0)
    checkpoint = {}
    for i in range(LAYERS):
        for name, (N, K) in SHAPES.items():
            dense = torch.randn(N, K, generator=seeded) / K**0.5
            checkpoint[f"{i}.{name}"] = QuantizedWeight.quantize(dense, scheme)
    return checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Decode with one rank and with two; 1 if they disagree."""
    parser = argparse.ArgumentParser(description="a tensor-parallel decoder on the ops of lowbit")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args(arguments)
    device, dtype, scheme = torch.device(args.device), getattr(torch, args.dtype), Scheme.parse(args.scheme)

    checkpoint = make_checkpoint(scheme)
    decoders = {world: Decoder(world, checkpoint, device, dtype) for world in (1, 2)}
    print(f"{scheme}, {LAYERS} layers of {HIDDEN} and {INNER}, {BATCH} sequences in {args.dtype} on {device.type}")
    for world, decoder in decoders.items():
        eager = decoder.decode(decoder.step, args.steps)
        step = decoder.capture()
        begin = time.perf_counter()
        tokens = decoder.decode(step, args.steps)
        rate = tokens.numel() / (time.perf_counter() - begin)
        if not torch.equal(tokens, eager):
            print("FAILED: the captured step decodes other tokens")
            return 1
        rank = decoder.ranks[0]
        packed = sum(linear.w.numel() for linear in rank.linears.values())
        print(f"{world} x {packed} bytes of weights, {rank.workspace.numel()} of workspace: {rate:.0f} tokens/s")
    part = check(decoders[1], decoders[2], checkpoint, PROJECTIONS)
    agree = part <= 1  # False where there is a NaN
    print(f"2 ranks and 1 {'agree' if agree else 'DISAGREE'}: the largest difference is {part:.2g} of its bound")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
