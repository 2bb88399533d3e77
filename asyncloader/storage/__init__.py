"""Bytes from somewhere."""

from ._local import LocalStorage
from ._protocol import Storage, read_exactly, read_small, read_text

__all__ = ["LocalStorage", "Storage", "read_exactly", "read_small", "read_text"]
