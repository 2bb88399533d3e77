"""Bytes from somewhere."""

from ._folder import Folder, LocalFolder, WritableFile
from ._local import LocalStorage
from ._protocol import Storage, read_exactly, read_small, read_text

__all__ = [
    "Folder",
    "LocalFolder",
    "LocalStorage",
    "Storage",
    "WritableFile",
    "read_exactly",
    "read_small",
    "read_text",
]
