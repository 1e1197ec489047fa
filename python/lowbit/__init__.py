"""lowbit: packed low-bit weights for PyTorch.

    model = lowbit.quantize_(model, "int4-g128")            # in place; returns a report
    lowbit.save_quantized(model, "folder")
    model = lowbit.load_quantized(make_model, "folder")
    model = lowbit.load_checkpoint("Llama-3.1-8B-GPTQ", make_model).model    # quantized by another library

Importing it registers `torch.ops.lowbit.*`. It does not initialise CUDA, download or compile anything.
"""

import typing as _typing

try:
    import torch as _torch  # noqa: F401 - the compiled part needs its libraries loaded
except ModuleNotFoundError as _error:
    if _error.name != "torch":
        raise
    raise ModuleNotFoundError("lowbit needs PyTorch 2.11 or later: pip install torch", name="torch") from None

from lowbit import _C as _C
from lowbit import _cuda as _cuda
from lowbit import formats, ops
from lowbit._locations import cmake_dir, library_paths
from lowbit._selection import can_implement, explain
from lowbit.comparison import compare_checkpoints
from lowbit.conversion import convert_checkpoint
from lowbit.convert import quantize_
from lowbit.embedding import QuantizedEmbedding
from lowbit.errors import ArtifactError, FormatError
from lowbit.experts import ExpertWeights, QuantizedExperts
from lowbit.formats import load_checkpoint, load_gguf
from lowbit.importance import collect_importance, load_importance, save_importance
from lowbit.integrations import _imports as _imports
from lowbit.linear import QuantizedLinear
from lowbit.scheme import Scheme
from lowbit.serialize import load_quantized, save_quantized
from lowbit.weight import QuantizedWeight

__all__ = [
    "ArtifactError",
    "ExpertWeights",
    "FormatError",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "QuantizedWeight",
    "Scheme",
    "__version__",
    "can_implement",
    "cmake_dir",
    "collect_importance",
    "compare_checkpoints",
    "convert_checkpoint",
    "explain",
    "formats",
    "library_paths",
    "load_checkpoint",
    "load_gguf",
    "load_importance",
    "load_quantized",
    "ops",
    "quantize_",
    "save_importance",
    "save_quantized",
]

__version__: str = _C.build_info()["version"]

if _typing.TYPE_CHECKING:
    from lowbit.integrations.transformers import LowbitConfig as LowbitConfig

_imports.install()


def __getattr__(name: str) -> _typing.Any:
    if name == "LowbitConfig":  # imports transformers
        from lowbit.integrations.transformers import LowbitConfig

        return LowbitConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
