"""A progress bar where somebody is watching, and nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["Advance", "progress_bar"]

#: Called with the name of what is being worked on and the amount of work just finished.
Advance = Callable[[str, int], None]

# Below this much work (in bytes) a bar would flash and vanish.
_WORTH_A_BAR = 64 << 20


def _nothing(name: str, amount: int) -> None:
    pass


@contextlib.contextmanager
def progress_bar(label: str, total: int, enabled: bool | None) -> Iterator[Advance]:
    """Show a bar of `total` bytes on stderr while the block runs.

    Args:
        enabled: True or False, or None for a bar only on a terminal and for long work.
    """
    if enabled is None:
        enabled = total >= _WORTH_A_BAR and sys.stderr.isatty()
    if not enabled:
        yield _nothing
        return
    # rich takes longer to import than the rest of lowbit, so it is loaded only where it shows something.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, name="")

        def advance(name: str, amount: int) -> None:
            bar.update(task, advance=amount, name=name)

        yield advance
