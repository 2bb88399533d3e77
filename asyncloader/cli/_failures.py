"""Failures as one line for people."""

from __future__ import annotations

import os

from asyncloader.errors import AsyncLoaderError, CheckpointNotFoundError
from asyncloader.runs import is_run_folder, latest

__all__ = ["EXPECTED", "message_of"]

EXPECTED = (AsyncLoaderError, KeyError, OSError, ValueError, MemoryError)
"""What is no bug: the checkpoint, the system, or what was asked for."""


def message_of(error: BaseException) -> str:
    """Say what is wrong."""
    if isinstance(error, CheckpointNotFoundError):
        return _not_found(error)
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # `str` of a KeyError is a `repr`
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if error.args else "not enough memory"
    if isinstance(error, OSError) and not isinstance(error, AsyncLoaderError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _not_found(error: CheckpointNotFoundError) -> str:
    if not os.path.lexists(error.location):
        return f"{error.location}: no such file or folder"
    if not is_run_folder(error.location):
        return str(error)
    try:
        newest = latest(error.location)
    except AsyncLoaderError:  # removed meanwhile
        return str(error)
    return (
        f"{error.location}: no checkpoint itself but a run folder that holds some; the newest is "
        f"{newest}"
    )
