"""Where the bytes of a shard's tensors stand.

Blocks are columns, with one entry a block. A checkpoint may have a million blocks, and to make a
Python object for each costs more than to read a small block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from asyncloader.errors import TruncatedShardError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from numpy.typing import NDArray

    from .dtypes import DType
    from .problems import Problems


Entry = TypeVar("Entry")
Value = TypeVar("Value", bound="Hashable")

BlockType = tuple["DType", tuple[int, ...]]
"""dtype and shape."""


class Columns(Mapping[str, Entry]):
    """Entries by name, as columns. An entry is made when it is asked for.

    Args:
        names: `[n]`, all different.
    """

    __slots__ = ("_names", "_numbers")

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._numbers = {name: number for number, name in enumerate(self._names)}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)}>"

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __getitem__(self, name: str) -> Entry:
        return self.at(self._numbers[name])

    def at(self, number: int) -> Entry:
        """Return the entry in that place of the columns."""
        raise NotImplementedError

    def names(self) -> AbstractSet[str]:
        """Return all names, as a set."""
        return self._numbers.keys()

    def numbers(self, names: Iterable[str]) -> list[int]:
        """Return where in the columns each name stands, -1 for names that are not there."""
        return list(map(self._numbers.get, names, repeat(-1)))


def numbered(values: Iterable[Value]) -> tuple[list[Value], NDArray[np.int64]]:
    """Return the different values that there are, and int64 `[n]`, which of them each is."""
    different: dict[Value, int] = {}
    numbers = [different.setdefault(value, len(different)) for value in values]
    return list(different), np.array(numbers, np.int64)


@dataclass(frozen=True, slots=True)
class Block:
    """Where one tensor's bytes stand."""

    shard: str
    """File name within the checkpoint."""

    key: str
    """Its name in the header."""

    dtype: DType
    shape: tuple[int, ...]

    offset: int
    """First byte, from the start of the file."""

    nbytes: int

    digests: tuple[str, ...] | None = None
    """Of each chunk of its bytes, if they are known: see `sidecar`."""

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


class Blocks(Columns[Block]):
    """The blocks of one shard, by key, in the order of its header.

    Args:
        shard: The file's name.
        keys: `[n]`, all different.
        types: The different dtypes and shapes that there are.
        kinds: int64 `[n]`; which of `types` each block has.
        offsets: int64 `[n]`; first byte, from the start of the file.
        nbytes: int64 `[n]`.
        digests: Of each block's chunks, by key, if they are known.
    """

    __slots__ = ("digests", "kinds", "nbytes", "offsets", "shard", "types")

    def __init__(
        self,
        shard: str,
        keys: Iterable[str],
        *,
        types: Sequence[BlockType],
        kinds: NDArray[np.int64],
        offsets: NDArray[np.int64],
        nbytes: NDArray[np.int64],
        digests: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__(keys)
        self.shard = shard
        self.types = types
        self.kinds = kinds
        self.offsets = offsets
        self.nbytes = nbytes
        self.digests = digests
        assert len(kinds) == len(offsets) == len(nbytes) == len(self)

    def without(self, refused: AbstractSet[str]) -> Blocks:
        """Return all blocks but those of some keys."""
        kept = [number for number, key in enumerate(self._names) if key not in refused]
        return Blocks(
            self.shard,
            [self._names[number] for number in kept],
            types=self.types,
            kinds=self.kinds[kept],
            offsets=self.offsets[kept],
            nbytes=self.nbytes[kept],
            digests=self.digests,
        )

    def at(self, number: int) -> Block:
        """Return the block in that place of the columns."""
        key = self._names[number]
        dtype, shape = self.types[self.kinds[number]]
        return Block(
            self.shard,
            key,
            dtype,
            shape,
            int(self.offsets[number]),
            int(self.nbytes[number]),
            None if self.digests is None else self.digests.get(key),
        )

    @property
    def digested(self) -> bool:
        """Whether there are digests."""
        return self.digests is not None


def lay_out(
    problems: Problems, blocks: Blocks, start: int, size: int, *, whole: bool
) -> tuple[Blocks, int]:
    """Check that blocks lie within the file, one right behind the other.

    Args:
        problems: Receives the blocks that lie elsewhere.
        blocks: Of one shard. A block without bytes has to stand between others, too.
        start: Where its data begins.
        size: The file's length in bytes.
        whole: Whether these are all blocks, so that no bytes between them belong to another.

    Returns:
        The blocks that lie within the file and overlap no other, and where the last of them ends.
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
        problems.add(problem, block.shard, block.key)
    return blocks, int(ends[-1]) if len(ends) else start


def _refused(problems: Problems, blocks: Blocks, order: NDArray[np.int64], size: int) -> set[str]:
    """Find the blocks that overlap another, or end behind the file.

    Args:
        problems: Receives them.
        blocks: All blocks.
        order: int64 `[m]`; the blocks that have bytes, as they lie in the file.
        size: The file's length in bytes.
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
