"""Tells how far a load or a save has come, and of every step; draws the bar."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from asyncloader._display import AsDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console


Step = Literal["plan", "read", "verify", "copy", "index", "commit"]

_EVERY = 0.1  # seconds between two calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(AsDict):
    """A moment of a load.

    Attributes:
        bytes_done: The bytes that were asked for and are there.
        bytes_total: All of them; an estimate where only some rows of a block are wanted.
        seconds: Since the load began.
        current: The tensor or table that the last bytes belong to.
        retries: How often something was read again that the storage had failed at.
    """

    bytes_done: int
    bytes_total: int
    seconds: float
    current: str
    retries: int = 0


class Meter:
    """Counts reads, and tells a listener now and then.

    Args:
        total: Bytes to read.
        listener: Called on the event loop, at most ten times a second and once at the end.
        clock: Seconds, ever growing.

    Attributes:
        retries: Says how often the storage tried again.
    """

    def __init__(
        self,
        total: int,
        listener: Callable[[Progress], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total = total
        self.wanted = 0
        self.read = 0
        self.verified = 0
        self.reads = 0
        self.retries: Callable[[], int] = int
        self._listener = listener
        self._clock = clock
        self._start = clock()
        self._told = self._start
        self._current = ""

    @property
    def seconds(self) -> float:
        """Since the load began."""
        return self._clock() - self._start

    def note(self, *, read: int, wanted: int, current: str, verified: int = 0) -> None:
        """Count one read of so many bytes.

        The load `wanted` some of them, and of these some were `verified`; the last ones belong to
        the tensor or table `current`.
        """
        self.read += read
        self.verified += verified
        self.wanted += wanted
        self.reads += 1
        self._current = current
        if self._listener is not None and (now := self._clock()) - self._told >= _EVERY:
            self._told = now
            self._tell(self._listener, self.total)

    def finish(self) -> None:
        """Say that all is done."""
        if self._listener is not None:
            self._tell(self._listener, self.wanted)

    def _tell(self, listener: Callable[[Progress], object], total: int) -> None:
        listener(
            Progress(
                bytes_done=self.wanted,
                bytes_total=max(total, self.wanted),
                seconds=self.seconds,
                current=self._current,
                retries=self.retries(),
            )
        )


@dataclass(slots=True)
class Stages:
    """Makes one progress of several loads and saves that run one after the other."""

    total: int  # bytes of all of them, about
    listener: Callable[[Progress], object] | None
    _before: int = 0
    _now: int = 0

    def tell(self, moment: Progress) -> None:
        """Tell the progress of the present stage."""
        self._now = moment.bytes_done
        if self.listener is not None:
            done = self._before + self._now
            self.listener(replace(moment, bytes_done=done, bytes_total=max(self.total, done)))

    def next(self) -> None:
        self._before += self._now
        self._now = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span(AsDict):
    """One step of a load.

    Attributes:
        step: What kind of work it was.
        name: A shard, a table, or a part of planning.
        lane: The asyncio task that did it, or waited for the thread that did: spans of one lane
            follow each other, or lie within each other.
        start: Seconds, by `time.perf_counter`.
        seconds: How long it took.
        nbytes: Bytes that it was about, 0 where that says nothing.
    """

    step: Step
    name: str
    lane: str
    start: float
    seconds: float
    nbytes: int


class Tracer:
    """Tells a listener about every step, on the event loop, when it is over.

    Args:
        listener: Gets a `Span`; `None` makes tracing free.
    """

    def __init__(self, listener: Callable[[Span], object] | None) -> None:
        self._listener = listener

    def span(
        self, step: Step, name: str, nbytes: int = 0
    ) -> contextlib.AbstractContextManager[None]:
        if self._listener is None:
            return contextlib.nullcontext()
        return self._measured(step, name, nbytes)

    def note(self, step: Step, name: str, start: float, nbytes: int = 0) -> None:
        """Tell that a step which began at `start` is over."""
        if self._listener is None:
            return
        seconds = time.perf_counter() - start
        task = asyncio.current_task()
        lane = "asyncloader" if task is None else task.get_name()
        self._listener(
            Span(step=step, name=name, lane=lane, start=start, seconds=seconds, nbytes=nbytes)
        )

    @contextlib.contextmanager
    def _measured(self, step: Step, name: str, nbytes: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.note(step, name, start, nbytes)


@contextlib.contextmanager
def progress_bar(
    doing: str = "loading",
    *,
    console: Console | None = None,
    label: Callable[[str], str] = str,
    after: float = 0.0,
) -> Iterator[Callable[[Progress], object]]:
    """Show a bar on the terminal, by default on stderr, and yield the listener that moves it.

    Args:
        doing: Is shown where a `Progress` has no name.
        console: Another terminal.
        label: Returns the text to show for a name.
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
            text = label(moment.current or doing)
            if moment.retries:
                text += f", {moment.retries} retries"
            bar.update(task, completed=done, total=total, description=text)
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
    """Yield the listener that a user's `progress` stands for: `True` is a bar that says `doing`."""
    if isinstance(progress, bool):
        with progress_bar(doing) if progress else contextlib.nullcontext() as listener:
            yield listener
    else:
        yield progress
