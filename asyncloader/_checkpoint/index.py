"""Reads `index` and `tensorkey.json`: which names a checkpoint has, and in which shard they stand.

| kind | key | block name |
|---|---|---|
| dense tensor `w` | `w^ ` (a caret and a space) | the same |
| slot `s` of table `t`, rank r of R | `t.s/part_r_R` | `t@s^begin@end@size` |

Names are looked up exactly. A block name is split at its last `^`, a sparse name at its last `@`,
so that names may hold dots, slashes, spaces and `@` themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING

from asyncloader.errors import CheckpointError

from .files import INDEX, TENSORKEY
from .slices import Slice
from .strict_json import BadJsonError, parse_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .header import ShardHeader
    from .problems import Problem, Problems
    from .sidecar import Sidecar


DENSE_SUFFIX = "^ "


@dataclass(frozen=True, slots=True)
class Place:
    """A block's key, and the shard file that holds it."""

    key: str
    shard: str


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of one slot of a table."""

    slice: Slice
    """The ids that the writing rank owned."""

    place: Place


class Places(Mapping[str, Place]):
    """Where dense tensors stand, by name. A `Place` is made when it is asked for.

    Args:
        keys: Of their blocks, by name.
        shards: Their files, by name.
    """

    __slots__ = ("block_keys", "shards")

    def __init__(self, keys: Mapping[str, str], shards: Mapping[str, str]) -> None:
        self.block_keys = keys
        self.shards = shards

    @classmethod
    def of(cls, places: Mapping[str, Place]) -> Places:
        """Return places as columns."""
        return cls(
            {name: place.key for name, place in places.items()},
            {name: place.shard for name, place in places.items()},
        )

    def __repr__(self) -> str:
        return f"<Places of {len(self)} tensors>"

    def __len__(self) -> int:
        return len(self.block_keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self.block_keys)

    def __contains__(self, name: object) -> bool:
        return name in self.block_keys

    def __getitem__(self, name: str) -> Place:
        return Place(self.block_keys[name], self.shards[name])


@dataclass(frozen=True, slots=True)
class Catalog:
    """All names of a checkpoint."""

    tensors: Places
    """Dense tensors by name."""

    tables: Mapping[str, Mapping[str, tuple[Part, ...]]]
    """Table → slot → its parts in the order of their slices. The ids are the slot `id`."""

    source: str = INDEX
    """The file that says so."""

    files: tuple[str, ...] = ()
    """All shards that it names, in order, those without a block included."""

    sidecar: Sidecar | None = None
    """Digests of all that it names, if there are any and they are wanted."""

    oddities: tuple[Problem, ...] = ()
    """What is odd but does no harm."""

    header: ShardHeader | None = None
    """That of `source`, if it is the one shard that there is."""

    recis: bool = False
    """Whether it is in RecIS's format, whatever `source` is called."""


def parse_catalog(
    problems: Problems, index: bytes | bytearray, tensorkey: bytes | bytearray
) -> Catalog:
    """Read both files.

    Args:
        problems: Receives entries that are wrong, or that the other file contradicts.
        index: The text.
        tensorkey: The text.

    Raises:
        CheckpointError: If `index` is not such JSON.
    """
    shards, blocks = _parse_index(problems, index)
    sparse: Mapping[str, object] = {}
    with problems.caught():
        sparse = json_object(problems.location, TENSORKEY, tensorkey, len)
    tables: dict[str, dict[str, list[Part]]] = {}
    for key in filter(sparse.__contains__, blocks):
        if (found := _split(problems, key, sparse[key])) is not None:
            table, slot, where = found
            part = Part(where, Place(key, shards[blocks[key]]))
            tables.setdefault(table, {}).setdefault(slot, []).append(part)
    if not sparse.keys() <= blocks.keys():
        for key in filter(lambda key: key not in blocks, sparse):
            if not problems.blames(INDEX, key):
                problems.add(f"is named here but not in {INDEX}", TENSORKEY, key)
    return Catalog(
        _dense(problems, shards, _without(blocks, sparse)),
        {
            table: {slot: _in_order(parts) for slot, parts in slots.items()}
            for table, slots in tables.items()
        },
        files=tuple(sorted(shards.values())),
        recis=True,
    )


def _without(blocks: Mapping[str, int], sparse: Mapping[str, object]) -> Mapping[str, int]:
    return {key: blocks[key] for key in blocks if key not in sparse} if sparse else blocks


def _dense(problems: Problems, shards: Mapping[int, str], blocks: Mapping[str, int]) -> Places:
    """Return where tensors stand, given the shard number of each key."""
    keys = {key.removesuffix(DENSE_SUFFIX): key for key in blocks}
    if len(keys) < len(blocks):
        keys = {}
        for key in blocks:
            name = key.removesuffix(DENSE_SUFFIX)
            if (other := keys.setdefault(name, key)) != key:
                problem = f"tensor {name!r} stands here twice, {other!r} is the other one"
                problems.add(problem, INDEX, key)
    numbers = map(blocks.__getitem__, keys.values())
    return Places(keys, dict(zip(keys, map(shards.__getitem__, numbers), strict=True)))


def _in_order(parts: list[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: (part.slice, part.place.key)))


def json_object(
    location: str,
    name: str,
    text: bytes | bytearray,
    expected: Callable[[Mapping[str, object]], int],
) -> dict[str, object]:
    """Return the JSON object that the file `name` holds.

    Args:
        location: The checkpoint, for messages.
        name: Of the file.
        text: What is in it.
        expected: How many members it has, with those of objects within: see `parse_object`.

    Raises:
        CheckpointError: If it holds something else.
    """
    try:
        return parse_object(text, expected).value
    except BadJsonError as error:
        raise CheckpointError(location, str(error), name, error.key) from error


def members_of_objects(value: Mapping[str, object]) -> int:
    """Count the members of an object and of those that are its members."""
    return len(value) + sum(len(one) for one in value.values() if isinstance(one, dict))


def _parse_index(
    problems: Problems, text: bytes | bytearray
) -> tuple[dict[int, str], Mapping[str, int]]:
    """Return the shards by number, and the numbers of all blocks, each of which has a shard."""
    value = json_object(problems.location, INDEX, text, members_of_objects)
    files, blocks = value.get("file_index"), value.get("block_index")
    if not isinstance(files, dict) or not isinstance(blocks, dict):
        raise CheckpointError(problems.location, "lacks file_index or block_index", INDEX)
    shards: dict[int, str] = {}
    for name, number in files.items():
        given = f"file_index gives {name!r} the number {shown(number)}"
        if not is_file_name(name):
            problems.add(f"{name[:200]!r} is not a plain file name", INDEX)
        elif type(number) is not int or number < 0:
            problems.add(f"{given}, which is not its own", INDEX)
        elif number in shards:
            problems.add(f"{given}, which is not its own: {shards[number]!r} has it", INDEX)
        else:
            shards[number] = name
    if set(map(type, blocks.values())) <= {int} and set(blocks.values()) <= shards.keys():
        return shards, blocks
    return shards, {
        key: number for key, number in blocks.items() if _has_shard(problems, key, number, shards)
    }


def _has_shard(problems: Problems, key: str, number: object, shards: Mapping[int, str]) -> bool:
    if type(number) is not int:
        problems.add(f"shard {shown(number)} is not a number", INDEX, key)
    elif number not in shards:
        problem = f"points to shard number {number}, which file_index does not name"
        problems.add(problem, INDEX, key)
    else:
        return True
    return False


def is_file_name(name: str) -> bool:
    """Whether the name stays inside the checkpoint's folder."""
    return name not in {"", ".", ".."} and not set(name) & set("/\\\0")


def _split(problems: Problems, key: str, name: object) -> tuple[str, str, Slice] | None:
    """Split `table@slot^begin@end@size`; return `None` if a name is not of that form."""
    if not isinstance(name, str):
        problems.add(f"its name is not text: {shown(name)}", TENSORKEY, key)
        return None
    full, caret, where = name.rpartition("^")
    table, at, slot = full.rpartition("@")
    if not caret or not at:
        problem = f"{name!r} is not of the form table@slot^begin@end@size"
        problems.add(problem, TENSORKEY, key)
        return None
    try:
        return table, slot, Slice.parse(where)
    except ValueError as error:
        problems.add(str(error), TENSORKEY, key)
        return None
