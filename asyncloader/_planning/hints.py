"""Says which name was meant by another one, that is not there."""

from __future__ import annotations

import difflib
import heapq
import os
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


# Comparing took 40 µs a pair of common lengths, and grows with their product: where there is much
# to compare, no reader gets that far.
_NAMES, _CANDIDATES, _LENGTH = 5, 200, 200
_PREFIXES = 3


def hint_for(name: str, names: Sequence[str]) -> str:
    """Return in brackets which of `names` was meant by another name, or nothing."""

    def in_common(other: str) -> int:
        return len(os.path.commonprefix((name, other)))  # noqa: RUF071  # any text, not only paths

    likely = heapq.nlargest(_CANDIDATES, names, in_common)
    return did_you_mean([name], likely)[name]


def did_you_mean(names: Sequence[str], candidates: Sequence[str]) -> Mapping[str, str]:
    """Return for each absent name a hint in brackets, or nothing, from names not asked for."""
    found, how = _other_prefix(names, candidates)
    if len(found) > 1:
        hints = {
            name: f" (it is there as {other!r}, {how}: rename them with filter_func)"
            for name, other in found.items()
        }
    else:
        found = found or _close_ones(names, candidates)
        hints = {name: f" (did you mean {other!r}?)" for name, other in found.items()}
    return dict.fromkeys(names, "") | hints


def _other_prefix(names: Sequence[str], candidates: Sequence[str]) -> tuple[dict[str, str], str]:
    """Find most names with one prefix more, or less; return also which prefix, in words."""
    there = set(candidates)
    for (more, less), _ in Counter(_prefixes(names, candidates)).most_common(_PREFIXES):
        renamed = {name: more + name.removeprefix(less) for name in names if name.startswith(less)}
        found = {name: other for name, other in renamed.items() if other in there}
        if 2 * len(found) > len(names):
            return found, f"as others are with {more!r}" if more else f"as others without {less!r}"
    return {}, ""


def _prefixes(names: Sequence[str], candidates: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the prefix that a name lacks, and the prefix to leave out; whole parts of names."""
    for name in names[:_NAMES]:
        for other in candidates:
            if len(other) > len(name):
                if other.endswith(name) and other[-len(name) - 1] == ".":
                    yield other[: -len(name)], ""
            elif len(other) < len(name) and name.endswith(other) and name[-len(other) - 1] == ".":
                yield "", name[: -len(other)]


def _close_ones(names: Sequence[str], candidates: Sequence[str]) -> dict[str, str]:
    short = [name for name in candidates[:_CANDIDATES] if len(name) <= _LENGTH]
    asked = [name for name in names[:_NAMES] if len(name) <= _LENGTH]
    found = {name: difflib.get_close_matches(name, short, n=1) for name in asked}
    return {name: close[0] for name, close in found.items() if close}
