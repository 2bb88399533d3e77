"""Guesses what a misspelt name was to be."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["did_you_mean"]

# Comparing takes some 10 µs a pair: where there are many, nobody reads that far.
_NAMES, _CANDIDATES = 20, 1000


def did_you_mean(names: Sequence[str], candidates: Sequence[str]) -> Mapping[str, str]:
    """Return for each name a hint in brackets, or nothing.

    Args:
        names: Asked for, but not there.
        candidates: There, but asked for by nobody.
    """
    hints = dict.fromkeys(names, "")
    for name in names[:_NAMES]:
        close = difflib.get_close_matches(name, candidates[:_CANDIDATES], n=1)
        if close:
            hints[name] = f" (did you mean {close[0]!r}?)"
    return hints
