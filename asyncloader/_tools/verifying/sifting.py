"""Parses what can be parsed, and names all entries that cannot, not only the first.

The package's own parsers refuse a file for its first bad entry, and only they know the rules. So
where all entries at once are refused, each is tried alone, and then those that are good by
themselves together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


Entry = TypeVar("Entry")
Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Sifted(Generic[Entry, Parsed]):
    """The good entries, and why the others are not."""

    parsed: Parsed | None
    """Of the good ones; `None` if nothing can be made of them."""

    good: Mapping[str, Entry]
    errors: tuple[CheckpointError, ...]


def sift(
    entries: Mapping[str, Entry], parse: Callable[[Mapping[str, Entry]], Parsed]
) -> Sifted[Entry, Parsed]:
    """Parse as many entries as possible.

    Args:
        entries: By key.
        parse: Raises `CheckpointError` if there is a bad entry, or two that contradict each other;
            `key` is that of one to leave out.
    """
    try:
        return Sifted(parse(entries), entries, ())
    except CheckpointError:
        good, errors = _each(entries, parse)
    while True:
        try:
            return Sifted(parse(good), good, tuple(errors))
        except CheckpointError as error:
            errors.append(error)
            if error.key is None or good.pop(error.key, None) is None:
                return Sifted(None, good, tuple(errors))


def _each(
    entries: Mapping[str, Entry], parse: Callable[[Mapping[str, Entry]], object]
) -> tuple[dict[str, Entry], list[CheckpointError]]:
    good, errors = {}, []
    for key, entry in entries.items():
        try:
            parse({key: entry})
        except CheckpointError as error:
            errors.append(error)
        else:
            good[key] = entry
    return good, errors
