"""Which block a rank writes where: round robin over its shards, back to back within each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from asyncloader._checkpoint.archive_form import PickledTensor, archive_form
from asyncloader._checkpoint.format import (
    MAX_HEADER,
    MODEL,
    dense_key,
    describe_embedding,
    describe_slot,
    describe_tensor,
    render_header,
    shard_name,
    sparse_key,
)
from asyncloader._checkpoint.parts import ID

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._checkpoint.archive_form import ArchiveForm
    from asyncloader._checkpoint.dtypes import DType
    from asyncloader._checkpoint.slices import Slice


_EMBEDDING = "embedding"
_AT = "@"
# `sparse_adamw_tf_beta1`, say, or `sparse_row_wise_adagrad_TABLE_step`.
_SCALAR = re.compile(r"sparse_.+_(step|beta1|beta2)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteBlock:
    """A block that a `Saver` is about to write: a dense tensor, or this rank's part of a slot.

    `tensor_name()` and `slice_info()` are those of RecIS's `WriteBlock`.

    Attributes:
        name: The name of the tensor, or `table@slot`; the ids are the slot `id`.
        table: The table, or the child of a coalesced table; `None` for a dense tensor.
        slice: The ids that this part may hold; `None` for a dense tensor.
        dtype: The dtype of the elements.
        shape: The shape; that of a part begins with its number of rows.
        nbytes: Bytes of the elements.
    """

    name: str
    table: str | None
    slice: Slice | None
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int

    def tensor_name(self) -> str:
        """Return the name."""
        return self.name

    def slice_info(self) -> str:
        """Return the slice as in block names, `begin@end@size`; of a tensor an empty text."""
        return "" if self.slice is None else str(self.slice)

    @property
    def slot(self) -> str:
        """The slot; of a dense tensor an empty text."""
        return "" if self.table is None else self.name[len(self.table) + len(_AT) :]


class PlacedBlock(NamedTuple):
    """A block, and where its bytes go."""

    block: WriteBlock
    key: str
    offset: int  # from the start of the file
    gap: int = 0  # bytes before it, which hold its checksum


class ShardLayout(NamedTuple):
    """One shard file to write."""

    file: str
    head: bytes  # all that comes before the data
    blocks: tuple[PlacedBlock, ...]
    tied: tuple[PlacedBlock, ...] = ()  # further names of bytes that are written once
    archive: ArchiveForm | None = None  # of `model.pt`

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(placed.block.nbytes for placed in self.blocks)

    @property
    def size(self) -> int:
        """The length of the file in bytes."""
        return self.archive.size if self.archive else len(self.head) + self.nbytes

    @property
    def names(self) -> bytes:
        """What says which tensors these are; the sidecar has its digest."""
        return self.archive.pickled if self.archive else self.head

    def describe(self, placed: PlacedBlock) -> dict[str, object]:
        """Return the entry of a block in the description."""
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
    """Return the blocks that a `filter_func` chose, in the order in which they were offered."""
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


def belongs_to_model(block: WriteBlock) -> bool:
    """Tell the dense tensors that RecIS has in `model.pt` from the sparse optimizers' scalars."""
    return block.table is None and _SCALAR.fullmatch(block.name) is None


def lay_out(
    blocks: Sequence[WriteBlock], *, rank: int, ranks: int, writers: int, save: str = ""
) -> tuple[ShardLayout, ...]:
    """Deal blocks out to the shards of a rank, `writers` of them; leave out those that get none.

    `save` is a part of their names.

    Raises:
        ValueError: If two blocks would have the same key, a name cannot be written, or the header
            of a shard would be too long.
    """
    keys: dict[str, WriteBlock] = {}
    for block in blocks:
        key = _key(block, rank, ranks)
        if (other := keys.setdefault(key, block)) is not block:
            raise ValueError(
                f"{other.name!r} and {block.name!r} would both stand under the key {key!r}; "
                "rename one of them"
            )
    items = list(keys.items())
    return tuple(
        lay_out_shard(shard_name(rank * writers + number, ranks * writers, save), dict(share))
        for number in range(writers)
        if (share := items[number::writers])
    )


def lay_out_shard(
    file: str, blocks: Mapping[str, WriteBlock], metadata: Mapping[str, str] | None = None
) -> ShardLayout:
    """Lay blocks, by key, back to back; raise `ValueError` if the header would be too long."""
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
    placed = (PlacedBlock(block, key, len(head) + entries[key][2]) for key, block in blocks.items())
    return ShardLayout(file, head, tuple(placed))


def lay_out_model(
    blocks: Sequence[WriteBlock], tied: Mapping[WriteBlock, WriteBlock]
) -> tuple[ShardLayout, ...]:
    """Lay dense tensors out as `model.pt`; `tied` says which of them share whose bytes.

    Without tensors there is no such file: a model may consist of tables.
    """
    if not blocks:
        return ()
    written = [block for block in blocks if block not in tied]
    numbers = {block: number for number, block in enumerate(written)}
    form = archive_form(
        [
            PickledTensor(block.name, block.dtype, block.shape, numbers[tied.get(block, block)])
            for block in blocks
        ],
        [block.nbytes for block in written],
    )
    placed = [
        PlacedBlock(block, block.name, begin, begin - header)
        for block, (header, begin) in zip(written, form.offsets, strict=True)
    ]
    others = (PlacedBlock(a, a.name, placed[numbers[b]].offset) for a, b in tied.items())
    return (ShardLayout(MODEL, form.head, tuple(placed), tuple(others), form),)


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
