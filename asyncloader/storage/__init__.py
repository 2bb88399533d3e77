"""Bytes from somewhere. `storage.folder` writes them; who only reads does not import it."""

from ._local import LocalStorage
from ._pace import processors
from ._protocol import (
    ReadInto,
    Storage,
    ThreadedStorage,
    fill,
    read_exactly,
    read_small,
    read_text,
)

__all__ = [
    "LocalStorage",
    "ReadInto",
    "Storage",
    "ThreadedStorage",
    "fill",
    "processors",
    "read_exactly",
    "read_small",
    "read_text",
]
