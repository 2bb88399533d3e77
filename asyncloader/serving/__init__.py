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
from ._loading import VersionLoader, check_options
from ._model import Model
from ._retry import may_pass
from ._shelf import Held, Shelf
from ._state import LiveState, LiveVersion
from ._switch import Switch
from ._telling import Teller

__all__ = [
    "Event",
    "Freed",
    "Held",
    "LiveState",
    "LiveVersion",
    "LoadCancelled",
    "LoadFailed",
    "LoadFinished",
    "LoadStarted",
    "Model",
    "RolledBack",
    "Shelf",
    "Swapped",
    "Switch",
    "Teller",
    "VersionLoader",
    "VersionRefused",
    "check_options",
    "may_pass",
]
