"""Bytes from somewhere. `storage.folder` writes them; who only reads does not import it."""

from ._descriptors import Descriptors
from ._local import LocalStorage
from ._lost import lost_memory
from ._opening import FileChangedError
from ._pace import ReadPace
from ._protocol import (
    ReadInto,
    Storage,
    ThreadedStorage,
    fill,
    opening_error,
    read_error,
    read_exactly,
    read_small,
    read_text,
)
from ._retrying import RetryingStorage, ThreadedRetryingStorage

__all__ = [
    "Descriptors",
    "FileChangedError",
    "LocalStorage",
    "ReadInto",
    "ReadPace",
    "RetryingStorage",
    "Storage",
    "ThreadedRetryingStorage",
    "ThreadedStorage",
    "fill",
    "lost_memory",
    "opening_error",
    "read_error",
    "read_exactly",
    "read_small",
    "read_text",
]
