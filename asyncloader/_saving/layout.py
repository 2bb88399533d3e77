"""Which block a rank writes where: round robin over its shards, back to back within each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import (
    MAX_HEADER,
    dense_key,
    describe_embedding,
    describe_slot,
    describe_tensor,
    render_header,
    shard_name,
    sparse_key,
    sparse_name,
)
from asyncloader._checkpoint.parts import ID

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._checkpoint.dtypes import DType
    from asyncloader._checkpoint.slices import Slice


_EMBEDDING = "embedding"
_AT = "@"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteBlock:
    """A block that a `Saver` is about to write: a dense tensor, or this rank's part of a slot.

    `tensor_name()` and `slice_info()` are those of RecIS's `WriteBlock`.
    """

    name: str
    """A tensor's own, or `table@slot`; the ids are the slot `id`."""

    table: str | None
    """The table, or the child of a coalesced one; `None` for a dense tensor."""

    slice: Slice | None
    """The ids that this part may hold; `None` for a dense tensor."""

    dtype: DType
    shape: tuple[int, ...]

    nbytes: int
    """Bytes of its elements."""

    def tensor_name(self) -> str:
        """Return the name."""
        return self.name

    def slice_info(self) -> str:
        """Return the slice as block names have it, `begin@end@size`; of a tensor nothing."""
        return "" if self.slice is None else str(self.slice)

    @property
    def slot(self) -> str:
        """The slot; of a dense tensor nothing."""
        return "" if self.table is None else self.name[len(self.table) + len(_AT) :]


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block, and where its bytes go."""

    block: WriteBlock
    key: str
    offset: int
    """First byte, from the start of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """One shard file to write."""

    file: str
    number: int
    """In `index`."""

    head: bytes
    """All that comes before the data."""

    blocks: tuple[PlacedBlock, ...]

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return len(self.head) + sum(placed.block.nbytes for placed in self.blocks)

    def names(self) -> dict[str, str]:
        """Return what `tensorkey.json` says of its blocks."""
        return {
            placed.key: sparse_name(placed.block.table, placed.block.slot, placed.block.slice)
            for placed in self.blocks
            if placed.block.table is not None and placed.block.slice is not None
        }

    def description(self) -> dict[str, dict[str, object]]:
        """Return what the description says of its blocks, by key."""
        return {placed.key: self._describe(placed) for placed in self.blocks}

    def _describe(self, placed: PlacedBlock) -> dict[str, object]:
        block, key = placed.block, placed.key
        if block.table is None:
            return describe_tensor(key, block.dtype, block.shape)
        if block.slot == _EMBEDDING:
            part = key[key.rindex("/part_") :]
            ids = f"{block.table}{_AT}{ID}".replace(_AT, ".", 1) + part
            return describe_embedding(key, block.dtype, block.shape, ids=ids)
        begin = placed.offset - len(self.head)
        return describe_slot(block.dtype, block.shape, begin=begin, end=begin + block.nbytes)


def checked_blocks(offered: Sequence[WriteBlock], chosen: object) -> list[WriteBlock]:
    """Return what a `filter_func` chose of the blocks that it was offered.

    Raises:
        TypeError: If it returned something else than a list of such blocks.
        ValueError: If it kept slots of a table without the table's ids.
    """
    known = set(offered)
    if not isinstance(chosen, list | tuple) or not all(
        isinstance(block, WriteBlock) and block in known for block in chosen
    ):
        raise TypeError(
            "filter_func must return a list of blocks out of those that it was given, "
            f"got {type(chosen).__name__}"
        )
    with_ids = {block.table for block in chosen if block.slot == ID}
    for block in chosen:
        if block.table is not None and block.table not in with_ids:
            raise ValueError(
                f"filter_func kept {block.name!r} but not {block.table + _AT + ID!r}: "
                "a reader could not say which rows are whose"
            )
    kept = set(chosen)
    return [block for block in offered if block in kept]


def lay_out(
    blocks: Sequence[WriteBlock], *, rank: int, ranks: int, writers: int
) -> tuple[ShardLayout, ...]:
    """Decide which shard gets which block. A shard that would get none is not written.

    Args:
        blocks: In the order in which they are dealt out.
        rank: The rank that writes.
        ranks: How many there are.
        writers: Shards of each rank.

    Raises:
        ValueError: If two blocks would have the same key, a name cannot be written, or they are too
            many for so few shards.
    """
    keys: dict[str, WriteBlock] = {}
    for block in blocks:
        key = _key(block, rank, ranks)
        if (other := keys.setdefault(key, block)) is not block:
            raise ValueError(
                f"{other.name!r} and {block.name!r} would both stand under the key {key!r}; "
                "rename one of them"
            )
    placed = list(keys.items())
    return tuple(
        lay_out_shard(
            shard_name(number, ranks * writers), number, dict(placed[number % writers :: writers])
        )
        for number in range(rank * writers, (rank + 1) * writers)
        if placed[number % writers :: writers]
    )


def lay_out_shard(
    file: str,
    number: int,
    blocks: Mapping[str, WriteBlock],
    metadata: Mapping[str, str] | None = None,
) -> ShardLayout:
    """Lay blocks back to back, by key.

    Raises:
        ValueError: If they are too many for one shard.
    """
    entries, end = {}, 0
    for key, block in blocks.items():
        entries[key] = (block.dtype, block.shape, end, end + block.nbytes)
        end += block.nbytes
    head = render_header(entries, metadata)
    if len(head) > MAX_HEADER:
        raise ValueError(
            f"the header of {file} would take {len(head)} bytes, more than the {MAX_HEADER} that "
            "safetensors allows: save to more shards (parallel)"
        )
    return ShardLayout(
        file=file,
        number=number,
        head=head,
        blocks=tuple(
            PlacedBlock(block, key, len(head) + entries[key][2]) for key, block in blocks.items()
        ),
    )


def _key(block: WriteBlock, rank: int, ranks: int) -> str:
    try:
        block.name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{block.name!r} cannot be written: {error}") from error
    if block.table is None:
        return dense_key(block.name)
    if _AT in block.slot:
        raise ValueError(
            f"slot {block.slot!r} of table {block.table!r}: a name that holds '@' could not be "
            "told from the table's"
        )
    return sparse_key(block.table, block.slot, rank, ranks)
