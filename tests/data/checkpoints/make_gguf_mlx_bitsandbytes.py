"""Makes the GGUF, MLX and bitsandbytes files of this folder, each with the code of those who own the format.

    python make_gguf_mlx_bitsandbytes.py cut CHECKPOINTS     # real checkpoints of tiny random Llamas, cut to a few tensors
    python make_gguf_mlx_bitsandbytes.py mlx                 # needs mlx (0.32 made these files)
    python make_gguf_mlx_bitsandbytes.py bitsandbytes        # needs bitsandbytes (0.50 made these files)

CHECKPOINTS holds what was cut: tiny-Q4_K_M.gguf (llama.cpp's convert and quantize), mlx_q4 (mlx-lm's convert), bnb_nf4dq and
bnb_int8 (transformers' save_pretrained with a BitsAndBytesConfig). The other two commands quantize small random weights in every
way there is, and keep beside model.safetensors what the owner's code decodes it to, in fp32: decoded.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEPT = ("model.norm.weight", "model.layers.0.self_attn.k_proj.", "model.layers.0.self_attn.v_proj.")


def cut_gguf(source: Path) -> None:
    """Embedding, attention of the first layer and two norms, metadata as it is."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(HERE / "gguf-q4_k_m.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        if tensor.name in ("token_embd.weight", "output_norm.weight") or tensor.name.startswith("blk.0.attn_"):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def cut_safetensors(source: Path, name: str) -> None:
    """A norm, and K and V of the first layer."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(KEPT)}  # noqa: SIM118
        metadata = file.metadata()
    _folder(name)
    save_file(tensors, HERE / name / "model.safetensors", metadata)
    (HERE / name / "config.json").write_bytes((source / "config.json").read_bytes())


def _folder(name: str) -> Path:
    (HERE / name).mkdir(exist_ok=True)
    return HERE / name


def _save(name: str, tensors: dict[str, Any], decoded: dict[str, Any], config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder = _folder(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(decoded, folder / "decoded.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def make_mlx() -> None:
    """Every number of bits, every group, every mode; each layer has its own entry in the config but the first."""
    import mlx.core as mx
    import torch

    mx.random.seed(0)
    cases = [("affine", bits, 64) for bits in (4, 2, 3, 5, 6, 8)] + [("affine", 4, 32), ("affine", 4, 128)]
    cases += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
    tensors: dict[str, torch.Tensor] = {}
    decoded: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine"}

    def torch_of(value: mx.array) -> torch.Tensor:
        if value.dtype == mx.uint32:
            return torch.tensor(value.view(mx.int32).tolist(), dtype=torch.int32).view(torch.uint32)
        if value.dtype == mx.uint8:
            return torch.tensor(value.tolist(), dtype=torch.uint8)
        kind = {mx.bfloat16: torch.bfloat16, mx.float16: torch.float16, mx.float32: torch.float32}[value.dtype]
        return torch.tensor(value.astype(mx.float32).tolist(), dtype=torch.float32).to(kind)

    for i, (mode, bits, group_size) in enumerate(cases):
        name = f"model.layers.{i}.mlp.up_proj"
        kind = (mx.bfloat16, mx.float16, mx.float32)[i % 3] if mode == "affine" else mx.float32
        weight = (mx.random.normal((8, 128)) * 0.02).astype(kind)
        q, scales, *biases = mx.quantize(weight, group_size=group_size, bits=bits, mode=mode)
        tensors[f"{name}.weight"], tensors[f"{name}.scales"] = torch_of(q), torch_of(scales)
        # In fp32, so that the formula is what is compared, and not the rounding of 16-bit arithmetic.
        if mode == "affine":
            tensors[f"{name}.biases"] = torch_of(biases[0])
            scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
        wide = mx.dequantize(q, scales, *biases, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32)
        decoded[name] = torch_of(wide)
        if i:
            config[name] = {"group_size": group_size, "bits": bits, "mode": mode}
    tensors["model.norm.weight"] = torch.ones(8)
    config["model.layers.99.mlp.gate"] = False
    _save("mlx-modes", tensors, decoded, {"model_type": "llama", "quantization": config, "quantization_config": config})


def make_bitsandbytes() -> None:
    """NF4 and FP4, absmax quantized or not, several blocks, and widths that blocks do not divide."""
    import bitsandbytes.functional as F
    import torch
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    decoded: dict[str, torch.Tensor] = {}
    cases = [
        ("nf4", 64, (16, 128)),
        ("fp4", 64, (16, 128)),
        ("nf4", 128, (6, 96)),
        ("fp4", 64, (5, 40)),
        ("nf4", 256, (4, 64)),
    ]
    for i, (kind, block, shape) in enumerate(cases):
        for nested in (False, True):
            name = f"layers.{2 * i + nested}.proj"
            weight = torch.randn(shape) * 0.02
            q, state = F.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
            tensors[f"{name}.weight"] = q
            for key, value in state.as_dict(packed=True).items():
                tensors[f"{name}.weight.{key}"] = value
            # The portable decoder: 0.50's CPU kernel takes a wrong absmax where a block crosses the end of a row.
            absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
            decoded[name] = _dequantize_4bit_compute(q.reshape(-1), absmax, state.code, block, shape, torch.float32)
    weight = torch.randn(12, 40, dtype=torch.float16)
    codes, scb, _ = F.int8_vectorwise_quant(weight)
    tensors["layers.99.proj.weight"], tensors["layers.99.proj.SCB"] = codes, scb
    decoded["layers.99.proj"] = F.int8_vectorwise_dequant(codes, scb)
    _save("bitsandbytes", tensors, decoded, {"quantization_config": {"quant_method": "bitsandbytes"}})


def main() -> None:
    command = sys.argv[1]
    if command == "cut":
        source = Path(sys.argv[2])
        cut_gguf(source / "tiny-Q4_K_M.gguf")
        for folder, name in (
            ("mlx_q4", "mlx-lm-q4"),
            ("bnb_nf4dq", "bitsandbytes-nf4"),
            ("bnb_int8", "bitsandbytes-int8"),
        ):
            cut_safetensors(source / folder, name)
    elif command == "mlx":
        make_mlx()
    else:
        make_bitsandbytes()


if __name__ == "__main__":
    main()
