"""What a service's status page shows, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._as_dict import AsDict

if TYPE_CHECKING:
    from asyncloader._loading.progress import Progress

    from .events import LoadFailed, VersionRefused
    from .shelf import Held


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveVersion(AsDict):
    """A version in memory."""

    version: str
    """Its name: that of its folder."""

    location: str
    serving: bool
    users: int
    """`use()` blocks that it is pinned by."""

    nbytes: int
    """What it takes of memory, as predicted from its plan."""

    seconds: float
    """How long its load took."""

    loaded_at: float
    """When it was loaded, in seconds since 1970."""

    @classmethod
    def of(cls, held: Held, *, serving: bool) -> LiveVersion:
        """Describe a version as it is now."""
        return cls(
            version=held.candidate.name,
            location=str(held.candidate.path),
            serving=serving,
            users=held.users,
            nbytes=held.nbytes,
            seconds=held.model.report.seconds,
            loaded_at=held.loaded_at,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState(AsDict):
    """A moment of a service's model."""

    versions: tuple[LiveVersion, ...]
    """All that are in memory, the one that serves last."""

    following: bool
    """Whether new versions are taken in; not after `rollback()` or `load()`, until `resume()`."""

    loading: str | None
    """The version that is being loaded."""

    progress: Progress | None
    """How far that has come."""

    problem: LoadFailed | VersionRefused | None
    """What kept the newest version from serving, until one serves."""

    trouble: str = ""
    """What is in the way: a run folder that is gone, a version that is still being written to, or
    one that is older than what serves and is the newest that is left; empty if nothing is."""

    nbytes: int
    """Memory of all versions, in bytes."""
