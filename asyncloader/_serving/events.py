"""What happens to a service's model, as values."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from asyncloader._as_dict import AsDict
from asyncloader._memory.sizes import size_text

if TYPE_CHECKING:
    from asyncloader._loading.report import LoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event(AsDict):
    version: str
    """The version's name: that of its folder."""

    location: str
    """Its folder."""

    at: float = field(default_factory=time.time)
    """When, in seconds since 1970."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them, and the kind of event, under `"kind"`."""
        return {"kind": type(self).__name__, **AsDict.to_dict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStarted(_Event):
    """A version is about to be loaded."""

    attempt: int
    """1 for the first try."""

    def __str__(self) -> str:
        again = f", try {self.attempt}" if self.attempt > 1 else ""
        return f"{self.location}: loading{again}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFinished(_Event):
    """A version is in memory. Whether it serves, `check` has yet to say."""

    report: LoadReport
    nbytes: int
    """What it takes of memory, as predicted from its plan."""

    def __str__(self) -> str:
        return str(self.report)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed(_Event):
    """A version could not be loaded. The one that served before goes on serving."""

    error: Exception
    attempt: int
    retry_in: float | None
    """Seconds until the next try; `None` where another one would fail likewise."""

    def __str__(self) -> str:
        error = f"{type(self.error).__name__}: {self.error}"
        what = "given up" if self.retry_in is None else f"next try in {self.retry_in:.1f} s"
        return f"{self.location}: could not be loaded, {what}: {error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCancelled(_Event):
    """A load was given up: for a rollback, another version, or the end of the service."""

    def __str__(self) -> str:
        return f"{self.location}: load given up"


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRefused(_Event):
    """A version that could be loaded will not serve: it would not fit, or `check` said no."""

    reason: str
    error: Exception | None
    """What `check` raised."""

    def __str__(self) -> str:
        return f"{self.location}: refused, {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped(_Event):
    """Whoever asks from now on gets this version."""

    previous: str | None

    def __str__(self) -> str:
        after = "" if self.previous is None else f" in place of {self.previous!r}"
        return f"{self.location}: serves{after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(_Event):
    """Likewise, but it is the version that served before `previous`."""

    previous: str

    def __str__(self) -> str:
        return f"{self.location}: serves again, in place of {self.previous!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed(_Event):
    """The memory of a version was given back."""

    nbytes: int

    def __str__(self) -> str:
        return f"{self.location}: gave back {size_text(self.nbytes)} of memory"


Event: TypeAlias = (
    LoadStarted
    | LoadFinished
    | LoadFailed
    | LoadCancelled
    | VersionRefused
    | Swapped
    | RolledBack
    | Freed
)
