"""Where the bytes of a shard's tensors stand.

As columns, one entry a block: a checkpoint may have a million of them, and a Python object each,
made and looked after, costs more than reading a small block does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from .dtypes import DType


BlockType = tuple["DType", tuple[int, ...]]
"""dtype and shape."""


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
    """Of each chunk of its bytes, where they are known: see `_sidecar`."""

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


class Blocks(Mapping[str, Block]):
    """The blocks of one shard, by key, in the order of its header.

    A `Block` is made when it is asked for.

    Args:
        shard: The file's name.
        keys: `[n]`, all different.
        types: The different dtypes and shapes that there are.
        kinds: int64 `[n]`; which of `types` each block has.
        offsets: int64 `[n]`; first byte, from the start of the file.
        nbytes: int64 `[n]`.
        digests: Of each block's chunks, by key, where they are known.
    """

    __slots__ = ("_digests", "_keys", "_numbers", "kinds", "nbytes", "offsets", "shard", "types")

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
        self.shard = shard
        self.types = types
        self.kinds = kinds
        self.offsets = offsets
        self.nbytes = nbytes
        self._keys = list(keys)
        self._numbers = {key: number for number, key in enumerate(self._keys)}
        self._digests = digests

    @classmethod
    def of(cls, shard: str, blocks: Iterable[Block]) -> Blocks:
        """Return blocks of one shard as columns."""
        known = list(blocks)
        types: dict[BlockType, int] = {}
        kinds = [types.setdefault((one.dtype, one.shape), len(types)) for one in known]
        digests = {one.key: one.digests for one in known if one.digests is not None}
        return cls(
            shard,
            [one.key for one in known],
            types=tuple(types),
            kinds=np.array(kinds, np.int64),
            offsets=np.array([one.offset for one in known], np.int64),
            nbytes=np.array([one.nbytes for one in known], np.int64),
            digests=digests or None,
        )

    def __repr__(self) -> str:
        return f"<Blocks {len(self)} of {self.shard!r}>"

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._numbers

    def __getitem__(self, key: str) -> Block:
        return self.at(self._numbers[key])

    def at(self, number: int) -> Block:
        """Return the block in that place of the columns."""
        key = self._keys[number]
        dtype, shape = self.types[self.kinds[number]]
        return Block(
            self.shard,
            key,
            dtype,
            shape,
            int(self.offsets[number]),
            int(self.nbytes[number]),
            None if self._digests is None else self._digests.get(key),
        )

    @property
    def digested(self) -> bool:
        """Whether there are digests."""
        return self._digests is not None

    def numbers(self, keys: Iterable[str]) -> list[int]:
        """Return where in the columns each key stands, -1 for those that are not there."""
        return list(map(self._numbers.get, keys, repeat(-1)))
