"""One comparison: make everybody, see that lowbit's result is right, time them in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from device.cells import Case
from device.contenders import PEERS, Contender, Inputs, lowbit_contenders, make_peer
from device.sweep import measure_candidates
from device.timing import Call, Timer, copies_for
from lowbit import _C, Scheme
from lowbit.commands._measure import Sample
from lowbit.commands._target import find_target

__all__ = ["measure_case"]

#: ||y - ref|| / ||ref|| of a product of 16-bit numbers that is right; 8-bit inputs are compared with their own codes.
_RIGHT = 0.02


def measure_case(case: Case, device: str, timer: Timer, seconds: float) -> dict[str, Any]:
    """The rows of one case, as JSON. Raises where lowbit itself cannot do it or is wrong."""
    with torch.inference_mode():
        if case.op == "roofline":
            return _roofline(device, timer, seconds, case.N)
        if case.op in ("dequantize", "quantize_activation"):
            return _memory_bound(case, device, timer, seconds)
        inputs = Inputs.make(case, device)
        if case.op == "sweep":
            return measure_candidates(case, inputs, _expected(inputs), _RIGHT, timer, seconds)
        error = _error(inputs)
        if not error < _RIGHT:
            return {"ok": False, "case": dataclasses.asdict(case), "error": f"wrong result: relative error {error:.3g}"}
        contenders = lowbit_contenders(inputs)
        refused: dict[str, str] = {}
        for name in case.peers:
            assert name in PEERS, name
            try:
                contenders.append(make_peer(name, inputs))
            except Exception as reason:
                refused[name] = f"{type(reason).__name__}: {(str(reason).strip().splitlines() or [''])[0]}"[:200]
        result = _rows(case, contenders, timer, seconds, _traffic(inputs), 2 * case.M * case.N * case.K)
    return {**result, "refused": {**refused, **result["refused"]}, "relative_error": error}


def _error(inputs: Inputs) -> float:
    """Of lowbit's result."""
    y = lowbit_contenders(inputs)[0].call(0)
    assert isinstance(y, Tensor)
    return _relative(y, _expected(inputs))


def _expected(inputs: Inputs) -> Tensor:
    """A product in fp32 with lowbit's own dequantized weight and quantized inputs."""
    case, ops = inputs.case, inputs.target.ops
    scheme = Scheme.parse(case.scheme)
    packed, scales, zeros = ops.quantize(inputs.weight, scheme.desc(), False, None)
    third = zeros if zeros.numel() else None
    dense = ops.dequantize(packed, scales, third, None, case.N, case.K, scheme.desc(), torch.float32)
    x = inputs.x.float()
    if case.op == "grad":
        return x @ dense
    if case.inputs != "bf16":
        int8 = case.inputs == "int8"
        format_id = _C.enums()["format"]["int8" if int8 else "fp8_e4m3"]
        group = 128 if case.inputs == "fp8-128" else -1
        codes, x_scales, _ = ops.quantize_activation(inputs.x, format_id, group, None, None, None, True)
        values = codes.cpu().float().to(x.device)  # not every device converts fp8
        x = values * x_scales.repeat_interleave(128 if group == 128 else case.K, -1)[..., : case.K]
    return x @ dense.t()


def _relative(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm())


def _traffic(inputs: Inputs) -> int:
    """Bytes of x and y, each moved once."""
    case = inputs.case
    x = case.M * (case.N if case.op == "grad" else case.K) * (2 if case.inputs == "bf16" else 1)
    return x + case.M * (case.K if case.op == "grad" else case.N) * 2


def _rows(
    case: Case, contenders: list[Contender], timer: Timer, seconds: float, traffic: int, operations: int
) -> dict[str, Any]:
    calls = {c.name: c.call for c in contenders}
    measured = timer.measure(calls, {c.name: c.copies for c in contenders}, seconds)
    rows, refused = [], {}
    for contender in contenders:
        sample = measured[contender.name]
        if isinstance(sample, str):
            refused[contender.name] = sample
            continue
        nbytes = contender.nbytes + traffic
        rows.append(
            {
                "name": contender.name,
                "us": sample.median * 1e6,
                "spread": sample.spread,
                "rounds": len(sample.seconds),
                "bytes": nbytes,
                "bytes_per_s": nbytes / sample.median,
                "operations_per_s": operations / sample.median,
                "kernel": contender.kernel,
            }
        )
    ok = any(row["name"] == contenders[0].name for row in rows)
    first = next(
        (f"{row['us']:.1f} us" for row in rows if row["name"] == contenders[0].name), refused.get(contenders[0].name)
    )
    return {
        "ok": ok,
        "case": dataclasses.asdict(case),
        "rows": rows,
        "refused": refused,
        "summary": f"{contenders[0].name} {first}",
    }


# ---- the ceilings, and what is measured against them -----------------------------------------------------------------------


def _copies(make: Callable[[], tuple[Tensor, ...]], device: str) -> list[tuple[Tensor, ...]]:
    first = make()
    count = copies_for(sum(t.nbytes for t in first), device)
    return [first] + [make() for _ in range(count - 1)]


def _roofline(device: str, timer: Timer, seconds: float, size: int) -> dict[str, Any]:
    """Bandwidth of a read and of a copy, and the rate of a large product, all through torch on random data."""
    elements, place = size * size * 4, find_target(device).device
    source = torch.randn(elements // 2, device=place).to(torch.bfloat16).repeat(2)
    target = torch.empty_like(source)
    words = source.view(torch.int32)
    a, b = (torch.randn(size, size, device=place).to(torch.bfloat16) for _ in range(2))
    ones: dict[str, tuple[Call, float]] = {
        "copy": (lambda i: target.copy_(source), 2.0 * source.nbytes),
        "read": (lambda i: words.amax(), 1.0 * source.nbytes),
        "bf16": (lambda i: torch.mm(a, b), 2.0 * size**3),
    }
    measured = timer.measure({name: call for name, (call, _) in ones.items()}, dict.fromkeys(ones, 1), seconds)
    rates = {name: amount / s.median for name, (_, amount) in ones.items() if isinstance(s := measured[name], Sample)}
    text = ", ".join(f"{name} {rate / 1e12:.3g} T/s" for name, rate in rates.items())
    return {
        "ok": set(rates) == set(ones),
        "rates": rates,
        "summary": text,
        "case": {"section": "roofline", "M": 0, "N": size, "K": size},
    }


def _memory_bound(case: Case, device: str, timer: Timer, seconds: float) -> dict[str, Any]:
    """dequantize and quantize_activation: bytes in and bytes out, each once."""
    ops, place = find_target(device).ops, find_target(device).device
    generator = torch.Generator(place).manual_seed(7)
    rows = case.N if case.op == "dequantize" else case.M
    values = torch.randn(rows, case.K, generator=generator, device=place, dtype=torch.float32).to(torch.bfloat16)
    if case.op == "dequantize":
        desc = Scheme.parse(case.scheme).desc()
        packed, scales, zeros = ops.quantize(values, desc, False, None)
        third = zeros if zeros.numel() else None
        sets = _copies(lambda: (packed.clone(), scales.clone()), device)
        nbytes = packed.nbytes + scales.nbytes
        traffic = values.nbytes

        def call(i: int) -> object:
            p, s = sets[i % len(sets)]
            return ops.dequantize(p, s, third, None, case.N, case.K, desc, torch.bfloat16)
    else:
        format_id = _C.enums()["format"]["int8" if case.inputs == "int8" else "fp8_e4m3"]
        group = 128 if case.inputs == "fp8-128" else -1
        sets = _copies(lambda: (values.clone(),), device)
        nbytes, traffic = values.nbytes, values.numel() + values.numel() // (128 if group == 128 else case.K) * 4

        def call(i: int) -> object:
            return ops.quantize_activation(sets[i % len(sets)][0], format_id, group, None, None, None, True)

    contender = Contender("lowbit", nbytes, len(sets), call, case.op)
    return _rows(case, [contender], timer, seconds, traffic, 0)
