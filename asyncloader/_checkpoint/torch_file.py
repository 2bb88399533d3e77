"""Reads the names and places of the tensors in a file of `torch.save`, as those of a shard.

Nothing is unpickled (see `pickled`), and no tensor is read. A tensor's name is its key; in dicts
and lists within each other, the keys with dots between. Other values are left out.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._storage.protocol import fill, read_exactly
from asyncloader._storage.unpacking import Deflated, PackedTensor
from asyncloader._threads.jobs import run_jobs, undisturbed
from asyncloader.errors import CheckpointError

from .archive import (
    HEADER,
    TAIL,
    Archive,
    ArchiveError,
    MoreNeededError,
    check_contents,
    content_begin,
    header_spans,
    list_entries,
)
from .blocks import Blocks, numbered
from .dtypes import BY_TORCH, DType, TensorType
from .entries import checked_digests
from .header import ShardHeader, check_digest
from .pickled import unpickled
from .rebuilding import PickleError, Refused, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from concurrent.futures import Executor

    from asyncloader._storage.protocol import ReadInto, ThreadedStorage

    from .archive import Entry
    from .problems import Problems
    from .sidecar import ShardDigests


_PICKLE, _ORDER, _DATA = "data.pkl", "byteorder", "data/"
_MOST_PICKLE = 128 << 20  # bytes: a million names take a hundred
_MOST_DEFLATED = 16 << 20
# Where packed tensors seem to lie: so far behind the end that no read takes both along.
_BEHIND = 1 << 20
# An expanded tensor takes more memory than its file has bytes, and a hostile one takes all.
_MOST_EXPANDED = 64 << 20
_MOST_AXES = 32  # of an array, in older releases of NumPy
_MOST_OFFSET = 1 << 62


async def read_archive(
    storage: ThreadedStorage, shard: str, size: int, *, executor: Executor
) -> Archive:
    """Read all of a file of `torch.save` but its tensors.

    Raises:
        CheckpointError: If it is no such file, or is damaged.
        ReadError: If the storage failed.
    """
    begin = max(size - TAIL, 0)
    try:
        while True:
            end = bytearray(size - begin)
            await read_exactly(storage, shard, begin, [memoryview(end)])
            try:
                job = undisturbed(partial(list_entries, size, begin, end))
                [entries] = await run_jobs(executor, [job])
                break
            except MoreNeededError as more:
                begin = more.begin
        contents = partial(read_contents, shard, size, entries)
        return await storage.on_thread(shard, contents)
    except ArchiveError as error:
        raise CheckpointError(storage.location, str(error), shard) from error


def read_contents(shard: str, size: int, entries: Mapping[str, Entry], read: ReadInto) -> Archive:
    """Read where contents begin, and the pickle; belongs on a thread."""
    if _PICKLE not in entries:
        raise ArchiveError(f"has no {_PICKLE!r}, which torch.save writes")
    begins: dict[str, int] = {}
    for first, last, grouped in header_spans(entries.values(), size):
        headers = memoryview(bytearray(last - first))
        fill(read, shard, first, headers)
        for entry in grouped:
            header = headers[entry.at - first :][:HEADER]
            begins[entry.name] = content_begin(entry, header, size)
    check_contents(begins, entries)
    content = partial(_content, shard, entries, begins, read)
    if _ORDER in entries and (order := content(_ORDER)) != b"little":
        raise ArchiveError(f"its numbers are stored as {order[:20]!r}, and only b'little' is read")
    return Archive(shard, size, entries, begins, content(_PICKLE))


def _content(
    shard: str,
    entries: Mapping[str, Entry],
    begins: Mapping[str, int],
    read: ReadInto,
    name: str,
) -> bytes:
    """Return the content of a small file of the archive."""
    entry = entries[name]
    most = _MOST_PICKLE if entry.is_stored else _MOST_DEFLATED
    if entry.size > most:
        raise ArchiveError(f"{name!r} takes {entry.size:,} bytes, and {most:,} are read")
    content = bytearray(entry.packed)
    fill(read, shard, begins[name], memoryview(content))
    if entry.is_stored:
        return bytes(content)
    try:
        unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, entry.size + 1)
    except zlib.error as error:
        raise ArchiveError(f"the compressed bytes of {name!r} are damaged: {error}") from error
    if len(unpacked) != entry.size:
        raise ArchiveError(f"{name!r} does not hold the {entry.size} bytes that the list says")
    return unpacked


def parse_archive(
    problems: Problems, archive: Archive, digests: ShardDigests | None = None
) -> ShardHeader:
    """Return the tensors of a file of `torch.save`, as a header of a shard.

    `problems` receives tensors that do not fit their storages, and names that stand for two.

    Raises:
        CheckpointError: If its pickle is damaged, or asks for what no file of tensors needs.
    """
    try:
        value = unpickled(archive.pickle)
        named = list(_tensors(value, len(archive.pickle)))
    except PickleError as error:
        problem = (
            f"{error}; save a plain state_dict() with torch.save, which holds tensors, dicts and "
            "numbers only"
        )
        raise CheckpointError(problems.location, problem, archive.shard, _PICKLE) from error
    if digests is not None:
        check_digest(
            problems, archive.shard, archive.pickle, digests.header, f"the bytes of {_PICKLE!r}"
        )
    layout = _Layout(problems, archive)
    for name, tensor in named:
        layout.add(name, tensor)
    return layout.header(digests)


def _tensors(value: object, most: int) -> Iterator[tuple[str, Tensor | Refused]]:
    """Yield all tensors by name.

    A value may stand in many places, also within itself. So there is a bound to their number, and
    to the length of all names: raises `PickleError` beyond.
    """
    if isinstance(value, Tensor | Refused):
        raise PickleError("it is one tensor without a name: save a dict {name: tensor}")
    left, room = most, 16 * most
    inner = [("", _members(value))]
    while inner:
        prefix, members = inner[-1]
        key, one = next(members, (None, None))
        if key is None:
            inner.pop()
            continue
        name = f"{prefix}{key}"
        left, room = left - 1, room - len(name)
        if left < 0 or room < 0:
            raise PickleError("it holds some value many times, or within itself")
        if isinstance(one, Tensor | Refused):
            yield name, one
        elif isinstance(one, dict | list | tuple):
            inner.append((f"{name}.", _members(one)))


def _members(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, dict):
        return iter(value.items())
    return iter(enumerate(value)) if isinstance(value, list | tuple) else iter(())


@dataclass(slots=True)
class _Layout:
    """Finds where tensors lie in an archive."""

    problems: Problems
    archive: Archive
    names: dict[str, tuple[DType, tuple[int, ...], int, int]] = field(default_factory=dict)
    packed: list[PackedTensor] = field(default_factory=list)
    deflated: dict[str, Deflated] = field(default_factory=dict)
    expanded: int = 0  # bytes that tensors take beyond those that the file has of them

    def add(self, name: str, tensor: Tensor | Refused) -> None:
        """Take a tensor, or tell why it does not fit its storage."""
        if name in self.names:
            self.problems.add("two tensors have this name", self.archive.shard, name)
        elif isinstance(tensor, Refused):
            self.names[name] = (DType(tensor.kind, tensor.kind, None), (), 0, 0)
        else:
            with self.problems.about(self.archive.shard, name):
                self.names[name] = self._placed(tensor)

    def _placed(  # noqa: C901  # one branch for each thing that can be wrong
        self, tensor: Tensor
    ) -> tuple[DType, tuple[int, ...], int, int]:
        """Return dtype, shape, offset and bytes; raise a `ValueError` if they cannot be right."""
        dtype, count = BY_TORCH.get(tensor.dtype), math.prod(tensor.shape)
        if dtype is None or dtype.itemsize is None:
            return DType(tensor.dtype, tensor.dtype, None), tensor.shape, 0, 0
        itemsize, key = dtype.itemsize, f"{_DATA}{tensor.storage.key}"
        if (entry := self.archive.entries.get(key)) is None:
            raise ValueError(f"its storage {key!r} is not in the archive")
        if (wanted := self._storage_bytes(tensor)) != entry.size:
            raise ValueError(f"its storage {key!r} should take {wanted} bytes, it has {entry.size}")
        is_contiguous, nbytes = tensor.is_contiguous, count * itemsize
        last = count - 1
        if not is_contiguous:
            pairs = zip(tensor.shape, tensor.stride, strict=True)
            last = sum((n - 1) * step for n, step in pairs)
        if count and (tensor.offset + last + 1) * itemsize > entry.size:
            raise ValueError(
                f"its element {tensor.offset + last} is beyond the {entry.size} bytes of its "
                f"storage {key!r}"
            )
        self.expanded += max(nbytes - entry.size, 0)
        if nbytes > entry.size and self.expanded > _MOST_EXPANDED:
            kind = f"tensor that is expanded, from {entry.size:,} bytes to {nbytes:,}"
            return DType(kind, kind, None), (), 0, 0
        shape = tuple(n for n in tensor.shape if n != 1)
        stride = tuple(s for n, s in zip(tensor.shape, tensor.stride, strict=True) if n != 1)
        if len(shape) > _MOST_AXES and not is_contiguous:
            raise ValueError(f"it has {len(shape)} dimensions and lies in pieces")
        begin = self.archive.begins[key]
        if not count or (is_contiguous and entry.is_stored):
            return dtype, tensor.shape, begin + (tensor.offset * itemsize if count else 0), nbytes
        storage: Deflated | int = begin
        if not entry.is_stored:
            deflated = Deflated(key, begin, begin + entry.packed, entry.size)
            storage = self.deflated.setdefault(key, deflated)
        end = self.packed[-1].offset + self.packed[-1].nbytes if self.packed else 0
        offset = max(end, self.archive.size + _BEHIND)
        if offset + nbytes > _MOST_OFFSET:
            raise ValueError("the tensors that lie in pieces are too large together")
        self.packed.append(
            PackedTensor(offset, nbytes, storage, itemsize, tensor.offset, shape, stride)
        )
        return dtype, tensor.shape, offset, nbytes

    def _storage_bytes(self, tensor: Tensor) -> int:
        storage = tensor.storage
        if storage.dtype is None:
            return storage.count
        dtype = BY_TORCH.get(storage.dtype)
        if dtype is None or dtype.itemsize is None:
            raise ValueError(f"it is in a storage of {storage.dtype}, which is not read")
        return storage.count * dtype.itemsize

    def header(self, digests: ShardDigests | None) -> ShardHeader:
        """Return all of them as a header."""
        values = self.names.values()
        # By text, whose hash nobody can know: of shapes many could be made to have the same one.
        texts, kinds = numbered(f"{dtype.name} {shape}" for dtype, shape, _, _ in values)
        known = [TensorType(dtype, shape) for dtype, shape, _, _ in values]
        first = dict(zip(reversed(kinds.tolist()), reversed(known), strict=True))
        blocks = Blocks(
            list(self.names),
            [first[number] for number in range(len(texts))],
            kinds,
            shard=self.archive.shard,
            offsets=np.array([offset for _, _, offset, _ in values], np.int64),
            nbytes=np.array([nbytes for *_, nbytes in values], np.int64),
        )
        if digests is not None:
            blocks.digests = checked_digests(self.problems, blocks, digests.blocks)
        return ShardHeader(blocks, 0, archive=self.archive, packed=tuple(self.packed))
