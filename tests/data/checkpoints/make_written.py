"""Makes written.json: what other libraries decode the checkpoints to that lowbit writes.

    python make_written.py            with compressed-tensors 0.20, auto-gptq 0.7.1, AutoAWQ 0.2.9 and gguf 0.19 installed

Every case converts the folder `dense` beside this file. For each layer the JSON holds a hash of the bytes that were written,
and a hash of the weight that the format's own library makes of them: tests/test_writers_recorded.py writes the same again,
and needs no library to know that they would read it right.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit import convert_checkpoint
from lowbit._safetensors import SafetensorsFile
from lowbit.formats._gguf_file import GGUFFile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
import checkpoints  # noqa: E402 - of the tests: bit streams in numpy

#: Name -> format and scheme.
CASES = {
    "ct-int4": ("compressed-tensors", "int4-g128"),
    "ct-int4-asym": ("compressed-tensors", "int4-g32-asym"),
    "ct-int3-asym": ("compressed-tensors", "int3-g64-asym"),
    "ct-int8": ("compressed-tensors", "int8"),
    "ct-int8-a8": ("compressed-tensors", "int8-a8"),
    "ct-int4-asym-a8": ("compressed-tensors", "int4-g64-asym-a8"),
    "ct-fp8-a8": ("compressed-tensors", "fp8-a8"),
    "ct-fp8-b128-a8": ("compressed-tensors", "fp8-b128-a8"),
    "gptq-int4": ("gptq", "int4-g128"),
    "gptq-int4-asym": ("gptq", "int4-g64-asym"),
    "gptq-int3-asym": ("gptq", "int3-g32-asym"),
    "gptq-int2-asym": ("gptq", "int2-g32-asym"),
    "gptq-int8": ("gptq", "int8-g128"),
    "awq-int4": ("awq", "int4-g64"),
    "awq-int4-asym": ("awq", "int4-g64-asym"),
    "gguf-q4_0": ("gguf", "int4-g32"),
    "gguf-q4_0-wide": ("gguf", "int4-g128"),
    "gguf-q4_1": ("gguf", "int4-g32-offset"),
    "gguf-q4_1-zeros": ("gguf", "int4-g64-asym"),
    "gguf-q5_0": ("gguf", "int5-g32"),
    "gguf-q5_1": ("gguf", "int5-g32-offset"),
    "gguf-q8_0": ("gguf", "int8-g32"),
}
LAYERS = {"model.layers.0.self_attn.k_proj": "blk.0.attn_k", "model.layers.0.self_attn.o_proj": "blk.0.attn_output"}


def write(case: str, folder: Path) -> Path:
    """The checkpoint of a case."""
    to, scheme = CASES[case]
    path = folder / (case + (".gguf" if to == "gguf" else ""))
    convert_checkpoint(HERE / "dense", path, to, scheme=scheme)
    return path


def sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def value_hash(weight: Tensor) -> str:
    """A hash of values: a zero has no sign, since whoever multiplies with the identity adds it to other zeros."""
    return sha256(weight + 0)


def stored(path: Path, layer: str) -> dict[str, Tensor]:
    """The tensors of a layer as they are in the file."""
    if path.is_file():
        file = GGUFFile(path)
        tensor = file.tensors[LAYERS[layer] + ".weight"]
        return {"weight": file.read_rows(tensor, 0, tensor.rows)}
    with SafetensorsFile(path / "model.safetensors") as found:
        return {name[len(layer) + 1 :]: found.read(name) for name in found if name.startswith(layer + ".")}


def bytes_of(path: Path, layer: str) -> str:
    """A hash of what was written for a layer: names and bytes."""
    tensors = sorted(stored(path, layer).items())
    return hashlib.sha256("".join(f"{name} {sha256(tensor)}\n" for name, tensor in tensors).encode()).hexdigest()


# -- the libraries ---------------------------------------------------------------------------------------------------------


def _make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoints", HERE / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decode_ct(path: Path, layer: str) -> Tensor:
    config = json.loads((path / "config.json").read_text())
    return _make().decode_ct("", stored(path, layer), config)


def decode_awq(path: Path, layer: str) -> Tensor:
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    _make().bare("awq.utils")
    peer = importlib.import_module("awq.utils.packing_utils")
    t = stored(path, layer)
    return peer.dequantize_gemm(t["qweight"], t["qzeros"], t["scales"], 4, config["group_size"]).t().contiguous()


def decode_gptq(path: Path, layer: str) -> Tensor:
    """By multiplying with the identity. auto-gptq reads v1, which has zeros less one, modulo 2^bits."""
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"
    bits, t = config["bits"], stored(path, layer)
    _make().bare("auto_gptq.nn_modules.qlinear")
    peer = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    N, K = t["qweight"].shape[1], t["g_idx"].numel()
    made = peer.QuantLinear(bits, config["group_size"], K, N, False, weight_dtype=torch.float32)
    zeros = (checkpoints.unstream(t["qzeros"].numpy(), bits, N) - 1) % (1 << bits)
    made.qweight, made.g_idx, made.scales = t["qweight"], t["g_idx"], t["scales"].float()
    made.qzeros = torch.from_numpy(checkpoints.stream(zeros, bits).copy())
    return made(torch.eye(K)).t().contiguous()


def decode_gguf(path: Path, layer: str) -> Tensor:
    import gguf

    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name == LAYERS[layer] + ".weight":
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            if "attn_k" in tensor.name:  # two heads of 64, whose rows GGUF keeps in rotary pairs
                weight = weight.view(2, 32, 2, -1).swapaxes(1, 2).reshape(weight.shape)
            return weight.contiguous()
    raise KeyError(layer)


DECODERS: Mapping[str, Callable[[Path, str], Tensor]] = {
    "ct": decode_ct,
    "gptq": decode_gptq,
    "awq": decode_awq,
    "gguf": decode_gguf,
}


def decoded(case: str, path: Path) -> dict[str, Any]:
    """What the library makes of each layer."""
    found = {}
    for layer in LAYERS:
        weight = DECODERS[case.partition("-")[0]](path, layer)
        dtype = str(weight.dtype).removeprefix("torch.")
        found[layer] = {"bytes": bytes_of(path, layer), "dtype": dtype, "sha256": value_hash(weight)}
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {case: decoded(case, write(case, Path(folder))) for case in CASES}
    (HERE / "written.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
