"""Which blocks fill which dense tensors, as columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, overload

import numpy as np

from asyncloader._checkpoint.blocks import numbered

from .casts import Cast, can_cast, cast_hint
from .targets import RowType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block, Blocks, BlockType
    from asyncloader._checkpoint.manifest import Manifest

    from .casts import Casting
    from .targets import TensorTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLoad:
    """A block that fills a dense tensor."""

    name: str
    """The destination."""

    block: Block


class TensorLoads(Sequence[TensorLoad]):
    """Blocks that fill dense tensors, in the order of load_info.

    A `TensorLoad` is made when it is asked for.

    Args:
        names: `[n]`, the destinations.
        shards: The different files that they come from.
        shard: int64 `[n]`; which of `shards` each comes from.
        offsets: int64 `[n]`; first byte, from the start of the file.
        nbytes: int64 `[n]`.
        digested: bool `[n]`; whether there are digests.
        block: Returns a block by its number.
    """

    __slots__ = ("block", "cast", "digested", "names", "nbytes", "offsets", "shard", "shards")

    def __init__(
        self,
        names: Sequence[str],
        *,
        shards: Sequence[str],
        shard: NDArray[np.int64],
        offsets: NDArray[np.int64],
        nbytes: NDArray[np.int64],
        digested: NDArray[np.bool_],
        block: Callable[[int], Block],
    ) -> None:
        self.names = names
        self.shards = shards
        self.shard = shard
        self.offsets = offsets
        self.nbytes = nbytes
        self.digested = digested
        self.block = block
        self.cast = np.zeros(len(names), np.bool_)
        """bool `[n]`; whether it is converted to another dtype."""

        assert len(names) == len(shard) == len(offsets) == len(nbytes) == len(digested)

    @classmethod
    def of(cls, loads: Iterable[TensorLoad]) -> TensorLoads:
        """Return loads as columns. Several may have parts of one block."""
        known = list(loads)
        blocks = [load.block for load in known]
        shards, shard = numbered(block.shard for block in blocks)
        return cls(
            [load.name for load in known],
            shards=shards,
            shard=shard,
            offsets=np.array([block.offset for block in blocks], np.int64),
            nbytes=np.array([block.nbytes for block in blocks], np.int64),
            digested=np.array([block.digests is not None for block in blocks], np.bool_),
            block=blocks.__getitem__,
        )

    def __repr__(self) -> str:
        return f"<TensorLoads {len(self)} tensors>"

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, number: int, /) -> TensorLoad: ...

    @overload
    def __getitem__(self, number: slice, /) -> tuple[TensorLoad, ...]: ...

    def __getitem__(self, number: int | slice, /) -> TensorLoad | tuple[TensorLoad, ...]:
        if isinstance(number, slice):
            return tuple(self[one] for one in range(len(self))[number])
        return TensorLoad(name=self.names[number], block=self.block(number))


def match_tensors(
    manifest: Manifest,
    chosen: Mapping[str, str],
    targets: TensorTargets,
    problems: list[str],
    casting: Casting | None,
) -> tuple[TensorLoads, list[Cast]]:
    """Find the blocks of chosen tensors, and compare dtypes and shapes.

    Args:
        manifest: With the headers of all their shards.
        chosen: Destinations, and the source of each.
        targets: The destinations.
        problems: Receives the tensors that do not fit.
        casting: Which dtypes may be converted.

    Returns:
        The blocks, and which of them are converted.

    Raises:
        CheckpointError: If a header lacks a block that `index` says it has.
    """
    places = manifest.catalog.tensors
    keys = list(map(places.block_keys.__getitem__, chosen.values()))
    files = list(map(places.shards.__getitem__, chosen.values()))
    shards, shard = numbered(files)
    of_shards = [manifest.headers[name].blocks for name in shards]
    number = np.empty(len(keys), np.int64)
    by_shard = np.argsort(shard, kind="stable")
    cuts = np.searchsorted(shard[by_shard], np.arange(len(of_shards) + 1)).tolist()
    for blocks, (low, high) in zip(of_shards, itertools.pairwise(cuts), strict=True):
        mine = by_shard[low:high]
        number[mine] = blocks.numbers(keys[one] for one in mine.tolist())
    sources = list(chosen.values())
    for odd in np.flatnonzero(number < 0).tolist():  # under a name that is known to be misspelt
        found = manifest.block(places[sources[odd]])
        number[odd] = of_shards[shard[odd]].numbers([found.key])[0]
    assert (number >= 0).all()
    at = np.cumsum([0, *map(len, of_shards)])[shard] + number
    loads = TensorLoads(
        list(chosen),
        shards=shards,
        shard=shard,
        offsets=_joined([blocks.offsets for blocks in of_shards])[at],
        nbytes=_joined([blocks.nbytes for blocks in of_shards])[at],
        digested=np.array([blocks.digested for blocks in of_shards], np.bool_)[shard],
        block=partial(_block, of_shards, shard, number),
    )
    casts = _casts(loads, _mismatches(loads, of_shards, at, targets), targets, problems, casting)
    return loads, casts


def _block(
    of_shards: Sequence[Blocks], shard: NDArray[np.int64], number: NDArray[np.int64], which: int
) -> Block:
    return of_shards[int(shard[which])].at(int(number[which]))


def _joined(columns: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *columns])


def _mismatches(
    loads: TensorLoads,
    of_shards: Sequence[Blocks],
    at: NDArray[np.int64],
    targets: TensorTargets,
) -> list[int]:
    """Return which destinations are of another dtype or shape than their blocks."""
    known: dict[BlockType, int] = {}

    def common(types: Sequence[BlockType], kinds: NDArray[np.int64]) -> NDArray[np.int64]:
        numbers = [known.setdefault(one, len(known)) for one in types]
        return np.array(numbers, np.int64)[kinds]

    want = common(targets.types, targets.kinds[targets.numbers(loads.names)])
    have = _joined([common(blocks.types, blocks.kinds) for blocks in of_shards])[at]
    numbers: list[int] = np.flatnonzero(want != have).tolist()
    return numbers


def _casts(
    loads: TensorLoads,
    mismatches: Iterable[int],
    targets: TensorTargets,
    problems: list[str],
    casting: Casting | None,
) -> list[Cast]:
    """Return the conversions; describe the blocks that fit in no way."""
    casts = []
    for number in mismatches:
        name, block = loads.names[number], loads.block(number)
        want = targets[name]
        have = RowType(shape=block.shape, dtype=block.dtype)
        if have.shape == want.shape and can_cast(have.dtype, want.dtype, casting):
            loads.cast[number] = True
            casts.append(Cast(name=name, source=have.dtype.torch, target=want.dtype.torch))
            continue
        hint = cast_hint(have.dtype, want.dtype) if have.shape == want.shape else ""
        problems.append(
            f"tensor {name!r} is {want}, the checkpoint has {have} "
            f"({block.shard}, key {block.key!r}){hint}"
        )
    return casts
