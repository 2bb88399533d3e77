"""Which save commits at a place of an object store: an object says it, which is created once."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import STAGING

from .leftovers import telling

if TYPE_CHECKING:
    from asyncloader._storage.folder import ConditionalFolder


LEASE = 300.0
"""Seconds that a commit may take: a dozen small requests, and copies within the store."""

_NAME = f"{STAGING}claim"


class CommitClaim:
    """One save's claim to commit, which another one may take over when it is old.

    Args:
        folder: The place.
        save_id: Tells this save from others.
        staging: A folder in it of this save's own.
        lease: Seconds after which a claim counts as left by a save that died.
    """

    def __init__(
        self, folder: ConditionalFolder, save_id: str, staging: str, *, lease: float
    ) -> None:
        self._folder = folder
        self._text = save_id.encode()
        self._clock = f"{staging}/now"
        self._lease = lease
        self._tag: str | None = None

    def take(self) -> float | None:
        """Take it, or return for how long another save has it, in seconds."""
        with contextlib.suppress(FileExistsError):
            self._tag = self._folder.put(_NAME, self._text, over=None)
            return None
        entry = self._folder.stat(_NAME)
        if entry is None:
            return 0.0
        age = self._now() - entry.modified
        if age <= self._lease:
            return age
        try:
            self._tag = self._folder.put(_NAME, self._text, over=entry)
        except FileExistsError:
            return age
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            self._folder.remove(_NAME)  # and created, when it is tried again
            return age
        return None

    def _now(self) -> float:
        """Return the time by the store's own clock."""
        with contextlib.closing(self._folder.create(self._clock)) as file:
            file.sync()
        entry = self._folder.stat(self._clock)
        return 0.0 if entry is None else entry.modified

    def is_ours(self) -> bool:
        """Say whether nobody has taken it over, as from one whose thread stood still."""
        entry = self._folder.stat(_NAME)
        return entry is not None and entry.tag == self._tag

    def release(self, told: list[str]) -> None:
        """Give it back, if it is ours; tell what went wrong."""
        if self._tag is not None:
            with telling(told, f"{_NAME!r} could not be removed"):
                if self.is_ours():
                    self._folder.remove(_NAME)
            self._tag = None
