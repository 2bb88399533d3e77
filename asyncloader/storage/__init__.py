"""Bytes from somewhere."""

from ._folder import Folder, LocalFolder, WritableFile
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
    "Folder",
    "LocalFolder",
    "LocalStorage",
    "ReadInto",
    "Storage",
    "ThreadedStorage",
    "WritableFile",
    "fill",
    "processors",
    "read_exactly",
    "read_small",
    "read_text",
]
