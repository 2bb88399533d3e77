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

from .entries import FIELDS, are_all, read_entries
from .files import SIDECAR
from .kinds import LOOKED_AT, kind_of
from .layout import check_layout
from .sidecar import digest_of
from .strict_json import BadJsonError, has_negative_zero, parse_object

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .blocks import Blocks
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
    location: str,
    shard: str,
    text: Text,
    size: int,
    *,
    recis: bool,
    digests: ShardDigests | None = None,
) -> ShardHeader:
    """Read the JSON of a header.

    Args:
        location: The checkpoint, for messages.
        shard: The file's name.
        text: The header, without the 8 bytes before it.
        size: The file's length in bytes.
        recis: Whether it is a shard of RecIS's, who spells dtypes in a way of his own.
        digests: What the sidecar says of the shard.

    Raises:
        CheckpointError: If it is not such JSON, the offsets contradict each other, or the digests
            are not those of this header.
        TruncatedShardError: If the file ends before its last block does.
    """
    try:
        parsed = parse_object(text, _members)
    except BadJsonError as error:
        raise CheckpointError(location, f"its header {error}", shard, error.key) from error
    entries, start = parsed.value, PREFIX + len(text)
    if digests is not None:
        _check_digest(location, shard, text, digests.header)
    metadata = _metadata(location, shard, entries.pop(_METADATA, None))
    blocks = read_entries(
        location,
        shard,
        entries,
        start=start,
        digests=digests,
        only_fields=parsed.as_expected,
        recis=recis,
    )
    if has_negative_zero(text):
        raise CheckpointError(
            location, "its header has -0 for a number, which is no size and no offset", shard
        )
    end, gap = check_layout(location, blocks, start, size)
    return ShardHeader(shard, blocks, size - end, metadata, gap)


def check_covered(location: str, header: ShardHeader, *, surplus: bool) -> None:
    """Refuse a file of which bytes belong to no block: another reader might find more in it.

    Args:
        location: The checkpoint, for messages.
        header: What the file declares.
        surplus: Whether there may be bytes after the last block.

    Raises:
        CheckpointError: If there is a gap between two blocks, or before the first, or such bytes.
    """
    if header.gap is not None:
        key, end = header.gap
        block = header.blocks[key]
        problem = (
            f"begins at byte {block.offset} of the file, but what is before it ends at {end}: "
            "blocks stand back to back"
        )
        raise CheckpointError(location, problem, header.shard, key)
    if header.surplus and not surplus:
        problem = (
            f"{header.surplus} bytes after its last block belong to none, safetensors itself "
            "refuses such a file; copy it again"
        )
        raise CheckpointError(location, problem, header.shard)


def _members(entries: Mapping[str, object]) -> int:
    """Return how many members a header has, if each entry has its fields and no more."""
    count, metadata = len(entries) * (1 + len(FIELDS)), entries.get(_METADATA)
    if _METADATA in entries:
        count -= len(FIELDS)
    return count + len(metadata) if isinstance(metadata, dict) else count


def _metadata(location: str, shard: str, metadata: object) -> Mapping[str, str]:
    if metadata is None:  # safetensors takes null for none
        return {}
    if not isinstance(metadata, dict) or not are_all(metadata.values(), str):
        problem = f"is {shown(metadata)}, not an object {{text: text}}"
        raise CheckpointError(location, problem, shard, _METADATA)
    return metadata


def _check_digest(location: str, shard: str, text: Text, wanted: str) -> None:
    found = digest_of(len(text).to_bytes(PREFIX, "little") + bytes(text))
    if found != wanted:
        end = PREFIX + len(text)
        problem = f"bytes [0, {end}), its header, are not those that were written: {SIDECAR} has "
        problem += f"the digest {wanted}, they have {found}; copy the file again"
        raise CheckpointError(location, problem, shard)
