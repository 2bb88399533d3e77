"""Serves a model while its next version comes in."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from ._arguments import as_dict, check_callable, check_count, checked_source
from ._ready_stores import source_of
from ._serving.model import Settings
from ._serving.service import Service
from ._serving.sought import Sought
from .options import ReadOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from ._planning.bank import Entries
    from ._ready_stores import Source
    from ._serving.events import Event, LiveState, LiveVersion
    from ._serving.model import Built, Model

__all__ = ["Live"]


class Live:
    """One model, and its versions: the newest one serves, the next one comes in beside it.

    Follows a run folder: each new checkpoint is loaded into a model that `build()` makes, checked,
    and then swapped for the version that serves, by one reference. A caller gets all tables and
    tensors of one version. If a version cannot be loaded, or does not pass, the old one goes on
    serving.

    ```python
    async with asyncloader.Live("/runs/ctr", build) as live:
        with live.use() as model:
            rows = model.tables["item_emb"].lookup(ids)
    ```

    Entering loads the first version, and raises if there is none, or it cannot be loaded. While
    files of it are still being written to, entering waits, and `state.trouble` says so. Leaving
    cancels a load under way, waits for its threads, and gives all memory back but that of versions
    that `use()` blocks still pin. `use`, `current`, `state` and `versions` may be called on any
    thread; all else belongs to the event loop on which the block was entered.

    Args:
        source: A run folder, whose newest committed checkpoint is followed (see `latest`), or one
            checkpoint, which is loaded again when it is replaced.
        build: Makes the tables and tensors that a version is loaded into, fresh and empty:
            `(hashtables, tensors)`, or a `torch.nn.Module`, whose tables and `state_dict()` are
            loaded (see `targets`). Called on a thread, unless it is a coroutine function.
        bank: In place of `source`, a list of entries as `Loader.from_bank` takes it. The runs of
            its entries with `is_dynamic` are followed: when one of them has a newer checkpoint, the
            whole bank is loaded into a new model.
        keep: Versions that stay in memory: the one that serves, and others that served before it.
            With 2, going back takes no load.
        poll: Seconds between two looks at the folder.
        loader_options: Further arguments of `Loader`, such as `max_loop_lag`, `verify`, `timeout`.
            `strict` is true unless it says otherwise: a version that lacks something does not
            serve. The first version, before which no request is served, is loaded at full speed.
        check: Gets a version that was loaded, before it serves; if it raises, or returns a value
            that is false (`torch.tensor(False)`, say), that version does not serve; with `None` it
            does. A value that is no truth value, as text or a list, is a `TypeError`. Called on a
            thread, unless it is a coroutine function.
        on_event: Called on the event loop with each `Event`. An error that it raises is logged.
        max_memory: Bytes that all versions in memory, the one to be loaded, and the reads under way
            may take together, as predicted from its plan; versions without users give way first.
            A version that would not fit is refused before it is read. Memory that `build` touches
            is not predicted: make tensors with `torch.empty`. Where fresh memory is dear to touch,
            as in some virtual machines, the memory of tables that were let go is kept for the next
            version: at most as much as one takes, and as `max_memory` leaves.
        retry_pause: Seconds before a load is tried again whose fault may pass (storage, no memory,
            replaced meanwhile); twice as long before each next try, a minute at most. A newer
            version is taken at once.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        source: Source | None = None,
        build: Callable[[], Built | Awaitable[Built]] | None = None,
        *,
        bank: Entries | None = None,
        keep: int = 1,
        poll: float = 5.0,
        loader_options: Mapping[str, Any] | None = None,
        check: Callable[[Model], object] | None = None,
        on_event: Callable[[Event], object] | None = None,
        max_memory: int | None = None,
        retry_pause: float = 1.0,
    ) -> None:
        options = {"strict": True, **as_dict(loader_options, "loader_options")}
        if source is not None:
            how = options.get("options")
            given = how.storage_options if isinstance(how, ReadOptions) else None
            given = options.get("storage_options", given)
            source, options["storage_options"] = source_of(source, "source", given)
        sought = Sought.of(source, bank)
        if isinstance(build, nn.Module):  # it can be called, and so would be
            raise TypeError(
                f"build is a function that makes a new model for each version, got {type(build)}: "
                "pass a function that returns such a one"
            )
        check_callable(build, "build", awaited=True)
        assert build is not None, "it can be called"
        if check is not None:
            check_callable(check, "check", awaited=True)
        if on_event is not None:
            check_callable(on_event, "on_event")
        for name, value in (("poll", poll), ("retry_pause", retry_pause)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        check_count(keep, "keep")
        if max_memory is not None:
            check_count(max_memory, "max_memory")
        for reserved in ("checkpoint_path", "hashtables", "tensors", "on_plan"):
            if reserved in options:
                raise TypeError(f"loader_options: {reserved!r} is given by Live itself")
        settings = Settings(
            build=build,
            check=check,
            on_event=on_event,
            keep=keep,
            poll=poll,
            loader_options=options,
            read=sought.options(options),  # raises now, not at the first load
            max_memory=max_memory,
            retry_pause=retry_pause,
        )
        self._service = Service(settings, sought)
        self._shelf = self._service.shelf

    def __repr__(self) -> str:
        return f"<Live {self._service!r}, {self._shelf!r}>"

    async def __aenter__(self) -> Self:
        await self._service.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._service.close()

    @contextlib.contextmanager
    def use(self) -> Iterator[Model]:
        """Yield the version that serves; it stays as it is until the block ends.

        Takes no time to speak of, and may be called on any thread. A version that is replaced
        meanwhile is freed when the last block that uses it ends.

        Raises:
            RuntimeError: If the `async with` block was not entered, or was left.
        """
        held = self._shelf.pin()
        try:
            yield held.model
        finally:
            self._shelf.unpin(held)

    @property
    def current(self) -> LiveVersion:
        """The version that serves.

        Raises:
            RuntimeError: If the `async with` block was not entered, or was left.
        """
        return self._shelf.serving.shown(serving=True)

    @property
    def versions(self) -> tuple[LiveVersion, ...]:
        """All versions in memory, in the order in which they last began to serve."""
        return self.state.versions

    @property
    def state(self) -> LiveState:
        """The facts of a status page."""
        return self._service.state

    async def rollback(self) -> LiveVersion:
        """Go back to the version that served before, and stay there until `resume()`.

        At once if it is still in memory (`keep`); otherwise it is loaded again from its folder,
        while the present one serves. A load that following has begun is given up, and so is a
        `load()` that still waits for a copy to end. Called again, it goes further back.

        Returns:
            The version that serves now.

        Raises:
            LookupError: If none served before.
            CheckpointNotFoundError: If it is neither in memory nor on the disk any more.
            CheckpointChangedError: If its folder holds another checkpoint by now.
            CheckpointError: If `check` refused it, or raised, which is the cause then.
            Exception: The error of its load. Nothing has changed in any of these cases.
        """
        return await self._service.rollback()

    async def load(self, version: str | os.PathLike[str]) -> LiveVersion:
        """Let a version serve that was chosen on purpose, and stay there until `resume()`.

        While it is still being written to, this waits, and `state.trouble` says so; the next
        command ends that.

        Args:
            version: The name of a sub-folder of the run folder, or the path of a checkpoint: any
                path, so check what comes from outside.

        Returns:
            The version that serves now.

        Raises:
            CheckpointNotFoundError: If there is no such checkpoint.
            CheckpointError: If another command came while it was still being written to; if `check`
                refused it, or raised, which is the cause then.
            Exception: The error of its load. Nothing has changed in any of these cases.
        """
        return await self._service.load(checked_source(version, "version"))

    async def resume(self) -> None:
        """Follow the newest version again, also one that was given up. Does not wait for it."""
        self._service.resume()
