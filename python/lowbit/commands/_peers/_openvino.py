"""OpenVINO: a compiled MatMul over compressed weights, with inputs in the dtype of x or quantized to int8 per group."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from lowbit.commands._contenders import Contender
from lowbit.commands._peers._peer import Bound, Engine, Peer, codes_in_groups, from_engines

__all__ = ["PEERS"]

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _matmul(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    ov: Any = importlib.import_module("openvino")
    N, K = weight.shape
    group = peer.options["group_size"] or K
    codes, scales = codes_in_groups(weight, peer.bits, group)
    stored = (codes[..., 0::2] | codes[..., 1::2] << 4 if peer.bits == 4 else codes).contiguous()
    model = _model(ov, stored, scales, peer.bits, group)
    core = ov.Core()
    precision = "f32" if peer.int8 else _PRECISIONS[dtype]

    def build(threads: int) -> Engine:
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": "1",
            "ENABLE_CPU_PINNING": False,  # nobody else is pinned either
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(peer.options["input_group"]),
        }
        _ = stored  # whose memory the model's constant is
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def bind(x: Tensor) -> Bound:
            inputs, outputs = ov.Tensor(x.float().numpy()), ov.Tensor(ov.Type.f32, ov.Shape([len(x), N]))

            def call() -> Any:
                # Requests are shared by the numbers of rows, so their tensors are set before each call.
                request.set_input_tensor(inputs)
                request.set_output_tensor(outputs)
                request.infer()
                return outputs

            return call

        return bind

    nbytes = stored.nbytes + scales.numel() * 2
    return from_engines(peer, nbytes, build, "MatMul", warm, lambda y: torch.from_numpy(y.data))


def _model(ov: Any, stored: Tensor, scales: Tensor, bits: int, group: int) -> Any:
    """Y[M, N] = A @ ((codes - 2^(bits-1)) * scales).T, in the form that its compiler recognises."""
    ops: Any = importlib.import_module("openvino.opset13")
    N, G = scales.shape
    kind = ov.Type.u4 if bits == 4 else ov.Type.u8
    constant = ov.op.Constant(ov.Tensor(stored.view(-1).numpy(), ov.Shape([N, G, group]), kind))
    middle = ov.op.Constant(kind, ov.Shape([1, 1, 1]), [1 << (bits - 1)])
    weight = ops.subtract(ops.convert(constant, "f16"), ops.convert(middle, "f16"))
    weight = ops.multiply(weight, ops.constant(scales.half().numpy()[..., None]))
    weight = ops.reshape(weight, ops.constant([N, G * group]), False)
    a = ops.parameter([-1, G * group], ov.Type.f32, name="A")
    return ov.Model([ops.matmul(a, ops.convert(weight, "f32"), False, True)], [a])


def _row(bits: int, group: int, a8: bool) -> Peer:
    size = f"-g{group}" if group else ""
    groups = f"groups of {group}" if group else "one scale per row"
    return Peer(
        f"openvino-int{bits}{size}{'-a8' if a8 else ''}",
        f"OpenVINO MatMul, {bits}-bit weights, {groups}{', inputs to int8 in groups of 32' if a8 else ''}",
        f"W{bits}A{8 if a8 else 16}",
        "openvino",
        _matmul,
        {"group_size": group, "input_group": 32 if a8 else 0},
    )


PEERS = (_row(4, 32, False), _row(4, 128, False), _row(4, 128, True), _row(8, 0, False), _row(8, 0, True))
