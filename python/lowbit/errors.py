"""Exceptions about files. Everything else raises ValueError, TypeError or RuntimeError."""

from __future__ import annotations

__all__ = ["ArtifactError", "FormatError"]


class ArtifactError(ValueError):
    """A saved artifact cannot be used: a file is missing, altered, or does not fit the model.

    The message names the file and, where there is one, the tensor. Nothing was loaded.

    Example:
        >>> try:
        ...     lowbit.load_quantized(model, "folder")
        ... except lowbit.ArtifactError as error:
        ...     print(error)  # folder/lowbit-3f….safetensors: sha256 is 9a…, the manifest says 3f…
    """


class FormatError(ArtifactError):
    """A file is not what its name promises: broken JSON, a broken safetensors header, bad offsets.

    Example:
        >>> lowbit.QuantizedWeight.load("truncated.safetensors")  # raises FormatError
    """
