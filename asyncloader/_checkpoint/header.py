"""Reads the header of a shard file. Bytes in, frozen values out.

A shard is a safetensors file: 8 bytes little-endian header length, that many bytes of JSON
`{key: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the data; offsets count from its
first byte. Nothing that a header says is believed before it is checked against the length of the
file: a block that this module returns lies within the file, overlaps no other, and is as long as
its dtype and shape demand. What safetensors refuses is refused; `check_covered` has the one rule
that does not hold for RecIS's files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING

from asyncloader.errors import CheckpointError, TruncatedShardError

from .blocks import lay_out
from .entries import FIELDS, are_all, read_entries
from .files import SIDECAR
from .kinds import LOOKED_AT, kind_of
from .sidecar import digest_of
from .strict_json import BadJsonError, has_negative_zero, parse_object

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .blocks import Blocks
    from .problems import Problems
    from .sidecar import ShardDigests
    from .strict_json import Text


PREFIX = 8
# As much as safetensors itself allows: room for a million tensors in one shard.
MAX_HEADER = 100_000_000
FIRST = LOOKED_AT
"""How many of a file's first bytes say what it is."""

_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What one shard file declares."""

    shard: str
    blocks: Blocks

    surplus: int
    """Bytes after the last block."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """Free text, `__metadata__`."""

    gap: tuple[str, int] | None = None
    """The first block that does not begin where the one before it ends, and where that is."""


def header_length(location: str, shard: str, start: bytes, size: int) -> int:
    """Return the length of the header in bytes, once it is known to be possible.

    Args:
        location: The checkpoint, for messages.
        shard: The file's name.
        start: The file's first bytes, `FIRST` of them or all that there are.
        size: The file's length.

    Raises:
        TruncatedShardError: If the file ends within its header.
        CheckpointError: If it is no safetensors file; it says what else, where that is known.
    """
    length = int.from_bytes(start[:PREFIX], "little")
    begins = start[PREFIX : PREFIX + 1] in {b"", b"{", b" "}
    if len("{}") <= length <= MAX_HEADER and len(start) >= PREFIX and begins:
        if PREFIX + length <= size:
            return length
        raise TruncatedShardError(location, shard, None, PREFIX, PREFIX + length, size)
    kind = kind_of(start)
    if kind is not None:
        problem = f"is not a safetensors file but {kind}"
    elif len(start) < PREFIX:
        raise TruncatedShardError(location, shard, None, 0, PREFIX, size)
    elif MAX_HEADER < length <= size - PREFIX and begins:
        problem = (
            f"its header is {length:,} bytes long, and no more than {MAX_HEADER:,} are read, here "
            "and by safetensors itself; save it to several files"
        )
    elif begins or not len("{}") <= length <= MAX_HEADER:
        problem = f"declares a header of {length} bytes; this is not a safetensors file"
    else:
        problem = "does not start with a safetensors header"
    raise CheckpointError(location, problem, shard)


def parse_header(
    problems: Problems,
    shard: str,
    text: Text,
    size: int,
    *,
    recis: bool,
    digests: ShardDigests | None = None,
) -> ShardHeader:
    """Read the JSON of a header.

    Args:
        problems: Receives what is wrong: a block that does not fit its offsets, the file or the
            other blocks; digests that are not those of this header.
        shard: The file's name.
        text: The header, without the 8 bytes before it.
        size: The file's length in bytes.
        recis: Whether it is a shard of RecIS's, who spells dtypes in a way of his own.
        digests: What the sidecar says of the shard.

    Raises:
        CheckpointError: If it is not such JSON.
    """
    try:
        parsed = parse_object(text, _members)
    except BadJsonError as error:
        problem = f"its header {error}"
        raise CheckpointError(problems.location, problem, shard, error.key) from error
    entries, start = parsed.value, PREFIX + len(text)
    if digests is not None:
        _check_digest(problems, shard, text, digests.header)
    metadata = _metadata(problems, shard, entries.pop(_METADATA, None))
    blocks = read_entries(
        problems,
        shard,
        entries,
        start=start,
        digests=digests,
        only_fields=parsed.as_expected,
        recis=recis,
    )
    if has_negative_zero(text):
        problems.add("its header has -0 for a number, which is no size and no offset", shard)
    layout = lay_out(problems, blocks, start, size)
    if len(layout.blocks) < len(entries):  # bytes between blocks may be those of the others
        return ShardHeader(shard, layout.blocks, 0, metadata)
    return ShardHeader(shard, layout.blocks, size - layout.end, metadata, layout.gap)


def check_covered(problems: Problems, header: ShardHeader, *, surplus: bool) -> None:
    """Refuse a file of which bytes belong to no block: another reader might find more in it.

    Args:
        problems: Receives a gap between two blocks, or before the first, or bytes after the last.
        header: What the file declares.
        surplus: Whether there may be bytes after the last block.
    """
    if header.gap is not None:
        key, end = header.gap
        problem = (
            f"begins at byte {header.blocks[key].offset} of the file, but what is before it ends "
            f"at {end}: blocks stand back to back"
        )
        problems.add(problem, header.shard, key)
    if header.surplus and not surplus:
        problem = (
            f"{header.surplus} bytes after its last block belong to none, safetensors itself "
            "refuses such a file; copy it again"
        )
        problems.add(problem, header.shard)


def _members(entries: Mapping[str, object]) -> int:
    """Return how many members a header has, if each entry has its fields and no more."""
    count, metadata = len(entries) * (1 + len(FIELDS)), entries.get(_METADATA)
    if _METADATA in entries:
        count -= len(FIELDS)
    return count + len(metadata) if isinstance(metadata, dict) else count


def _metadata(problems: Problems, shard: str, metadata: object) -> Mapping[str, str]:
    if metadata is None:  # safetensors takes null for none
        return {}
    if isinstance(metadata, dict) and are_all(metadata.values(), str):
        return metadata
    problems.add(f"is {shown(metadata)}, not an object {{text: text}}", shard, _METADATA)
    return {}


def _check_digest(problems: Problems, shard: str, text: Text, wanted: str) -> None:
    found = digest_of(len(text).to_bytes(PREFIX, "little") + bytes(text))
    if found != wanted:
        end = PREFIX + len(text)
        problem = f"bytes [0, {end}), its header, are not those that were written: {SIDECAR} has "
        problem += f"the digest {wanted}, they have {found}; copy the file again"
        problems.add(problem, shard)
