"""Small edits that break a written checkpoint."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from .shard import header_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Let `change` alter a JSON file's content in place; what it returns is ignored."""
    content = json.loads(path.read_bytes())
    change(content)
    path.write_bytes(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode())


def edit_header(shard: Path, change: Callable[[Any], object], *, pad_header: bool = True) -> None:
    """Let `change` alter a shard's header in place; the data stays as it is."""
    content, data = _split(shard)
    change(content)
    head = header_bytes(content, pad=pad_header)
    shard.write_bytes(len(head).to_bytes(8, "little") + head + data)


def shard_header(shard: Path) -> dict[str, dict[str, Any]]:
    """Return a shard's header."""
    return _split(shard)[0]


def shard_holding(path: Path, key: str) -> Path:
    """Return the shard file of the checkpoint at `path` that holds an `index` key."""
    index = json.loads((path / "index").read_bytes())
    number = index["block_index"][key]
    file: str = next(name for name, at in index["file_index"].items() if at == number)
    return path / file


def truncate(path: Path, *, by: int) -> None:
    """Cut the last `by` bytes off a file."""
    os.truncate(path, path.stat().st_size - by)


def append(path: Path, data: bytes) -> None:
    """Add bytes to the end of a file."""
    with path.open("ab") as file:
        file.write(data)


def declare_header_length(shard: Path, length: int) -> None:
    """Overwrite a shard's first eight bytes, the length of its header."""
    with shard.open("r+b") as file:
        file.write(length.to_bytes(8, "little"))


def _split(shard: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
    raw = shard.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    content: dict[str, dict[str, Any]] = json.loads(raw[8:start])
    return content, raw[start:]
