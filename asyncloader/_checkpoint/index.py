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
from operator import attrgetter
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

    def __len__(self) -> int:
        return len(self.block_keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self.block_keys)

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
    """All shards that it names, in order, also shards without a block."""

    sidecar: Sidecar | None = None
    """Digests of all that it names, if there are any and they are wanted."""

    oddities: tuple[Problem, ...] = ()
    """Oddities that do no harm."""

    header: ShardHeader | None = None
    """That of `source`, if it is the one shard that there is."""

    recis: bool = False
    """Whether it is in RecIS's format."""


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
        with problems.about(TENSORKEY, key):
            table, slot, where = _split(sparse[key])
            part = Part(where, Place(key, shards[blocks[key]]))
            tables.setdefault(table, {}).setdefault(slot, []).append(part)
    if not sparse.keys() <= blocks.keys():
        for key in filter(lambda key: key not in blocks, sparse):
            if not problems.blames(INDEX, key):
                problems.add(f"is named here but not in {INDEX}", TENSORKEY, key)
    dense = {key: blocks[key] for key in blocks if key not in sparse} if sparse else blocks
    in_order = attrgetter("slice", "place.key")
    return Catalog(
        _dense(problems, shards, dense),
        {
            table: {slot: tuple(sorted(parts, key=in_order)) for slot, parts in slots.items()}
            for table, slots in tables.items()
        },
        files=tuple(sorted(shards.values())),
        recis=True,
    )


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
        text: Its content.
        expected: Counts its members, and the members of objects within: see `parse_object`.

    Raises:
        CheckpointError: If it holds something else.
    """
    try:
        return parse_object(text, expected).value
    except BadJsonError as error:
        raise CheckpointError(location, str(error), name, error.key) from error


def members_of_objects(value: Mapping[str, object]) -> int:
    """Count the members of an object, and the members of these."""
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
        with problems.about(INDEX):
            shards[_number_of_its_own(name, number, shards)] = name
    if set(map(type, blocks.values())) <= {int} and set(blocks.values()) <= shards.keys():
        return shards, blocks
    sound = {}
    for key, number in blocks.items():
        with problems.about(INDEX, key):
            sound[key] = _known_number(number, shards)
    return shards, sound


def _number_of_its_own(name: str, number: object, others: Mapping[int, str]) -> int:
    if not is_file_name(name):
        raise ValueError(f"{name[:200]!r} is not a plain file name")
    problem = f"file_index gives {name!r} the number {shown(number)}, which is not its own"
    if type(number) is not int or number < 0:
        raise ValueError(problem)
    if number in others:
        raise ValueError(f"{problem}: {others[number]!r} has it")
    return number


def _known_number(number: object, shards: Mapping[int, str]) -> int:
    if type(number) is not int:
        raise ValueError(f"shard {shown(number)} is not a number")
    if number not in shards:
        raise ValueError(f"points to shard number {number}, which file_index does not name")
    return number


def is_file_name(name: str) -> bool:
    """Whether the name stays inside the checkpoint's folder."""
    return name not in {"", ".", ".."} and not set(name) & set("/\\\0")


def _split(name: object) -> tuple[str, str, Slice]:
    """Split `table@slot^begin@end@size`.

    Raises:
        ValueError: If it is not of that form.
    """
    if not isinstance(name, str):
        raise ValueError(f"its name is not text: {shown(name)}")  # noqa: TRY004  # it is data
    full, caret, where = name.rpartition("^")
    table, at, slot = full.rpartition("@")
    if not caret or not at:
        raise ValueError(f"{name!r} is not of the form table@slot^begin@end@size")
    return table, slot, Slice.parse(where)
