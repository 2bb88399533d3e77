"""The file of hot ids, which a table that starts again reads: numpy's .npz, without pickles."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .hot import HotIds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader._table.schema import Encoding

_NAMES = "names"  # the slots, then the children


def write_hot(path: str | os.PathLike[str], hot: Mapping[str, HotIds], encoding: Encoding) -> int:
    """Write ids and their counts; return how many ids there are. May take long."""
    whole = Path(path)
    names = np.array([str(len(hot)), *hot, *encoding.children])
    arrays = {_NAMES: names}
    for number, one in enumerate(hot.values()):
        arrays |= {f"ids{number}": one.ids, f"counts{number}": one.counts.astype(np.uint8)}
    handle, temporary = tempfile.mkstemp(prefix=f".{whole.name}-", dir=whole.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes only arrays of Any
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(whole)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    return sum(len(one.ids) for one in hot.values())


def read_hot(path: str | os.PathLike[str], encoding: Encoding) -> dict[str, HotIds]:
    """Return what `write_hot` wrote, by slot, as the ids of a table of this encoding.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no such file.
    """
    try:
        _check_plain(path)
        with np.load(path, allow_pickle=False) as arrays:
            count, *names = arrays[_NAMES].tolist()
            slots, children = names[: int(count)], names[int(count) :]
            found = {
                slot: HotIds(
                    arrays[f"ids{number}"].astype(np.int64, casting="safe"),
                    arrays[f"counts{number}"].astype(np.uint8, casting="safe").astype(np.int64),
                )
                for number, slot in enumerate(slots)
            }
    except (ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{os.fspath(path)} is no file of hot ids: {error}") from error
    for slot, (ids, counts) in found.items():
        if ids.ndim != 1 or ids.shape != counts.shape:
            raise ValueError(
                f"{os.fspath(path)} is no file of hot ids: of slot {slot!r}, ids and counts differ"
            )
    return {slot: _renumbered(one, children, encoding) for slot, one in found.items()}


def _check_plain(path: str | os.PathLike[str]) -> None:
    """Refuse what takes more memory than the file is long."""
    with zipfile.ZipFile(path) as archive:
        for one in archive.infolist():
            if one.compress_type:
                raise ValueError(f"{one.filename} is compressed")
            with archive.open(one) as member:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):
                    raise ValueError(f"{one.filename} is of version {version}")
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                if math.prod(shape) * dtype.itemsize != one.file_size - member.tell():
                    raise ValueError(f"{one.filename} is not as long as it says")


def _renumbered(hot: HotIds, children: list[str], encoding: Encoding) -> HotIds:
    """Return the ids of children that the table has, by the numbers that it gives them."""
    if not encoding.coalesced:
        return hot
    numbers = (hot.ids.view(np.uint64) >> np.uint64(encoding.BITS)).astype(np.int64)
    ids, kept = encoding.decode(hot.ids), np.zeros(len(hot.ids), np.bool_)
    for number, child in enumerate(children):
        if child in encoding.children:
            mine = numbers == number
            kept |= mine
            ids[mine] = encoding.encode(ids[mine], child)
    return HotIds(ids[kept], hot.counts[kept])
