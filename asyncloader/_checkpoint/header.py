"""Reads the header of a shard file. Bytes in, frozen values out.

A shard is a safetensors file: 8 bytes little-endian header length, that many bytes of JSON
`{key: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the data; offsets count from its
first byte. Nothing that a header says is believed before it is checked against the length of the
file: a block that this module returns lies within the file, overlaps no other, and is as long as
its dtype and shape demand. What safetensors refuses is refused, but for bytes after the last block
of a file of RecIS's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING

from asyncloader.errors import CheckpointError, TruncatedShardError

from .blocks import lay_out
from .entries import FIELDS, are_all, read_entries
from .format import MAX_HEADER, PREFIX, SIDECAR
from .sidecar import digest_of
from .strict_json import BadJsonError, has_negative_zero, parse_object

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader._storage.unpacking import PackedTensor

    from .archive import Archive
    from .blocks import Blocks
    from .problems import Problems
    from .sidecar import ShardDigests
    from .strict_json import Text


FIRST = 512  # so many of a file's first bytes show which kind of file it is

_METADATA = "__metadata__"
_TEXT = rb"(\xef\xbb\xbf)?\s*"  # the beginning of a text, perhaps behind a byte order mark
_SAVE = "load it with torch.load and write it with safetensors.torch.save_file"
# The beginning of a file; its kind, and advice. `torch.save` writes ZIP archives, and wrote pickles
# before.
_KINDS = (
    (
        rb"version https://git-lfs\.github\.com/spec/",
        (
            "a Git LFS pointer, in place of the file that it stands for; fetch the file: "
            "`git lfs pull`"
        ),
    ),
    (rb"PK\x03\x04", f"a ZIP archive, such as torch.save writes (.pt, .bin); {_SAVE}"),
    (rb"GGUF", "a GGUF file, of llama.cpp; take the safetensors file of the same model"),
    (rb"\x1f\x8b", "compressed with gzip; unpack it: `gzip -d`"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it: `zstd -d`"),
    (rb"\xfd7zXZ\x00", "compressed with xz; unpack it: `xz -d`"),
    (rb"BZh", "compressed with bzip2; unpack it: `bzip2 -d`"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file; convert it to safetensors"),
    (rb"\x93NUMPY", "a NumPy array (.npy); convert it to safetensors"),
    (rb"\x00{8}", "zeros, as a copy that broke off leaves them; copy the file again"),
    (rb"\x80[\x02-\x05][\x8a\x95}(\x5dcq]", f"a pickle, such as torch.save wrote; {_SAVE}"),
    (
        _TEXT + rb"(?i:<!doctype html|<html|<head|<body)",
        "an HTML page: the download brought a web page; download the file again",
    ),
    (
        _TEXT + rb"(?i:<\?xml|<[a-z]+[ >])",
        "an XML text, such as a store's error message; download the file again",
    ),
    (
        _TEXT + rb"[{[]\s*[\"{}\[\]]",
        "JSON text, not tensors; if it lists a checkpoint's files, give its folder",
    ),
    (rb"(?s:.{257})ustar", "a tar archive; unpack it"),
)


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The content of one shard, as its header declares it."""

    blocks: Blocks
    surplus: int  # bytes after the last block
    metadata: Mapping[str, str] = field(default_factory=dict)  # free text, `__metadata__`
    archive: Archive | None = None  # where the shard is a file of `torch.save`
    packed: tuple[PackedTensor, ...] = ()  # blocks whose bytes a storage gathers


def header_length(location: str, shard: str, start: bytes, size: int) -> int:
    """Return the length of the header in bytes, once it is known to be possible.

    `start` has the first `FIRST` bytes of the file, or all of a shorter one; `size` is its length.

    Raises:
        TruncatedShardError: If the file ends within its header.
        CheckpointError: If it is no safetensors file; it names the kind of file, if that is known.
    """
    length = int.from_bytes(start[:PREFIX], "little")
    begins = start[PREFIX : PREFIX + 1] in {b"", b"{", b" "}
    if len("{}") <= length <= MAX_HEADER and len(start) >= PREFIX and begins:
        if PREFIX + length <= size:
            return length
        raise TruncatedShardError(location, shard, None, PREFIX, PREFIX + length, size)
    kind = next((kind for beginning, kind in _KINDS if re.match(beginning, start)), None)
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
    """Read the JSON of a header: `text`, without the 8 bytes before it, of a file of `size` bytes.

    `problems` receives blocks that do not fit their offsets, the file or the other blocks, and
    digests of another header. A shard of RecIS's, `recis`, may spell dtypes in its own way.

    Raises:
        CheckpointError: If it is not such JSON.
    """
    try:
        entries = parse_object(text, _members)
    except BadJsonError as error:
        raise CheckpointError(problems.location, f"its header {error}", shard, error.key) from error
    start = PREFIX + len(text)
    if digests is not None:
        whole = len(text).to_bytes(PREFIX, "little") + bytes(text)
        check_digest(problems, shard, whole, digests.header, f"bytes [0, {start}), its header,")
    metadata = _metadata(problems, shard, entries.pop(_METADATA, None))
    blocks = read_entries(problems, shard, entries, start=start, digests=digests, recis=recis)
    if has_negative_zero(text):
        problems.add("its header has -0 for a number, which is no size and no offset", shard)
    sound, end = lay_out(problems, blocks, start, size, whole=len(blocks) == len(entries))
    surplus = size - end if len(sound) == len(entries) else 0
    if surplus and not recis:
        problem = (
            f"{surplus} bytes after its last block belong to none, safetensors itself refuses such "
            "a file; copy it again"
        )
        problems.add(problem, shard)
    return ShardHeader(sound, surplus, metadata)


def _members(entries: Mapping[str, object]) -> int:
    """Count the members of a header in which each entry has its fields and no more."""
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


def check_digest(problems: Problems, shard: str, text: bytes, wanted: str, what: str) -> None:
    """Compare the text of a header with its digest."""
    found = digest_of(text)
    if found != wanted:
        problem = f"{what} are not those that were written: {SIDECAR} has "
        problem += f"the digest {wanted}, they have {found}; copy the file again"
        problems.add(problem, shard)
