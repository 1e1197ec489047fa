"""The runner from Python: tensors in, tensors out."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cases import cpu_desc
from lowbit import _C
from reference import Weight

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
#: The longest stretch of K that kernels sum in int32 (csrc/cpu/workspace.h).
SEGMENT = 32768


class Refused(Exception):
    """The kernel does not take the problem; the text says why."""


def _bytes(tensor: torch.Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


class Runner:
    """A process that calls kernels; one for each machine that is emulated."""

    def __init__(self, command: Sequence[str | Path]):
        self._process = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        levels, features = self._ask("levels", [], [])
        self.levels = levels.decode().split()
        words = features.decode().split()
        self.features = {name: value == "1" for name, value in zip(words[::2], words[1::2], strict=True)}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=30) == 0

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) != size:
            raise RuntimeError(f"the runner ended with status {self._process.wait(timeout=30)}")
        return data

    def _ask(self, text: str, numbers: Sequence[int], blobs: Sequence[bytes]) -> list[bytes]:
        frame = [struct.pack("<I", len(text)), text.encode(), struct.pack(f"<I{len(numbers)}q", len(numbers), *numbers)]
        frame.append(struct.pack("<I", len(blobs)))
        for blob in blobs:
            frame += [struct.pack("<Q", len(blob)), blob]
        assert self._process.stdin is not None
        self._process.stdin.write(b"".join(frame))
        self._process.stdin.flush()
        (count,) = struct.unpack("<I", self._read(4))
        error, *answer = [self._read(struct.unpack("<Q", self._read(8))[0]) for _ in range(count)]
        if error.startswith(b"refused: "):
            raise Refused(error.decode())
        if error:
            raise RuntimeError(error.decode())
        return answer

    # ---- kernels: the request's words, numbers and blobs are described in runner.cpp ------------------------------------

    def gemm(
        self, level: str, kernel: str, x: torch.Tensor, weight: Weight, packed: torch.Tensor,
        bias: torch.Tensor | None, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """x @ W.T + bias in `dtype`; bias is fp32."""
        M, N, K = len(x), weight.N, weight.K
        numbers = [N, K, cpu_desc(weight.spec), M, ELEMENTS[x.dtype], ELEMENTS[dtype], 0, 0]
        blobs = [_bytes(packed), _bytes(x), b"", b"", b"", _bytes(bias)]
        return _tensor(self._ask(f"{level} gemm {kernel}", numbers, blobs)[0], dtype, M, N)

    def gemm_a8(
        self, level: str, kernel: str, activation: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        weight: Weight, packed: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """The same for int8 activations per token: codes, scales, zeros."""
        codes, scales, zeros = activation
        M, N, K = len(codes), weight.N, weight.K
        if weight.perm is not None:
            codes = codes[:, weight.perm.long()]
        group_size = K if weight.spec.group_size == -1 else weight.spec.group_size
        segment = min(group_size, SEGMENT)
        per_group = -(-group_size // segment)
        sums = np.zeros((M, weight.spec.groups(K) * per_group), np.int32)
        for i in range(sums.shape[1]):
            begin = i // per_group * group_size + i % per_group * segment
            end = min(begin + segment, i // per_group * group_size + group_size, K)
            sums[:, i] = codes[:, begin:end].int().sum(1) if begin < end else 0
        numbers = [N, K, cpu_desc(weight.spec), M, ELEMENTS[torch.int8], ELEMENTS[dtype], segment, per_group]
        blobs = [packed, codes, torch.from_numpy(sums), scales, zeros, bias]
        answer = self._ask(f"{level} gemm {kernel}", numbers, [_bytes(blob) for blob in blobs])
        return _tensor(answer[0], dtype, M, N)

    def grad(self, level: str, kernel: str, dy: torch.Tensor, weight: Weight, packed: torch.Tensor) -> torch.Tensor:
        """dy @ W for fp32 dy: dx [M, K], fp32, columns in original order."""
        M, N, K = len(dy), weight.N, weight.K
        padded = torch.zeros(M, -(-N // 16) * 16)
        padded[:, :N] = dy
        numbers = [N, K, cpu_desc(weight.spec), M]
        answer = self._ask(f"{level} grad {kernel}", numbers, [_bytes(packed), _bytes(padded)])[0]
        sums = _tensor(answer, torch.float32, M, len(answer) // (4 * M))[:, :K]
        dx = torch.empty(M, K)
        dx[:, slice(None) if weight.perm is None else weight.perm.long()] = sums
        return dx

    def load(
        self, level: str, x: torch.Tensor, perm: torch.Tensor | None, pre_scale: torch.Tensor | None, stride: int
    ) -> torch.Tensor:
        """Rows of x as fp32 [M, stride]."""
        numbers = [*x.shape, ELEMENTS[x.dtype], stride]
        answer = self._ask(f"{level} load", numbers, [_bytes(x), _bytes(perm), _bytes(pre_scale)])
        return _tensor(answer[0], torch.float32, len(x), stride)

    def store(self, level: str, row: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """fp32 values in `dtype`."""
        return _tensor(self._ask(f"{level} store", [ELEMENTS[dtype]], [_bytes(row)])[0], dtype, len(row))

    def quantize(
        self, level: str, values: torch.Tensor, importance: torch.Tensor | None, desc: int, search: bool
    ) -> list[bytes]:
        """Groups [G, count] -> codes, scales, zeros as bytes."""
        return self._ask(f"{level} quantize", [desc, search, *values.shape], [_bytes(values), _bytes(importance)])

    def quantize_activation(
        self, level: str, x: torch.Tensor, group_size: int, dtype: torch.dtype, symmetric: bool,
        scale: torch.Tensor | None, zero: torch.Tensor | None,
    ) -> list[bytes]:  # fmt: skip
        """fp32 rows -> codes, scales, zeros as bytes."""
        numbers = [*x.shape, group_size, ELEMENTS[dtype], symmetric]
        return self._ask(f"{level} activation", numbers, [_bytes(x), _bytes(scale), _bytes(zero)])

    def dequantize(self, level: str, weight: Weight, desc: int) -> torch.Tensor:
        """W [N, K] in fp32, columns in packed order."""
        codes = torch.from_numpy(weight.codes.astype(np.uint8))
        blobs = [_bytes(blob) for blob in (codes, weight.scales, weight.zeros, *weight.supers)]
        answer = self._ask(f"{level} dequantize", [weight.N, weight.K, desc], blobs)
        return _tensor(answer[0], torch.float32, weight.N, weight.K)


def kernels(op: str) -> list[str]:
    """Names of the CPU kernels of an op, on whatever instruction set."""
    return list(dict.fromkeys(row["name"] for row in _C.kernel_table() if row["backend"] == "cpu" and row["op"] == op))
