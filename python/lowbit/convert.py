"""quantize_: replace the nn.Linear layers of a model by QuantizedLinear, and weights of experts, in place."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowbit._canonical import check_dense, check_importance
from lowbit._packed import PackedModule
from lowbit._places import (
    ExpertsParameter,
    experts_parameters,
    mixtures_in,
    replace_module,
    routes,
    tied_linears,
    used_directly,
)
from lowbit._progress import progress_bar
from lowbit.embedding import QuantizedEmbedding, check_embedding
from lowbit.experts import ExpertWeights, QuantizedExperts
from lowbit.integrations import announce
from lowbit.linear import QuantizedLinear
from lowbit.report import LayerReport, QuantizeReport, SkippedParameter
from lowbit.scheme import Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["quantize_"]

# A parameter of this size left unquantized is worth a line in the report.
_WORTH_REPORTING = 1_000_000
# Output layers by the names that model families give them. Their error goes straight into the logits.
_OUTPUT_LAYERS = frozenset({"lm_head", "embed_out", "output_projection"})
_ERROR_CHUNK = 1 << 20  # elements: 4 MB in fp32, so that the passes over them stay in cache

Filter = Callable[[str, nn.Linear], bool]
_Target = nn.Linear | nn.Embedding | ExpertsParameter  # what becomes a quantized layer


@dataclasses.dataclass
class _Plan:
    schemes: dict[str, Scheme] = dataclasses.field(default_factory=dict)  # path -> what it becomes
    reasons: dict[str, tuple[str, bool]] = dataclasses.field(default_factory=dict)  # path -> why not, chosen
    tied: dict[str, list[str]] = dataclasses.field(
        default_factory=dict
    )  # embedding -> output layers that share its weight

    def embed(self, model: nn.Module, name: str, module: nn.Embedding, scheme: Scheme) -> None:
        """Quantize an embedding, and with it the output layers that share its weight."""
        try:
            check_embedding(module, scheme)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        linears = tied_linears(model, module)
        if linears is None:
            raise ValueError(f"{name}: its weight is tied to that of a module which is no nn.Linear")
        self.schemes[name] = scheme
        self.tied[name] = linears
        for path in linears:
            self.schemes.pop(path, None)
            self.reasons[path] = (f"shares the weight of {name}", True)


def quantize_(
    model: nn.Module,
    scheme: Scheme | str,
    *,
    filter_fn: Filter | None = None,
    overrides: Mapping[str, Scheme | str | None] | None = None,
    strict: bool = False,
    progress: bool | None = None,
    importance: Mapping[str, Tensor] | None = None,
) -> QuantizeReport:
    """Quantize the linear layers of a model in place.

    Every nn.Linear becomes a `QuantizedLinear`, but for: output layers (called lm_head, embed_out, or returned by
    get_output_embeddings()), routers of a mixture of experts (called gate or router, beside `experts`), layers whose weight
    is tied to another module's, or used by the module around them without calling them (T5's `wo`), subclasses of nn.Linear,
    and what `filter_fn` or `overrides` exclude. Where a Transformers model keeps the weights of a mixture's experts in a
    Parameter [E, N, K], that becomes a `QuantizedExperts`; it is a layer by the Parameter's name. Everything is checked
    before the first layer is changed. Dense weights are freed one by one, so the peak is about one layer above the model.
    An nn.Embedding becomes a `QuantizedEmbedding` where an override names it, and a tied output layer then shares its
    weight.

    Args:
        model: its linear weights are fp32, bf16 or fp16. If it is itself an nn.Linear, put it into a module first.
        scheme: for every layer that no override names.
        filter_fn: `filter_fn(name, linear)` returns whether to quantize a layer; asked where no override matches. For
            experts, it gets an nn.Linear on the meta device with the features of one.
        overrides: pattern -> Scheme, string, or None to leave alone; the first pattern that matches a name decides.
            Patterns are shell globs ("*.down_proj") or, after "re:", regular expressions, for the whole name. An
            override with a scheme also quantizes output layers and routers. Experts are matched by the name of their Parameter
            ("model.layers.0.mlp.experts.down_proj") and by that of the module around it. An embedding is quantized by a
            pattern that ends with its own name ("*.embed_tokens").
        strict: raise if a Parameter of 1 MB or more would be left unquantized without an override or filter_fn
            having asked for it.
        progress: show a progress bar; by default on a terminal, when the work is long.
        importance: layer name -> [K], the weight of each column's squared error in the search for scales, as
            `collect_importance` measures it; layers that are not quantized may be among them.

    Returns:
        A report: per layer the format, bytes before and after, and error; and what was not quantized, with reasons.

    Raises:
        ValueError: an override matches nothing, a scheme does not fit a layer's shape, a weight holds NaN or is on the
            meta device, or `strict` found something; the message names the layers. The model is unchanged.

    Example:
        >>> report = lowbit.quantize_(model, "int4-g128", overrides={"*.down_proj": "int6-g64", "head": None})
        >>> print(report)
    """
    if isinstance(model, nn.Linear):
        raise ValueError("an nn.Linear cannot be replaced in place: use QuantizedLinear.from_linear")
    plan = _plan(model, Scheme.parse(scheme), filter_fn, dict(overrides or {}))
    targets = _targets(model, plan)
    columns = _check(model, plan, targets, importance or {})
    skipped = _skipped(model, plan)
    if strict:
        _refuse_surprises(skipped)
    before = _nbytes(model)
    reports = _convert_all(model, plan, targets, columns, progress)
    announce(model)
    return QuantizeReport(tuple(reports), tuple(skipped), before, _nbytes(model))


# -- planning --------------------------------------------------------------------------------------------------------------


def _plan(
    model: nn.Module, scheme: Scheme, filter_fn: Filter | None, overrides: dict[str, Scheme | str | None]
) -> _Plan:
    chosen = {p: None if s is None else Scheme.parse(s) for p, s in overrides.items()}
    matchers = {pattern: _matcher(pattern) for pattern in chosen}
    owned = _owned(model)
    _check_overrides(chosen, matchers, owned)
    tied = _tied(model)
    outputs = _output_layers(model)
    mixtures = mixtures_in(model)
    plan = _Plan()
    for name, module in owned.items():
        if name in plan.reasons:  # an output layer that goes with its embedding
            continue
        known = (name, name.rpartition(".")[0]) if isinstance(module, ExpertsParameter) else (name,)
        pattern = next((p for p, match in matchers.items() if any(map(match, known))), None)
        if pattern is not None and chosen[pattern] is None:
            plan.reasons[name] = (f"override {pattern!r} is None", True)
        elif pattern is not None and isinstance(module, nn.Embedding) and _asks_for(pattern, name):
            plan.embed(model, name, module, chosen[pattern] or scheme)
        elif reason := _unsuited(name, module, tied):
            if pattern is not None and pattern == name:
                raise ValueError(f"override {pattern!r} asks for {chosen[pattern]}, but {name}: {reason}")
            plan.reasons[name] = (reason, False)
        elif pattern is not None:
            plan.schemes[name] = chosen[pattern] or scheme
        elif id(module) in outputs or name.rpartition(".")[2] in _OUTPUT_LAYERS:
            plan.reasons[name] = ("an output layer; name it in overrides to quantize it", False)
        elif routes(name, mixtures.__contains__):
            plan.reasons[name] = ("routes to experts; name it in overrides to quantize it", False)
        elif isinstance(module, nn.Linear) and used_directly(model, name):
            plan.reasons[name] = ("the module around it uses its weight directly", False)
        elif filter_fn is not None and not filter_fn(name, _layer(module)):
            plan.reasons[name] = ("filter_fn returned False", True)
        else:
            plan.schemes[name] = scheme
    return plan


def _owned(model: nn.Module) -> dict[str, nn.Module | ExpertsParameter]:
    """Modules that hold Parameters, and Parameters that hold the weights of experts, in the model's order."""
    experts = experts_parameters(model)
    found: dict[str, nn.Module | ExpertsParameter] = {}
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        inside = {full: experts[full] for name in names if (full := f"{path}.{name}" if path else name) in experts}
        if len(inside) < len(names):  # it holds something else as well
            found[path] = module
        found |= inside
    return found


def _layer(module: nn.Module | ExpertsParameter) -> nn.Linear:
    """What a filter is shown."""
    return module.stand_in() if isinstance(module, ExpertsParameter) else _linear(module)


def _targets(model: nn.Module, plan: _Plan) -> dict[str, _Target]:
    owned = _owned(model)
    found: dict[str, _Target] = {}
    for name in plan.schemes:
        module = owned[name]
        special = isinstance(module, ExpertsParameter | nn.Embedding)
        found[name] = module if special else _linear(module)  # type: ignore[assignment, arg-type]
    return found


def _asks_for(pattern: str, name: str) -> bool:
    """Whether an override names an embedding: by the last part of its path, so that "*" does not."""
    return pattern.rpartition(".")[2] == name.rpartition(".")[2]


def _matcher(pattern: str) -> Callable[[str], object]:
    if not isinstance(pattern, str):
        raise TypeError(f"an override's pattern is a string, got {pattern!r}")
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern)).match
    try:
        return re.compile(pattern[3:]).fullmatch
    except re.error as error:
        raise ValueError(f"override {pattern!r} is not a regular expression: {error}") from None


def _check_overrides(
    chosen: Mapping[str, Scheme | None],
    matchers: Mapping[str, Callable[[str], object]],
    owned: Mapping[str, nn.Module | ExpertsParameter],
) -> None:
    linear = (nn.Linear, ExpertsParameter)
    for pattern, match in matchers.items():
        found = [name for name in owned if match(name)]
        found += [n for n, m in owned.items() if isinstance(m, ExpertsParameter) and match(n.rpartition(".")[0])]
        # A scheme is for linear layers; None may name anything that holds parameters.
        if chosen[pattern] is not None:
            found = [name for name in found if isinstance(owned[name], linear) or _asks_for(pattern, name)] or (
                [pattern] if pattern in owned else []  # named exactly: the planner says why it cannot be done
            )
        if not found:
            some = [name for name, m in owned.items() if isinstance(m, linear)][:4]
            raise ValueError(
                f"override {pattern!r} matches no layer; layers are called, for example, {', '.join(some)}"
            )


def _unsuited(name: str, module: nn.Module | ExpertsParameter, tied: Mapping[int, list[str]]) -> str | None:
    if isinstance(module, ExpertsParameter):
        others = [other for other in tied[id(module.parameter)] if other != name]
        return f"tied to {', '.join(others)}" if others else None
    if isinstance(module, PackedModule):
        return "already quantized"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding"
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} is not nn.Linear"
    if type(module) is not nn.Linear:
        # A subclass may use its weight in its own way; MultiheadAttention hands out_proj.weight to a fused kernel.
        return f"{type(module).__name__} is a subclass of nn.Linear"
    others = [other for other in tied[id(module.weight)] if other != f"{name}.weight"]
    return f"tied to {', '.join(others)}" if others else None


def _tied(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each Parameter is reached through different modules."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():  # each module once: one module at two paths is not a tie
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return names


def _output_layers(model: nn.Module) -> set[int]:
    found = set()
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        if callable(get):
            try:
                found.add(id(get()))
            except (AttributeError, NotImplementedError):  # base classes define it and raise
                continue
    return found


def _check(
    model: nn.Module, plan: _Plan, targets: Mapping[str, _Target], importance: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Every layer against its scheme, before any is touched; returns importance by layer, checked."""
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | PackedModule)} | targets.keys()
    if unknown := sorted(importance.keys() - layers - experts_parameters(model).keys()):
        raise ValueError(f"importance names {', '.join(unknown[:5])}, which are not linear layers of the model")
    columns = {}
    for name, scheme in plan.schemes.items():
        target = targets[name]
        try:
            if scheme.activation_static:
                raise ValueError(f"scheme {scheme} needs calibrated input scales: use QuantizedLinear.from_weight")
            for weight in target.weight if isinstance(target, ExpertsParameter) else (target.weight,):
                check_dense(weight, scheme)
            if name in importance:
                columns[name] = _columns(target, importance[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return columns


def _columns(target: _Target, importance: Tensor) -> Tensor:
    if isinstance(target, ExpertsParameter):
        E, _, K = target.shape
        rows = importance if importance.dim() == 2 and len(importance) == E else importance.expand(E, -1)
        return torch.stack([check_importance(row, K) for row in rows])
    return check_importance(importance, target.weight.shape[1])


def _skipped(model: nn.Module, plan: _Plan) -> list[SkippedParameter]:
    found = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            quantized = full in plan.schemes or (path in plan.schemes and name == "weight")
            done = isinstance(module, PackedModule) and name == "weight"
            if quantized or done or parameter.nbytes < _WORTH_REPORTING or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            reason, chosen = plan.reasons.get(path, ("not the weight of a linear layer", False))
            reason, chosen = plan.reasons.get(full, (reason, chosen))
            found.append(SkippedParameter(full, parameter.nbytes, reason, chosen))
    return found


def _refuse_surprises(skipped: list[SkippedParameter]) -> None:
    if surprises := [s for s in skipped if not s.chosen]:
        listing = "; ".join(f"{s.name} ({s.nbytes} bytes): {s.reason}" for s in surprises)
        raise ValueError(f"strict: these would be left unquantized: {listing}")


# -- doing -----------------------------------------------------------------------------------------------------------------


def _convert_all(
    model: nn.Module,
    plan: _Plan,
    targets: dict[str, _Target],
    columns: Mapping[str, Tensor],
    progress: bool | None,
) -> list[LayerReport]:
    paths = _paths(model)
    reports = []
    total = sum(target.weight.nbytes for target in targets.values())
    with progress_bar("quantizing", total, progress) as advance:
        for name, scheme in plan.schemes.items():
            target = targets.pop(name)
            new, report = _convert(name, target, scheme, columns.get(name))
            for path in paths.get(id(target), [name]):
                replace_module(model, path, new)
            share(model, new, plan.tied.get(name, ()))
            reports.append(report)
            advance(name, report.bytes_before)
            del target  # the last reference: the dense weight is freed before the next layer
    return reports


def share(model: nn.Module, embedding: nn.Module, paths: Sequence[str]) -> None:
    """Replace output layers by ones that share an embedding's weight."""
    for path in paths:
        assert isinstance(embedding, QuantizedEmbedding)
        replace_module(model, path, embedding.output_layer(_linear(model.get_submodule(path))))


def _convert(name: str, target: _Target, scheme: Scheme, importance: Tensor | None) -> tuple[PackedModule, LayerReport]:
    if isinstance(target, ExpertsParameter):
        return _convert_experts(name, target, scheme, importance)
    if isinstance(target, nn.Embedding):
        weight = target.weight.detach()
        made = QuantizedEmbedding.from_embedding(target, scheme, importance=importance)
        error = _relative_error(weight, made.quantized_weight())
        shape = (target.num_embeddings, target.embedding_dim)
        return made, LayerReport(name, str(scheme), shape, weight.nbytes, made.weight.nbytes, error)
    return _convert_linear(name, target, scheme, importance)


def _convert_experts(
    name: str, target: ExpertsParameter, scheme: Scheme, importance: Tensor | None
) -> tuple[QuantizedExperts, LayerReport]:
    weight = target.weight
    quantized = ExpertWeights.quantize(weight, scheme, importance)
    parts = [_noise_and_signal(dense, one) for dense, one in zip(weight, quantized, strict=True)]
    error = _ratio(sum(noise for noise, _ in parts), sum(signal for _, signal in parts))
    new = QuantizedExperts.from_weight(quantized).train(target.owner.training)
    return new, LayerReport(name, str(scheme), target.shape, weight.nbytes, new.weight.nbytes, error)


def _convert_linear(
    name: str, linear: nn.Linear, scheme: Scheme, importance: Tensor | None
) -> tuple[QuantizedLinear, LayerReport]:
    weight = linear.weight.detach()
    quantized = QuantizedWeight.quantize(weight, scheme, importance)
    error = _relative_error(weight, quantized)
    new = QuantizedLinear.from_weight(quantized, linear.bias)
    new.train(linear.training)
    for hooks in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    ):  # the caller's hooks watch the place in the model, not the object
        getattr(new, hooks).update(getattr(linear, hooks))
    shape = (linear.out_features, linear.in_features)
    return new, LayerReport(name, str(scheme), shape, weight.nbytes, new.weight.nbytes, error)


def _relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """||W - W'|| / ||W||."""
    return _ratio(*_noise_and_signal(weight, quantized))


def _noise_and_signal(weight: Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """||W - W'||^2 and ||W||^2, some rows at a time, so that no second dense weight is made."""
    rows = max(128, _ERROR_CHUNK // quantized.K // 128 * 128)  # multiples of a block
    noise = signal = 0.0
    for begin, part in _row_slices(quantized, rows):
        dense = weight[begin : begin + part.N].float()
        signal += _sum_of_squares(dense)
        noise += _sum_of_squares(part.dequantize().sub_(dense))
    return noise, signal


def _ratio(noise: float, signal: float) -> float:
    if signal == 0:
        return 0.0 if noise == 0 else math.inf
    return math.sqrt(noise / signal)


def _sum_of_squares(rows: Tensor) -> float:
    # Row norms in fp32, their sum in fp64: several times faster than converting every element.
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def _row_slices(w: QuantizedWeight, rows: int) -> Iterator[tuple[int, QuantizedWeight]]:
    for begin in range(0, w.N, rows):
        yield begin, w.rows(begin, min(begin + rows, w.N))


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def _paths(model: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return found


def _nbytes(model: nn.Module) -> int:
    return sum(t.nbytes for tensors in (model.parameters(), model.buffers()) for t in tensors)
