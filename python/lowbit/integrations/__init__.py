"""lowbit inside other libraries. Nothing here is imported by `import lowbit` but `_imports`, which waits for them.

transformers    LowbitConfig: quantize on load, save_pretrained, checkpoints of other libraries on our kernels
peft            LoRA on QuantizedLinear
"""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["announce"]


def announce(model: nn.Module) -> None:
    """Tell a Transformers model that its layers are lowbit's now, so that save_pretrained writes what it can load.

    Called by `quantize_`, `load_quantized` and `load_checkpoint`; does nothing to any other module.
    """
    if "transformers.integrations.moe" in sys.modules:
        from lowbit.integrations._experts import switch

        switch(model)
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, getattr(modeling, "PreTrainedModel", ())):
        return
    try:
        from lowbit.integrations.transformers import attach
    except ImportError:  # a transformers that is too old: what it saves is not ours to say
        return
    attach(model)
