"""ggml, from the libraries that llama-cpp-python brings: ggml_mul_mat on its CPU backend, weights repacked where it does so.

Inputs are fp32, which ggml itself quantizes to int8 in blocks of 32 (256 for its k-quants) at every call.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowbit.commands._contenders import Contender
from lowbit.commands._peers._peer import Bound, Engine, Peer, from_engines

__all__ = ["PEERS"]

# Values of ggml's enum ggml_type, which are in files and so never change.
_F32: Final = 0
_TYPES: Final = {"q4_0": 2, "q8_0": 8, "q4_k": 12, "q6_k": 14}
_POINTER: Final = ctypes.c_void_p


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


class _Ggml:
    """The functions of ggml that a matrix product takes."""

    _SIGNATURES: Final = {
        "ggml_init": (_POINTER, [_InitParams]),
        "ggml_free": (None, [_POINTER]),
        "ggml_new_tensor_2d": (_POINTER, [_POINTER, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
        "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
        "ggml_new_graph": (_POINTER, [_POINTER]),
        "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
        "ggml_get_data": (_POINTER, [_POINTER]),
        "ggml_nbytes": (ctypes.c_size_t, [_POINTER]),
        "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
        "ggml_blck_size": (ctypes.c_int64, [ctypes.c_int]),
        "ggml_quantize_chunk": (
            ctypes.c_size_t,
            [ctypes.c_int, _POINTER, _POINTER, *[ctypes.c_int64] * 3, _POINTER],
        ),
        "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, [_POINTER, _POINTER]),
        "ggml_backend_buffer_free": (None, [_POINTER]),
        "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t]),
        "ggml_backend_graph_compute": (ctypes.c_int, [_POINTER, _POINTER]),
        "ggml_backend_free": (None, [_POINTER]),
        "ggml_backend_get_device": (_POINTER, [_POINTER]),
        "ggml_backend_get_default_buffer_type": (_POINTER, [_POINTER]),
        "ggml_backend_buft_name": (ctypes.c_char_p, [_POINTER]),
        "ggml_backend_dev_backend_reg": (_POINTER, [_POINTER]),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, [_POINTER, _POINTER]),
        "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, ctypes.c_char_p]),
        "ggml_backend_cpu_init": (_POINTER, []),
        "ggml_backend_cpu_set_n_threads": (None, [_POINTER, ctypes.c_int]),
    }

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        folders = [] if spec is None else [Path(p) / "lib" for p in spec.submodule_search_locations or ()]
        suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
        loaded = []
        for name in ("ggml-base", "ggml-cpu", "ggml"):
            found = [path for folder in folders for path in sorted(folder.glob(f"*{name}{suffix}*"))]
            if not found:
                raise RuntimeError(f"this llama-cpp-python has no lib{name}")
            loaded.append(ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL))
        for name, (returns, takes) in self._SIGNATURES.items():
            function = next((f for f in (getattr(library, name, None) for library in loaded) if f), None)
            if function is None:
                raise RuntimeError(f"this llama-cpp-python's ggml has no {name}")
            function.restype, function.argtypes = returns, takes
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:  # functions that __init__ sets, for the type checker
        raise AttributeError(name)

    def context(self) -> Any:
        """Room for the descriptions of a few tensors and a graph; data lives in buffers."""
        return self.ggml_init(_InitParams(4 << 20, None, True))

    def weight_buffers(self, backend: Any) -> list[Any]:
        """Types of buffers for weights: those that repack first, the plain one last."""
        registry = self.ggml_backend_dev_backend_reg(self.ggml_backend_get_device(backend))
        address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        found: list[Any] = []
        if address:
            get = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)
            extra = get(self.ggml_backend_get_device(backend))
            while extra and extra[len(found)]:
                found.append(extra[len(found)])
        return [*found, self.ggml_backend_get_default_buffer_type(backend)]


class _Weight:
    """W in one of ggml's types, on a CPU backend of its own; frees what it holds."""

    def __init__(self, ggml: _Ggml, kind: int, data: Tensor, N: int, K: int, threads: int) -> None:
        self._ggml, self._N, self._K = ggml, N, K
        self._frees: list[tuple[Any, Any]] = []
        self._backend = self._keep(ggml.ggml_backend_free, ggml.ggml_backend_cpu_init())
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        context = self._keep(ggml.ggml_free, ggml.context())
        for buffers in ggml.weight_buffers(self._backend):
            self.tensor = ggml.ggml_new_tensor_2d(context, kind, K, N)
            buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffers)
            product = ggml.ggml_mul_mat(context, self.tensor, ggml.ggml_new_tensor_2d(context, _F32, K, 1))
            if buffer and ggml.ggml_backend_dev_supports_op(ggml.ggml_backend_get_device(self._backend), product):
                self._keep(ggml.ggml_backend_buffer_free, buffer)
                self.buffers = ggml.ggml_backend_buft_name(buffers).decode()
                ggml.ggml_backend_tensor_set(self.tensor, data.data_ptr(), 0, data.nbytes)
                return
            if buffer:
                ggml.ggml_backend_buffer_free(buffer)
            context = self._keep(ggml.ggml_free, ggml.context())
        raise RuntimeError("ggml's CPU backend does not multiply with this type")

    def _keep(self, free: Any, handle: Any) -> Any:
        self._frees.append((free, handle))
        return handle

    def __del__(self) -> None:
        while self._frees:
            free, handle = self._frees.pop()
            free(handle)

    def bind(self, x: Tensor) -> Bound:
        """The product with x [M, K], a graph of one node."""
        ggml, backend = self._ggml, self._backend
        context = self._keep(ggml.ggml_free, ggml.context())
        a = ggml.ggml_new_tensor_2d(context, _F32, self._K, len(x))
        y = ggml.ggml_mul_mat(context, self.tensor, a)
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(
            context, ggml.ggml_backend_get_default_buffer_type(backend)
        )
        self._keep(ggml.ggml_backend_buffer_free, buffer)
        values = x.float().contiguous()
        ggml.ggml_backend_tensor_set(a, values.data_ptr(), 0, values.nbytes)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, y)
        memory = (ctypes.c_float * (len(x) * self._N)).from_address(ggml.ggml_get_data(y))
        result = torch.frombuffer(memory, dtype=torch.float32).view(len(x), self._N)
        compute = ggml.ggml_backend_graph_compute

        def call() -> Tensor:
            compute(backend, graph)
            return result

        call.weight = self  # type: ignore[attr-defined]  # which owns everything above
        return call


def _mul_mat(peer: Peer, weight: Tensor, dtype: torch.dtype, warm: bool) -> Contender:
    N, K = weight.shape
    ggml, kind = _Ggml(), _TYPES[peer.options["type"]]
    block = ggml.ggml_blck_size(kind)
    if K % block:
        raise RuntimeError(f"K={K} is not a multiple of {block}")
    values = weight.float().contiguous()
    data = torch.empty(ggml.ggml_row_size(kind, K) * N, dtype=torch.uint8)
    ggml.ggml_quantize_chunk(kind, values.data_ptr(), data.data_ptr(), 0, N, K, None)
    buffers = _Weight(ggml, kind, data, N, K, 1).buffers

    def build(threads: int) -> Engine:
        return _Weight(ggml, kind, data, N, K, threads).bind

    return from_engines(peer, data.nbytes, build, f"ggml_mul_mat, {buffers}", warm)


def _row(name: str, what: str, kind: str) -> Peer:
    what = f"ggml_mul_mat, {what}, inputs to int8 in blocks"
    return Peer(f"ggml-{name}", what, kind, "llama-cpp-python", _mul_mat, {"type": name}, "llama_cpp", "bench-ggml")


PEERS = (
    _row("q4_0", "4 bits in blocks of 32", "W4A8"),
    _row("q4_k", "4 bits, two levels of scales", "W4A8"),
    _row("q6_k", "6 bits, two levels of scales", "W6A8"),
    _row("q8_0", "8 bits in blocks of 32", "W8A8"),
)
