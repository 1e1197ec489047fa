"""Makes the files beside it: what other libraries wrote, cut down to what the tests need, and what they decode it to.

    python make.py cut FOLDER        FOLDER holds the whole checkpoints named in CUTS
    python make.py pack              peers.safetensors: small layers packed by the libraries themselves
    python make.py decode            decoded.json: hashes of what the libraries decode the cut checkpoints to

The whole checkpoints are one randomly initialised Llama (hidden 256, intermediate 512, one layer, vocabulary 320), each
quantized and saved by the library itself: GPTQModel 7.7, AutoAWQ 0.2.9, llm-compressor 0.14 (compressed-tensors 0.19),
transformers 5.17. Cutting copies tensors bit by bit and leaves configs as they are.

`pack` and `decode` need compressed-tensors 0.20 installed, and on PYTHONPATH the unpacked packages auto-gptq 0.7.1 and
AutoAWQ 0.2.9; compressed-tensors 0.13 and nvidia-modelopt 0.47 are read from folders given by CT_OLD and MODELOPT. Only the
modules named here are imported, because the packages' pins contradict each other.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import math
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
LAYER = "model.layers.0."
K_PROJ, O_PROJ = LAYER + "self_attn.k_proj.", LAYER + "self_attn.o_proj."
NORM = LAYER + "input_layernorm."
# Name here -> name of the whole checkpoint, layers that are kept.
CUTS = {
    "dense": ("dense", (K_PROJ, O_PROJ, NORM)),
    "gptq-v1-sym": ("gq_w4_sym", (K_PROJ, NORM)),
    "gptq-v2-asym-act-order": ("gq_w4_asym_v2", (K_PROJ, O_PROJ, NORM)),
    "awq-gemm": ("awq_GEMM", (K_PROJ, NORM)),
    "ct-w4a16": ("llmc_W4A16", (K_PROJ, NORM)),
    "ct-w4a16-asym": ("llmc_W4A16_ASYM", (K_PROJ, NORM)),
    "ct-w8a8": ("llmc_W8A8", (K_PROJ, NORM)),
    "ct-fp8-dynamic": ("llmc_FP8_DYNAMIC", (K_PROJ, NORM)),
    "ct-nvfp4": ("llmc_NVFP4", (K_PROJ, NORM)),
    "fp8-block128": ("tf_fp8blk", (K_PROJ, O_PROJ, NORM)),
}
CONFIGS = ("config.json", "quantize_config.json")


def cut(source: Path) -> None:
    for here, (folder, kept) in CUTS.items():
        target = HERE / here
        target.mkdir(exist_ok=True)
        with safe_open(source / folder / "model.safetensors", "pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names if name.startswith(kept)}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        for config in CONFIGS:
            if (source / folder / config).exists():
                shutil.copyfile(source / folder / config, target / config)


# -- peers ---------------------------------------------------------------------------------------------------------------


def bare(package: str) -> None:
    """Let modules of a package be imported without running the package's own __init__."""
    parts = package.split(".")
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations is not None, f"{name} is not on PYTHONPATH"
        module = types.ModuleType(name)
        module.__path__, module.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules[name] = module


def function(path: Path, name: str, **names: Any) -> Any:
    """One function of a source file, compiled alone with `names` as its globals."""
    tree = ast.parse(path.read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    found.returns, found.decorator_list = None, []
    for argument in found.args.args:
        argument.annotation = None
    scope: dict[str, Any] = {"torch": torch, "math": math, **names}
    exec(compile(ast.Module([found], []), str(path), "exec"), scope)
    return scope[name]


class Case:
    """Random codes, zeros and scales of a layer, and the weight they stand for; W is exact in fp32."""

    def __init__(self, bits: int, N: int, K: int, group: int, symmetric: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        G = math.ceil(K / group)
        self.bits, self.N, self.K, self.group = bits, N, K, group
        self.codes = torch.tensor(rng.integers(0, 1 << bits, (N, K)), dtype=torch.uint8)
        low = 1 if bits > 1 else 0  # a zero of 0 is a case of its own
        zeros = rng.integers(low, 1 << bits, (N, G)) if not symmetric else np.full((N, G), 1 << (bits - 1))
        self.zeros = torch.tensor(zeros, dtype=torch.uint8)
        self.scales = torch.tensor(rng.uniform(0.01, 0.02, (N, G))).half()
        self.g_idx = torch.arange(K) // group

    def linear(self) -> nn.Linear:
        made = nn.Linear(self.K, self.N, bias=False)
        g = self.g_idx
        difference = self.codes.float() - self.zeros.float()[:, g]
        made.weight.data = difference * self.scales.float()[:, g]
        return made

    def expected(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "zeros": self.zeros, "scales": self.scales}


def gptq_cases() -> dict[str, Tensor]:
    bare("auto_gptq.nn_modules.qlinear")
    peer = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    found: dict[str, Tensor] = {}
    for bits in (2, 3, 4, 8):
        for order in (False, True):
            case = Case(bits, 32, 128, 32, seed=bits)
            if order:
                case.g_idx = case.g_idx[torch.randperm(128, generator=torch.Generator().manual_seed(bits))]
            layer = peer.QuantLinear(bits, 32, 128, 32, False, weight_dtype=torch.float32)
            layer.pack(case.linear(), case.scales.float(), case.zeros.float(), case.g_idx.int())
            made = {
                "qweight": layer.qweight,
                "qzeros": layer.qzeros,
                "scales": layer.scales.half(),
                "g_idx": layer.g_idx,
            }
            name = f"gptq-{bits}{'-order' if order else ''}."
            found |= {name + key: value for key, value in made.items()}
            found |= {f"{name}expected.{key}": value for key, value in case.expected().items()}
    return found


def awq_cases() -> dict[str, Tensor]:
    bare("awq.modules.linear")
    bare("awq.utils")
    found: dict[str, Tensor] = {}
    for version, kind, groups in (
        ("gemm", "WQLinear_GEMM", (64,)),
        ("gemv", "WQLinear_GEMV", (128, 64, 32)),
        ("gemv_fast", "WQLinear_GEMVFast", (128, 64, 32)),
        ("marlin", "WQLinear_Marlin", (64, 128)),
    ):
        peer = getattr(importlib.import_module(f"awq.modules.linear.{version}"), kind)
        for group in groups:
            N = 64 if version == "marlin" else 32
            case = Case(4, N, 128, group, symmetric=version == "marlin", seed=group)
            scales, zeros = case.scales, case.zeros.float()
            if version == "gemm":
                scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
            given = None if version == "marlin" else zeros
            layer = peer.from_linear(case.linear(), 4, group, False, scales, given)
            name = f"awq-{version}-{group}."
            for key in ("qweight", "qzeros", "scales"):
                if hasattr(layer, key):
                    found[name + key] = getattr(layer, key).contiguous()
            found |= {f"{name}expected.{key}": value for key, value in case.expected().items()}
    return found


def ct_cases() -> dict[str, Tensor]:
    helpers = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
    old_file = Path(os.environ["CT_OLD"]) / "compressed_tensors/compressors/quantized_compressors/pack_quantized.py"
    packers = {"ct": helpers.pack_to_int32, "ct-old": function(old_file, "pack_to_int32")}
    found: dict[str, Tensor] = {}
    for packer, pack in packers.items():
        for bits in (2, 3, 4, 5, 6, 8):
            case = Case(bits, 24, 72, 8, seed=bits)
            offset = 1 << (bits - 1)
            name = f"{packer}-{bits}."
            found[name + "weight_packed"] = pack((case.codes.int() - offset).to(torch.int8), bits)
            zeros = (case.zeros.int() - offset).to(torch.int8)
            found[name + "weight_zero_point"] = pack(zeros, bits, packed_dim=0).contiguous()
            found[name + "weight_scale"] = case.scales.bfloat16()
            found[name + "weight_shape"] = torch.tensor([24, 72])
            found |= {f"{name}expected.{key}": value for key, value in case.expected().items()}
            found[name + "expected.scales"] = case.scales.bfloat16()
    return found


def modelopt_cases() -> dict[str, Tensor]:
    source = Path(os.environ["MODELOPT"]) / "modelopt/torch/export/quant_utils.py"
    check = function(source, "_validate_int4_block_size")
    pack = function(source, "pack_int4_in_uint8", _validate_int4_block_size=check)
    case = Case(4, 16, 64, 32, symmetric=True)
    scales = case.scales.float()
    made = {"weight": pack(case.linear().weight.data, scales, 32), "weight_scale": scales}
    expected = {**case.expected(), "scales": scales}
    return {f"modelopt-awq.{k}": v for k, v in made.items()} | {
        f"modelopt-awq.expected.{k}": v for k, v in expected.items()
    }


def pack() -> None:
    tensors = gptq_cases() | awq_cases() | ct_cases() | modelopt_cases()
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        HERE / "peers.safetensors",
    )


# -- what the peers decode -----------------------------------------------------------------------------------------------


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def decode_ct(folder: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    scheme = parsed.config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(parsed.format).decompress(tensors, scheme)["weight"]


def decode_awq(folder: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    bare("awq.utils")
    peer = importlib.import_module("awq.utils.packing_utils")
    made = peer.dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, 64)
    return made.t().contiguous()


def decode_gptq(folder: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """By multiplying with the identity: what auto-gptq's layer computes, in fp32."""
    bare("auto_gptq.nn_modules.qlinear")
    peer = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    K, N = tensors["qweight"].shape[0] * 8, tensors["qweight"].shape[1]
    group = config["quantization_config"]["group_size"]
    layer = peer.QuantLinear(4, group, K, N, False, weight_dtype=torch.float32)
    for name, tensor in tensors.items():
        setattr(layer, name, tensor.float() if name == "scales" else tensor)
    if config["quantization_config"]["checkpoint_format"] == "gptq_v2":
        nibbles = [(layer.qzeros >> (4 * i)) & 15 for i in range(8)]
        assert min(int(n.min()) for n in nibbles) > 0, "v1 cannot say a zero of 0"
        layer.qzeros = sum(((n - 1) << (4 * i) for i, n in enumerate(nibbles)), torch.zeros_like(layer.qzeros))
    return layer(torch.eye(K)).t().contiguous()


def decode_fp8(folder: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"])


DECODERS = {"ct": decode_ct, "awq": decode_awq, "gptq": decode_gptq, "fp8": decode_fp8}


def decode() -> None:
    found: dict[str, dict[str, Any]] = {}
    for folder, (_, kept) in CUTS.items():
        family = folder.partition("-")[0]
        if family not in DECODERS:
            continue
        config = json.loads((HERE / folder / "config.json").read_text())
        tensors = load_file(HERE / folder / "model.safetensors")
        for prefix in kept:
            parts = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if len(parts) > 1:
                weight = DECODERS[family](folder, parts, config)
                about = {"dtype": str(weight.dtype).removeprefix("torch."), "sha256": sha256(weight)}
                found.setdefault(folder, {})[prefix[:-1]] = about
    (HERE / "decoded.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    steps = {"cut": lambda: cut(Path(sys.argv[2])), "pack": pack, "decode": decode}
    steps[sys.argv[1]]()
