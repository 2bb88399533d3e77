"""Reads the list of files in the archive that `torch.save` writes. Bytes in, frozen values out.

The archive is a zip: tensors are stored, not compressed, each in a file of its own, and all files
lie in one folder. The list stands at the archive's end. Before the bytes of each file stands a
local header, whose length the list does not have: torch pads it, so that bytes lie at multiples of
64. Nothing that the list says is believed before it is compared with the archive's length.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from io import SEEK_END, SEEK_SET
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


SIGNATURE = b"PK\x03\x04"
"""Of a local header; an archive of torch begins with one."""

HEADER = 30  # bytes of a local header before its names
TAIL = 64 << 10  # bytes of an archive's end that nearly always hold its list
MAX_LIST = 64 << 20  # bytes of an archive's end that are read at most: half a million files

_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x1
# Headers that are as near as this to each other are read at once, of so many bytes at most.
_NEAR, _SPAN = 4 << 10, 1 << 20
_UNPACKED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


class ArchiveError(ValueError):
    """A file is no archive of torch's, or a damaged one."""


class MoreNeededError(Exception):
    """More of an archive's end has to be read, from the byte `begin` on."""

    def __init__(self, begin: int) -> None:
        super().__init__(begin)
        self.begin = begin


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive.

    Attributes:
        name: Without the folder that all files are in.
        at: Where its local header begins.
        size: Bytes of its content.
        packed: Bytes that the content takes in the archive.
        is_stored: Whether it is not compressed.
        crc: CRC-32 of its content; 0 if it was not computed.
    """

    name: str
    at: int
    size: int
    packed: int
    is_stored: bool
    crc: int


@dataclass(frozen=True, slots=True)
class Archive:
    """What was read of a file of `torch.save`: all but its tensors.

    Attributes:
        shard: The file.
        size: Its length in bytes.
        entries: The files in it, by name.
        begins: Where their contents begin, by name.
        pickle: The text that describes the tensors.
    """

    shard: str
    size: int
    entries: Mapping[str, Entry]
    begins: Mapping[str, int]
    pickle: bytes


class _End:
    """The end of an archive, as a file."""

    def __init__(self, size: int, begin: int, content: bytes | bytearray) -> None:
        self._size = size
        self._begin = begin
        self._content = content
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        at = self._size + offset if whence == SEEK_END else offset
        if at < 0:
            raise OSError("before the beginning")
        self._at = at
        return at

    def read(self, length: int = -1) -> bytes:
        if self._at < self._begin and length:
            raise MoreNeededError(self._at)
        begin = self._at - self._begin
        end = len(self._content) if length < 0 else begin + length
        taken = bytes(self._content[begin:end])
        self._at += len(taken)
        return taken


def list_entries(size: int, begin: int, content: bytes | bytearray) -> dict[str, Entry]:
    """Return the files of an archive of `size` bytes, by name; `content` is its end, from `begin`.

    Raises:
        MoreNeededError: If its list begins before `begin`.
        ArchiveError: If it is no archive, or not one that torch writes.
    """
    try:
        with zipfile.ZipFile(_End(size, begin, content)) as archive:  # all that it uses
            listed = archive.infolist()
    except MoreNeededError as more:
        if size - more.begin > MAX_LIST:
            raise ArchiveError(f"its list of files takes more than {MAX_LIST:,} bytes") from more
        raise
    except Exception as error:  # what `zipfile` raises of a damaged list is not documented
        raise ArchiveError(
            f"is damaged, or cut short: {error}; copy it again, or, if torch before 1.6 wrote it, "
            "load it with torch.load and save it with torch.save"
        ) from error
    found: dict[str, Entry] = {}
    folder = listed[0].orig_filename.partition("/")[0] if listed else ""
    for one in listed:
        first, _, name = one.orig_filename.partition("/")
        if first != folder or not name:
            raise ArchiveError(f"{one.orig_filename[:100]!r} is not in the folder {folder[:100]!r}")
        if name in found:
            raise ArchiveError(f"{name!r} is there twice")
        found[name] = _entry(name, one)
    _check_places(found.values(), size)
    return found


def _entry(name: str, listed: zipfile.ZipInfo) -> Entry:
    is_stored = listed.compress_type == zipfile.ZIP_STORED
    if listed.flag_bits & _ENCRYPTED:
        raise ArchiveError(f"{name!r} is encrypted")
    if listed.compress_type not in _UNPACKED:
        raise ArchiveError(f"{name!r} is compressed by method {listed.compress_type}, no deflate")
    if is_stored and listed.file_size != listed.compress_size:
        raise ArchiveError(f"{name!r} has two sizes, {listed.file_size} and {listed.compress_size}")
    if not is_stored and listed.compress_size > listed.file_size + listed.file_size // 1000 + 64:
        raise ArchiveError(
            f"{name!r}: {listed.file_size} bytes do not take {listed.compress_size} compressed"
        )
    # No deflated text is shorter: its longest code, 258 bytes, takes two bits.
    if listed.file_size > 1032 * (listed.compress_size + 16):
        raise ArchiveError(f"{name!r}: {listed.compress_size} bytes cannot be {listed.file_size}")
    return Entry(
        name,
        listed.header_offset,
        listed.file_size,
        listed.compress_size,
        is_stored,
        listed.CRC,
    )


def _check_places(entries: Iterable[Entry], size: int) -> None:
    """Refuse entries that lie over each other, or beyond the end."""
    end, last = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.at):
        if entry.at < end:
            raise ArchiveError(f"{entry.name!r} lies over {last!r}")
        end, last = entry.at + HEADER + entry.packed, entry.name
    if end > size:
        raise ArchiveError(f"{last!r} ends at byte {end}, beyond the file's {size}")


def header_spans(entries: Iterable[Entry], size: int) -> list[tuple[int, int, list[Entry]]]:
    """Group entries whose local headers are read at once: first byte, end, entries."""
    spans: list[tuple[int, int, list[Entry]]] = []
    for entry in sorted(entries, key=lambda entry: entry.at):
        end = min(entry.at + HEADER, size)
        if spans and end - spans[-1][0] <= _SPAN and entry.at - spans[-1][1] <= _NEAR:
            begin, _, grouped = spans.pop()
            grouped.append(entry)
            spans.append((begin, end, grouped))
        else:
            spans.append((entry.at, end, [entry]))
    return spans


def content_begin(entry: Entry, header: bytes | memoryview, size: int) -> int:
    """Return where the content of an entry begins, given its local header.

    Raises:
        ArchiveError: If these bytes are not its header, or the content ends beyond the file's size.
    """
    if len(header) < HEADER:
        raise ArchiveError(f"{entry.name!r}: the file ends within its header")
    signature, _, flags, method, *_, names, extra = _LOCAL.unpack_from(header)
    if signature != SIGNATURE or flags & _ENCRYPTED:
        raise ArchiveError(f"{entry.name!r}: its header, at byte {entry.at}, is damaged")
    if (method == zipfile.ZIP_STORED) != entry.is_stored:
        raise ArchiveError(f"{entry.name!r}: the header says another compression than the list")
    begin: int = entry.at + HEADER + names + extra
    if begin + entry.packed > size:
        raise ArchiveError(
            f"{entry.name!r}: bytes [{begin}, {begin + entry.packed}) are beyond the file's {size}"
        )
    return begin


def check_contents(begins: Mapping[str, int], entries: Mapping[str, Entry]) -> None:
    """Refuse entries whose contents lie over the next header: padding could hide that."""
    found = sorted((entries[name] for name in begins), key=lambda entry: entry.at)
    for entry, following in pairwise(found):
        end = begins[entry.name] + entry.packed
        if end > following.at:
            raise ArchiveError(f"{entry.name!r} lies over {following.name!r}")
