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
    """What a save did. `str` is one line; `rich.print` shows a table."""

    location: str
    save_id: str
    shard_index: int
    shard_num: int
    committed: bool
    """Whether the checkpoint is there: true on rank 0. The other ranks have written their parts."""

    bytes_written: int
    """Of shard files, by this rank."""

    seconds: float
    """Until all of it was on the disk; on rank 0 until the commit, the other ranks waited for."""

    shards: tuple[str, ...]
    """Files that this rank wrote."""

    tables: Mapping[str, int]
    """Rows that this rank wrote, by the table's or child's name on disk."""

    tensors: tuple[str, ...]
    """Dense tensors that this rank wrote."""

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
        grid.add_row("committed", "yes" if self.committed else "not yet: rank 0 does that")
        return grid
