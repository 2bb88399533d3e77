"""The sidecar `asyncloader.json`: digests of all bytes, and where the rows of sub-slices begin.

RecIS neither writes nor reads it. A checkpoint without a sidecar can be loaded, and not verified.

    {"format": 1, "digest": "xxh3-128", "chunk_bytes": 8388608,
     "files":  {"index": digest, "tensorkey.json": digest},
     "shards": {file: {"header": digest, "blocks": {key: [digest of each chunk]}}},
     "parts":  {table: [{"slice": "begin@end@size", "rows": n, "offsets": [257 row numbers]}]}}

A block's chunks are counted from its own first byte; the last one may be shorter. A header's digest
is that of the shard's bytes before its data. Rows of a part are sorted by their slice position, and
`offsets[i]` is the first row whose position is not below that of the part's sub-slice i of 256.

The digest of `index` ties the sidecar to the checkpoint. Another program may write a new checkpoint
into the folder, and leave the old sidecar: then the digest differs.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import chain
from reprlib import repr as shown  # shortens
from typing import TYPE_CHECKING, Any

import orjson

from asyncloader.errors import CheckpointError

from .format import INDEX, SIDECAR
from .slices import Slice
from .strict_json import BadJsonError, parse_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .problems import Problems
    from .strict_json import Text


DIGEST_CHUNK = 8 << 20  # the bytes of one digest
SUB_SLICES = 256
_FORMAT = 1
_ALGORITHM = "xxh3-128"
_HEX = 32


def digest_of(data: Text | memoryview) -> str:
    """Return the digest of bytes, 32 hexadecimal digits. Holds no GIL while it computes."""
    import xxhash  # noqa: PLC0415  # not every checkpoint has digests

    return xxhash.xxh3_128_hexdigest(data)


def chunk_count(nbytes: int) -> int:
    """Return how many chunks a block has."""
    return -(-nbytes // DIGEST_CHUNK)


@dataclass(frozen=True, slots=True)
class ShardDigests:
    """The digests of one shard."""

    header: str  # of the bytes before the data
    blocks: Mapping[str, tuple[str, ...]]  # by key, of each chunk


@dataclass(frozen=True, slots=True)
class PartRows:
    """How the rows of one part are spread over its slice."""

    slice: Slice
    rows: int
    offsets: tuple[int, ...]  # the first row of each of 256 equal sub-slices, and `rows`

    @property
    def cuts(self) -> list[int]:
        """The first position of each sub-slice but the first."""
        begin, share = self.slice.begin, self.slice.end - self.slice.begin
        return [begin + share * number // SUB_SLICES for number in range(1, SUB_SLICES)]

    def among(self, wanted: Slice) -> range:
        """Return the rows of the sub-slices that `wanted`, of the same size, meets.

        Rows of ids below the part's slice belong to the first sub-slice, rows of ids beyond it to
        the last: that is how rows are sorted.
        """
        part, cuts = self.slice, self.cuts
        first = bisect_right(cuts, wanted.begin) if wanted.begin > part.begin else 0
        last = bisect_left(cuts, wanted.end) + 1 if wanted.end < part.end else SUB_SLICES
        return range(self.offsets[first], self.offsets[last])


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A sidecar that was read.

    Attributes:
        files: Digests of `index`, `tensorkey.json` and the description.
        shards: Digests by shard file.
        parts: As JSON has them: to check them all takes longer than to read the rest.
    """

    files: Mapping[str, str]
    shards: Mapping[str, ShardDigests]
    parts: object

    def spread(self, location: str, table: str, slice_: Slice) -> PartRows | None:
        """Read how the rows of one part are spread, if that is known.

        Raises:
            CheckpointError: If that is damaged.
        """
        with _damage(location):
            for entry in _list(_object(self.parts).get(table, [])):
                if _object(entry).get("slice") == str(slice_):
                    return part_of_json(entry)
        return None

    def all_spread(self, location: str) -> dict[str, tuple[PartRows, ...]]:
        """Read how the rows of all parts are spread, by table.

        Raises:
            CheckpointError: If that is damaged.
        """
        with _damage(location):
            return {
                table: tuple(part_of_json(entry) for entry in _list(entries))
                for table, entries in _object(self.parts).items()
            }


def render_sidecar(
    files: Mapping[str, str],
    shards: Mapping[str, ShardDigests],
    parts: Mapping[str, Iterable[PartRows]],
) -> bytes:
    """Return the text of the file; see `Sidecar`."""
    value = {
        "format": _FORMAT,
        "digest": _ALGORITHM,
        "chunk_bytes": DIGEST_CHUNK,
        "files": files,
        "shards": shards,
        "parts": {table: [part_as_json(part) for part in rows] for table, rows in parts.items()},
    }
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def parse_sidecar(location: str, text: Text) -> Sidecar | None:
    """Read the file; return `None` if it is of a format that is not known here.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        value = parse_object(text, _members)
    except BadJsonError as error:
        raise _bad(location, str(error), error.key) from error
    if type(value.get("format")) is not int:
        raise _bad(location, "lacks the number of its format")
    if value["format"] != _FORMAT:
        return None
    said = value.get("digest"), value.get("chunk_bytes")
    # We write an integer: 8388608.0 is equal, and shows that another program has written it.
    if said != (_ALGORITHM, DIGEST_CHUNK) or type(said[1]) is not int:
        wanted = f"those of its format {_ALGORITHM!r} of {DIGEST_CHUNK} bytes"
        raise _bad(location, f"damaged: its digests are {shown(said)}, {wanted}")
    with _damage(location):
        return Sidecar(
            files={name: _digest(text) for name, text in _object(value["files"]).items()},
            shards=shards_of_json(value["shards"]),
            parts=value["parts"],
        )


def check_files(problems: Problems, sidecar: Sidecar, texts: Mapping[str, Text]) -> bool:
    """Say whether the sidecar was written with this `index`.

    `texts` are `index` and other files that it has digests of, by name. `problems` receives the
    files that were not written with it.
    """
    known = sidecar.files.get(INDEX) == digest_of(texts[INDEX])
    if not known and not texts[INDEX].endswith(b"\n"):
        return False  # RecIS wrote it: a damaged one of ours would still end like this
    for name, text in texts.items():
        check_file(problems, sidecar, name, text)
    return known


def check_file(problems: Problems, sidecar: Sidecar, name: str, text: Text) -> None:
    """Compare a file with its digest."""
    wanted, found = sidecar.files.get(name), digest_of(text)
    if found != wanted:
        problem = (
            f"is not what was written: {SIDECAR} has the digest {wanted}, it has {found}; copy it "
            "again"
        )
        problems.add(problem, name)


@contextlib.contextmanager
def _damage(location: str) -> Iterator[None]:
    """Raise the error of a damaged sidecar where the `with` block cannot read it."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise _bad(location, f"damaged: {error}") from error


def _bad(location: str, problem: str, key: str | None = None) -> CheckpointError:
    problem += "; copy it again. With verify='off' the checkpoint can be loaded unverified"
    return CheckpointError(location, problem, SIDECAR, key)


def _members(value: Mapping[str, object]) -> int:
    """Count the members of objects, down to the digests of a block and to the parts of a table."""
    outer = _objects(value.values())
    entries = [entry for one in outer for entry in one.values()]
    lists = chain.from_iterable(entry for entry in entries if isinstance(entry, list))
    inner = _objects(chain(entries, lists))
    blocks = _objects(field for one in inner for field in one.values())
    return len(value) + sum(map(len, chain(outer, inner, blocks)))


def _objects(values: Iterable[object]) -> list[dict[str, object]]:
    return [one for one in values if isinstance(one, dict)]


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} is not an object")  # noqa: TRY004  # it is data
    return value


def _list(value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{shown(value)} is not a list")  # noqa: TRY004  # it is data
    return value


def _digest(value: object) -> str:
    if not isinstance(value, str) or len(value) != _HEX:
        raise ValueError(f"{shown(value)} is not a digest")
    return value


def shards_of_json(value: object) -> dict[str, ShardDigests]:
    """Read the digests of shards; raise `KeyError` or `ValueError` if these are none."""
    found = {}
    for shard, entry in _object(value).items():
        blocks = {
            key: tuple(_digest(one) for one in _list(digests))
            for key, digests in _object(_object(entry)["blocks"]).items()
        }
        found[shard] = ShardDigests(_digest(entry["header"]), blocks)
    return found


def part_as_json(part: PartRows) -> dict[str, Any]:
    return {"slice": str(part.slice), "rows": part.rows, "offsets": part.offsets}


def part_of_json(value: object) -> PartRows:
    """Read a value of `part_as_json`; raise `KeyError` or `ValueError` if it is none."""
    entry = _object(value)
    rows, offsets, text = entry["rows"], _list(entry["offsets"]), entry["slice"]
    if not isinstance(text, str) or type(rows) is not int:
        raise ValueError(f"{shown(entry)} is not a part")
    ascending = all(type(one) is int for one in offsets) and list(offsets) == sorted(offsets)
    if not ascending or len(offsets) != SUB_SLICES + 1 or (offsets[0], offsets[-1]) != (0, rows):
        raise ValueError(f"offsets {shown(offsets)} are not those of {SUB_SLICES} sub-slices")
    return PartRows(Slice.parse(text), rows, tuple(offsets))
