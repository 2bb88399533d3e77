"""Checks of arguments that more than one class takes: each raises where the argument is passed.

An argument of the wrong type is a `TypeError`, one that makes no sense a `ValueError`.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping
from typing import TypeVar

from ._addresses import HTTP, address_of, is_url, local_path

T = TypeVar("T")


def checked_path(path: str | os.PathLike[str], name: str) -> str:
    """Return a path as text."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"{name} must be a path, got {path!r}")
    text = os.fspath(path)
    check_no_url(text, name)
    if not isinstance(text, str):
        raise TypeError(f"{name} must be text, got {text!r}")
    if "\0" in text:
        raise ValueError(f"{name}: no path holds a NUL, got {text!r}")
    return text


def checked_source(path: str | os.PathLike[str], name: str) -> str:
    """Return a path, or the URL of an object store, as text; of a `file://` URL, its path."""
    if isinstance(path, str) and is_url(path):
        path = local_path(path, name)
        if is_url(path):
            address_of(path, name)
            return path
    return checked_path(path, name)


def checked_target(path: str | os.PathLike[str], name: str) -> str:
    """Return a path, or the URL of an object store that is written to, as text."""
    text = checked_source(path, name)
    if is_url(text) and address_of(text, name).store == HTTP:
        raise ValueError(f"{name}: {text!r} is read only: save to a folder or an object store")
    return text


def check_storage_options(options: object) -> None:
    """Refuse all but a mapping and `None`; the error does not hold what may be a secret."""
    if not isinstance(options, Mapping | None):
        raise TypeError("storage_options is a dict of obstore's options, or None")


def check_no_url(path: str | bytes, name: str) -> None:
    """Refuse an address on the network; the local file system would take it for a folder."""
    text = os.fsdecode(path)
    if is_url(text):
        raise ValueError(
            f"{name} is a URL ({text.partition(':')[0]}://…) that was made a Path, which has lost "
            "a slash of it: give it as text. (Of a local folder with such a name, give the "
            "absolute path.)"
        )


def as_dict(mapping: Mapping[str, T] | None, name: str) -> dict[str, T]:
    """Return a copy of a mapping, and an empty one for `None`."""
    given: object = mapping
    if given is not None and not isinstance(given, Mapping):
        is_module = hasattr(given, "state_dict")
        hint = "; of a module, targets(module) gives both" if is_module else ""
        raise TypeError(f"{name} maps names to values, got {type(given)}{hint}")
    return dict(mapping or {})


def check_timeout(timeout: float | None, name: str = "timeout") -> None:
    """Refuse all but a positive number and `None`."""
    if timeout is not None and not isinstance(timeout, int | float):
        raise TypeError(f"{name} is a number of seconds or None, got {timeout!r}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"{name} must be positive or None, got {timeout}")


def check_count(count: object, name: str) -> None:
    """Refuse all but a positive int."""
    if type(count) is not int:
        raise TypeError(f"{name} must be an int, got {count!r}")
    if count < 1:
        raise ValueError(f"{name} must be positive, got {count}")


def check_switch(value: object, name: str, *, also: str | None = None) -> None:
    """Refuse all but a bool, and one other value: `"no"` would be on."""
    if not isinstance(value, bool) and (also is None or value != also):
        more = "" if also is None else f", or {also!r}"
        raise TypeError(f"{name} is True or False{more}, got {value!r}")


def check_names(names: object, name: str) -> None:
    """Refuse a text where a list of names is wanted: its letters would be the names."""
    if isinstance(names, str | bytes):
        raise TypeError(f"{name} is a list of names, got the text {names!r}: write [{names!r}]")


def check_callable(function: object, name: str, *, awaited: bool = False) -> None:
    """Refuse an object that cannot be called, or whose call only makes a coroutine or a generator.

    Args:
        function: A function, or an object that can be called.
        name: The name of the argument.
        awaited: Whether the result is awaited, so that it may be a coroutine function.
    """
    if not callable(function):
        raise TypeError(f"{name} must be callable, got {function!r}")
    inner: object = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    for code in (inner, type(inner).__call__):
        if inspect.iscoroutinefunction(code) and not awaited:
            raise TypeError(
                f"{name} is called, not awaited: give it a plain function, no async def"
            )
        if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
            raise TypeError(f"{name} is a generator function, which does nothing when it is called")


def check_progress(progress: object) -> None:
    """Refuse all but a plain function, a bool and `None`."""
    if progress is None or isinstance(progress, bool):
        return
    if not callable(progress):
        raise TypeError(f"progress must be callable, True or None, got {progress!r}")
    check_callable(progress, "progress")


def check_row_options(
    concurrency: object, cache_bytes: object, stall_timeout: float | None, *, prefix: str = ""
) -> None:
    """Refuse options of lookups that make no sense; `prefix` begins their names."""
    check_count(concurrency, f"{prefix}concurrency")
    if type(cache_bytes) is not int:
        raise TypeError(f"{prefix}cache_bytes must be an int, got {cache_bytes!r}")
    if cache_bytes < 0:
        raise ValueError(f"{prefix}cache_bytes is 0 or more, got {cache_bytes!r}")
    check_timeout(stall_timeout, f"{prefix}stall_timeout")
