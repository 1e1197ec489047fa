"""QuantizedExperts: one linear layer of every expert of a mixture, packed in one tensor.

state_dict holds what that of a QuantizedLinear holds, every tensor with a leading dimension of E, and nothing beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit import ops
from lowbit._experts import ExpertWeights
from lowbit._packed import CANONICAL, PackedModule, frozen
from lowbit.linear import QuantizedLinear, _A8Linear
from lowbit.scheme import Scheme, format_info

__all__ = ["ExpertWeights", "QuantizedExperts"]

_gemm = torch.ops.lowbit.gemm.default
_linear = torch.ops.lowbit.linear.default


class QuantizedExperts(PackedModule):
    """y[s] = x[s] @ W[e].T + bias[e] for rows of x that are sorted by expert, with W[E, N, K] packed and frozen.

    It stands where a model keeps a Parameter [E, N, K]. `weight` is one uint8 Parameter [E, bytes] in which every row is an
    expert as `QuantizedLinear` would hold it; there is no second copy. The product is a loop over the experts that have
    rows, so that their counts have to be known on the CPU.

    Args:
        num_experts, in_features, out_features: E, K and N.
        scheme: a Scheme or its string, such as "int4-g128"; one with static activations is refused.
        device: where to make the (uninitialised) tensors; "meta" makes none.
        has_perm: the weights have column permutations.
        batch_invariant: a row of y has the same bits whatever other rows x has.

    Attributes:
        weight: uint8 [E, bytes]; does not require grad.
        layout: value of the layout enum; 0 (canonical) until the module is prepared.

    Example:
        >>> experts = QuantizedExperts.from_dense(torch.randn(4, 64, 256), "int4-g128")
        >>> experts(torch.randn(5, 256), [2, 0, 0, 3]).shape  # two rows for the first expert, three for the last
        torch.Size([5, 64])
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        scheme: Scheme | str = "int4-g128",
        *,
        device: torch.device | str | None = None,
        has_perm: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__(scheme, (num_experts, out_features, in_features), device, has_perm, batch_invariant)
        if self.scheme.activation_static:
            raise ValueError(f"scheme {self.scheme} has static activations, which experts do not take")
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self._a8 = None if self.scheme.activation_format is None else format_info(self.scheme.activation_format).id

    @classmethod
    def from_dense(
        cls, weight: Tensor, scheme: Scheme | str, *, importance: Tensor | None = None, batch_invariant: bool = False
    ) -> QuantizedExperts:
        """Quantize dense weights [E, N, K].

        Raises:
            ValueError: as `ExpertWeights.quantize`.

        Example:
            >>> QuantizedExperts.from_dense(torch.randn(4, 64, 256), "int8").layout != 0
            True
        """
        return cls.from_weight(ExpertWeights.quantize(weight, scheme, importance), batch_invariant=batch_invariant)

    @classmethod
    def from_weight(cls, weight: ExpertWeights, *, batch_invariant: bool = False) -> QuantizedExperts:
        """A prepared module over canonical weights.

        Example:
            >>> QuantizedExperts.from_weight(ExpertWeights.quantize(torch.randn(4, 64, 256), "nf4-g64")).num_experts
            4
        """
        E, N, K = weight.shape
        made = cls(E, K, N, weight.scheme, device="meta", has_perm=weight.has_perm, batch_invariant=batch_invariant)
        made._set_weight(weight, weight.device)
        return made

    def quantized_weight(self) -> ExpertWeights:
        """The weights in canonical form (a copy), on the device of the module.

        Raises:
            RuntimeError: there is no weight yet (a fresh module, or one on the meta device).

        Example:
            >>> experts.quantized_weight().dequantize(torch.bfloat16)  # [E, N, K]
        """
        weight: ExpertWeights = self._canonical_weight()
        return weight

    def expert(self, index: int) -> QuantizedLinear:
        """One expert as a layer of its own, which shares the memory.

        Raises:
            IndexError: there is no such expert.
            RuntimeError: there is no weight yet.

        Example:
            >>> experts.expert(3)(x).shape
            torch.Size([8, 64])
        """
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert {index} of {self.num_experts}")
        self._need_weight("expert()")
        made = QuantizedLinear(
            self.in_features, self.out_features, False, self.scheme, device="meta", has_perm=self.has_perm
        )
        made.flags = self.flags
        made._set_layout(self.layout)
        made.weight = frozen(self.weight.detach()[index])
        return made.train(self.training)

    def forward(self, x: Tensor, counts: Sequence[int], bias: Tensor | None = None) -> Tensor:
        """y[S, N] for x[S, K], in x's dtype (under autocast, in its dtype).

        Args:
            x: the rows of the first expert, then those of the second, and so on.
            counts: E numbers: how many rows each expert has; they add up to S.
            bias: optional [E, N].

        Raises:
            ValueError: counts do not fit, or x has another number of columns; the message holds the values.
            RuntimeError: the module has not been prepared.
        """
        self._check(x, counts, bias)
        weight, N, K = self._parameters["weight"], self.out_features, self.in_features
        assert weight is not None
        grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        product = self._a8_product(x, grad) if self._a8 is not None else None
        op = _linear if grad else _gemm
        parts, begin = [], 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            rows, add = slice(begin, begin + count), None if bias is None else bias[e]
            if product is not None:
                parts.append(product(rows, e, add))
            else:
                parts.append(op(x[rows], weight[e], add, N, K, self._desc, self.flags))
            begin += count
        return torch.cat(parts) if parts else x.new_empty((0, N))

    def _check(self, x: Tensor, counts: Sequence[int], bias: Tensor | None) -> None:
        if self.layout == CANONICAL:
            raise self._not_prepared()
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x must be [S, K={self.in_features}], got {list(x.shape)}")
        if len(counts) != self.num_experts or sum(counts) != len(x) or min(counts) < 0:
            raise ValueError(
                f"counts must be {self.num_experts} numbers that add up to S={len(x)}, got {len(counts)} "
                f"with the sum {sum(counts)}"
            )
        if bias is not None and tuple(bias.shape) != (self.num_experts, self.out_features):
            raise ValueError(f"bias must be [E={self.num_experts}, N={self.out_features}], got {list(bias.shape)}")

    def _a8_product(self, x: Tensor, grad: bool) -> Callable[[slice, int, Tensor | None], Tensor]:
        """The 8-bit product of some rows and one expert; all rows are quantized at once."""
        if grad:
            apply: Callable[..., Tensor] = _A8Linear.apply
            return lambda rows, e, bias: apply(x[rows], bias, self.expert(e))
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)  # as autocast casts the input of the unquantized layer
        scheme, weight = self.scheme, self.weight
        assert self._a8 is not None
        group, symmetric = scheme.activation_group_size, scheme.activation_symmetric
        xq, scales, zeros = ops.quantize_activation(x, self._a8, group, None, None, None, symmetric)

        def product(rows: slice, e: int, bias: Tensor | None) -> Tensor:
            if bias is not None and bias.dtype not in (dtype, torch.float32):
                bias = bias.to(dtype)
            offset = None if zeros is None else zeros[rows]
            N, K = self.out_features, self.in_features
            return ops.gemm_a8(xq[rows], scales[rows], offset, weight[e], bias, N, K, self._desc, self.flags, dtype)

        return product

    def __getitem__(self, index: object) -> Tensor:
        raise TypeError(
            "the weights of these experts are quantized and have no dense slices: call the module, or its expert(index)"
        )

    def _label(self) -> str:
        return (
            f"QuantizedExperts({self.num_experts}, {self.in_features}, {self.out_features}, "
            f"scheme={str(self.scheme)!r})"
        )

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={str(self.scheme)!r}, {self._state()}"
        )
