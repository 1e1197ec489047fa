"""QuantizedLinear: nn.Linear over a packed weight.

What state_dict holds, whatever the layout of the weight in memory (prefix left out):

    weight_packed, weight_scales, weight_zeros or weight_offsets, weight_perm      the canonical tensors, and of scales of
    weight_super_scales, weight_super_offsets or weight_scale_offset                two levels the second
    weight_scheme                           uint8, the scheme's string: a state_dict of another scheme is refused
    bias                                    as in nn.Linear
    input_scale, input_zero                 of schemes with static activations: fp32 [1], int32 [1]
    input_pre_scale                         fp32 [K]: x is multiplied by it first
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from lowbit import ops
from lowbit._packed import CANONICAL, PackedModule, frozen
from lowbit.scheme import Scheme, format_info
from lowbit.weight import QuantizedWeight

__all__ = ["QuantizedLinear"]

_gemm = torch.ops.lowbit.gemm.default
_linear = torch.ops.lowbit.linear.default
_INPUTS: Final[tuple[str, ...]] = ("input_scale", "input_zero", "input_pre_scale")


class QuantizedLinear(PackedModule):
    """y = x @ W.T + bias, with W[N, K] packed and frozen.

    `weight` is one uint8 Parameter that holds codes, scales, zeros and perm in the order that this device's kernels read
    them, which `layout` names. There is no second copy. A module made with this constructor is empty: fill it with
    `load_state_dict`. One made with `from_linear` or `from_weight` is ready.

    `.to(device)` repacks where the other device reads another layout; `.half()`, `.bfloat16()` and `.float()` change
    the bias only. Bytes moved by offloading (`weight` replaced by a meta tensor and put back) keep their layout.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one.
        scheme: a Scheme or its string, such as "int4-g128".
        device: where to make the (uninitialised) tensors; "meta" makes none.
        dtype: of the bias.
        has_perm: the weight has a column permutation.
        batch_invariant: a row of y has the same bits whatever other rows x has; the cost is in the docs.

    Attributes:
        weight, bias: Parameters; neither requires grad, though the bias may be made to.
        layout: value of the layout enum; 0 (canonical) until the module is prepared.

    Example:
        >>> layer = QuantizedLinear.from_linear(nn.Linear(256, 64), "int4-g128")
        >>> layer(torch.randn(8, 256)).shape
        torch.Size([8, 64])
    """

    _beside = ("bias", *_INPUTS)
    _needed = ("bias", *_INPUTS[:2])

    bias: nn.Parameter | None
    input_scale: nn.Parameter | None
    input_zero: nn.Parameter | None
    input_pre_scale: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: Scheme | str = "int4-g128",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        has_perm: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__(scheme, (out_features, in_features), device, has_perm, batch_invariant)
        self.in_features = in_features
        self.out_features = out_features
        for name in ("bias", *_INPUTS):
            self.register_parameter(name, None)
        if bias:
            self.bias = frozen(torch.empty(out_features, device=device, dtype=dtype))
        if self.scheme.activation_static:
            self.input_scale = frozen(torch.ones(1, device=device, dtype=torch.float32))
            if not self.scheme.activation_symmetric:
                self.input_zero = frozen(torch.zeros(1, device=device, dtype=torch.int32))
        # Read on every call, so kept as plain numbers.
        self._a8 = None if self.scheme.activation_format is None else format_info(self.scheme.activation_format).id

    # -- making one -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: Scheme | str,
        *,
        importance: Tensor | None = None,
        batch_invariant: bool = False,
    ) -> QuantizedLinear:
        """Quantize an nn.Linear; its bias is shared, not copied.

        Args:
            linear: its weight [N, K] is fp32, bf16 or fp16.
            scheme: a Scheme or its string.
            importance: optional [K], for the search (see `QuantizedWeight.quantize`).

        Raises:
            ValueError: as `QuantizedWeight.quantize`.

        Example:
            >>> QuantizedLinear.from_linear(nn.Linear(256, 64), "int8").layout != 0
            True
        """
        weight = QuantizedWeight.quantize(linear.weight, scheme, importance)
        made = cls.from_weight(weight, linear.bias, batch_invariant=batch_invariant)
        return made.train(linear.training)

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        input_scale: Tensor | None = None,
        input_zero: Tensor | None = None,
        input_pre_scale: Tensor | None = None,
        batch_invariant: bool = False,
    ) -> QuantizedLinear:
        """A prepared module over a canonical weight.

        Args:
            weight: [N, K].
            bias: [N], a floating-point dtype.
            input_scale, input_zero: fp32 [1] and int32 [1]; schemes with static activations need them.
            input_pre_scale: fp32 [K], which x is multiplied by: the weight was divided by it.

        Raises:
            ValueError: a tensor is missing, has another shape, or does not go with the scheme.

        Example:
            >>> QuantizedLinear.from_weight(QuantizedWeight.load("q_proj.safetensors"))
            QuantizedLinear(in_features=256, out_features=64, bias=False, scheme='int4-g128', layout=cpu_tile16)
        """
        made = cls(
            weight.K, weight.N, bias is not None, weight.scheme,
            device="meta", has_perm=weight.perm is not None, batch_invariant=batch_invariant,
        )  # fmt: skip
        given = {"input_scale": input_scale, "input_zero": input_zero, "input_pre_scale": input_pre_scale}
        found = made._check_inputs({name: t for name, t in given.items() if t is not None})
        if bias is not None:
            _check_bias(bias, weight.N)
            made.bias = frozen(bias.detach())
        made._set_weight(weight, weight.device)
        for name, tensor in found.items():
            setattr(made, name, frozen(tensor.to(weight.device)))
        return made

    def _check_inputs(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The activation tensors in their dtypes; ValueError unless they are the ones that the scheme asks for."""
        shapes = {"input_scale": (1,), "input_zero": (1,), "input_pre_scale": (self.in_features,)}
        needed = {name for name in ("input_scale", "input_zero") if getattr(self, name) is not None}
        allowed = needed | {"input_pre_scale"}
        if missing := sorted(needed - given.keys()):
            raise ValueError(f"scheme {self.scheme} has static activations and needs {' and '.join(missing)}")
        if extra := sorted(given.keys() - allowed):
            raise ValueError(f"{extra[0]} does not go with scheme {self.scheme}")
        found = {}
        for name, tensor in given.items():
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} must be {list(shapes[name])}, got {list(tensor.shape)}")
            if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} has values that are not finite")
            found[name] = tensor.detach().to(torch.int32 if name == "input_zero" else torch.float32)
        return found

    def quantized_weight(self) -> QuantizedWeight:
        """The weight in canonical form (a copy), on the device of the module.

        Raises:
            RuntimeError: there is no weight yet (a fresh module, or one on the meta device).

        Example:
            >>> layer.quantized_weight().dequantize(torch.bfloat16)  # W [N, K]
        """
        weight: QuantizedWeight = self._canonical_weight()
        return weight

    # -- forward --------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """y[..., N] = x[..., K] @ W.T + bias, in x's dtype (under autocast, in its dtype).

        Raises:
            RuntimeError: the module has not been prepared, or x does not fit; the message holds the values.
        """
        if self.layout == CANONICAL:
            raise self._not_prepared()
        # Straight from the dict: nn.Module.__getattr__ costs a good part of a microsecond per tensor.
        parameters = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if self._a8 is not None:
            apply: Callable[..., Tensor] = _A8Linear.apply
            return apply(x, bias, self) if grad else self._forward_a8(x, bias)
        if (pre_scale := parameters["input_pre_scale"]) is not None:
            x = (x * pre_scale).to(x.dtype)  # multiplied in fp32, rounded once more than the product below
        op = _linear if grad else _gemm
        return op(x, weight, bias, self.out_features, self.in_features, self._desc, self.flags)

    def _forward_a8(self, x: Tensor, bias: Tensor | None) -> Tensor:
        scheme, dtype = self.scheme, x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)  # as autocast casts the input of the unquantized layer
        if bias is not None and bias.dtype not in (dtype, torch.float32):
            bias = bias.to(dtype)
        assert self._a8 is not None
        scale, zero, pre_scale = (self._parameters[name] for name in _INPUTS)
        group, symmetric = scheme.activation_group_size, scheme.activation_symmetric
        xq, x_scales, x_zeros = ops.quantize_activation(x, self._a8, group, scale, zero, pre_scale, symmetric)
        N, K = self.out_features, self.in_features
        return ops.gemm_a8(xq, x_scales, x_zeros, self.weight, bias, N, K, self._desc, self.flags, dtype)

    def _label(self) -> str:
        return f"QuantizedLinear({self.in_features}, {self.out_features}, scheme={str(self.scheme)!r})"

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"scheme={str(self.scheme)!r}, {self._state()}"
        )

    # -- state_dict -----------------------------------------------------------------------------------------------------

    def _check_beside(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {name: tensors[name] for name in _INPUTS if name in tensors}
        for name in ("input_scale", "input_zero"):  # what is absent keeps its value
            if (old := self._parameters[name]) is not None:
                inputs.setdefault(name, old)
        inputs = self._check_inputs(inputs)
        if (bias := tensors.get("bias")) is not None:
            if self.bias is None:
                raise ValueError("the state_dict holds a bias, the module has none")
            _check_bias(bias, self.out_features)
            inputs["bias"] = bias
        return inputs

    def _set_beside(self, tensors: dict[str, Tensor], assign: bool) -> None:
        bias = tensors.pop("bias", None)
        for name, tensor in tensors.items():
            setattr(self, name, frozen(tensor.to(self.weight.device)))
        if bias is not None and self.bias is not None:
            if assign:
                self.bias = nn.Parameter(bias.detach(), requires_grad=self.bias.requires_grad)
            else:
                with torch.no_grad():
                    self.bias.copy_(bias)


def _check_bias(bias: Tensor, N: int) -> None:
    if tuple(bias.shape) != (N,) or not bias.is_floating_point():
        raise ValueError(f"bias must be floating point [N={N}], got {bias.dtype} {list(bias.shape)}")


class _A8Linear(torch.autograd.Function):
    """The 8-bit product with the gradient of the same layer without rounding of x (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: QuantizedLinear) -> Tensor:
        ctx.save_for_backward(module.weight, module.input_pre_scale)
        ctx.module = module
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return module._forward_a8(x.detach(), None if bias is None else bias.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        weight, pre_scale = ctx.saved_tensors
        module = ctx.module
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            N, K = module.out_features, module.in_features
            dx = torch.ops.lowbit.gemm_grad_input.default(dy, weight, N, K, module._desc, module.flags)
            dx = (dx if pre_scale is None else dx * pre_scale).to(ctx.x_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dbias, None
