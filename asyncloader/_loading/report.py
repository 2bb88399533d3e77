"""What a load did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncloader._display import AsDict, listed, size_text
from asyncloader._table.protocol import UpdateCounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import RenderableType

    from asyncloader._planning.origins import Origin
    from asyncloader._planning.targets import Cast
    from asyncloader._threads.lag import LoopLag

    from .load import Load
    from .session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport(AsDict):
    """What a load did. `str` is one line; `rich.print` shows a table.

    Attributes:
        location: The checkpoint.
        bytes_read: From storage; without headers, index, and bytes that were only compared.
        bytes_wanted: The bytes that were asked for; gaps that were read along with them do not
            count.
        bytes_verified: The bytes among `bytes_wanted` that were compared with digests, and found to
            be the same: 0 if there are none, or with `verify="off"`.
        reads: How many reads there were.
        seconds: How long the load took.
        tables: What was done to each table, by its name.
        tensors: By name: `loaded`, `copied` (by way of staging memory), `shared with …` (tied: its
            memory was filled under that name), `missing`, or `not asked for` (left out by
            `filter_func`).
        filled: How many of them are `loaded` or `copied`.
        missing: Asked for, not in the checkpoint: `tensor`, `table`, or `table@slot`. Destinations
            keep what they held.
        unexpected: In the checkpoint, and not asked for.
        warnings: What is odd about the checkpoint but did no harm.
        casts: What was converted to another dtype on its way; see `Loader`'s `cast`.
        retries: How often something was read again that the storage had failed at. More than a few
            are a disk or a network to look after.
        requests: To an object store, those for names, headers and lists included; 0 of a disk.
        bytes_cached: That came from `cache_dir`, names and headers included.
        lag: How late the event loop was, and what the load did about it; `None` unless it was asked
            to see to that (`max_loop_lag`, `pressure`).
        sources: Of a bank: which entry each name of the model came from, and under which name.
        extra: Of a bank: the plain values that came with it, such as `global_step`.
        in_place: The tables whose rows showed as they came, as RecIS's own tables do.
    """

    location: str
    bytes_read: int
    bytes_wanted: int
    bytes_verified: int
    reads: int
    seconds: float
    tables: Mapping[str, UpdateCounts]
    tensors: Mapping[str, str]
    filled: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    warnings: tuple[str, ...]
    casts: tuple[Cast, ...] = ()
    retries: int = 0
    requests: int = 0
    bytes_cached: int = 0
    lag: LoopLag | None = None
    sources: Mapping[str, Origin] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    in_place: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = sum(table.rows for table in self.tables.values())
        parts = [
            (
                f"{self.location}: {size_text(self.bytes_read)} in {self.seconds:.2f} s "
                f"({self.gigabytes_per_second:.2f} GB/s)"
            ),
            f"{self.filled} tensor{'s' * (self.filled != 1)}",
            f"{rows:,} rows of {len(self.tables)} table{'s' * (len(self.tables) != 1)}",
        ]
        if self.bytes_verified:
            parts.append(self.verified)
        if self.bytes_cached:
            parts.append(f"{size_text(self.bytes_cached)} from the cache")
        for count, what in (
            (len(self.missing), "missing"),
            (len(self.unexpected), "unexpected"),
            (len(self.casts), "cast"),
            (self.retries, "retried"),
        ):
            if count:
                parts.append(f"{count} {what}")
        if self.lag is not None:
            parts.append(str(self.lag))
        return ", ".join(parts)

    @property
    def verified(self) -> str:
        """How much of it was verified, in words."""
        if not self.bytes_verified:
            return "not verified"
        if self.bytes_verified == self.bytes_wanted:
            return "all verified"
        part = f"{size_text(self.bytes_verified)} of {size_text(self.bytes_wanted)}"
        return f"{part} verified"

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes read, in 10⁹ a second."""
        return self.bytes_read / max(self.seconds, 1e-9) / 1e9

    def __rich__(self) -> RenderableType:
        from rich.console import Group  # noqa: PLC0415  # only a report that is shown pays for it
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        head = Table.grid(padding=(0, 2))
        head.add_column(style="dim")
        head.add_row("checkpoint", Text(self.location))
        for path, count in Counter(origin.path for origin in self.sources.values()).items():
            head.add_row("", Text(f"{count:,} names from {path}"))
        surplus = self.bytes_read - self.bytes_wanted
        also = f", {size_text(surplus)} of it only to join reads" if surplus else ""
        head.add_row("read", f"{size_text(self.bytes_read)} in {self.reads:,} reads{also}")
        head.add_row("digests", self.verified)
        rate = f"{self.gigabytes_per_second:.2f} GB/s"
        head.add_row("time", f"{self.seconds:.3f} s, [bold]{rate}[/]")
        if self.requests:
            cached = f", {size_text(self.bytes_cached)} from the cache" if self.bytes_cached else ""
            head.add_row("store", f"{self.requests:,} requests{cached}")
        if self.retries:
            times = "once" if self.retries == 1 else f"{self.retries:,} times"
            head.add_row("storage", Text(f"failed and was tried again {times}", style="yellow"))
        if self.lag is not None:
            head.add_row("event loop", str(self.lag))
        if self.in_place:
            head.add_row("in place", Text(listed(self.in_place)))
        tally = Counter(
            "shared" if how.startswith("shared") else how for how in self.tensors.values()
        )
        if tally:
            counts = ", ".join(f"{count:,} {what}" for what, count in tally.items())
            head.add_row("tensors", counts)
        notes = [
            Text(f"{title}: {listed(names)}", style="yellow")
            for title, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("warning", self.warnings),
                ("cast", tuple(map(str, self.casts))),
            )
            if names
        ]
        if notes:
            notes.insert(0, Text())
        return Group(head, *(["", self._rich_tables()] if self.tables else []), *notes)

    def _rich_tables(self) -> RenderableType:
        from rich import box  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        several = len(self.tables) > 1
        rows = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, show_footer=several)
        rows.add_column("table", footer=f"{len(self.tables)} tables")
        fields = []
        for name in UpdateCounts.__slots__:
            total = sum(getattr(table, name) for table in self.tables.values())
            odd = name in {"duplicates", "dropped"}
            if total or name in {"rows", "new"}:  # the others are news only if there are any
                style = "yellow" if odd else None
                rows.add_column(name, footer=f"{total:,}", justify="right", style=style)
                fields.append(name)
        for title, table in sorted(self.tables.items()):
            rows.add_row(Text(title), *(f"{getattr(table, name):,}" for name in fields))
        return rows


def report_of(load: Load, *, tensors: Iterable[str], session: Session) -> LoadReport:
    """Report a load that is not committed yet, so without tables; belongs on a thread.

    `tensors` are all names that were asked for.
    """
    plan, meter, traffic = load.plan, load.meter, session.traffic()
    done = dict.fromkeys(plan.tensors.names, "loaded")
    done |= {name: f"shared with {other!r}" for name, other in plan.shared.items()}
    done |= {name: "copied" for name, staged in load.touched.items() if staged}
    done |= dict.fromkeys(plan.skipped, "not asked for")
    outcomes = {name: done.get(name, "missing") for name in tensors}
    return LoadReport(
        location=plan.location,
        bytes_read=meter.read,
        bytes_wanted=meter.wanted,
        bytes_verified=meter.verified,
        reads=meter.reads,
        seconds=meter.seconds,
        tables={},
        tensors=outcomes,
        filled=sum(outcome in {"loaded", "copied"} for outcome in outcomes.values()),
        missing=plan.missing,
        unexpected=plan.unexpected,
        warnings=(*plan.warnings, *load.warnings),
        casts=plan.casts,
        in_place=load.in_place,
        retries=session.retries,
        requests=traffic.requests,
        bytes_cached=traffic.cached,
        sources={} if plan.bank is None else plan.bank.origins,
        extra=plan.extra,
    )
