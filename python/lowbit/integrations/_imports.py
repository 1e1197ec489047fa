"""Registration with libraries at the moment they are imported, before or after lowbit, without importing them.

Transformers and PEFT look up quantizers and layers in tables of their own, and neither has entry points for them. So
`import lowbit` puts a finder into sys.meta_path that waits for two module names; right after such a module has been
executed, the integration registers. Where it has been imported already, that is done at once. All other imports cost one
look into a dict.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["install"]

# Module that holds the table -> module here whose register() fills it in.
_TARGETS: Final[Mapping[str, str]] = {
    "transformers.quantizers.auto": "lowbit.integrations.transformers",
    "peft.tuners.lora.model": "lowbit.integrations.peft",
}


def _register(target: str) -> None:
    """Call register(); a library that has changed must not become one that cannot be imported."""
    try:
        module = importlib.import_module(_TARGETS[target])
        if not hasattr(module, "HOST"):
            return  # it is being imported, needs the library for that, and registers when it is done
        if module.HOST is not sys.modules[target]:
            module = importlib.reload(module)  # the library was imported anew, and so were the classes we derive from
        module.register()
    except ImportError:  # a version that is not supported: asking for LowbitConfig says so
        return
    except Exception as error:
        library = target.partition(".")[0]
        warnings.warn(f"lowbit could not register with {library}: {error}", RuntimeWarning, stacklevel=2)


class _Loader(importlib.abc.Loader):
    """Another loader, and then _register."""

    def __init__(self, inner: Any, target: str) -> None:
        self._inner, self._target = inner, target

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """The inner loader's module."""
        made: types.ModuleType | None = self._inner.create_module(spec)
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        """Execute, leave no trace, register."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        _register(self._target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of _TARGETS as the finders behind it do, and wraps their loaders."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec with our loader for the names that are waited for, None for all others."""
        if name not in _TARGETS:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, name)
                return spec
        return None


def install() -> None:
    """Wait for the libraries, or register where they are there; calling it again changes nothing."""
    # By name: after importlib.reload the old finder is of another class.
    mine = (_Finder.__module__, _Finder.__qualname__)
    sys.meta_path[:] = [f for f in sys.meta_path if (type(f).__module__, type(f).__qualname__) != mine]
    sys.meta_path.insert(0, _Finder())
    for target in _TARGETS:
        if target in sys.modules:
            _register(target)
