"""Says what happens: to the log, and to whoever listens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from asyncloader.errors import AsyncLoaderError

from .events import LoadFailed, LoadFinished, RolledBack, Swapped, VersionRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from .events import Event


_log = logging.getLogger("asyncloader")


class Teller:
    """Tells a listener, on the event loop, and remembers what is wrong.

    Args:
        listener: Gets every event. What it raises is logged: nobody stops serving for it.
    """

    def __init__(self, listener: Callable[[Event], object] | None) -> None:
        self._listener = listener
        self.problem: LoadFailed | VersionRefused | None = None
        """What kept the newest version from serving, until one serves."""

        self._troubles: dict[object, str] = {}

    @property
    def trouble(self) -> str:
        """What is in the way now; nothing if nothing is."""
        return "; ".join(dict.fromkeys(self._troubles.copy().values()))

    def note(self, about: object, trouble: str) -> None:
        """Note what is in the way, and log it when that begins; an empty text says it is over."""
        if trouble and about not in self._troubles:
            _log.warning("%s", trouble)
        if trouble:
            self._troubles[about] = trouble
        else:
            self._troubles.pop(about, None)

    def tell(self, event: Event) -> None:
        """Say that something has happened."""
        level = logging.INFO
        if isinstance(event, LoadFailed | VersionRefused):
            self.problem, level = event, logging.WARNING
        elif isinstance(event, Swapped | RolledBack):
            self.problem = None
        if not isinstance(event, LoadFinished):  # the loader has logged its report
            # Whose code it was, where it was not ours, a traceback tells.
            error = getattr(event, "error", None)
            mine = error is None or isinstance(error, AsyncLoaderError | OSError)
            _log.log(level, "%s", event, exc_info=None if mine else error)
        if self._listener is None:
            return
        try:
            self._listener(event)
        except Exception:  # noqa: BLE001  # a user's function may raise anything
            _log.exception("on_event failed; the version that serves is not affected")
