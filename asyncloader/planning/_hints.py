"""Guesses what a misspelt name was to be."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["did_you_mean"]

# Comparing took 40 µs a pair of common lengths, and grows with their product: where there is much
# to compare, nobody reads that far.
_NAMES, _CANDIDATES, _LENGTH = 5, 200, 200


def did_you_mean(names: Sequence[str], candidates: Sequence[str]) -> Mapping[str, str]:
    """Return for each name a hint in brackets, or nothing.

    Args:
        names: Asked for, but not there.
        candidates: There, but asked for by nobody.
    """
    short = [name for name in candidates[:_CANDIDATES] if len(name) <= _LENGTH]
    hints = dict.fromkeys(names, "")
    for name in names[:_NAMES]:
        close = difflib.get_close_matches(name, short, n=1) if len(name) <= _LENGTH else []
        if close:
            hints[name] = f" (did you mean {close[0]!r}?)"
    return hints
