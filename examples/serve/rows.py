"""What lookups of tables on the disk have come to since somebody looked last."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncloader import TableStats

__all__ = ["Rows"]

_OVER = 2.0
"""Seconds that rates are for, about."""


class Rows:
    """Turns counts, which only grow, into rates."""

    def __init__(self) -> None:
        self._past: list[tuple[float, Counter[str]]] = []

    def seen(self, tables: Iterable[TableStats]) -> dict[str, Any] | None:
        """Return hits, rates and latency of late; `None` if no rows stay on the disk."""
        now, total, cache_bytes = time.monotonic(), Counter[str](), 0
        for stats in tables:
            cache_bytes = max(cache_bytes, stats.cache_bytes)  # which they share
            total += Counter(ids=stats.ids, hits=stats.hits, rows=stats.rows_read)
            total += Counter(stats.latency)
        if not total:
            self._past = []
            return None
        if self._past and self._past[-1][1]["ids"] > total["ids"]:
            self._past = []  # another version, which counts anew
        self._past = [*(one for one in self._past if one[0] > now - _OVER), (now, total)]
        began, before = self._past[0]
        late = total - before
        lookups = {bound: late[bound] for bound in stats.latency}
        return {
            "hit_rate": late["hits"] / late["ids"] if late["ids"] else None,
            "rows_per_second": late["rows"] / max(now - began, 0.001),
            "p99": _percentile(lookups, 0.99),
            "cache_bytes": cache_bytes,
        }


def _percentile(lookups: dict[str, int], share: float) -> float | None:
    """Return the bound, in seconds, that this share of lookups kept to; `None` without any."""
    total, sum_ = sum(lookups.values()), 0
    for bound, count in lookups.items():
        sum_ += count
        if total and sum_ >= share * total:
            return float(bound) if bound != "+Inf" else None
    return None
