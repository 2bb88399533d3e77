"""Which versions of a model are in memory, and which one serves."""

from ._events import (
    Event,
    Freed,
    LoadCancelled,
    LoadFailed,
    LoadFinished,
    LoadStarted,
    RolledBack,
    Swapped,
    VersionRefused,
)
from ._freeing import Freeing
from ._loading import RefusedError, VersionLoader, check_options
from ._model import Model
from ._retry import may_pass, retrying
from ._shelf import Held, Shelf
from ._source import Candidate, candidate, named, newest
from ._state import LiveState, LiveVersion
from ._telling import Teller

__all__ = [
    "Candidate",
    "Event",
    "Freed",
    "Freeing",
    "Held",
    "LiveState",
    "LiveVersion",
    "LoadCancelled",
    "LoadFailed",
    "LoadFinished",
    "LoadStarted",
    "Model",
    "RefusedError",
    "RolledBack",
    "Shelf",
    "Swapped",
    "Teller",
    "VersionLoader",
    "VersionRefused",
    "candidate",
    "check_options",
    "may_pass",
    "named",
    "newest",
    "retrying",
]
