"""QuantizedLinear: what state_dict holds, and what moving, casting and copying it does."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from layers import SCHEMES, inputs, layer
from lowbit import QuantizedLinear, QuantizedWeight, Scheme

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


def test_accelerate_offloads_and_brings_back() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    accelerate = pytest.importorskip("accelerate")
    x, expected = inputs(2, 128), layer()(inputs(2, 128))
    hooked = layer()
    hooks.add_hook_to_module(hooked, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    # cpu_offload looks parameters up in the state_dict by their names in memory, so it needs to be given those.
    offloaded = nn.Sequential(layer())
    accelerate.cpu_offload(offloaded, "cpu", state_dict=dict(offloaded.named_parameters()))
    for module, inner in ((hooked, hooked), (offloaded, offloaded[0])):
        for _ in range(2):
            assert inner.weight.is_meta
            assert torch.equal(module(x), expected)


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
    monkeypatch.setattr("lowbit._packed.preferred_layout", lambda *args: 99)
    monkeypatch.setattr("lowbit._packed.device_layout", lambda *args: 99)


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
        patch.setattr("lowbit._packed.preferred_layout", lambda *args: 1)
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
