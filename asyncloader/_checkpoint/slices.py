"""Which ids a rank owns.

Id `x` belongs to a slice `[begin, end)` of `size` when `uint64(x) % size` lies in it. The rule, the
default size and the way of splitting are RecIS's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


DEFAULT_SLICE_SIZE = 65536
# Positions are computed as unsigned 64-bit numbers by the kernels; RecIS keeps them in 32 bits.
_MAX_SIZE = 2**62
_PATTERN = re.compile(r"([0-9]{1,19})@([0-9]{1,19})@([0-9]{1,19})")
_UINT64 = 2**64 - 1


@dataclass(frozen=True, slots=True, order=True)
class Slice:
    """The positions `[begin, end)` out of `size`."""

    begin: int
    end: int
    size: int

    def __post_init__(self) -> None:
        for value in (self.begin, self.end, self.size):
            if type(value) is not int:
                raise TypeError(f"slice bounds must be int, got {value!r}")
        if not 0 <= self.begin <= self.end <= self.size or not 0 < self.size <= _MAX_SIZE:
            raise ValueError(
                f"a slice needs 0 <= begin <= end <= size and size > 0, "
                f"got begin={self.begin}, end={self.end}, size={self.size}"
            )

    def __hash__(self) -> int:
        # The hash of text is another one in each process. That of numbers is not: a checkpoint
        # could name a million slices of one hash, for which a dict would take hours.
        return hash(str(self))

    def __str__(self) -> str:
        width = len(str(self.size))
        return f"{self.begin:0{width}}@{self.end:0{width}}@{self.size}"

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Read `begin@end@size` as it stands in block names; raise `ValueError` otherwise."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a slice; expected begin@end@size")
        begin, end, size = (int(group) for group in match.groups())
        return cls(begin, end, size)

    @property
    def is_whole(self) -> bool:
        """Whether every id belongs to it."""
        return self.begin == 0 and self.end == self.size

    def accepts(self, id_: int) -> bool:
        """Whether the id, as it stands on disk, belongs to this slice."""
        return self.begin <= (id_ & _UINT64) % self.size < self.end

    def strays(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which ids do not belong to this slice."""
        unsigned = ids.view(np.uint64)
        # A division costs ten times as much as a mask.
        is_power = self.size & (self.size - 1) == 0
        size = np.uint64(self.size)
        position = unsigned & (size - np.uint64(1)) if is_power else unsigned % size
        # Below `begin` it wraps around, to more than any slice is long.
        position -= np.uint64(self.begin)
        outside: NDArray[np.bool_] = position >= np.uint64(self.end - self.begin)
        return outside

    def covers(self, other: Slice) -> bool:
        """Whether every id of `other` is certain to be one of ours."""
        if self.is_whole:
            return True
        return self.size == other.size and self.begin <= other.begin and other.end <= self.end

    def disjoint(self, other: Slice) -> bool:
        """Whether no id can belong to both."""
        if self.begin == self.end or other.begin == other.end:
            return True
        same = self.size == other.size
        return same and (self.end <= other.begin or other.end <= self.begin)

    def share_of(self, other: Slice) -> float:
        """Return the expected part of `other`'s ids that are ours, from 0.0 to 1.0."""
        if self.covers(other):
            return 1.0
        if self.size != other.size:  # positions modulo different sizes: as good as independent
            return (self.end - self.begin) / self.size
        common = min(self.end, other.end) - max(self.begin, other.begin)
        return max(common, 0) / max(other.end - other.begin, 1)


def gen_slice(
    shard_index: int = 0, shard_num: int = 1, slice_size: int = DEFAULT_SLICE_SIZE
) -> Slice:
    """Return the slice of rank `shard_index` out of `shard_num`.

    The first `slice_size % shard_num` ranks own one position more than the others.

    Raises:
        ValueError: If the numbers make no sense.
    """
    if not 0 <= shard_index < shard_num <= slice_size:
        raise ValueError(
            f"gen_slice needs 0 <= shard_index < shard_num <= slice_size, "
            f"got {shard_index}, {shard_num}, {slice_size}"
        )
    share, larger = divmod(slice_size, shard_num)
    begin = shard_index * share + min(shard_index, larger)
    return Slice(begin, begin + share + (shard_index < larger), slice_size)
