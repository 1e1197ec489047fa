"""QuantizedLinear: what forward computes, its gradients, and how it compiles."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from layers import SCHEMES, inputs, layer
from lowbit import _C, QuantizedLinear, QuantizedWeight, Scheme

A8_SCHEMES = ["int8-a8", "int4-g32-a8", "int8-aint8_asym", "fp8-a8", "fp8-b128-a8", "nf4-g64-a8"]


def reference(module: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    bias = None if module.bias is None else module.bias.double()
    return nn.functional.linear(x.double(), module.quantized_weight().dequantize().double(), bias)


# -- forward -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "perm", "bias"), list(itertools.product(SCHEMES, [False, True], [False, True])))
def test_forward_is_x_times_the_dequantized_weight(text: str, perm: bool, bias: bool) -> None:
    module = layer(text, bias, perm)
    for shape in ((1, 128), (3, 5, 128), (128,), (0, 128), (17, 128)):
        y = module(inputs(*shape))
        assert y.shape == (*shape[:-1], 48)
        torch.testing.assert_close(y.double(), reference(module, inputs(*shape)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_keeps_the_dtype_of_x(dtype: torch.dtype) -> None:
    module = layer().to(dtype)
    x = inputs(4, 128, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(y.double(), reference(module, x), rtol=0.02, atol=tolerance)


@pytest.mark.parametrize("text", A8_SCHEMES)
def test_activation_schemes(text: str) -> None:
    module = layer(text)
    x = inputs(6, 128)
    error = (module(x).double() - reference(module, x)).norm() / reference(module, x).norm()
    assert (
        0 < float(error) < (0.05 if "fp8" in module.scheme.activation else 0.02)
    )  # quantized inputs: close, not equal


def test_static_activations_and_pre_scale() -> None:
    weight = QuantizedWeight.quantize(inputs(48, 128), "int8-aint8_static_asym")
    x = inputs(6, 128)
    scale, zero = (x.max() - x.min()) / 255, torch.round(-128 - x.min() / ((x.max() - x.min()) / 255))
    given = {"input_scale": scale.reshape(1), "input_zero": zero.int().reshape(1)}
    plain = QuantizedLinear.from_weight(weight, **given)
    torch.testing.assert_close(plain(x).double(), reference(plain, x), rtol=0.05, atol=0.5)
    scaled = QuantizedLinear.from_weight(weight, **given, input_pre_scale=torch.full((128,), 2.0))
    torch.testing.assert_close(scaled(x / 2), plain(x))
    assert scaled.state_dict()["input_pre_scale"].shape == (128,)
    with pytest.raises(ValueError, match="needs input_scale and input_zero"):
        QuantizedLinear.from_weight(weight)
    with pytest.raises(ValueError, match=r"input_scale must be \[1\], got \[2\]"):
        QuantizedLinear.from_weight(weight, **{**given, "input_scale": torch.ones(2)})
    with pytest.raises(ValueError, match="input_scale has values that are not finite"):
        QuantizedLinear.from_weight(weight, **{**given, "input_scale": torch.full((1,), torch.nan)})
    with pytest.raises(ValueError, match="input_scale does not go with scheme int8"):
        QuantizedLinear.from_weight(QuantizedWeight.quantize(inputs(8, 8), "int8"), input_scale=torch.ones(1))


def test_from_linear_shares_the_bias_and_freezes() -> None:
    linear = nn.Linear(128, 48).eval()
    module = QuantizedLinear.from_linear(linear, "int8")
    assert module.bias.data_ptr() == linear.bias.data_ptr()
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.training
    assert module.weight.dtype == torch.uint8
    assert sum(p.nbytes for p in module.parameters()) < 1.1 * (128 * 48 + 48 * 4 + 48 * 4)  # one copy
    torch.testing.assert_close(module(inputs(2, 128)), linear(inputs(2, 128)), rtol=0.05, atol=0.05)


def test_bias_is_checked() -> None:
    weight = layer().quantized_weight()
    with pytest.raises(ValueError, match=r"bias must be floating point \[N=48\], got torch.float32 \[47\]"):
        QuantizedLinear.from_weight(weight, torch.zeros(47))


def test_errors_hold_the_values() -> None:
    with pytest.raises(RuntimeError, match=r"K=100 .*K=128"):
        layer()(torch.zeros(2, 100))
    with pytest.raises(RuntimeError, match=r"call prepare\(\)"):
        QuantizedLinear(128, 48)(torch.zeros(2, 128))
    with pytest.raises(RuntimeError, match="never loaded"):
        QuantizedLinear(128, 48).prepare()
    with pytest.raises(RuntimeError, match="meta device"):
        QuantizedLinear(128, 48, device="meta").prepare()
    with pytest.raises(ValueError, match="group_size=256 is larger than K=128"):
        QuantizedLinear(128, 48, scheme="int4-g256")


# -- gradients -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int4-g32", "fp8-b128", "int8-a8", "fp8-a8"])
def test_gradient_of_x_and_bias(text: str) -> None:
    module = layer(text)
    assert module.requires_grad_(True) is module
    assert module.bias.requires_grad
    assert not module.weight.requires_grad
    x = inputs(3, 5, 128).requires_grad_()
    dy = inputs(3, 5, 48)
    module(x).backward(dy)
    weight = module.quantized_weight().dequantize()
    torch.testing.assert_close(x.grad, dy @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(module.bias.grad, dy.sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_gradient_passes_the_pre_scale() -> None:
    weight = QuantizedWeight.quantize(inputs(48, 128), "int8-a8")
    pre = torch.rand(128) + 0.5
    module = QuantizedLinear.from_weight(weight, input_pre_scale=pre)
    x = inputs(4, 128).requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 48) @ weight.dequantize() * pre, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pre_scale_of_inputs_that_stay_as_they_are(dtype: torch.dtype) -> None:
    """AWQ's scales, where they are not folded into the layer before: one rounding of x * pre_scale, then the product."""
    weight = QuantizedWeight.quantize(inputs(48, 128), "int4-g32")
    pre = torch.rand(128) + 0.5
    module, plain = QuantizedLinear.from_weight(weight, input_pre_scale=pre), QuantizedLinear.from_weight(weight)
    x = inputs(4, 128, dtype=dtype).requires_grad_()
    y = module(x)
    assert y.dtype == dtype and torch.equal(y, plain((x.float() * pre).to(dtype)))
    y.sum().backward()
    wanted = (torch.ones(4, 48) @ weight.dequantize() * pre).to(dtype)
    torch.testing.assert_close(x.grad, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)
    again = QuantizedLinear(128, 48, bias=False, scheme="int4-g32")
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), y)


def test_static_fp8() -> None:
    weight = QuantizedWeight.quantize(inputs(48, 128), "fp8-afp8_static")
    x = inputs(6, 128)
    scale = x.abs().amax().reshape(1) / 448
    module = QuantizedLinear.from_weight(weight, input_scale=scale)
    rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(module(x), rounded @ weight.dequantize().T, rtol=1e-4, atol=1e-3)
    clipped = QuantizedLinear.from_weight(weight, input_scale=torch.full((1,), 1 / 448))
    torch.testing.assert_close(clipped(x * 1e4), clipped(x.sign()))  # what is beyond the scale is its largest code


def test_only_the_bias_requires_grad() -> None:
    module = layer().requires_grad_()
    module(inputs(2, 128)).sum().backward()
    torch.testing.assert_close(module.bias.grad, torch.full((48,), 2.0))


def test_adapters_train_around_it() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = layer()
            self.down = nn.Linear(self.base.in_features, 4, bias=False)
            self.up = nn.Linear(4, self.base.out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    model = Adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    before = model.base.weight.clone()
    target = inputs(8, 48)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(inputs(8, 128)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model.base.weight, before)


@pytest.mark.parametrize("text", ["int4-g32", "int8-a8"])
def test_autocast_casts_x_and_bias_only(text: str) -> None:
    module = layer(text)
    before = copy.deepcopy(module.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(inputs(4, 128))
        grad = module(inputs(4, 128).requires_grad_())
    assert y.dtype == grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), reference(module, inputs(4, 128)), rtol=0.05, atol=0.6)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_repr() -> None:
    names = {value: name for name, value in _C.enums()["layout"].items()}
    module = layer("int8-a8", bias=False)
    assert repr(module) == (
        "QuantizedLinear(in_features=128, out_features=48, bias=False, scheme='int8-a8', "
        f"layout={names[module.layout]})"
    )
    assert "not prepared" in repr(QuantizedLinear(8, 8, scheme="int8"))


def test_batch_invariant_is_a_flag() -> None:
    linear = nn.Linear(256, 64)
    module = QuantizedLinear.from_linear(linear, "int4-g32", batch_invariant=True)
    assert module.flags == _C.enums()["flags"]["batch_invariant"]
    x = inputs(9, 256)
    rows = torch.cat([module(row[None]) for row in x])
    assert torch.equal(module(x), rows)


# -- compile -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int4-g32", "int8-a8"])
def test_compiles_into_one_graph(text: str) -> None:
    module = nn.Sequential(layer(text), nn.ReLU(), layer("fp8", N=16, K=48))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7):
        x = inputs(rows, 128)
        torch.testing.assert_close(compiled(x), module(x))
    x = inputs(3, 128).requires_grad_()
    compiled(x).sum().backward()
    first, x.grad = x.grad, None
    module(x).sum().backward()
    torch.testing.assert_close(first, x.grad)


def test_exports() -> None:
    module = nn.Sequential(layer("int4-g32"))
    exported = torch.export.export(module, (inputs(3, 128),))
    torch.testing.assert_close(exported.module()(inputs(3, 128)), module(inputs(3, 128)))


def test_scheme_may_be_an_object() -> None:
    scheme = Scheme("int4", 32)
    assert QuantizedLinear(128, 48, scheme=scheme).scheme is scheme
