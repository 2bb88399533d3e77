"""Values as JSON takes them, for status pages and logs; sizes and lists of names as people do."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

_SHOWN = 8


class AsDict:
    """A frozen dataclass that can be made a dictionary of what JSON knows."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as `json.dumps` takes them.

        Tuples are lists, mappings are dictionaries, paths are text; infinity is `None`. An error is
        `{"type": …, "message": …}`. An event also has its kind, the name of its class, under
        `"kind"`.
        """
        known = dataclasses.fields(self)  # type: ignore[arg-type]  # of a dataclass, see above
        return {field.name: _plain(getattr(self, field.name)) for field in known}


def _plain(value: object) -> object:
    if value is None or isinstance(value, int | float | str):
        is_infinite = isinstance(value, float) and not math.isfinite(value)
        return None if is_infinite else value  # JSON has no number for it
    if isinstance(value, AsDict):
        return value.to_dict()
    if isinstance(value, BaseException):
        return {"type": type(value).__name__, "message": str(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def size_text(count: int) -> str:
    """Return a number of bytes in powers of a thousand."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def listed(names: tuple[str, ...]) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def escaped(text: str) -> str:
    """Return a text in which control characters, and others that show nothing, are escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text.replace("\\", "\\\\")
    )
