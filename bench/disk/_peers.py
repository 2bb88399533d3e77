"""The same rows, kept by others: a mapped file, torch's mmap, RocksDB, LMDB."""

from __future__ import annotations

import contextlib
import gc
import importlib
import mmap
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import pytest
import torch

from bench._cache import cached, evict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from bench._rows import RowsCase

Ask: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"

_AT_ONCE = 1 << 16


class Peer(NamedTuple):
    """Someone who gives rows of ids; blocks.

    It is opened for each measurement: what is mapped stays in the page cache.
    """

    name: str
    place: Path
    """Its file, or its folder."""

    opened: Callable[[], contextlib.AbstractContextManager[Ask]]


def peers(case: RowsCase, folder: Path) -> list[Peer]:
    """Return all of them that are installed, with rows of `case`. They are written once."""
    return [
        _mapped(case),
        _torch(case, folder / "rows.pt"),
        *_rocks(case, folder / "rocks"),
        *_lmdb(case, folder / "lmdb"),
    ]


def _places(case: RowsCase) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what finds ids' rows; they are in our Saver's order, so by a sort of that."""

    def key(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
        bits = ids.view(np.uint64)
        return (bits << np.uint64(48)) | (bits >> np.uint64(16))

    keys = key(case.all_ids())
    return lambda wanted: torch.from_numpy(np.searchsorted(keys, key(wanted.numpy())))


def _mapped(case: RowsCase) -> Peer:
    find, shape = _places(case), (case.count, case.width // 4)

    @contextlib.contextmanager
    def opened() -> Iterator[Ask]:
        with case.shard.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped.madvise(mmap.MADV_RANDOM)  # else each row brings 128 KiB along
        memory = np.frombuffer(mapped, np.float32, case.count * shape[1], case.rows)
        rows = torch.from_numpy(memory).view(shape)
        yield lambda ids: rows.index_select(0, find(ids))

    return Peer("mmap, index_select", case.shard, opened)


def _torch(case: RowsCase, path: Path) -> Peer:
    find = _places(case)
    if not path.exists():
        shape = (case.count, case.width // 4)
        memory = np.memmap(case.shard, np.float32, "r", case.rows, shape)
        torch.save(torch.from_numpy(np.array(memory)), path)

    @contextlib.contextmanager
    def opened() -> Iterator[Ask]:
        rows = torch.load(path, mmap=True)
        yield lambda ids: rows.index_select(0, find(ids))

    return Peer("torch.load(mmap)", path, opened)


def _rocks(case: RowsCase, path: Path) -> list[Peer]:
    try:
        rocksdict = importlib.import_module("rocksdict")
    except ImportError:
        return []
    options = rocksdict.Options(raw_mode=True)
    options.set_compression_type(rocksdict.DBCompressionType.none())
    table = rocksdict.BlockBasedOptions()
    table.set_bloom_filter(10, False)  # its API
    options.set_block_based_table_factory(table)
    options.increase_parallelism(2)
    if not path.exists():
        base = rocksdict.Rdict(str(path), options)
        for some, rows in _rows(case):
            batch = rocksdict.WriteBatch(raw_mode=True)
            for id_, row in zip(some, rows, strict=True):
                batch.put(id_.tobytes(), row.tobytes())
            base.write(batch)
        base.flush()
        base.close()

    @contextlib.contextmanager
    def opened() -> Iterator[Ask]:
        base = rocksdict.Rdict(str(path), options)
        with contextlib.closing(base):
            yield lambda ids: _tensor(b"".join(base.get(_keys(ids))), case)

    return [Peer("RocksDB", path, opened)]


def _lmdb(case: RowsCase, path: Path) -> list[Peer]:
    try:
        lmdb = importlib.import_module("lmdb")
    except ImportError:
        return []
    room = 4 * case.count * case.width + (64 << 20)
    if not path.exists():
        # By key: it appends then, and is several times as fast to write.
        with lmdb.open(str(path), map_size=room, sync=False) as base:
            order = np.argsort(case.all_ids())
            rows = np.memmap(case.shard, np.uint8, "r", case.rows, (case.count, case.width))
            ids = case.all_ids()
            for low in range(0, case.count, _AT_ONCE):
                some = order[low : low + _AT_ONCE]
                with base.begin(write=True) as transaction:
                    pairs = zip(_ordered(ids[some]), map(bytes, rows[some]), strict=True)
                    transaction.cursor().putmulti(list(pairs), append=True)
            base.sync(True)  # its API

    @contextlib.contextmanager
    def opened() -> Iterator[Ask]:
        with lmdb.open(str(path), map_size=room, readahead=False, readonly=True) as base:

            def ask(ids: torch.Tensor) -> torch.Tensor:
                with base.begin(buffers=True) as transaction:
                    found = map(transaction.get, _ordered(ids.numpy()))
                    return _tensor(b"".join(found), case)

            yield ask

    return [Peer("LMDB", path, opened)]


def _rows(case: RowsCase) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    ids = case.all_ids()
    rows = np.memmap(case.shard, np.uint8, "r", case.rows, (case.count, case.width))
    for low in range(0, case.count, _AT_ONCE):
        yield ids[low : low + _AT_ONCE], rows[low : low + _AT_ONCE]


def _keys(ids: torch.Tensor) -> list[bytes]:
    return [id_.tobytes() for id_ in ids.numpy()]


def _ordered(ids: NDArray[np.int64]) -> list[bytes]:
    """Return keys that sort as ids of 0 and more do."""
    packed = ids.astype(">i8").tobytes()
    return [packed[at : at + 8] for at in range(0, len(packed), 8)]


def _tensor(found: bytes, case: RowsCase) -> torch.Tensor:
    rows = torch.frombuffer(bytearray(found), dtype=torch.float32)
    return rows.view(-1, case.width // 4)


def cold_or_skip(place: Path) -> None:
    """Have nothing of a file, or of a folder's, in the page cache, or skip the case."""
    files = [one for one in place.iterdir() if one.is_file()] if place.is_dir() else [place]
    gc.collect()  # of what is mapped
    evict(files)
    if cached(files) > 0.01:
        pytest.skip(f"the page cache of {place} cannot be emptied")
