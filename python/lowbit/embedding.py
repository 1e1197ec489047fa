"""QuantizedEmbedding: nn.Embedding over a packed weight.

state_dict holds what that of a QuantizedLinear without a bias holds: the canonical tensors and `weight_scheme`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbit._packed import CANONICAL, PackedModule
from lowbit._places import beside_gathering
from lowbit.linear import QuantizedLinear
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["QuantizedEmbedding"]

_embedding = torch.ops.lowbit.embedding.default


class QuantizedEmbedding(PackedModule):
    """out[..., K] = W[indices[...]], with W[N, K] packed and frozen.

    `weight` is one uint8 Parameter, as in `QuantizedLinear`, which it can be shared with (`tie`): the output layer of a model
    whose embedding it is then costs nothing.

    Args:
        num_embeddings, embedding_dim: N and K.
        padding_idx: kept for whoever asks; a row is what is stored for it.
        scheme: a Scheme or its string, without a quantized input.
        device: where to make the (uninitialised) weight; "meta" makes none.
        dtype: of what comes out; by default that of torch. `.to(dtype)`, `.half()` and so on change it.

    Attributes:
        weight: uint8; does not require grad.
        layout: value of the layout enum; 0 (canonical) until the module is prepared.

    Example:
        >>> layer = QuantizedEmbedding.from_embedding(nn.Embedding(1000, 256), "int8-g64")
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 256])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scheme: Scheme | str = "int8-g64",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        has_perm: bool = False,
    ) -> None:
        super().__init__(scheme, (num_embeddings, embedding_dim), device, has_perm, False)
        _check_scheme(self.scheme)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.dtype = dtype or torch.get_default_dtype()

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, scheme: Scheme | str, *, importance: Tensor | None = None
    ) -> QuantizedEmbedding:
        """Quantize an nn.Embedding; what comes out keeps its dtype.

        Raises:
            ValueError: as `QuantizedWeight.quantize`, or `check_embedding` says why it cannot be replaced.

        Example:
            >>> QuantizedEmbedding.from_embedding(nn.Embedding(1000, 256), "int4-g64").layout != 0
            True
        """
        check_embedding(embedding, Scheme.parse(scheme))
        weight = QuantizedWeight.quantize(embedding.weight.detach(), scheme, importance)
        made = cls.from_weight(weight, dtype=embedding.weight.dtype, padding_idx=embedding.padding_idx)
        return made.train(embedding.training)

    @classmethod
    def from_weight(
        cls, weight: QuantizedWeight, *, dtype: torch.dtype | None = None, padding_idx: int | None = None
    ) -> QuantizedEmbedding:
        """A prepared module over a canonical weight.

        Example:
            >>> QuantizedEmbedding.from_weight(QuantizedWeight.quantize(torch.randn(1000, 256), "int8-g64")).num_embeddings
            1000
        """
        scheme, has_perm = weight.scheme, weight.has_perm
        made = cls(weight.N, weight.K, padding_idx, scheme, device="meta", dtype=dtype, has_perm=has_perm)
        made._set_weight(weight, weight.device)
        return made

    def output_layer(self, linear: nn.Linear | QuantizedLinear) -> QuantizedLinear:
        """A layer in place of `linear` that shares this weight: y = x @ W.T + bias, with linear's bias.

        Raises:
            ValueError: the features are not those of the weight.

        Example:
            >>> model.lm_head = model.embed_tokens.output_layer(model.lm_head)
        """
        if (linear.out_features, linear.in_features) != self._shape:
            raise ValueError(
                f"an output layer of N={linear.out_features}, K={linear.in_features} cannot share a weight of "
                f"N={self.num_embeddings}, K={self.embedding_dim}"
            )
        made = QuantizedLinear(
            self.embedding_dim, self.num_embeddings, linear.bias is not None, self.scheme, device="meta",
            has_perm=self.has_perm,
        )  # fmt: skip
        made.bias = linear.bias
        self.tie(made)
        return made.train(linear.training)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight in canonical form (a copy), on the device of the module.

        Raises:
            RuntimeError: there is no weight yet (a fresh module, or one on the meta device).

        Example:
            >>> layer.quantized_weight().dequantize(torch.bfloat16)  # W [N, K]
        """
        weight: QuantizedWeight = self._canonical_weight()
        return weight

    def forward(self, indices: Tensor) -> Tensor:
        """Rows of W in `dtype`.

        Args:
            indices: int64 or int32, any shape, 0 <= index < N.

        Raises:
            RuntimeError: the module has not been prepared, or an index is out of range; the message holds the values.
        """
        if self.layout == CANONICAL:
            raise self._not_prepared()
        weight = self._parameters["weight"]
        return _embedding(indices, weight, self.num_embeddings, self.embedding_dim, self._desc, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device))
        super()._apply(fn, recurse)
        if probe.dtype in (torch.float32, torch.bfloat16, torch.float16):
            self.dtype = probe.dtype
        return self

    def _label(self) -> str:
        return f"QuantizedEmbedding({self.num_embeddings}, {self.embedding_dim}, scheme={str(self.scheme)!r})"

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {padding}scheme={str(self.scheme)!r}, dtype={self.dtype}, "
            f"{self._state()}"
        )


def _check_scheme(scheme: Scheme) -> None:
    if scheme.activation is not None:
        raise ValueError(f"scheme {scheme} quantizes inputs, and the inputs of an embedding are indices")


def check_embedding(embedding: nn.Embedding, scheme: Scheme) -> None:
    """Raise ValueError where an nn.Embedding does more than to gather rows, or the scheme is not one for weights alone."""
    _check_scheme(scheme)
    if (reason := beside_gathering(embedding)) is not None:
        raise ValueError(reason)
