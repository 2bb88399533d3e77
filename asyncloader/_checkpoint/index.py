"""Reads which names a checkpoint has, and in which shard they stand. Texts in, a catalog out.

In RecIS's format, these are the texts of `index` and `tensorkey.json`:

| kind | key | block name |
|---|---|---|
| dense tensor `w` | `w^ ` (a caret and a space) | the same |
| slot `s` of table `t`, rank r of R | `t.s/part_r_R` | `t@s^begin@end@size` |

Names are looked up exactly. A block name is split at its last `^`, a sparse name at its last `@`
before which a table with ids stands; so names may hold dots, slashes, spaces and `@` themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING

from asyncloader.errors import CheckpointError

from .format import DENSE_SUFFIX, INDEX, SIDECAR, TENSORKEY
from .long_slots import split_name, with_long_slots
from .problems import Problem
from .sidecar import check_files, parse_sidecar
from .slices import Slice
from .strict_json import members_of_objects, object_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .header import ShardHeader
    from .problems import Problems
    from .sidecar import Sidecar
    from .strict_json import Text


@dataclass(frozen=True, slots=True)
class Place:
    """A block's key, and the shard file that holds it."""

    key: str
    shard: str


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of one slot of a table."""

    slice: Slice  # the ids that the writing rank owned
    place: Place


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Places(Mapping[str, Place]):
    """Where dense tensors stand, by name. A `Place` is made when a caller asks for it."""

    block_keys: Mapping[str, str]  # of their blocks, by name
    shards: Mapping[str, str]  # their files, by name

    @classmethod
    def of(cls, places: Mapping[str, Place]) -> Places:
        """Return places as columns."""
        keys = {name: place.key for name, place in places.items()}
        return cls(keys, {name: place.shard for name, place in places.items()})

    def __len__(self) -> int:
        return len(self.block_keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self.block_keys)

    def __getitem__(self, name: str) -> Place:
        return Place(self.block_keys[name], self.shards[name])


@dataclass(frozen=True, slots=True)
class Catalog:
    """All names of a checkpoint.

    Attributes:
        tensors: Dense tensors by name.
        tables: Table → slot → its parts in the order of their slices. The ids are the slot `id`.
        source: The file that lists the names.
        files: All shards that it names, in order, also shards without a block.
        sidecar: Digests of all that it names, if there are any and they are wanted.
        oddities: Oddities that do no harm.
        headers: Those that are known already, by shard.
        broken: Why `model.pt` cannot be read; its tensors are not among the names then.
        recis: Whether the checkpoint is in RecIS's format.
    """

    tensors: Places
    tables: Mapping[str, Mapping[str, tuple[Part, ...]]]
    source: str = INDEX
    files: tuple[str, ...] = ()
    sidecar: Sidecar | None = None
    oddities: tuple[Problem, ...] = ()
    headers: Mapping[str, ShardHeader] = field(default_factory=dict)
    broken: CheckpointError | None = None
    recis: bool = False

    def names(self) -> tuple[str, ...]:
        """Return all names: of dense tensors, and `table@slot` of tables; ids are `table@id`."""
        slots = (f"{table}@{slot}" for table, held in self.tables.items() for slot in held)
        return tuple(dict.fromkeys((*self.tensors, *slots)))

    def whole(self) -> Catalog:
        """Return it; raise `CheckpointError` if some of its names could not be read."""
        if self.broken is not None:
            raise self.broken
        return self

    def places(self, name: str) -> tuple[Place, ...]:
        """Return the places of a name's blocks, in the order of their slices; perhaps none.

        Names match exactly. A tensor may have the name of a table's slot: then it is the tensor.
        """
        if (place := self.tensors.get(name)) is not None:
            return (place,)
        table, slot = split_name(self.tables, name)
        return tuple(part.place for part in self.tables.get(table, {}).get(slot, ()))


def parse_recis(problems: Problems, files: Mapping[str, Text], text: Text | None) -> Catalog:
    """Parse all files of names together.

    `files` has `index`, and `tensorkey.json` unless that could not be read; `text` is the sidecar,
    if there is one and it is wanted. `problems` receives wrong entries and contradictions.

    Raises:
        CheckpointError: If `index` is damaged.
    """
    sidecar, odd = None, ""
    if text is not None:
        with problems.caught():
            sidecar = parse_sidecar(problems.location, text)
            if sidecar is None:
                odd = "is of a format that is not known here, so nothing is verified"
            elif not check_files(problems, sidecar, files):
                sidecar = None
                odd = f"belongs to another save than {INDEX}, so nothing is verified"
    catalog = parse_catalog(problems, files[INDEX], files.get(TENSORKEY, b"{}"))
    oddities = (Problem(SIDECAR, None, odd),) if odd else ()
    return replace(catalog, sidecar=sidecar, oddities=oddities)


def parse_catalog(problems: Problems, index: Text, tensorkey: Text) -> Catalog:
    """Read the texts of `index` and `tensorkey.json`.

    `problems` receives entries that are wrong, or that the other file contradicts.

    Raises:
        CheckpointError: If `index` is not such JSON.
    """
    shards, blocks = _parse_index(problems, index)
    sparse: Mapping[str, object] = {}
    with problems.caught():
        sparse = object_in(problems.location, TENSORKEY, tensorkey, len)
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
            for table, slots in with_long_slots(tables).items()
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


def catalog_of_file(header: ShardHeader) -> Catalog:
    """Return the names in one file's header: the keys, as they stand."""
    file, keys = header.blocks.shard, {key: key for key in header.blocks}
    return Catalog(
        Places(keys, dict.fromkeys(keys, file)), {}, file, (file,), headers={file: header}
    )


def parse_weight_map(problems: Problems, text: Text, name: str) -> Catalog:
    """Read the text of a file `name` that says which tensor stands in which file.

    Hugging Face's folders of several files have one: `{"metadata": {...}, "weight_map": {tensor:
    file}}`. A tensor's name is its key, as it stands.

    Raises:
        CheckpointError: If it is not such JSON.
    """
    weight_map = object_in(problems.location, name, text, members_of_objects).get("weight_map")
    if not isinstance(weight_map, dict):
        problem = f"its weight_map is {shown(weight_map)}, not an object {{tensor: file}}"
        raise CheckpointError(problems.location, problem, name)
    sound = {}
    for key, shard in weight_map.items():
        if isinstance(shard, str) and is_file_name(shard):
            sound[key] = shard
        else:
            problems.add(f"its file {shown(shard)} is not a plain file name", name, key)
    places = Places({key: key for key in sound}, sound)
    return Catalog(places, {}, name, tuple(sorted(set(sound.values()))))


def _parse_index(problems: Problems, text: Text) -> tuple[dict[int, str], Mapping[str, int]]:
    """Return the shards by number, and the numbers of all blocks, each of which has a shard."""
    value = object_in(problems.location, INDEX, text, members_of_objects)
    files, blocks = value.get("file_index"), value.get("block_index")
    if not isinstance(files, dict) or not isinstance(blocks, dict):
        raise CheckpointError(problems.location, "lacks file_index or block_index", INDEX)
    shards: dict[int, str] = {}
    for name, number in files.items():
        problem = f"file_index gives {name!r} the number {shown(number)}, which is not its own"
        if not is_file_name(name):
            problems.add(f"{name[:200]!r} is not a plain file name", INDEX)
        elif type(number) is not int or number < 0:
            problems.add(problem, INDEX)
        elif number in shards:
            problems.add(f"{problem}: {shards[number]!r} has it", INDEX)
        else:
            shards[number] = name
    if set(map(type, blocks.values())) <= {int} and set(blocks.values()) <= shards.keys():
        return shards, blocks
    sound = {}
    for key, number in blocks.items():
        if type(number) is not int:
            problems.add(f"shard {shown(number)} is not a number", INDEX, key)
        elif number not in shards:
            problem = f"points to shard number {number}, which file_index does not name"
            problems.add(problem, INDEX, key)
        else:
            sound[key] = number
    return shards, sound


def is_file_name(name: str) -> bool:
    """Say whether the name stays inside the checkpoint's folder."""
    return name not in {"", ".", ".."} and not set(name) & set("/\\\0")


def _split(name: object) -> tuple[str, str, Slice]:
    """Split `table@slot^begin@end@size`; raise a `ValueError` if it is not of that form."""
    if not isinstance(name, str):
        raise ValueError(f"its name is not text: {shown(name)}")  # noqa: TRY004  # it is data
    full, caret, where = name.rpartition("^")
    table, at, slot = full.rpartition("@")
    if not caret or not at:
        raise ValueError(f"{name!r} is not of the form table@slot^begin@end@size")
    return table, slot, Slice.parse(where)
