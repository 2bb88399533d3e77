"""Several checkpoints as one: their names and files with the folder's path before them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from asyncloader.errors import CheckpointError

from .index import Catalog, Part, Place, Places
from .sidecar import Sidecar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .header import ShardHeader
    from .manifest import Manifest


def label(path: str, name: str) -> str:
    """Return what a name of one checkpoint is called among several."""
    return f"{path}: {name}"


def shard_of(path: str, file: str) -> str:
    """Return what a file of one checkpoint is called among several."""
    return f"{path}/{file}"


def split_shard(shard: str) -> tuple[str, str]:
    """Return the path and the file of `shard_of`: a file's name holds no slash."""
    path, _, file = shard.rpartition("/")
    return path, file


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What is used of one checkpoint: its names, of tensors and of tables."""

    catalog: Catalog
    tensors: Iterable[str]
    tables: Iterable[str]


def join_catalogs(used: Mapping[str, Used]) -> Catalog:
    """Return the used names of all checkpoints, by path, as those of one.

    Raises:
        CheckpointError: If two names cannot be told apart: `b: c` of `a`, and `c` of `a: b`.
    """
    keys: dict[str, str] = {}
    shards: dict[str, str] = {}
    tables: dict[str, Mapping[str, tuple[Part, ...]]] = {}
    parts: dict[str, object] = {}
    for path, one in used.items():
        places = one.catalog.tensors
        for name in one.tensors:
            _check_new(keys, path, name)
            keys[label(path, name)] = places.block_keys[name]
            shards[label(path, name)] = shard_of(path, places.shards[name])
        spread = None if one.catalog.sidecar is None else one.catalog.sidecar.parts
        for table in one.tables:
            _check_new(tables, path, table)
            tables[label(path, table)] = {
                slot: tuple(_moved(part, path) for part in of)
                for slot, of in one.catalog.tables[table].items()
            }
            if isinstance(spread, dict) and table in spread:
                parts[label(path, table)] = spread[table]
    recis = any(one.catalog.recis for one in used.values())
    sidecar = Sidecar(files={}, shards={}, parts=parts)
    return Catalog(Places(keys, shards), tables, sidecar=sidecar, recis=recis)


def _check_new(known: Mapping[str, object], path: str, name: str) -> None:
    if label(path, name) in known:
        problem = f"{name!r} cannot be told from a name of another folder: rename the folder"
        raise CheckpointError(path, problem)


def _moved(part: Part, path: str) -> Part:
    return replace(part, place=Place(part.place.key, shard_of(path, part.place.shard)))


def join_headers(manifests: Mapping[str, Manifest]) -> dict[str, ShardHeader]:
    """Return the headers of all checkpoints, by path, under the names of their files among all."""
    return {
        shard_of(path, file): replace(
            header, blocks=replace(header.blocks, shard=shard_of(path, file))
        )
        for path, manifest in manifests.items()
        for file, header in manifest.headers.items()
    }
