"""The second half of planning: with the headers of the chosen shards."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._checkpoint.blocks import numbered
from asyncloader._checkpoint.dtypes import TensorType
from asyncloader._checkpoint.format import MODEL
from asyncloader._checkpoint.parts import ID, count_problems, id_problems, spread_problems
from asyncloader._checkpoint.problems import Problems
from asyncloader.errors import PlanError

from .hints import did_you_mean
from .plan import LoadPlan, PartLoad, TableLoad, TensorLoads
from .targets import Cast, misfit, misfit_on_disk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block, Blocks
    from asyncloader._checkpoint.manifest import Manifest

    from .choice import Choice, PartChoice
    from .targets import Casting, TableTarget, TensorTargets


def plan_load(
    manifest: Manifest, choice: Choice, *, strict: bool, casting: Casting | None = None
) -> LoadPlan:
    """Check every chosen block against its destination, and plan the load.

    `manifest` has the headers of all chosen shards. With `strict`, a missing name is a problem.

    Raises:
        PlanError: With everything that does not fit.
        CheckpointError: If a header lacks a block that `index` says it has.
    """
    problems = list(dict.fromkeys(choice.problems))
    warnings = [*manifest.warnings, *choice.warnings]
    match = partial(
        _match_tensors,
        manifest,
        targets=choice.targets.tensors,
        casting=casting,
        problems=problems,
        warnings=warnings,
    )
    tensors, casts = match(choice.tensors)
    again, _ = match(choice.shared)  # not loaded, and wrong all the same if they do not fit
    tables: dict[str, _TableBuilder] = {}
    for part in choice.parts:
        builder = tables.setdefault(part.target.name, _TableBuilder(part.target, casting))
        builder.add(manifest, part)
    for child in choice.cleared:
        target = choice.targets.tables[child]
        tables.setdefault(target.name, _TableBuilder(target, casting)).cleared.append(child)
    for builder in tables.values():
        problems += builder.problems
        casts += builder.casts
    missing = tuple(dict.fromkeys(choice.missing))
    if strict:
        hints = did_you_mean(missing, choice.unexpected)
        problems += [
            f"{name!r} is asked for but not in the checkpoint{hints[name]}" for name in missing
        ]
    if problems:
        raise PlanError(manifest.location, problems)
    return LoadPlan(
        location=manifest.location,
        tensors=tensors,
        shared=choice.fillers,
        again=again,
        skipped=choice.skipped,
        tables=tuple(builder.build() for builder in tables.values()),
        missing=missing,
        unexpected=choice.unexpected,
        warnings=tuple(warnings),
        casts=tuple(casts),
    )


def _match_tensors(
    manifest: Manifest,
    chosen: Mapping[str, str],
    *,
    targets: TensorTargets,
    casting: Casting | None,
    problems: list[str],
    warnings: list[str],
) -> tuple[TensorLoads, list[Cast]]:
    """Find the blocks of chosen tensors (destination → source), and compare dtypes and shapes.

    Return the blocks and their conversions.
    """
    places = manifest.catalog.tensors
    keys = list(map(places.block_keys.__getitem__, chosen.values()))
    shards, shard = numbered(map(places.shards.__getitem__, chosen.values()))
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
        names=list(chosen),
        shards=shards,
        shard=shard,
        offsets=_joined([blocks.offsets for blocks in of_shards])[at],
        nbytes=_joined([blocks.nbytes for blocks in of_shards])[at],
        digested=np.array([one.digests is not None for one in of_shards], np.bool_)[shard],
        block=partial(_block, of_shards, shard, number),
    )
    differing = _differing(loads, of_shards, at, targets)
    casts = _casts(loads, differing, targets, casting=casting, problems=problems, warnings=warnings)
    return loads, casts


def _block(
    of_shards: Sequence[Blocks], shard: NDArray[np.int64], number: NDArray[np.int64], which: int
) -> Block:
    return of_shards[int(shard[which])].at(int(number[which]))


def _joined(columns: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *columns])


def _differing(
    loads: TensorLoads, of_shards: Sequence[Blocks], at: NDArray[np.int64], targets: TensorTargets
) -> list[int]:
    """Return the numbers of the blocks whose dtype or shape is not that of their destination."""
    known: dict[TensorType, int] = {}

    def common(columns: Blocks | TensorTargets) -> NDArray[np.int64]:
        numbers = [known.setdefault(one, len(known)) for one in columns.types]
        return np.array(numbers, np.int64)[columns.kinds]

    wanted = common(targets)[targets.numbers(loads.names)]
    found: list[int] = np.flatnonzero(wanted != _joined([*map(common, of_shards)])[at]).tolist()
    return found


def _casts(
    loads: TensorLoads,
    differing: Sequence[int],
    targets: TensorTargets,
    *,
    casting: Casting | None,
    problems: list[str],
    warnings: list[str],
) -> list[Cast]:
    """Return the conversions; `problems` receives the blocks that fit in no way.

    `warnings` receives those whose shape is taken for another.
    """
    casts = []
    for number in differing:
        name, block = loads.names[number], loads.block(number)
        want, have = targets[name], TensorType(block.dtype, block.shape)
        # As `load_state_dict` does. RecIS's own loader of shards does not.
        is_scalar = block.shard == MODEL and (have.shape, want.shape) == ((1,), ())
        hint = misfit(TensorType(have.dtype, ()) if is_scalar else have, want, casting)
        if hint is not None:
            problems.append(
                f"tensor {name!r} is {want}, the checkpoint has {have} "
                f"({block.shard}, key {block.key!r}){hint}"
            )
            continue
        if is_scalar:
            warnings.append(f"tensor {name!r} is {want}, {MODEL} has {have}: its value is taken")
        if have.dtype != want.dtype:
            loads.cast[number] = True
            casts.append(Cast(name=name, source=have.dtype.torch, target=want.dtype.torch))
    return casts


def _rows_among(manifest: Manifest, part: PartChoice, ids: Block) -> range | None:
    """Return the rows among which the wanted rows stand, if the sidecar knows."""
    sidecar, wanted = manifest.catalog.sidecar, part.target.slice
    if sidecar is None or wanted.size != part.claimed.size or wanted.covers(part.claimed):
        return None
    spread = sidecar.spread(manifest.location, part.source, part.claimed)
    if spread is None:
        return None
    Problems(manifest.location).take(spread_problems(spread, ids))
    return spread.among(wanted)


@dataclass(slots=True)
class _TableBuilder:
    """Gathers the parts of one table, in order, into layers: their slots and children."""

    target: TableTarget
    casting: Casting | None
    layers: list[tuple[tuple[frozenset[str], bool], set[str]]] = field(default_factory=list)
    parts: list[PartLoad] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    casts: dict[Cast, None] = field(default_factory=dict)  # once, however many ranks wrote it
    cleared: list[str] = field(default_factory=list)
    rank: int = 0

    def add(self, manifest: Manifest, part: PartChoice) -> None:
        ids = manifest.block(part.ids)
        slots = {slot: manifest.block(place) for slot, place in part.slots.items()}
        problems = self._problems(part, ids, slots)
        self.problems += [problem for problem in problems if problem not in self.problems]
        if problems or not ids.rows:
            return
        for slot, block in slots.items():
            want = self.target.slots[slot].dtype
            if block.dtype != want:
                name = f"{part.child}@{slot}"
                cast = Cast(name=name, source=block.dtype.torch, target=want.torch)
                self.casts[cast] = None
        wanted = self.target.slice
        among = _rows_among(manifest, part, ids)
        expected = round(ids.rows * wanted.share_of(part.claimed)) if among is None else len(among)
        reach = range(ids.rows)
        if among is not None:
            reach = reach[max(among.start - 1, 0) : among.stop + 1]
        self.parts.append(
            PartLoad(
                child=part.child,
                source=part.source,
                claimed=part.claimed,
                layer=self._layer(part.child, (frozenset(slots), part.fills)),
                rank=self.rank,
                certain=wanted.covers(part.claimed),
                expected=expected,
                reach=reach,
                ids=ids,
                slots=slots,
            )
        )
        self.rank += ids.rows

    def _layer(self, child: str, slots: tuple[frozenset[str], bool]) -> int:
        """Return a layer of these slots, above every layer that may hold the same ids.

        Layers of the same slots are two, if one of them brings no ids.
        """
        for number in range(len(self.layers) - 1, -1, -1):
            of_layer, children = self.layers[number]
            if of_layer == slots:
                children.add(child)
                return number
            if child in children:
                break
        self.layers.append((slots, {child}))
        return len(self.layers) - 1

    def _problems(self, part: PartChoice, ids: Block, slots: Mapping[str, Block]) -> list[str]:
        if odd := list(map(str, id_problems(f"{part.source}@{ID}", ids))):
            return odd
        problems: list[str] = []
        for slot, block in slots.items():
            name = f"{part.source}@{slot}"
            want, have = self.target.slots[slot], TensorType(block.dtype, block.shape[1:])
            hint = misfit(have, want, self.casting) if block.shape else ""
            if self.target.locates and have.shape == want.shape:
                held = {other.slots[slot].dtype for other in self.parts if slot in other.slots}
                hint = misfit_on_disk(block.dtype, want.dtype, held) or hint
            if hint is None:
                problems += map(str, count_problems(name, ids, block))
            else:
                problems.append(
                    f"slot {slot!r} of table {self.target.name!r} has rows of {want}, "
                    f"{name} in the checkpoint has {have}{hint}"
                )
        return problems

    def build(self) -> TableLoad:
        return TableLoad(
            name=self.target.name,
            slice=self.target.slice,
            layers=tuple(slots for (slots, _), _ in self.layers),
            parts=tuple(self.parts),
            fills=frozenset(n for n, ((_, fills), _) in enumerate(self.layers) if fills),
            cleared=tuple(self.cleared),
            locates=self.target.locates,
        )
