"""What of a checkpoint is still to come, where its files are being copied. Blocks."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from asyncloader.errors import CheckpointError, TruncatedShardError

from .files import INDEX, TENSORKEY
from .header import FIRST, PREFIX, header_length, parse_header
from .index import parse_catalog
from .problems import Problems
from .safetensors import is_weight_map, parse_weight_map
from .strict_json import MAX_NAMES

if TYPE_CHECKING:
    from pathlib import Path


_SAFETENSORS = ".safetensors"


def lack_of(mark: Path | None) -> str:
    """Say which file is missing or short; nothing if none is. Whatever else is wrong a load says.

    Args:
        mark: The file that names the shards, or the only one; `None` if it is gone.
    """
    if mark is None:
        return "it was removed"
    try:
        if mark.stat().st_size > MAX_NAMES and not mark.name.endswith(_SAFETENSORS):
            return ""
        for shard in sorted(_shards(mark)):
            _check_length(mark.parent, shard, recis=mark.name == INDEX)
        if mark.name == INDEX:
            _written(mark.parent / TENSORKEY)
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)!r} is missing"  # noqa: PTH119  # text
    except TruncatedShardError as error:
        return str(error)
    except _UnwrittenError as unwritten:
        return f"{str(unwritten)!r} is not written yet"
    except (OSError, CheckpointError):
        pass
    return ""


class _UnwrittenError(Exception):
    """A file has its name and its length, maybe, and not yet its content."""


def _shards(mark: Path) -> set[str]:
    if mark.name == INDEX:
        catalog = parse_catalog(Problems(str(mark.parent)), _written(mark), b"{}")
        return set(catalog.tensors.shards.values())  # without TENSORKEY, tables are tensors, too
    if is_weight_map(mark.name):
        catalog = parse_weight_map(Problems(str(mark.parent)), _written(mark), mark.name)
        return set(catalog.tensors.shards.values())
    return {mark.name}


def _written(names: Path) -> bytes:
    """Return the text of a JSON file, unless it is cut short: it ends where its braces do."""
    text = names.read_bytes()
    if not text or text.count(b"{") > text.count(b"}"):
        raise _UnwrittenError(names.name)
    return text


def _check_length(folder: Path, shard: str, *, recis: bool) -> None:
    """Raise if a shard is not as long as its header says."""
    found = (folder / shard).stat()
    if not stat.S_ISREG(found.st_mode):  # opening a FIFO would hang
        return
    with (folder / shard).open("rb") as file:
        start = file.read(FIRST)
        if len(start) >= PREFIX and not any(start[:PREFIX]):  # its room was taken first
            raise _UnwrittenError(shard)
        length = header_length(str(folder), shard, start, found.st_size)
        file.seek(PREFIX)
        parse_header(Problems(str(folder)), shard, file.read(length), found.st_size, recis=recis)
