"""What a service's status page shows, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._display import AsDict

if TYPE_CHECKING:
    from asyncloader._loading.progress import Progress

    from .events import LoadFailed, VersionRefused
    from .shelf import Held


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveVersion(AsDict):
    """A version in memory.

    Attributes:
        version: The version's name: the name of its folder.
        location: Its folder.
        serving: Whether it is the version that serves.
        users: How many `use()` blocks pin it.
        nbytes: The memory that it takes, in bytes, as predicted from its plan.
        seconds: How long its load took.
        loaded_at: When it was loaded, in seconds since 1970.
    """

    version: str
    location: str
    serving: bool
    users: int
    nbytes: int
    seconds: float
    loaded_at: float

    @classmethod
    def of(cls, held: Held, *, serving: bool) -> LiveVersion:
        """Describe a version as it is now."""
        return cls(
            **held.candidate.names,
            serving=serving,
            users=held.users,
            nbytes=held.nbytes,
            seconds=held.model.report.seconds,
            loaded_at=held.loaded_at,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState(AsDict):
    """A moment of a service's model.

    Attributes:
        versions: All versions in memory; the version that serves is the last.
        following: Whether new versions are taken in; not after `rollback()` or `load()`, until
            `resume()`.
        loading: The name of the version that is being loaded; `None` if none is.
        progress: How far that load has come.
        problem: What kept the newest version from serving, until one serves.
        trouble: What is in the way now: a run folder that is gone, a version that is still being
            written to, or the newest version that is left and is older than the one that serves;
            empty if nothing is.
        nbytes: Memory of all versions, in bytes.
    """

    versions: tuple[LiveVersion, ...]
    following: bool
    loading: str | None
    progress: Progress | None
    problem: LoadFailed | VersionRefused | None
    trouble: str = ""
    nbytes: int
