"""lowbit in five lines: quantize a model, run it, save it, load it.

    python examples/quickstart.py [FOLDER]

Needs no network. The model is saved to FOLDER, or to a temporary folder that is removed at the end.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from torch import nn

import lowbit


def make_model() -> nn.Module:
    """Any nn.Module with nn.Linear layers in it."""
    return nn.Sequential(nn.LayerNorm(1024), nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))


def main(folder: str) -> None:
    """The five lines, and what they did."""
    torch.manual_seed(0)
    model, x = make_model(), torch.randn(8, 1024)
    exact = model(x)

    report = lowbit.quantize_(model, "int4-g128")  # in place
    y = model(x)  # as before; the weights stay packed
    digest = lowbit.save_quantized(model, folder)
    again = lowbit.load_quantized(make_model, folder)  # every file, size, name and SHA-256 is checked first
    assert torch.equal(again(x), y)

    print(report)
    print(f"\noutput: {(y - exact).norm() / exact.norm():.1%} from the model in fp32 (random weights)")
    print(f"saved and loaded again, to the bit: {digest}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory(prefix="lowbit-quickstart-") as temporary:
            main(temporary)
