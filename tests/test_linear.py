"""QuantizedLinear: what forward computes, what state_dict holds, and what moving it about does."""

from __future__ import annotations

import copy
import io
import itertools
import time

import pytest
import torch
from torch import nn

from lowbit import _C, QuantizedLinear, QuantizedWeight, Scheme

SCHEMES = [
    "int4-g32",
    "int3-g16-offset",
    "int4-g32-asym",
    "int5-g8-fzero",
    "int8",
    "fp8",
    "fp8-b128",
    "nf4-g64",
    "fp4-g32",
]
A8_SCHEMES = ["int8-a8", "int4-g32-a8", "int8-aint8_asym", "fp8-a8", "fp8-b128-a8", "nf4-g64-a8"]


def layer(text: str = "int4-g32", bias: bool = True, perm: bool = False, N: int = 48, K: int = 128) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.quantize(torch.randn(N, K, generator=generator), text)
    if perm:
        order = torch.randperm(K, generator=generator).to(torch.int32)
        weight = QuantizedWeight.from_tensors({**weight.tensors(), "perm": order}, text, weight.shape)
    return QuantizedLinear.from_weight(weight, torch.randn(N, generator=generator) if bias else None)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


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
    with pytest.raises(ValueError, match="input_pre_scale does not go with scheme int8"):
        QuantizedLinear.from_weight(QuantizedWeight.quantize(inputs(8, 8), "int8"), input_pre_scale=torch.ones(8))


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
    with pytest.raises((RuntimeError, ValueError), match=r"K=100 .*K=128"):
        layer()(torch.zeros(2, 100))
    with pytest.raises(RuntimeError, match=r"call prepare\(\)"):
        QuantizedLinear(128, 48)(torch.zeros(2, 128))
    with pytest.raises(RuntimeError, match="never loaded"):
        QuantizedLinear(128, 48).prepare()
    with pytest.raises(RuntimeError, match="meta device"):
        QuantizedLinear(128, 48, device="meta").prepare()
    with pytest.raises(ValueError, match="group_size=256 is larger than K=128"):
        QuantizedLinear(128, 48, scheme="int4-g256")


def test_forward_adds_little_to_the_op() -> None:
    module = layer(N=64, K=64)
    x = inputs(1, 64)
    args = (x, module.weight, module.bias, 64, 64, module._desc, 0)

    def best(call: object, *call_args: object) -> float:
        times = []
        for _ in range(40):
            start = time.perf_counter()
            for _ in range(200):
                call(*call_args)  # type: ignore[operator]
            times.append((time.perf_counter() - start) / 200)
        return min(times)

    with torch.inference_mode():
        extra = best(module, x) - best(torch.ops.lowbit.gemm.default, *args)
    assert extra < 5e-6  # measured: about 1.2 us on an idle machine, half of it nn.Module.__call__


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


# -- state_dict ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "perm"), list(itertools.product([*SCHEMES, "int8-a8"], [False, True])))
def test_state_dict_is_canonical_and_loads_everywhere(text: str, perm: bool) -> None:
    module = layer(text, perm=perm)
    state = module.state_dict()
    weight = module.quantized_weight()
    assert state.keys() == {f"weight_{name}" for name in weight.tensors()} | {"weight_scheme", "bias"}
    assert all(torch.equal(state[f"weight_{name}"], tensor) for name, tensor in weight.tensors().items())
    assert bytes(state["weight_scheme"].tolist()).decode() == text
    x = inputs(2, 128)
    for device, assign in (("cpu", False), ("cpu", True), ("meta", True)):
        other = QuantizedLinear(128, 48, True, text, device=device, has_perm=perm)
        assert other.load_state_dict(state, assign=assign).missing_keys == []
        assert other.quantized_weight() == weight
        assert torch.equal(other(x), module(x))


def test_meta_module_to_empty_then_load() -> None:
    module = layer()
    other = QuantizedLinear(128, 48, True, "int4-g32", device="meta")
    assert other.weight.is_meta
    assert other.state_dict()["weight_packed"].is_meta
    assert other.state_dict()["weight_packed"].shape == (48, 64)
    other.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="call prepare"):
        other(inputs(2, 128))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(inputs(2, 128)), module(inputs(2, 128)))


def test_made_under_a_device_context() -> None:
    with torch.device("meta"):
        module = QuantizedLinear(128, 48)
    assert all(p.is_meta for p in module.parameters())


def test_loading_within_a_model_with_assign_from_a_file() -> None:
    model = nn.Sequential(layer("int4-g32"), nn.ReLU(), nn.Linear(48, 4))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with torch.device("meta"):
        other = nn.Sequential(QuantizedLinear(128, 48, True, "int4-g32"), nn.ReLU(), nn.Linear(48, 4))
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(inputs(2, 128)), model(inputs(2, 128)))
    other[0].requires_grad_()
    other.load_state_dict(state, assign=True)
    assert other[0].bias.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight_packed": torch.zeros(48, 63, dtype=torch.uint8)},
            r"packed .* \[48, 64\], got torch.uint8 \[48, 63\]",
        ),
        ({"weight_scales": None}, "Missing key.*weight_scales"),
        ({"weight_zeros": torch.zeros(48, 4, dtype=torch.uint8)}, "has no zeros"),
        ({"extra": torch.zeros(1)}, "Unexpected key.*extra"),
        ({"weight": torch.zeros(48, 128)}, "Unexpected key.*weight"),
        ({"bias": torch.zeros(3)}, r"bias must be .* got torch.float32 \[3\]"),
        ({"bias": None}, "Missing key.*bias"),
        ({"input_scale": torch.ones(1)}, "input_scale does not go with scheme int4-g32"),
        ({"weight_scales": torch.full((48, 4), torch.inf, dtype=torch.bfloat16)}, "scales: 192 values are not finite"),
        (
            {"weight_scheme": torch.tensor(list(b"nf4-g32"), dtype=torch.uint8)},
            "of scheme nf4-g32, the module is int4-g32",
        ),
        ({"weight_scheme": torch.tensor([255], dtype=torch.uint8)}, "unknown format"),
    ],
)
def test_bad_state_dicts_change_nothing(changes: dict[str, torch.Tensor | None], message: str) -> None:
    module = layer()
    before = module(inputs(2, 128))
    state = {name: t for name, t in {**module.state_dict(), **changes}.items() if t is not None}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    assert torch.equal(module(inputs(2, 128)), before)


def test_not_strict_loads_what_is_there() -> None:
    module, other = layer(), layer()
    with torch.no_grad():
        other.bias.zero_()
    result = other.load_state_dict({"bias": module.bias, "elsewhere": torch.zeros(1)}, strict=False)
    assert set(result.missing_keys) == {"weight_packed", "weight_scales"}
    assert torch.equal(other.bias, module.bias)


def test_loading_to_meta_without_assign_is_refused() -> None:
    with pytest.raises(RuntimeError, match="pass assign=True"):
        QuantizedLinear(128, 48, True, "int4-g32", device="meta").load_state_dict(layer().state_dict())


# -- moving and copying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_dtype_casts_change_the_bias_only(cast: str) -> None:
    weight = QuantizedWeight.quantize(inputs(48, 128), "int8-aint8_static")
    given = {"input_scale": torch.full((1,), 0.03), "input_pre_scale": torch.rand(128)}
    module = QuantizedLinear.from_weight(weight, torch.zeros(48), **given)
    before = {name: t.clone() for name, t in module.named_parameters()}
    getattr(module, cast)()
    wanted = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}
    assert module.bias.dtype == wanted[cast]
    for name in ("weight", "input_scale", "input_pre_scale"):
        assert module.get_parameter(name).dtype == before[name].dtype
        assert torch.equal(module.get_parameter(name), before[name])


def test_type_does_not_touch_bytes() -> None:
    module = layer()
    before = module.weight.clone()
    module.type(torch.float16)
    assert module.bias.dtype == torch.float16
    assert module.weight.dtype == torch.uint8
    assert torch.equal(module.weight, before)
    assert module(inputs(2, 128, dtype=torch.float16)).dtype == torch.float16


def test_deepcopy_pickle_and_torch_save() -> None:
    module = layer("int4-g32-asym", perm=True)
    x = inputs(2, 128)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), module(x))
        assert other.weight.data_ptr() != module.weight.data_ptr()
        assert repr(other) == repr(module)
    copied = copy.deepcopy(nn.ModuleDict({"a": module, "b": module}))
    assert copied["a"] is copied["b"]


def test_share_memory() -> None:
    module = layer()
    before = module(inputs(2, 128))
    module.share_memory()
    assert module.weight.is_shared()
    assert torch.equal(module(inputs(2, 128)), before)


def test_bytes_moved_by_offload_hooks_are_valid_again_when_back() -> None:
    """What offloading does around a forward: put a meta tensor in place of each parameter, and later the bytes back."""
    module = layer("int4-g32-asym", perm=True)
    x = inputs(2, 128)
    expected = module(x)
    layout = module.layout
    saved = {name: p.detach().clone() for name, p in module.named_parameters()}
    for name, parameter in list(module.named_parameters()):
        kind = type(parameter)
        module._parameters[name] = kind(parameter.to("meta"), requires_grad=parameter.requires_grad)
    assert module.layout == layout
    with pytest.raises(RuntimeError, match="meta device"):
        module.prepare()
    for name, value in saved.items():
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    assert torch.equal(module(x), expected)
    assert module.prepare().layout == layout


def _second_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that layout 99 exists, and that this device's kernels read it: the bytes of the real one, backwards."""
    real = layer().layout
    pack, unpack, desc = QuantizedWeight.pack, QuantizedWeight.unpack, Scheme.desc

    def pack_99(self: QuantizedWeight, layout: int, device: object) -> torch.Tensor:
        return pack(self, real, device).flip(0) if layout == 99 else pack(self, layout, device)

    def unpack_99(weight: torch.Tensor, scheme: Scheme, shape: object, layout: int, perm: bool) -> QuantizedWeight:
        return (
            unpack(weight.flip(0), scheme, shape, real, perm)
            if layout == 99
            else unpack(weight, scheme, shape, layout, perm)
        )

    monkeypatch.setattr(QuantizedWeight, "pack", pack_99)
    monkeypatch.setattr(QuantizedWeight, "unpack", unpack_99)
    monkeypatch.setattr(
        Scheme, "desc", lambda self, layout=0, perm=False: desc(self, real if layout == 99 else layout, perm)
    )
    monkeypatch.setattr("lowbit.linear.preferred_layout", lambda *args: 99)
    monkeypatch.setattr("lowbit.linear.device_layout", lambda *args: 99)


def test_bytes_of_another_layout_are_repacked_by_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer("int4-g32-asym", perm=True)
    weight, expected, before = module.quantized_weight(), module(inputs(2, 128)), module.weight.clone()
    with monkeypatch.context() as patch:
        _second_layout(patch)
        assert module.quantized_weight() == weight  # still in the layout it came in
        assert module.prepare().layout == 99
        assert torch.equal(module.weight, before.flip(0))
        assert module.quantized_weight() == weight
        assert torch.equal(module.state_dict()["weight_packed"], weight.packed)
        other = QuantizedLinear(128, 48, True, "int4-g32-asym", device="meta")
        other.load_state_dict(module.state_dict(), assign=True)
        assert other.layout == 99
        patch.setattr("lowbit.linear.preferred_layout", lambda *args: 1)
        assert module.prepare().layout == 1
    assert torch.equal(module.weight, before)
    assert torch.equal(module(inputs(2, 128)), expected)


def test_moving_to_a_device_without_kernels_keeps_the_bytes() -> None:
    module = layer("int4-g32-asym", perm=True)
    moved = copy.deepcopy(module).to("meta")
    assert moved.weight.is_meta
    assert moved.layout == module.layout
    assert moved.state_dict()["weight_perm"].is_meta
    with pytest.raises(RuntimeError, match="meta device"):
        moved.quantized_weight()


def test_a_fresh_module_has_a_state_dict_to_fill() -> None:
    module, other = layer("int4-g32-asym"), QuantizedLinear(128, 48, True, "int4-g32-asym")
    state = other.state_dict()
    for name, tensor in module.state_dict().items():
        state[name].copy_(tensor)
    other.load_state_dict(state)
    assert torch.equal(other(inputs(2, 128)), module(inputs(2, 128)))


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
