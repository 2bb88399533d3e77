"""The progress bar of `progress=True`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .progress import Progress


@contextlib.contextmanager
def progress_bar(doing: str = "loading") -> Iterator[Callable[[Progress], object]]:
    """Show a bar on the terminal, and yield what it wants to be told."""
    from rich import progress  # noqa: PLC0415  # only a bar that is shown pays for it
    from rich.console import Console  # noqa: PLC0415

    columns = (
        progress.TextColumn("{task.description}", markup=False),  # names may hold brackets
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(doing, total=None)

        def show(moment: Progress) -> None:
            bar.update(
                task,
                completed=moment.bytes_done,
                total=moment.bytes_total,
                description=moment.current or doing,
            )

        try:
            yield show
        except BaseException:  # no half-filled bar above the error
            bar.remove_task(task)
            raise
