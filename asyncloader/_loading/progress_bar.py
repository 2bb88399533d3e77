"""The progress bar of `progress=True`, and of the command line."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from .progress import Progress


@contextlib.contextmanager
def progress_bar(
    doing: str = "loading",
    *,
    console: Console | None = None,
    label: Callable[[str], str] = str,
    after: float = 0.0,
) -> Iterator[Callable[[Progress], object]]:
    """Show a bar on the terminal, and yield the listener that moves it.

    Args:
        doing: What is shown where a `Progress` has no name.
        console: Where to; by default stderr.
        label: Makes of a name what is shown of it.
        after: Seconds that have to pass before the bar is shown, where it is known how much there
            is to do. Such a bar is gone when the block has ended.
    """
    from rich import console as rich_console  # noqa: PLC0415  # only a bar needs rich
    from rich import progress  # noqa: PLC0415

    columns = (
        progress.TextColumn("{task.description}", markup=False),  # names may hold brackets
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        out = console or rich_console.Console(stderr=True)
        bar = progress.Progress(*columns, console=out, transient=after > 0)
        task = bar.add_task(doing, total=None)
        if not after:
            stack.enter_context(bar)

        def show(moment: Progress) -> None:
            done, total = moment.bytes_done, moment.bytes_total or None
            bar.update(
                task, completed=done, total=total, description=label(moment.current or doing)
            )
            if not bar.live.is_started and (not total or time.monotonic() - begin >= after):
                stack.enter_context(bar)

        try:
            yield show
        except BaseException:  # no half-filled bar above the error
            bar.remove_task(task)
            raise


@contextlib.contextmanager
def listening(
    progress: Callable[[Progress], object] | bool | None,  # noqa: FBT001  # users pass it so
    doing: str,
) -> Iterator[Callable[[Progress], object] | None]:
    """Yield what a user's `progress` stands for: `True` is a bar.

    Args:
        progress: A listener, `True` for a bar, or nothing.
        doing: What the bar says.
    """
    if isinstance(progress, bool):
        with progress_bar(doing) if progress else contextlib.nullcontext() as listener:
            yield listener
    else:
        yield progress
