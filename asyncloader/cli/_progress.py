"""A bar on stderr, for what takes longer than a moment."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from rich import progress

from ._names import middle_cut, shown
from ._output import console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from asyncloader._tools.stages import Tell

__all__ = ["progress_bar", "silent"]

_MOMENT = 0.3
_NAME = 24


def silent(done: int, total: int, name: str) -> None:
    """Show nothing."""


@contextlib.contextmanager
def progress_bar(out: Console | None = None) -> Iterator[Tell]:
    """Show a bar while the block runs, and yield what it wants to be told.

    Nothing if the block takes but a moment.

    Args:
        out: Where to; by default stderr, if that is a terminal.
    """
    if out is None and (sys.stderr is None or not sys.stderr.isatty()):
        yield silent  # whatever colours are forced
        return
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with contextlib.ExitStack() as stack:
        bar = progress.Progress(*columns, console=out or console(stderr=True), transient=True)
        task = bar.add_task("", total=None)
        begin = time.monotonic()

        def tell(done: int, total: int, name: str) -> None:
            description = middle_cut(shown(name), _NAME)
            bar.update(task, completed=done, total=total or None, description=description)
            if not bar.live.is_started and (not total or time.monotonic() - begin >= _MOMENT):
                stack.enter_context(bar)

        yield tell
