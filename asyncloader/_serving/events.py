"""What happens to a service's model, and its state, as values; tells the log and a listener."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from asyncloader._display import AsDict, size_text
from asyncloader.errors import AsyncLoaderError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from asyncloader._disk_table.stats import TableStats
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.report import LoadReport


_log = logging.getLogger("asyncloader")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event(AsDict):
    version: str
    location: str
    at: float = field(default_factory=time.time)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them, and the kind of event, under `"kind"`."""
        return {"kind": type(self).__name__, **AsDict.to_dict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStarted(_Event):
    """A version is about to be loaded.

    Attributes:
        version: The version's name: the name of its folder.
        location: Its folder.
        at: When it happened, in seconds since 1970.
        attempt: 1 for the first try.
    """

    attempt: int

    def __str__(self) -> str:
        again = f", try {self.attempt}" if self.attempt > 1 else ""
        return f"{self.location}: loading{again}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFinished(_Event):
    """A version is in memory. Whether it serves, `check` has yet to say.

    Attributes:
        version: The version's name: the name of its folder.
        location: Its folder.
        at: When it happened, in seconds since 1970.
        report: The report of the load.
        nbytes: The memory that the version takes, as predicted from its plan.
    """

    report: LoadReport
    nbytes: int

    def __str__(self) -> str:
        return str(self.report)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed(_Event):
    """A version could not be loaded. The version that served before goes on serving.

    Attributes:
        version: The version's name: the name of its folder.
        location: Its folder.
        at: When it happened, in seconds since 1970.
        error: The error of the load.
        attempt: 1 for the first try.
        retry_in: Seconds until the next try; `None` where another try would fail likewise.
    """

    error: Exception
    attempt: int
    retry_in: float | None

    def __str__(self) -> str:
        error = f"{type(self.error).__name__}: {self.error}"
        what = "given up" if self.retry_in is None else f"next try in {self.retry_in:.1f} s"
        return f"{self.location}: could not be loaded, {what}: {error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCancelled(_Event):
    """A load was given up: for a rollback, another version, or the end of the service.

    Attributes:
        version: The version's name: the name of its folder.
        location: Its folder.
        at: When it happened, in seconds since 1970.
    """

    def __str__(self) -> str:
        return f"{self.location}: load given up"


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRefused(_Event):
    """A version that could be loaded will not serve: it would not fit, or `check` said no.

    Attributes:
        version: The version's name: the name of its folder.
        location: Its folder.
        at: When it happened, in seconds since 1970.
        reason: Why it will not serve.
        error: The error that `check` raised, or a `ValueError` where it returned a false value;
            `None` if the version would not fit.
    """

    reason: str
    error: Exception | None

    def __str__(self) -> str:
        return f"{self.location}: refused, {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped(_Event):
    """Every `use()` gets this version from now on.

    Attributes:
        version: The version's name: the name of its folder.
        location: Its folder.
        at: When it happened, in seconds since 1970.
        previous: The name of the version that served before; `None` if this is the first.
    """

    previous: str | None

    def __str__(self) -> str:
        after = "" if self.previous is None else f" in place of {self.previous!r}"
        return f"{self.location}: serves{after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(_Event):
    """Every `use()` gets this version again, which served before `previous`.

    Attributes:
        version: The version's name: the name of its folder.
        location: Its folder.
        at: When it happened, in seconds since 1970.
        previous: The name of the version that served until now.
    """

    previous: str

    def __str__(self) -> str:
        return f"{self.location}: serves again, in place of {self.previous!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed(_Event):
    """The memory of a version was given back.

    Attributes:
        version: The version's name: the name of its folder.
        location: Its folder.
        at: When it happened, in seconds since 1970.
        nbytes: How much memory it took, as predicted from its plan.
    """

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState(AsDict):
    """A moment of a service's model.

    Attributes:
        versions: All versions in memory; the version that serves is the last.
        following: Whether new versions are taken in; not after `rollback()` or `load()`, until
            `resume()`.
        loading: The name of the version that is being loaded; `None` if none is.
        progress: How far that load has come.
        problem: The event that kept the newest version from serving, until one serves.
        trouble: What is in the way now: a run folder that is gone, a version that is still being
            written to, or that the newest version left in the folder is older than the one that
            serves; empty if nothing is.
        nbytes: Memory of all versions, in bytes.
        tables: What the lookups of each `DiskTable` of the version that serves have come to.
    """

    versions: tuple[LiveVersion, ...]
    following: bool
    loading: str | None
    progress: Progress | None
    problem: LoadFailed | VersionRefused | None
    trouble: str = ""
    nbytes: int
    tables: Mapping[str, TableStats] = field(default_factory=dict)


class Teller:
    """Tells the log and a listener of events, on the event loop, and remembers troubles.

    An error that the listener raises is logged; serving goes on.
    """

    def __init__(self, listener: Callable[[Event], object] | None) -> None:
        self._listener = listener
        self._troubles: dict[object, str] = {}
        self.problem: LoadFailed | VersionRefused | None = None  # until a version serves

    @property
    def trouble(self) -> str:
        """What is in the way now; empty if nothing is."""
        return "; ".join(dict.fromkeys(self._troubles.copy().values()))

    def note(self, about: object, trouble: str) -> None:
        """Note a trouble, and log it when it begins; an empty text says that it is over."""
        if trouble and about not in self._troubles:
            _log.warning("%s", trouble)
        if trouble:
            self._troubles[about] = trouble
        else:
            self._troubles.pop(about, None)

    def tell(self, event: Event) -> None:
        """Log an event, and pass it on."""
        level = logging.INFO
        if isinstance(event, LoadFailed | VersionRefused):
            self.problem, level = event, logging.WARNING
        elif isinstance(event, Swapped | RolledBack):
            self.problem = None
        if not isinstance(event, LoadFinished):  # the loader has logged its report
            # A traceback tells whose code failed, where it was not ours.
            error = getattr(event, "error", None)
            is_ours = error is None or isinstance(error, AsyncLoaderError | OSError)
            _log.log(level, "%s", event, exc_info=None if is_ours else error)
        if self._listener is None:
            return
        try:
            self._listener(event)
        except Exception:  # noqa: BLE001  # a user's function may raise anything
            _log.exception("on_event failed; the version that serves is not affected")
