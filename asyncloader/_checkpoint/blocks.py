"""Where the bytes of a shard's tensors stand.

Blocks are columns, with one entry a block. A checkpoint may have a million blocks, and to make a
Python object for each costs more than to read a small block.
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from asyncloader.errors import TruncatedShardError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from collections.abc import Set as AbstractSet

    from numpy.typing import NDArray

    from .dtypes import DType, TensorType
    from .problems import Problems


Entry = TypeVar("Entry")
Value = TypeVar("Value", bound="Hashable")


@dataclass(eq=False, repr=False)
class Columns(Mapping[str, Entry]):
    """Tensors by name, as columns. An entry is made when a caller asks for it.

    Attributes:
        order: `[n]`, the names, all different.
        types: The different dtypes and shapes.
        kinds: int64 `[n]`; which of `types` each tensor has.
    """

    order: Sequence[str]
    types: Sequence[TensorType] = ()
    kinds: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        self._numbers = {name: number for number, name in enumerate(self.order)}
        assert len(self.kinds) == len(self._numbers) == len(self.order)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)}>"

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __getitem__(self, name: str) -> Entry:
        return self.at(self._numbers[name])

    def keys(self) -> KeysView[str]:
        return self._numbers.keys()

    def at(self, number: int) -> Entry:
        """Return the entry at a place of the columns."""
        raise NotImplementedError

    def numbers(self, names: Iterable[str]) -> list[int]:
        """Return the place of each name in the columns, -1 for an unknown name."""
        return list(map(self._numbers.get, names, repeat(-1)))


def numbered(values: Iterable[Value]) -> tuple[list[Value], NDArray[np.int64]]:
    """Return the different values, and int64 `[n]`: which of them each value is."""
    different: dict[Value, int] = {}
    numbers = [different.setdefault(value, len(different)) for value in values]
    return list(different), np.array(numbers, np.int64)


@dataclass(frozen=True, slots=True)
class Block:
    """Where one tensor's bytes stand."""

    shard: str  # the file's name within the checkpoint
    key: str  # the block's name in the header
    dtype: DType
    shape: tuple[int, ...]
    offset: int  # the first byte, from the start of the file
    nbytes: int
    digests: tuple[str, ...] | None = None  # one for each chunk, if known: see `sidecar`

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def window(self, begin: int, end: int) -> Block | None:
        """Return the rows `[begin, end)`, or `None` if these are none."""
        if begin >= end:
            return None
        if (begin, end) == (0, self.rows):
            return self
        assert 0 <= begin < end <= self.rows
        row = self.nbytes // self.rows
        return replace(
            self,
            offset=self.offset + begin * row,
            nbytes=(end - begin) * row,
            shape=(end - begin, *self.shape[1:]),
            digests=None,  # they are of chunks of the whole block
        )


@dataclass(eq=False, repr=False, kw_only=True)
class Blocks(Columns[Block]):
    """The blocks of one shard, by key, in the order of its header.

    Attributes:
        shard: The file's name.
        offsets: int64 `[n]`; first byte, from the start of the file.
        nbytes: int64 `[n]`.
        digests: Of each block's chunks, by key, if they are known.
    """

    shard: str
    offsets: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    digests: Mapping[str, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        assert len(self.offsets) == len(self.nbytes) == len(self)

    def at(self, number: int) -> Block:
        key = self.order[number]
        dtype, shape = self.types[self.kinds[number]]
        digests = None if self.digests is None else self.digests.get(key)
        offset, nbytes = int(self.offsets[number]), int(self.nbytes[number])
        return Block(self.shard, key, dtype, shape, offset, nbytes, digests)

    def without(self, refused: AbstractSet[str]) -> Blocks:
        """Return all blocks but the refused keys."""
        kept = [number for number, key in enumerate(self) if key not in refused]
        return replace(
            self,
            order=[self.order[number] for number in kept],
            kinds=self.kinds[kept],
            offsets=self.offsets[kept],
            nbytes=self.nbytes[kept],
        )


_OF_TABLE = "/part_"  # in the keys of RecIS's tables


def lay_out(
    problems: Problems, blocks: Blocks, start: int, size: int, *, whole: bool
) -> tuple[Blocks, int]:
    """Check that blocks lie within the file, one right behind the other, empty ones too.

    Data begins at byte `start`, the file ends at byte `size`. `whole` says that these are all
    blocks of the shard, so that the bytes between them belong to no other.

    Return the blocks that lie within the file and overlap no other, and where the last one ends.
    """
    order = np.lexsort((blocks.nbytes, blocks.offsets))
    begins, ends = blocks.offsets[order], (blocks.offsets + blocks.nbytes)[order]
    full = ends > begins  # a block without bytes overlaps none
    if (begins[full][1:] < ends[full][:-1]).any() or (ends[full] > size).any():
        refused = _refused(problems, blocks, order[full], size)
        return lay_out(problems, blocks.without(refused), start, size, whole=False)
    before = np.concatenate(([start], ends[:-1]))
    gaps = np.flatnonzero(begins != before).tolist()
    if gaps and whole:  # another reader might find more in such a file
        block = blocks.at(order[gaps[0]])
        problem = (
            f"begins at byte {block.offset} of the file, but what is before it ends at "
            f"{before[gaps[0]]}: blocks stand back to back"
        )
        if _OF_TABLE in block.key:
            problem += "; a table of RecIS with two slots of one name can leave such a gap"
        problems.add(problem, block.shard, block.key)
    return blocks, int(ends[-1]) if len(ends) else start


def _refused(problems: Problems, blocks: Blocks, order: NDArray[np.int64], size: int) -> set[str]:
    """Find the blocks that overlap another, or end behind the file's `size` bytes.

    `order` has the numbers of the blocks that have bytes, int64 `[m]`, as they lie in the file.
    """
    last, refused = None, set[str]()
    for block in map(blocks.at, order.tolist()):
        end = block.offset + block.nbytes
        if last is not None and block.offset < last.offset + last.nbytes:
            problems.add(
                f"bytes [{block.offset}, {end}) overlap those of {last.key!r}, which end at "
                f"{last.offset + last.nbytes}",
                block.shard,
                block.key,
            )
        elif end > size:
            where = problems.location, block.shard, block.key
            problems.error(TruncatedShardError(*where, block.offset, end, size))
        else:
            last = block
            continue
        refused.add(block.key)
    assert refused, "the columns say that a block is wrong, and no block is"
    return refused
