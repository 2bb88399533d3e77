"""Says which name was meant by another one, that is not there."""

from __future__ import annotations

import difflib
import heapq
import os
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


# Comparing took 40 µs a pair of common lengths, and grows with their product: where there is much
# to compare, no reader gets that far.
_NAMES, _CANDIDATES, _LENGTH = 5, 200, 200
_LOOKED_AT = 100_000
_PREFIXES = 3


def did_you_mean(
    names: Sequence[str], candidates: Sequence[str], *, rename: str = "filter_func"
) -> Mapping[str, str]:
    """Return for each absent name a hint in brackets, or nothing, from names not asked for.

    Of several names with one prefix more, or less, it says that `rename` renames them.
    """
    found, how = _other_prefix(names, candidates)
    if len(found) > 1:
        hints = {
            name: f" (it is there as {other!r}, {how}: rename them with {rename})"
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
    short = [name for name in candidates[:_LOOKED_AT] if len(name) <= _LENGTH]
    found = {}
    for name in names[:_NAMES]:
        if len(name) <= _LENGTH:
            likely = heapq.nlargest(_CANDIDATES, short, partial(_in_common, name))
            found[name] = difflib.get_close_matches(name, likely, n=1)
    return {name: close[0] for name, close in found.items() if close}


def _in_common(one: str, other: str) -> int:
    return len(os.path.commonprefix((one, other)))  # noqa: RUF071  # any text, not only paths
