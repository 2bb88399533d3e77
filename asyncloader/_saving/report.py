"""What a save did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._display import AsDict, listed, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport(AsDict):
    """What a save did. `str` is one line; `rich.print` shows a table.

    Attributes:
        location: The folder.
        save_id: Told this save from every other one into the folder.
        shard_index: This rank.
        shard_num: How many ranks saved.
        committed: Whether the checkpoint is there: true on rank 0. The other ranks have written
            their parts.
        bytes_written: Bytes of the shard files that this rank wrote.
        seconds: Until all of it was on the disk; on rank 0 until the commit, the other ranks waited
            for.
        shards: Names of the shard files that this rank wrote.
        tables: Rows that this rank wrote, by the table's or child's name on disk.
        tensors: Names of the dense tensors that this rank wrote.
        recis_problems: What of it RecIS 1.0.0 could not read, or would read wrongly; a sentence
            each.
        evicted: Older checkpoints of the run that were removed (`max_keep`).
    """

    location: str
    save_id: str
    shard_index: int
    shard_num: int
    committed: bool
    bytes_written: int
    seconds: float
    shards: tuple[str, ...]
    tables: Mapping[str, int]
    tensors: tuple[str, ...]
    recis_problems: tuple[str, ...] = ()
    evicted: tuple[str, ...] = ()

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes written, in 10⁹ a second."""
        return self.bytes_written / max(self.seconds, 1e-9) / 1e9

    def __str__(self) -> str:
        rows = sum(self.tables.values())
        rank = f" rank {self.shard_index} of {self.shard_num}:" if self.shard_num > 1 else ""
        state = "" if self.committed else "; rank 0 commits"
        return (
            f"{self.location}:{rank} {size_text(self.bytes_written)} in {self.seconds:.2f} s "
            f"({self.gigabytes_per_second:.2f} GB/s) to {len(self.shards)} "
            f"shard{'s' * (len(self.shards) != 1)}, {len(self.tensors)} "
            f"tensor{'s' * (len(self.tensors) != 1)}, {rows:,} rows of {len(self.tables)} "
            f"table{'s' * (len(self.tables) != 1)}{state}"
        )

    def __rich__(self) -> RenderableType:
        from rich.table import Table  # noqa: PLC0415  # needed where the report is shown
        from rich.text import Text  # noqa: PLC0415

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_row("checkpoint", Text(self.location))
        if self.shard_num > 1:
            grid.add_row("rank", f"{self.shard_index} of {self.shard_num}")
        grid.add_row("written", f"{size_text(self.bytes_written)} to {len(self.shards)} shards")
        rate = f"{self.gigabytes_per_second:.2f} GB/s"
        grid.add_row("time", f"{self.seconds:.3f} s, [bold]{rate}[/]")
        if self.tables:
            rows = tuple(f"{name} ({count:,} rows)" for name, count in self.tables.items())
            grid.add_row("tables", Text(listed(rows)))
        if self.tensors:
            grid.add_row("tensors", f"{len(self.tensors):,}")
        if self.evicted:
            grid.add_row("removed", Text(listed(self.evicted)))
        for problem in self.recis_problems:
            grid.add_row("RecIS", Text(problem, style="yellow"))
        grid.add_row("committed", "yes" if self.committed else "not yet: rank 0 does that")
        return grid
