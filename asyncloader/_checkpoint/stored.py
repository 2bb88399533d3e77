"""The tensors of a checkpoint by name, also where several ranks wrote one of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .parts import row_problems
from .problems import Problems

if TYPE_CHECKING:
    from .blocks import Block
    from .dtypes import DType
    from .index import Catalog, Place
    from .manifest import Manifest


_AT = "@"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor on disk, in one or more blocks whose rows follow each other."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def rows(self) -> int:
        """Length of the first dimension.

        Raises:
            ValueError: If it has none.
        """
        if not self.shape:
            raise ValueError(f"{self.name!r} is a scalar, it has no rows")
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that all blocks take on disk."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def memory(self) -> int:
        """Bytes that it takes in memory; the bytes on disk if torch lacks its dtype."""
        itemsize = self.dtype.itemsize
        return self.nbytes if itemsize is None else math.prod(self.shape) * itemsize

    def window(self, begin: int, end: int) -> Stored:
        """Return the rows `[begin, end)`.

        Raises:
            ValueError: If not all of them are there.
        """
        if not 0 <= begin <= end <= self.rows:
            raise ValueError(f"{self.name!r} has {self.rows} rows, not [{begin}, {end})")
        ends = itertools.accumulate(block.rows for block in self.blocks)
        cuts = (
            cut_rows(block, max(begin - (last - block.rows), 0), min(end - last, 0) + block.rows)
            for block, last in zip(self.blocks, ends, strict=True)
        )
        return replace(
            self,
            shape=(end - begin, *self.shape[1:]),
            blocks=tuple(block for block in cuts if block is not None),
        )


def cut_rows(block: Block, begin: int, end: int) -> Block | None:
    """Return the rows `[begin, end)` of a block, or `None` if that is nothing."""
    if begin >= end:
        return None
    if (begin, end) == (0, block.rows):
        return block
    assert 0 <= begin < end <= block.rows
    row = block.nbytes // block.rows
    return replace(
        block,
        offset=block.offset + begin * row,
        nbytes=(end - begin) * row,
        shape=(end - begin, *block.shape[1:]),
        digests=None,  # they are of chunks of the whole block
    )


def stored_names(catalog: Catalog) -> tuple[str, ...]:
    """Return all names: of dense tensors, and `table@slot` of tables; the ids are `table@id`."""
    slots = (f"{table}{_AT}{slot}" for table, held in catalog.tables.items() for slot in held)
    return tuple(dict.fromkeys((*catalog.tensors, *slots)))


def places_of(catalog: Catalog, name: str) -> tuple[Place, ...]:
    """Return where a name's blocks stand, in the order of their slices; nothing if nowhere.

    A name is matched exactly. If a dense tensor is called like a table's slot, it is the tensor's.
    """
    if (place := catalog.tensors.get(name)) is not None:
        return (place,)
    table, _, slot = name.rpartition(_AT)
    return tuple(part.place for part in catalog.tables.get(table, {}).get(slot, ()))


def stored_tensor(manifest: Manifest, name: str) -> Stored:
    """Return the tensor of a name whose headers were read.

    Raises:
        CheckpointError: If its blocks do not fit together, or a shard lacks one.
    """
    blocks = tuple(manifest.block(place) for place in places_of(manifest.catalog, name))
    first, shape = blocks[0], blocks[0].shape
    if len(blocks) > 1:
        Problems(manifest.location).take(row_problems(name, blocks))
        shape = (sum(block.rows for block in blocks), *shape[1:])
    return Stored(name=name, dtype=first.dtype, shape=shape, blocks=blocks)
