"""The plan that a `filter_func` may change: `{destination: {source: [slot, …]}}`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncloader._checkpoint import parts

if TYPE_CHECKING:
    from .targets import Targets


ID = parts.ID
LoadInfo = dict[str, dict[str, list[str]]]


def default_load_info(targets: Targets) -> LoadInfo:
    """Map every child of every table, and every tensor, to itself."""
    info: LoadInfo = {
        child: {child: [ID, *target.slots]} for child, target in targets.tables.items()
    }
    return info | {name: {name: []} for name in targets.tensors}


def checked_load_info(info: object) -> LoadInfo:
    """Return the value of a `filter_func`, if it is of the right form.

    Raises:
        TypeError: If it is something else.
    """
    form = "{destination: {source: [slot, ...]}}"
    if not isinstance(info, dict):
        raise TypeError(f"filter_func must return the dict {form}, got {type(info).__name__}")
    for destination, sources in info.items():
        if not isinstance(destination, str) or not isinstance(sources, dict):
            raise TypeError(f"filter_func must return {form}, got {destination!r}: {sources!r}")
        for source, slots in sources.items():
            names = isinstance(slots, list | tuple) and all(isinstance(s, str) for s in slots)
            if not isinstance(source, str) or not names:
                got = f"{destination!r}: {{{source!r}: {slots!r}}}"
                raise TypeError(f"filter_func must return {form}, got {got}")
    return info
