"""`lowbit quantize`: a folder of safetensors to an artifact, one tensor at a time."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit import _artifact, convert
from lowbit._artifact import Item, Layer
from lowbit._progress import Advance, progress_bar
from lowbit.commands import _arguments, _output, _staging
from lowbit.commands._plan import Override, Plan, make_plan
from lowbit.errors import ArtifactError
from lowbit.formats._source import Source, open_source, read_json
from lowbit.importance import check_columns, load_importance
from lowbit.report import LayerReport, QuantizeReport
from lowbit.scheme import PRESETS, Scheme
from lowbit.weight import QuantizedWeight

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Quantize the linear layers of a model in a folder of safetensors files.

Works tensor by tensor: no model is built, transformers is not needed, and memory holds about one tensor. Embeddings,
output layers, norms and whatever is not the weight of a linear layer are kept as they are. Config and tokenizer files
are copied. The result is what lowbit.load_quantized reads. DIR appears when all of it is there.
"""
_EXAMPLE = """\
examples:
  lowbit quantize Llama-3.1-8B --scheme int4-g128 --out Llama-3.1-8B-int4
  lowbit quantize model --scheme int4-g32 --override '*.down_proj=int6-g64' --skip '*.router' --out model-int4

schemes: any string such as the following (see docs/python.md for all)
"""


def add_parser(commands: Any) -> None:
    """Describe the command."""
    presets = "\n".join(f"  {name:<16} {text}" for name, text in PRESETS.items())
    parser = commands.add_parser(
        "quantize",
        help="quantize a folder of safetensors",
        description=_DESCRIPTION,
        epilog=_EXAMPLE + presets,
        formatter_class=_output.HelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="folder with *.safetensors")
    parser.add_argument("--scheme", required=True, type=_arguments.scheme, help="how to quantize, such as int4-g128")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder to make")
    _arguments.add_overrides(
        parser,
        "another scheme, or none, for layers whose name matches: a glob such as '*.down_proj', or a regular expression "
        "after 're:'. The first override or skip that matches decides",
    )
    parser.add_argument(
        "--skip",
        dest="overrides",
        metavar="PATTERN",
        type=lambda pattern: (pattern, None),
        action="append",
        help="leave these layers alone: short for --override PATTERN=none",
    )
    parser.add_argument(
        "--search",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="search the scale of least squared error, or round to nearest; by default as each scheme says",
    )
    _arguments.add_importance(parser)
    parser.add_argument(
        "--strict", action="store_true", help="fail if a tensor of 1 MB or more would be kept that no override names"
    )
    parser.add_argument("--force", action="store_true", help="replace the artifact that is in DIR")
    _arguments.add_max_shard_bytes(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, and no report on success")
    _output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    begin = time.perf_counter()
    if (args.model / _artifact.MANIFEST).exists():
        raise ArtifactError(f"{args.model}: is a lowbit artifact, and quantized already")
    if args.model.is_file():
        raise ArtifactError(f"{args.model}: not a folder")
    _staging.check_target(args.out, args.model, args.force)
    scheme, overrides = _with_search(args.scheme, args.overrides, args.search)
    importance = {} if args.importance is None else load_importance(args.importance)
    with open_source(args.model) as checkpoint:
        plan = make_plan(checkpoint.tensors, scheme, overrides, read_json(args.model / "config.json"), args.strict)
        check_columns(importance, checkpoint.tensors, plan.schemes)
        copied, left = _staging.side_files(args.model, args.out)
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        with _staging.staged(args.out) as folder:
            with progress_bar("quantizing", total, False if args.quiet else None) as advance:
                work = _Work(checkpoint, plan, advance, importance)
                sha256 = _artifact.write_artifact(
                    folder, work.items(), work.layers, max_shard_bytes=args.max_shard_bytes
                )
            _staging.copy_files(args.model, copied, folder)
    report = work.report()
    if args.json:
        files: dict[str, Any] = {"out": str(args.out), "sha256": sha256, "copied": copied, "not_copied": left}
        _output.print_json({**files, "seconds": time.perf_counter() - begin, **report.to_dict()})
    elif not args.quiet:
        print(_output.clean_lines(str(report)))
        if left:
            print(_output.clean(f"not copied: {', '.join(left)}"))
        print(_output.clean(f"{args.out}: sha256 {sha256}, {time.perf_counter() - begin:.1f} s"))
    return 0


def _with_search(scheme: Scheme, overrides: list[Override], search: bool | None) -> tuple[Scheme, list[Override]]:
    if search is None:
        return scheme, overrides
    changed = [(p, None if s is None else dataclasses.replace(s, search=search)) for p, s in overrides]
    return dataclasses.replace(scheme, search=search), changed


class _Work:
    """The items to write, in the checkpoint's order; each reads and quantizes its tensor when its turn comes."""

    def __init__(
        self, checkpoint: Source, plan: Plan, advance: Advance, importance: Mapping[str, Tensor] | None = None
    ) -> None:
        self._checkpoint, self._plan, self._advance = checkpoint, plan, advance
        self._importance = importance or {}
        self._rows: dict[str, LayerReport] = {}
        self.layers = {
            module: Layer(scheme, (N, K))
            for module, scheme in plan.schemes.items()
            for N, K in [checkpoint.tensors[f"{module}.weight"].shape]
        }

    def items(self) -> list[Item]:
        """One Item per tensor of the checkpoint."""
        return list(self._make_items())

    def _make_items(self) -> Iterator[Item]:
        for name, info in self._checkpoint.tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and module in self.layers:
                yield _artifact.layer_item(module, self.layers[module], lambda m=module: self._quantize(m))  # type: ignore[misc]
            else:
                yield Item({name: (info.dtype, info.shape)}, lambda n=name: self._keep(n), "tensor")  # type: ignore[misc]

    def _keep(self, name: str) -> Mapping[str, Tensor]:
        tensor = self._checkpoint.read(name)
        self._advance(name, tensor.nbytes)
        return {name: tensor}

    def _quantize(self, module: str) -> QuantizedWeight:
        layer = self.layers[module]
        dense = self._checkpoint.read(f"{module}.weight")
        try:
            weight = QuantizedWeight.quantize(dense, layer.scheme, self._importance.get(module))
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None
        lost = convert._relative_error(dense, weight)
        self._rows[module] = LayerReport(module, str(layer.scheme), layer.shape, dense.nbytes, weight.nbytes, lost)
        self._advance(module, dense.nbytes)
        return weight

    def report(self) -> QuantizeReport:
        """What was done. Bytes are those of the files."""
        before = sum(info.nbytes for info in self._checkpoint.tensors.values())
        saved = sum(row.bytes_before - row.bytes_after for row in self._rows.values())
        rows = tuple(self._rows[module] for module in self._plan.schemes)
        return QuantizeReport(rows, self._plan.skipped, before, before - saved)
