"""Who takes part in a comparison: what a contender is, how one is checked, and lowbit's own. Peers are in `_peers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit import _C, _selection, ops
from lowbit.commands._measure import Call, copies_for
from lowbit.commands._target import Target, find_target
from lowbit.scheme import Scheme, format_info
from lowbit.weight import QuantizedWeight

__all__ = [
    "Contender",
    "Wrong",
    "check_product",
    "copy_tensors",
    "kind_of",
    "make_dequantize",
    "make_scheme",
    "rotate",
    "tolerance",
]

# Static scales for normally distributed inputs: five standard deviations are the largest code.
_STATIC_SCALES = {"int8": 5.0 / 127, "fp8_e4m3": 5.0 / 448}


class Wrong(RuntimeError):
    """A contender computes something else than the product."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A weight W[N, K] in one form, and how to multiply with it.

    Args:
        name: in tables.
        kind: what is multiplied, such as "W4A16": bits of the weight and of its inputs. Only the same is comparable.
        nbytes: of one copy of the weight.
        bind: given x [M, K], a function of the number of the call; copies are used in rotation. It uses as many threads as
            torch does when it is called.
        kernel: the kernel's name for M rows of x.
        bits: of the weight; how far from the exact product a result may be.
        int8: whether inputs are quantized, so that 8-bit matmul sets its roof.
        result: what a call returned, as a tensor [M, N].
    """

    name: str
    kind: str
    nbytes: int
    bind: Callable[[Tensor], Call]
    kernel: Callable[[int], str]
    bits: int = 16
    int8: bool = False
    baseline: bool = False
    result: Callable[[Any], Tensor] = torch.as_tensor


def copy_tensors(tensors: tuple[Tensor, ...], warm: bool) -> list[tuple[Tensor, ...]]:
    """As many copies as it takes for each to have left the caches when its turn comes again (`warm`: the one)."""
    count = copies_for(sum(t.nbytes for t in tensors), warm, tensors[0].device.type)
    return [tensors] + [tuple(t.clone() for t in tensors) for _ in range(count - 1)]


def rotate(copies: Sequence[tuple[Any, ...]], call: Callable[..., object]) -> Call:
    """`call` on the i-th copy, around and around."""
    count = len(copies)
    return lambda i: call(*copies[i % count])


def kind_of(scheme: Scheme) -> str:
    """ "W4A16", "W8A8" and the like.

    Example:
        >>> kind_of(Scheme.parse("int4-g128-a8"))
        'W4A8'
    """
    return f"W{scheme.bits}A{16 if scheme.activation is None else 8}"


def tolerance(bits: int) -> float:
    """The largest plausible relative error (of norms) of a product with normally distributed weights in that many bits."""
    return {2: 0.7, 3: 0.35, 4: 0.2, 5: 0.1, 6: 0.06, 8: 0.06}.get(bits, 0.02)


def check_product(contender: Contender, returned: object, x: Tensor, weight: Tensor) -> float:
    """Compare what a call returned with the product in fp64, on up to 8 rows and 64 columns of it.

    Args:
        contender: whose call it was.
        returned: by the call on x.
        x: [M, K].
        weight: [N, K], before it was quantized.

    Returns:
        The relative error, as the ratio of norms.

    Raises:
        Wrong: the shape is not [M, N], or the error is larger than quantizing explains.
    """
    y, x = contender.result(returned).cpu(), x.cpu()
    M, N = x.shape[0], weight.shape[0]
    if tuple(y.shape) != (M, N):
        raise Wrong(f"computes something else: a result of shape {list(y.shape)} instead of {[M, N]}")
    rows = torch.linspace(0, M - 1, min(M, 8)).long()
    columns = torch.linspace(0, N - 1, min(N, 64)).long()
    wanted = x[rows].double() @ weight[columns].double().T
    error = float((y[rows][:, columns].double() - wanted).norm() / wanted.norm())
    if not error <= tolerance(contender.bits):
        raise Wrong(
            f"computes something else: relative error {error:.3g}, at most {tolerance(contender.bits)} is plausible"
        )
    return error


# -- lowbit ------------------------------------------------------------------------------------------------------------------


def make_scheme(
    scheme: Scheme,
    weight: Tensor,
    dtype: torch.dtype,
    warm: bool,
    batch_invariant: bool = False,
    target: Target | None = None,
) -> Contender:
    """lowbit: the op that `QuantizedLinear` calls; for schemes with activations, quantizing the input is included."""
    N, K = weight.shape
    target = target or find_target("cpu")
    quantized = QuantizedWeight.quantize(weight, dataclasses.replace(scheme, search=False))
    layout = _C.preferred_layout(target.name, scheme.desc())
    desc = scheme.desc(layout)
    flags = _C.enums()["flags"]["batch_invariant"] if batch_invariant else 0
    first = quantized.pack(layout).to(target.device)
    # Each is packed, because `pack` chooses the memory: a clone lies where torch's allocator puts it.
    more = range(copies_for(first.nbytes, warm, first.device.type) - 1)
    copies = [(first,)] + [(quantized.pack(layout).to(target.device),) for _ in more]
    gemm, quantize, gemm_a8 = (getattr(target.ops, n).default for n in ("gemm", "quantize_activation", "gemm_a8"))
    if scheme.activation is None:
        op, asked = "gemm", str(dtype)

        def bind(x: Tensor) -> Call:
            return rotate(copies, lambda w: gemm(x, w, None, N, K, desc, flags))
    else:
        info = format_info(str(scheme.activation_format))
        group, symmetric = scheme.activation_group_size, scheme.activation_symmetric
        op, asked = "gemm_a8", "int8" if info.kind == "int" else "float8_e4m3fn"
        one_scale = torch.tensor([_STATIC_SCALES[info.name]], device=target.device)
        fixed = one_scale, None if symmetric else torch.zeros(1, dtype=torch.int32, device=target.device)
        scale, zero = fixed if scheme.activation_static else (None, None)

        def bind(x: Tensor) -> Call:
            def call(w: Tensor) -> Tensor:
                xq, scales, zeros = quantize(x, info.id, group, scale, zero, None, symmetric)
                return gemm_a8(xq, scales, None if symmetric else zeros, w, None, N, K, desc, flags, x.dtype)

            return rotate(copies, call)

    def kernel(M: int) -> str:
        answer = _selection.explain(
            op, M=M, N=N, K=K, scheme=scheme, device=target.model, dtype=asked, batch_invariant=batch_invariant
        )
        return str(answer.chosen)

    name = f"{scheme}{' batch-invariant' if batch_invariant else ''}"
    return Contender(
        name, kind_of(scheme), copies[0][0].nbytes, bind, kernel, scheme.bits, int8=scheme.activation is not None
    )


def make_dequantize(
    scheme: Scheme, weight: Tensor, dtype: torch.dtype, warm: bool, target: Target | None = None
) -> Contender:
    """What one does without a kernel: dequantize the whole weight, then F.linear."""
    N, K = weight.shape
    target = target or find_target("cpu")
    q = QuantizedWeight.quantize(weight, dataclasses.replace(scheme, search=False)).to(target.device)
    desc, found = scheme.desc(), {"packed": q.packed, "scales": q.scales, "zeros": q.zeros, "supers": q.super_scales}
    parts = {name: tensor for name, tensor in found.items() if tensor is not None}
    copies = copy_tensors(tuple(parts.values()), warm)

    def bind(x: Tensor) -> Call:
        def call(*tensors: Tensor) -> Tensor:
            t = dict(zip(parts, tensors, strict=True))
            W = ops.dequantize(
                t["packed"], t["scales"], t.get("zeros"), None, N, K, desc, dtype, t.get("supers")
            )  # fmt: skip
            return F.linear(x, W)

        return rotate(copies, call)

    name = f"dequant {scheme}"
    return Contender(
        name, kind_of(scheme), q.nbytes, bind, lambda M: "dequantize, F.linear", scheme.bits, baseline=True
    )
