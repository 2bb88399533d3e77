"""What one rank has written, as it tells rank 0: a small file beside its shards."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import orjson

from asyncloader._checkpoint.format import (
    DESCRIPTION,
    INDEX,
    MAX_NAMES,
    MAX_SIDECAR,
    SIDECAR,
    TENSORKEY,
    render_index,
    render_json,
)
from asyncloader._checkpoint.parts import gaps, overlaps
from asyncloader._checkpoint.sidecar import (
    PartRows,
    ShardDigests,
    digest_of,
    part_as_json,
    part_of_json,
    render_sidecar,
    shards_of_json,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .layout import ShardLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPart:
    """One rank's share of a checkpoint."""

    save_id: str
    rank: int
    ranks: int
    numbers: Mapping[str, int]
    """Shard file → its number."""

    sizes: Mapping[str, int]
    """Shard file → its length in bytes."""

    digests: Mapping[str, ShardDigests]
    names: Mapping[str, str]
    """Key → block name, of tables."""

    description: Mapping[str, Mapping[str, object]]
    rows: Mapping[str, PartRows]
    """By table."""

    slots: Mapping[str, Mapping[str, str]]
    """By table and slot, what one row is: dtype and shape."""

    tensors: Mapping[str, str]
    """By name, dtype and shape of each dense tensor that this rank was given. Rank 0 saves its
    own; those of the others are compared with them."""

    @classmethod
    def of(
        cls,
        layouts: Sequence[ShardLayout],
        digests: Mapping[str, ShardDigests],
        rows: Mapping[str, PartRows],
        *,
        save_id: str,
        rank: int,
        ranks: int,
        tensors: Mapping[str, str],
    ) -> RankPart:
        """Return the part that these shards are."""
        names: dict[str, str] = {}
        description: dict[str, dict[str, object]] = {}
        slots: dict[str, dict[str, str]] = {}
        for layout in layouts:
            names |= layout.names()
            description |= layout.description()
            for block in (placed.block for placed in layout.blocks):
                if block.table is not None:
                    row = f"{block.dtype} {list(block.shape[1:])}"
                    slots.setdefault(block.table, {})[block.slot] = row
        return cls(
            save_id=save_id,
            rank=rank,
            ranks=ranks,
            numbers={layout.file: layout.number for layout in layouts},
            sizes={layout.file: layout.size for layout in layouts},
            digests=digests,
            names=names,
            description=description,
            rows=rows,
            slots=slots,
            tensors=tensors,
        )


def render_part(part: RankPart) -> bytes:
    """Return the text of a part file."""
    value = {field.name: getattr(part, field.name) for field in fields(part)}
    value["rows"] = {table: part_as_json(rows) for table, rows in part.rows.items()}
    return orjson.dumps(value)


def parse_part(text: bytes) -> RankPart:
    """Read a part file that `render_part` wrote.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        value: dict[str, Any] = orjson.loads(text)
        value["digests"] = shards_of_json(value["digests"])
        value["rows"] = {table: part_of_json(rows) for table, rows in value["rows"].items()}
        return RankPart(**value)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a part file: {error!r}") from error


def merge_parts(parts: Sequence[RankPart]) -> dict[str, bytes]:
    """Return the texts of all files of a checkpoint but its shards, `index` last.

    Raises:
        ValueError: If the parts do not make one checkpoint.
    """
    files: dict[str, int] = {}
    blocks: dict[str, int] = {}
    names: dict[str, str] = {}
    description: dict[str, Mapping[str, object]] = {}
    shards: dict[str, ShardDigests] = {}
    rows: dict[str, list[PartRows]] = {}
    for part in parts:
        files |= part.numbers
        names |= part.names
        description |= part.description
        shards |= part.digests
        for file, digests in part.digests.items():
            blocks |= dict.fromkeys(digests.blocks, part.numbers[file])
        for table, of_rank in part.rows.items():
            rows.setdefault(table, []).append(of_rank)
    for table, of_table in rows.items():
        _check_slices(table, of_table)
    _check_slots(parts)
    _check_tensors(parts)
    _check_numbers(files)
    index, tensorkey = render_index(files, blocks), render_json(names)
    described = render_json(description)
    sidecar = render_sidecar(
        files={
            INDEX: digest_of(index),
            TENSORKEY: digest_of(tensorkey),
            DESCRIPTION: digest_of(described),
        },
        shards=shards,
        parts=rows,
    )
    texts = {
        TENSORKEY: tensorkey,
        DESCRIPTION: described,
        SIDECAR: sidecar,
        INDEX: index,
    }
    check_sizes({name: len(text) for name, text in texts.items()})
    return texts


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Refuse files that are longer than what a load reads.

    Raises:
        ValueError: If one is.
    """
    for name, most in {INDEX: MAX_NAMES, TENSORKEY: MAX_NAMES, SIDECAR: MAX_SIDECAR}.items():
        if sizes[name] > most:
            raise ValueError(
                f"{name} would take {sizes[name]} bytes, and at most {most} are ever read: save "
                "fewer tensors, slots or ranks into one checkpoint"
            )


def _check_slices(table: str, parts: list[PartRows]) -> None:
    """Refuse parts that claim the same ids, or, together, not all of them.

    Where two ranks claim an id, a reader could not say whose row is right.
    """
    parts.sort(key=lambda part: part.slice)
    claims = [part.slice for part in parts if part.slice.begin < part.slice.end]
    remedy = "give each rank's table slice=gen_slice(shard_index, shard_num)"
    for one, other in overlaps(claims):
        raise ValueError(
            f"table {table!r}: one rank's slice is {one}, another's {other}, which overlap; "
            f"{remedy}"
        )
    if not claims or any(gaps(claims, 0, claims[0].size)):
        raise ValueError(
            f"table {table!r}: the slices of the ranks that saved it leave ids out "
            f"({', '.join(map(str, claims)) or 'they are empty'}); {remedy}, and save it on every "
            "rank"
        )


def _check_numbers(files: Mapping[str, int]) -> None:
    """Refuse shards that were counted in different ways: two would have the same number."""
    totals = {file.rpartition("-of-")[2] for file in files}
    if len(totals) > 1 or len(set(files.values())) < len(files):
        raise ValueError(
            "the ranks' shards are not counted alike: give every rank's Saver the same parallel"
        )


def _check_slots(parts: Iterable[RankPart]) -> None:
    """Refuse tables whose slots are not the same on all ranks that saved them."""
    seen: dict[str, tuple[int, Mapping[str, str]]] = {}
    for part in parts:
        for table, slots in part.slots.items():
            rank, others = seen.setdefault(table, (part.rank, slots))
            if slots != others:
                raise ValueError(
                    f"table {table!r}: rank {rank} saved {_listed(others)}, but rank {part.rank} "
                    f"{_listed(slots)}; give it the same slots on every rank"
                )


def _check_tensors(parts: Iterable[RankPart]) -> None:
    """Refuse dense tensors that would be in no file, as rank 0 has none of that name and shape."""
    saved: Mapping[str, str] = {}
    for part in sorted(parts, key=lambda part: part.rank):
        if part.rank == 0:
            saved = part.tensors
        for name, kind in part.tensors.items():
            if saved.get(name) != kind:
                other = f"rank 0 has {saved[name]}" if name in saved else "rank 0 has none"
                raise ValueError(
                    f"tensor {name!r} of rank {part.rank} ({kind}) would be in no file: only rank "
                    f"0's dense tensors are saved, and {other}; gather it on rank 0, or leave it "
                    f"out on rank {part.rank}"
                )


def _listed(slots: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({row})" for name, row in slots.items())
