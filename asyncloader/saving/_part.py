"""What one rank has written, as it tells rank 0: a small file beside its shards."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from asyncloader.checkpoint import (
    DESCRIPTION,
    INDEX,
    SIDECAR,
    TENSORKEY,
    PartRows,
    ShardDigests,
    Sidecar,
    Slice,
    digest_of,
    render_index,
    render_json,
    render_sidecar,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader.planning import ShardLayout

__all__ = ["RankPart", "merge_parts", "parse_part", "render_part"]


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
    ) -> RankPart:
        """Return the part that these shards are."""
        names: dict[str, str] = {}
        description: dict[str, dict[str, object]] = {}
        for layout in layouts:
            names |= layout.names()
            description |= layout.description()
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
        )


def render_part(part: RankPart) -> bytes:
    """Return the text of a part file."""
    return orjson.dumps(
        {
            "save_id": part.save_id,
            "rank": part.rank,
            "ranks": part.ranks,
            "numbers": part.numbers,
            "sizes": part.sizes,
            "digests": {
                file: {"header": digests.header, "blocks": digests.blocks}
                for file, digests in part.digests.items()
            },
            "names": part.names,
            "description": part.description,
            "rows": {
                table: [str(rows.slice), rows.rows, rows.offsets]
                for table, rows in part.rows.items()
            },
        }
    )


def parse_part(text: bytes) -> RankPart:
    """Read a part file that `render_part` wrote."""
    value: dict[str, Any] = orjson.loads(text)
    value["digests"] = {
        file: ShardDigests(entry["header"], {k: tuple(v) for k, v in entry["blocks"].items()})
        for file, entry in value["digests"].items()
    }
    value["rows"] = {
        table: PartRows(Slice.parse(part), rows, tuple(offsets))
        for table, (part, rows, offsets) in value["rows"].items()
    }
    return RankPart(**value)


def merge_parts(parts: Sequence[RankPart]) -> dict[str, bytes]:
    """Return the texts of a checkpoint's files besides its shards, `index` last.

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
    index, tensorkey = render_index(files, blocks), render_json(names)
    sidecar = Sidecar(
        files={INDEX: digest_of(index), TENSORKEY: digest_of(tensorkey)},
        shards=shards,
        parts={table: tuple(of_table) for table, of_table in rows.items()},
    )
    return {
        TENSORKEY: tensorkey,
        DESCRIPTION: render_json(description),
        SIDECAR: render_sidecar(sidecar),
        INDEX: index,
    }


def _check_slices(table: str, parts: list[PartRows]) -> None:
    """Refuse parts that claim the same ids: nobody could say whose rows are right."""
    parts.sort(key=lambda part: part.slice)
    for one, other in itertools.pairwise(parts):
        if one.slice.size != other.slice.size or not one.slice.disjoint(other.slice):
            raise ValueError(
                f"table {table!r}: one rank's slice is {one.slice}, another's {other.slice}, which "
                "overlap; give each rank's table slice=gen_slice(shard_index, shard_num)"
            )
