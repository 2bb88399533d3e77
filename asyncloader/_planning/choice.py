"""The first half of planning: by names alone, before any shard is opened."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from asyncloader._checkpoint.parts import ID, gaps, repeated, without_rows

from .targets import TensorTargets, default_load_info

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from asyncloader._checkpoint.index import Catalog, Part, Place
    from asyncloader._checkpoint.slices import Slice

    from .targets import LoadInfo, TableTarget, Targets


_SHOWN = 10
# `torch.compile`, FSDP and activation checkpointing put these into the names of a `state_dict()`.
_OF_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_OF_PARALLEL = "module"  # DistributedDataParallel puts this before all names


@dataclass(frozen=True, slots=True, kw_only=True)
class PartChoice:
    """One rank's part of a table to load."""

    target: TableTarget
    child: str
    source: str
    claimed: Slice
    ids: Place
    slots: Mapping[str, Place]
    fills: bool  # whether it brings no ids, but slots for those that are there


@dataclass(slots=True)
class Choice:
    """Everything chosen, in the order of load_info, and everything that is wrong so far.

    Attributes:
        tensors: The dense tensors to load, and the source of each.
        shared: The dense tensors whose memory one of `tensors` fills, and the source of each.
        lacking: The dense tensors whose source is not in the checkpoint, and that source.
        fillers: The tensors of `shared` and `lacking` whose memory one of `tensors` fills, and its
            name.
        cleared: The children whose ids are taken out first.
    """

    catalog: Catalog
    targets: Targets
    tensors: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    fillers: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    parts: list[PartChoice] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    cleared: tuple[str, ...] = ()

    def shards(self) -> tuple[str, ...]:
        """Return the shards whose headers are needed."""
        shard_of = self.catalog.tensors.shards.__getitem__
        names = {*map(shard_of, self.tensors.values()), *map(shard_of, self.shared.values())}
        for part in self.parts:
            names |= {part.ids.shard, *(place.shard for place in part.slots.values())}
        return tuple(sorted(names))


def choose(
    catalog: Catalog, info: LoadInfo | None, targets: Targets, *, fills: bool = False
) -> Choice:
    """Find the blocks that `info` asks for; `None` asks for every destination by its own name.

    With `fills`, slots that are listed without `id` fill the rows of ids that are there.
    """
    choice = Choice(catalog, targets)
    by_own_name = info is None
    if info is None:  # a dict for each of 100,000 tensors would take longer than all else here
        info = default_load_info(replace(targets, tensors=TensorTargets(())))
    else:
        choice.skipped = tuple(name for name in targets.tensors if not info.get(name))
    for destination, found in info.items():
        if destination in targets.tables:
            for source, slots in found.items():
                _choose_table(choice, destination, source, slots, fills=fills)
        elif destination in targets.tensors:
            _choose_tensor(choice, destination, found)
        else:
            choice.problems.append(
                f"load_info names the destination {destination!r}, but there are only "
                f"{_some([*targets.tables, *targets.tensors])}; a table goes by its name or its "
                "children's"
            )
    if by_own_name:
        _choose_by_own_name(choice)
        wanted: AbstractSet[str] = targets.tensors.keys()
        if choice.warnings:
            wanted = {*wanted, *choice.tensors.values()}
    else:
        wanted = {s for name, of in info.items() if name not in targets.tables for s in of}
    choice.unexpected = tuple(_unexpected(catalog, info, targets, wanted))
    _share(choice)
    return choice


def _choose_by_own_name(choice: Choice) -> None:
    there = choice.catalog.tensors.block_keys
    names = list(choice.targets.tensors)
    choice.tensors = dict(zip(names, names, strict=True))
    if not choice.tensors.keys() <= there.keys():
        choice.tensors = {name: name for name in names if name in there}
        choice.lacking = {name: name for name in names if name not in there}
        _choose_wrapped(choice)


def _choose_wrapped(choice: Choice) -> None:
    """Find the tensors of a bare model under the names of a wrapped one."""
    kept = {
        name: [part for part in name.split(".") if part not in _OF_WRAPPERS]
        for name in choice.catalog.tensors.block_keys
    }
    # A model with a part `module` has that in some names: here no name fits, and all have it.
    if not choice.tensors and all(parts[0] == _OF_PARALLEL for parts in kept.values() if parts):
        kept = {name: parts[1:] for name, parts in kept.items()}
    bare: dict[str, list[str]] = {}
    for name, parts in kept.items():
        bare.setdefault(".".join(parts), []).append(name)
    found = {name: bare[name][0] for name in choice.lacking if len(bare.get(name, ())) == 1}
    if found:
        name, source = next(iter(found.items()))
        choice.tensors |= found
        choice.lacking = {name: name for name in choice.lacking if name not in found}
        choice.warnings.append(
            f"{len(found)} tensors were saved under the names of a wrapped model: {name!r} is "
            f"there as {source!r}, and so on"
        )


def _choose_tensor(choice: Choice, name: str, sources: Mapping[str, Sequence[str]]) -> None:
    if len(sources) > 1:
        choice.problems.append(f"tensor {name!r} has several sources: {', '.join(sources)}")
        return
    for source, slots in sources.items():
        if slots:
            choice.problems.append(f"tensor {name!r} has no slots, load_info lists {slots}")
        elif source not in choice.catalog.tensors:
            choice.lacking[name] = source
        else:
            choice.tensors[name] = source


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more if names else "none"


def _share(choice: Choice) -> None:
    """Of tensors that are the same memory, keep the last: it would have won.

    Absent ones may be filled, too: safetensors' `save_model`, and others, write tied weights once.
    """
    targets, names = choice.targets.tensors, (*choice.tensors, *choice.lacking)
    if targets.memory is not None:
        numbers = map(targets.memory.__getitem__, targets.numbers(names))
        memory = dict(zip(names, numbers, strict=True))
        last = {memory[name]: name for name in choice.tensors}
        choice.fillers = {n: last[m] for n, m in memory.items() if last.get(m, n) != n}
        choice.shared = {k: v for k, v in choice.tensors.items() if k in choice.fillers}
        choice.tensors = {name: choice.tensors[name] for name in last.values()}
    lacking = choice.lacking.items()
    choice.missing += [source for name, source in lacking if name not in choice.fillers]


def _choose_table(
    choice: Choice, child: str, source: str, listed: Sequence[str], *, fills: bool
) -> None:
    target = choice.targets.tables[child]
    if ID not in listed and not fills:
        choice.problems.append(f"table {child!r} from {source!r}: load_info must list 'id'")
    choice.problems += [
        f"table {child!r} has no slot {slot!r}, which load_info lists; "
        f"add_slot() it, or leave it out with filter_func"
        for slot in listed
        if slot != ID and slot not in target.slots
    ]
    slots = choice.catalog.tables.get(source)
    if slots is None:
        choice.missing.append(source)
        return
    if ID not in slots:
        choice.problems.append(f"the checkpoint has table {source!r} but not its ids")
        return
    wanted = [slot for slot in dict.fromkeys(listed) if slot in target.slots]
    choice.missing += [f"{source}@{slot}" for slot in wanted if slot not in slots]
    held = [slot for slot in wanted if slot in slots]
    choice.missing += _gaps(source, slots[ID], target.slice)
    ids = [part for part in slots[ID] if not target.slice.disjoint(part.slice)]
    for slot in (ID, *held):
        choice.problems += map(str, repeated(source, slot, slots[slot]))
        choice.problems += map(str, without_rows(source, slot, ids, slots[slot]))
    found = {slot: {part.slice: part.place for part in slots[slot]} for slot in held}
    choice.parts += [
        PartChoice(
            target=target,
            child=child,
            source=source,
            claimed=part.slice,
            ids=part.place,
            slots={slot: places[part.slice] for slot, places in found.items()},
            fills=ID not in listed,
        )
        for part in ids
        if all(part.slice in places for places in found.values())
    ]


def _gaps(source: str, parts: Sequence[Part], wanted: Slice) -> list[str]:
    """Say which positions of the wanted slice no part claims to hold."""
    size = parts[0].slice.size
    if any(part.slice.size != size for part in parts):
        return []
    begin, end = (wanted.begin, wanted.end) if wanted.size == size else (0, size)
    found = gaps((part.slice for part in parts), begin, end)
    return [f"{source}@{ID}[{a}, {b}) of {size}" for a, b in found]


def _unexpected(
    catalog: Catalog, info: LoadInfo, targets: Targets, tensors: AbstractSet[str]
) -> Iterable[str]:
    """Yield the names that the load does not ask for; of tensors, all but `tensors`."""
    tables = dict[str, set[str]]()
    for destination in info.keys() & targets.tables.keys():
        for source, slots in info[destination].items():
            tables.setdefault(source, set()).update(slots)
    for table, held in catalog.tables.items():
        if table not in tables:
            yield table
        else:
            yield from (f"{table}@{slot}" for slot in held if slot not in tables[table])
    if not catalog.tensors.block_keys.keys() <= tensors:
        yield from (name for name in catalog.tensors if name not in tensors)
