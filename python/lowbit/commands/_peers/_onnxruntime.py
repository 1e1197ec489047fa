"""ONNX Runtime: MatMulNBits with its accuracy levels, and dynamic quantization to int8. Inputs and outputs are fp32."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from lowbit.commands._contenders import Contender
from lowbit.commands._peers._peer import Bound, Engine, Peer, codes_in_groups, from_engines

__all__ = ["PEERS"]


def _matmul_nbits(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    N, K = weight.shape
    bits, group, level = peer.bits, peer.options["group_size"], peer.options["level"]
    codes, scales = codes_in_groups(weight, bits, group)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4 if bits == 4 else codes
    attributes = {"K": K, "N": N, "bits": bits, "block_size": group, "accuracy_level": level}
    initial = {"B": packed.numpy(), "scales": scales.view(-1).numpy()}
    model = _model("MatMulNBits", attributes, initial, N, K)
    return _sessions(peer, model, packed.nbytes + scales.nbytes, N, f"MatMulNBits, accuracy {level}", warm)


def _dynamic(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    N, K = weight.shape
    scales = weight.float().abs().amax(1).clamp_min(1e-9) / 127
    codes = (weight.float() / scales[:, None]).round().to(torch.int8)
    initial = {
        "B": codes.t().contiguous().numpy(),
        "scales": scales.numpy(),
        "zeros": torch.zeros(N, dtype=torch.int8).numpy(),
    }
    model = _model("DynamicQuantizeMatMul", {}, initial, N, K)
    return _sessions(peer, model, codes.nbytes + scales.nbytes, N, "DynamicQuantizeMatMul", warm)


def _model(op: str, attributes: dict[str, int], initial: dict[str, Any], N: int, K: int) -> bytes:
    """A model of one node: Y[M, N] from A[M, K]."""
    onnx: Any = importlib.import_module("onnx")
    make = onnx.helper
    node = make.make_node(op, ["A", *initial], ["Y"], domain="com.microsoft", **attributes)
    graph = make.make_graph(
        [node],
        op,
        [make.make_tensor_value_info("A", onnx.TensorProto.FLOAT, ["M", K])],
        [make.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, ["M", N])],
        [onnx.numpy_helper.from_array(value, name) for name, value in initial.items()],
    )
    imports = [make.make_opsetid("", 21), make.make_opsetid("com.microsoft", 1)]
    serialized: bytes = make.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    return serialized


def _sessions(peer: Peer, model: bytes, nbytes: int, N: int, kernel: str, warm: bool) -> Contender:
    ort: Any = importlib.import_module("onnxruntime")

    def build(threads: int) -> Engine:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Its idle threads would spin on the cores of whoever is next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads > 1 else "1")
        try:
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise RuntimeError(str(error).splitlines()[0]) from None

        def bind(x: Tensor) -> Bound:
            a, y = x.float().contiguous(), torch.empty(len(x), N)
            binding = session.io_binding()
            for put, name, tensor in ((binding.bind_input, "A", a), (binding.bind_output, "Y", y)):
                put(name, "cpu", 0, 1, list(tensor.shape), tensor.data_ptr())  # 1: float32

            def call() -> Tensor:
                session.run_with_iobinding(binding)
                return y

            call.inputs = a  # type: ignore[attr-defined]  # the binding holds its address only
            return call

        return bind

    return from_engines(peer, nbytes, build, kernel, warm)


def _bits(bits: int, group: int, a8: bool) -> Peer:
    level = 4 if a8 else 1
    means = "inputs in int8" if a8 else "fp32"
    return Peer(
        f"onnxruntime-int{bits}-g{group}{'-a8' if a8 else ''}",
        f"ONNX Runtime MatMulNBits, groups of {group}, accuracy level {level} ({means})",
        f"W{bits}A{8 if a8 else 16}",
        "onnxruntime",
        _matmul_nbits,
        {"group_size": group, "level": level},
    )


PEERS = (
    _bits(4, 32, False),
    _bits(4, 128, False),
    _bits(4, 32, True),
    _bits(4, 128, True),
    _bits(8, 128, False),
    _bits(8, 128, True),
    Peer("onnxruntime-int8-a8", "ONNX Runtime DynamicQuantizeMatMul, one scale for x", "W8A8", "onnxruntime", _dynamic),
)
