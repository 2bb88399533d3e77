"""The second half of planning: with the headers of the chosen shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncloader._checkpoint.parts import ID, count_problems, id_problems, spread_problems
from asyncloader._checkpoint.problems import Problems
from asyncloader.errors import PlanError

from .casts import Cast, can_cast, cast_hint
from .hints import RENAME, did_you_mean
from .plan import LoadPlan, PartLoad, TableLoad
from .targets import RowType
from .tensor_loads import match_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.manifest import Manifest

    from .casts import Casting
    from .choice import Choice, PartChoice
    from .targets import TableTarget


def plan_load(
    manifest: Manifest, choice: Choice, *, strict: bool, casting: Casting | None = None
) -> LoadPlan:
    """Check every chosen block against its destination, and plan the load.

    Args:
        manifest: With the headers of all chosen shards.
        choice: From `choose`.
        strict: Whether something that is missing is a problem.
        casting: Which dtypes may be converted; by default another dtype is a problem.

    Raises:
        PlanError: With everything that does not fit.
        CheckpointError: If a header lacks a block that `index` says it has.
    """
    problems = list(dict.fromkeys(choice.problems))
    targets = choice.targets.tensors
    tensors, casts = match_tensors(manifest, choice.tensors, targets, problems, casting)
    # Not loaded, and wrong all the same if they do not fit.
    again, _ = match_tensors(manifest, choice.shared, targets, problems, casting)
    tables: dict[str, _TableBuilder] = {}
    for part in choice.parts:
        builder = tables.setdefault(part.target.name, _TableBuilder(part.target, casting))
        builder.add(manifest, part)
    for builder in tables.values():
        problems += builder.problems
        casts += builder.casts
    missing = tuple(dict.fromkeys(choice.missing))
    if strict:
        hints = did_you_mean(missing, choice.unexpected, rename=RENAME)
        problems += [
            f"{name!r} is asked for but not in the checkpoint{hints[name]}" for name in missing
        ]
    if problems:
        raise PlanError(manifest.location, problems)
    return LoadPlan(
        location=manifest.location,
        tensors=tensors,
        shared=_fillers(choice),
        again=again,
        skipped=choice.skipped,
        tables=tuple(builder.build() for builder in tables.values()),
        missing=missing,
        unexpected=choice.unexpected,
        warnings=(*manifest.warnings, *choice.warnings),
        casts=tuple(casts),
    )


def _fillers(choice: Choice) -> dict[str, str]:
    """Say under which name the memory of shared tensors is filled."""
    also = (*choice.shared, *choice.tied)
    if not also:
        return {}
    targets = choice.targets.tensors
    assert targets.memory is not None, "tensors share memory, and all are said to have their own"
    memory = targets.memory.__getitem__
    fillers = dict(zip(map(memory, targets.numbers(choice.tensors)), choice.tensors, strict=True))
    return {
        name: fillers[memory(one)] for name, one in zip(also, targets.numbers(also), strict=True)
    }


def _rows_among(manifest: Manifest, part: PartChoice, ids: Block) -> range | None:
    """Return the rows among which the wanted rows stand, if the sidecar knows.

    Raises:
        CheckpointError: If it says of other rows where they stand.
    """
    sidecar, wanted = manifest.catalog.sidecar, part.target.slice
    if sidecar is None or wanted.size != part.claimed.size or wanted.covers(part.claimed):
        return None
    spread = sidecar.spread(manifest.location, part.source, part.claimed)
    if spread is None:
        return None
    Problems(manifest.location).take(spread_problems(spread, ids))
    return spread.among(wanted)


@dataclass(slots=True)
class _Layer:
    slots: frozenset[str]
    children: set[str]


@dataclass(slots=True)
class _TableBuilder:
    """Gathers the parts of one table, in order, into layers."""

    target: TableTarget
    casting: Casting | None
    layers: list[_Layer] = field(default_factory=list)
    parts: list[PartLoad] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    casts: dict[Cast, None] = field(default_factory=dict)
    rank: int = 0

    def add(self, manifest: Manifest, part: PartChoice) -> None:
        ids = manifest.block(part.ids)
        slots = {slot: manifest.block(place) for slot, place in part.slots.items()}
        problems = self._problems(part, ids, slots)
        self.problems += [problem for problem in problems if problem not in self.problems]
        if problems or not ids.rows:
            return
        self._note_casts(part, slots)
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
                layer=self._layer(part.child, frozenset(slots)),
                rank=self.rank,
                certain=wanted.covers(part.claimed),
                expected=expected,
                reach=reach,
                ids=ids,
                slots=slots,
            )
        )
        self.rank += ids.rows

    def _layer(self, child: str, slots: frozenset[str]) -> int:
        """Return a layer of these slots, above every layer that may hold the same ids."""
        for number in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[number]
            if layer.slots == slots:
                layer.children.add(child)
                return number
            if child in layer.children:
                break
        self.layers.append(_Layer(slots, {child}))
        return len(self.layers) - 1

    def _problems(self, part: PartChoice, ids: Block, slots: dict[str, Block]) -> list[str]:
        if odd := list(map(str, id_problems(f"{part.source}@{ID}", ids))):
            return odd
        problems = []
        for slot, block in slots.items():
            want = self.target.slots[slot]
            have = RowType(shape=block.shape[1:], dtype=block.dtype)
            fits = have.shape == want.shape and bool(block.shape)
            same = have.dtype == want.dtype
            if not fits or not (same or can_cast(have.dtype, want.dtype, self.casting)):
                hint = cast_hint(have.dtype, want.dtype) if fits else ""
                problems.append(
                    f"slot {slot!r} of table {self.target.name!r} has rows of {want}, "
                    f"{part.source}@{slot} in the checkpoint has {have}{hint}"
                )
            else:
                problems += map(str, count_problems(f"{part.source}@{slot}", ids, block))
        return problems

    def _note_casts(self, part: PartChoice, slots: Mapping[str, Block]) -> None:
        for slot, block in slots.items():
            want = self.target.slots[slot].dtype
            if block.dtype != want:
                name = f"{part.child}@{slot}"
                cast = Cast(name=name, source=block.dtype.torch, target=want.torch)
                self.casts[cast] = None  # once, however many ranks wrote it

    def build(self) -> TableLoad:
        return TableLoad(
            name=self.target.name,
            slice=self.target.slice,
            layers=tuple(layer.slots for layer in self.layers),
            parts=tuple(self.parts),
        )
