"""The list of one rank's shards, as it tells rank 0: a small file beside the shards."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import orjson

from asyncloader._checkpoint.format import (
    DESCRIPTION,
    INDEX,
    IO_STATE,
    MAX_NAMES,
    MAX_SIDECAR,
    MODEL,
    SIDECAR,
    TENSORKEY,
    render_index,
    render_json,
    sparse_name,
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
    """One rank's share of a checkpoint.

    Attributes:
        sizes: File → its length in bytes.
        digests: Shard file → digests.
        names: Key → block name, of tables.
        description: Key → entry of the description.
        rows: By table.
        slots: By table and slot, dtype and shape of one row.
        tensors: By name, dtype and shape of each dense tensor that this rank was given. Rank 0
            saves its own; those of the others are compared with them.
        states: Files beside the shards → digest of each.
    """

    save_id: str
    rank: int
    ranks: int
    sizes: Mapping[str, int]
    digests: Mapping[str, ShardDigests]
    names: Mapping[str, str]
    description: Mapping[str, Mapping[str, object]]
    rows: Mapping[str, PartRows]
    slots: Mapping[str, Mapping[str, str]]
    tensors: Mapping[str, str]
    states: Mapping[str, str]

    @classmethod
    def of(
        cls,
        layouts: Sequence[ShardLayout],
        digests: Mapping[str, ShardDigests],
        rows: Mapping[str, PartRows],
        tensors: Mapping[str, str],
        states: Mapping[str, tuple[int, str]],
        *,
        save_id: str,
        rank: int,
        ranks: int,
    ) -> RankPart:
        """Return the part that these shards are."""
        names: dict[str, str] = {}
        description: dict[str, dict[str, object]] = {}
        slots: dict[str, dict[str, str]] = {}
        for layout in layouts:
            for placed in (*layout.blocks, *layout.tied):
                block, key = placed.block, placed.key
                description[key] = layout.describe(placed)
                if block.table is not None and block.slice is not None:
                    names[key] = sparse_name(block.table, block.slot, block.slice)
                    row = f"{block.dtype} {list(block.shape[1:])}"
                    slots.setdefault(block.table, {})[block.slot] = row
        return cls(
            save_id=save_id,
            rank=rank,
            ranks=ranks,
            sizes={layout.file: layout.size for layout in layouts}
            | {file: size for file, (size, _) in states.items()},
            digests=digests,
            names=names,
            description=description,
            rows=rows,
            slots=slots,
            tensors=tensors,
            states={file: digest for file, (_, digest) in states.items()},
        )


def render_part(part: RankPart) -> bytes:
    value = {field.name: getattr(part, field.name) for field in fields(part)}
    value["rows"] = {table: part_as_json(rows) for table, rows in part.rows.items()}
    return orjson.dumps(value)


def parse_part(text: bytes) -> RankPart:
    """Read a text of `render_part`; raise `ValueError` if it is damaged."""
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
    states: dict[str, str] = {}
    for part in parts:
        names |= part.names
        description |= part.description
        shards |= part.digests
        states |= part.states
        for file, digests in part.digests.items():
            if file == MODEL:  # RecIS knows it by its name
                continue
            files[file] = int(file.removeprefix("model-").partition("-")[0])
            blocks |= dict.fromkeys(digests.blocks, files[file])
        for table, of_rank in part.rows.items():
            rows.setdefault(table, []).append(of_rank)
    for table, of_table in rows.items():
        _check_slices(table, of_table)
    _check_slots(parts)
    _check_tensors(parts)
    _check_states(parts)
    if len({file.rpartition("-of-")[2] for file in files}) > 1:  # two would have the same number
        raise ValueError(
            "the ranks' shards are not counted alike: give every rank's Saver the same parallel"
        )
    texts = {TENSORKEY: render_json(names), DESCRIPTION: render_json(description)}
    index = render_index(files, blocks)
    sidecar = render_sidecar(
        files=states | {name: digest_of(text) for name, text in {INDEX: index, **texts}.items()},
        shards=shards,
        parts=rows,
    )
    texts |= {SIDECAR: sidecar, INDEX: index}
    check_sizes({name: len(text) for name, text in texts.items()})
    return texts


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Refuse files that are longer than a load reads."""
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


def _check_tensors(parts: Sequence[RankPart]) -> None:
    """Refuse dense tensors that would be in no file, as rank 0 has none of that name and shape."""
    saved = parts[0].tensors
    for part in parts[1:]:
        for name, kind in part.tensors.items():
            if saved.get(name) != kind:
                other = f"rank 0 has {saved[name]}" if name in saved else "rank 0 has none"
                raise ValueError(
                    f"tensor {name!r} of rank {part.rank} ({kind}) would be in no file: only rank "
                    f"0's dense tensors are saved, and {other}; gather it on rank 0, or leave it "
                    f"out on rank {part.rank}"
                )


def _check_states(parts: Sequence[RankPart]) -> None:
    """Refuse to resume some ranks from where they stood, and others from the start."""
    without = [part.rank for part in parts if IO_STATE.format(rank=part.rank) not in part.states]
    if without and len(without) < len(parts):
        raise ValueError(
            f"ranks {without} gave no io_state, and the others did: give it on every rank, an "
            "empty dict will do"
        )


def _listed(slots: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({row})" for name, row in slots.items())
