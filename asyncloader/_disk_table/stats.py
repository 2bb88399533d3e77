"""What the lookups of a table came to."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncloader._display import AsDict

from .forked import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Mapping

BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
"""Seconds: the upper bounds of the buckets of `latency`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStats(AsDict):
    """What the lookups of a `DiskTable` came to, since it was made.

    Attributes:
        lookups: Lookups that ended well.
        failures: Lookups that raised an error.
        ids: Ids that were asked for.
        hits: Of those, how many the cache of hot rows had.
        absent: Of those, how many have no row.
        rows_read: Rows that were read from files; an id that is twice in a lookup counts once.
        bytes_read: Bytes of those rows.
        waits: Of the rows read, how many were not in the page cache.
        retries: Reads that were tried again after an error.
        seconds: All lookups together took so long.
        latency: Lookups by how long they took: `{upper bound in seconds: lookups}`, the bounds as
            text; each counts once, `+Inf` has the longest.
        nbytes: Memory for ids, in bytes.
        cache_bytes: Memory for hot rows, in bytes; 0 if there is no cache.
    """

    lookups: int = 0
    failures: int = 0
    ids: int = 0
    hits: int = 0
    absent: int = 0
    rows_read: int = 0
    bytes_read: int = 0
    waits: int = 0
    retries: int = 0
    seconds: float = 0.0
    latency: Mapping[str, int] = field(default_factory=dict)
    nbytes: int = 0
    cache_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of ids that the cache had, 0 to 1."""
        return self.hits / self.ids if self.ids else 0.0


class Tally:
    """Counts lookups, on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for a microsecond
        self._counts = dict.fromkeys(
            ("lookups", "failures", "ids", "hits", "absent", "rows_read", "bytes_read", "waits",
             "retries"), 0,
        )  # fmt: skip
        self._seconds = 0.0
        self._latency = [0] * (len(BOUNDS) + 1)
        renew_after_fork(self)

    def renew(self) -> None:
        """Forget who held the lock."""
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def ended(self, seconds: float) -> None:
        """Count a lookup that went well."""
        bucket = bisect_left(BOUNDS, seconds)
        with self._lock:
            self._counts["lookups"] += 1
            self._seconds += seconds
            self._latency[bucket] += 1

    def stats(self, *, nbytes: int, cache_bytes: int) -> TableStats:
        with self._lock:
            return TableStats(
                **self._counts,
                seconds=self._seconds,
                latency=dict(zip((*map(str, BOUNDS), "+Inf"), self._latency, strict=True)),
                nbytes=nbytes,
                cache_bytes=cache_bytes,
            )
