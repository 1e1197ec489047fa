"""Metal kernels by torch.mps.compile_shader, where torch's library lacks the C interface that they are otherwise started through.

Sources, checks and choice of kernels stay those of csrc/metal: only what compiles a source and starts a kernel is Python's
(csrc/metal/launcher.h). Each launch costs a detour through the interpreter; what the GPU runs is the same.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import torch
from torch import Tensor

from lowbit import _C

__all__ = ["Launcher", "install", "uninstall"]

_Strings = ctypes.POINTER(ctypes.c_char_p)
_Sizes = ctypes.POINTER(ctypes.c_uint64)
_COMPILE: Final = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p, _Strings)
_LAUNCH: Final = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int32,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64), _Sizes, _Sizes, _Strings,
)  # fmt: skip

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _tensors(handles: list[int]) -> list[Tensor]:
    """The tensors of AtenTensorHandles, which are given up. (The function for a single one copies, and leaks the handle.)"""
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_new_capsule(h, None, None) for h in handles])


class Launcher:
    """The two functions of csrc/metal/launcher.h, callable from C for as long as this object lives."""

    def __init__(self) -> None:
        self._libraries: list[Any] = []  # what compile_shader returned; number i is at i - 1
        self._error = b""  # what C was told last, and may still read
        self.compile = _COMPILE(self._compile)
        self.launch = _LAUNCH(self._launch)

    @property
    def addresses(self) -> tuple[int, int]:
        """As `_C.set_metal_launcher` takes them."""
        compile, launch = (ctypes.cast(f, ctypes.c_void_p).value for f in (self.compile, self.launch))
        assert compile is not None and launch is not None
        return compile, launch

    # No exception may leave these two: C would not see it.

    def _compile(self, source: bytes, error: Any) -> int:
        try:
            self._libraries.append(torch.mps.compile_shader(source.decode()))
        except BaseException as problem:
            self._say(problem, error)
            return 0
        return len(self._libraries)

    def _launch(
        self, source: int, kernel: bytes, count: int, tensors: Any, words: Any, threads: Any, group: Any, error: Any
    ) -> int:
        try:
            # First of all, because the handles are ours now.
            found = iter(_tensors([handle for handle in tensors[:count] if handle]))
            arguments = [next(found) if tensors[i] else words[i] for i in range(count)]
            function = getattr(self._libraries[source - 1], kernel.decode())
            function(*arguments, threads=threads[:3], group_size=group[:3])
        except BaseException as problem:
            self._say(problem, error)
            return 1
        return 0

    def _say(self, problem: BaseException, error: Any) -> None:
        self._error = f"{type(problem).__name__}: {problem}".encode()
        error[0] = self._error


_installed: list[Launcher] = []  # never emptied: C may be inside one of them


def install() -> None:
    """Start Metal kernels this way from now on."""
    _installed.append(Launcher())
    _C.set_metal_launcher(*_installed[-1].addresses)


def uninstall() -> None:
    """Start them through torch's C interface again."""
    _C.set_metal_launcher(0, 0)
