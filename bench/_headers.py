"""Checkpoints of very many tensors of which the names and headers are real, and the data a hole."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from tests.oracle import shard_name

if TYPE_CHECKING:
    from pathlib import Path

SHARDS = 4


def tensor_names(count: int) -> list[str]:
    """Return names as a model has them."""
    return [f"model.layers.{number}.weight" for number in range(count)]


def write_headers(path: Path, count: int) -> Path:
    """Write a checkpoint of so many tensors of one float32 each, unless it is there."""
    if (path / "index").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    keys = [f"{name}^ " for name in tensor_names(count)]
    files = {shard_name(number, SHARDS): number for number in range(SHARDS)}
    for file, number in files.items():
        _write_shard(path / file, keys[number::SHARDS])
    index = {
        "block_index": {key: number % SHARDS for number, key in enumerate(keys)},
        "file_index": files,
    }
    (path / "tensorkey.json").write_text("{}")  # names of tables' blocks, of which there are none
    (path / "index").write_text(json.dumps(index))
    return path


def _write_shard(path: Path, keys: list[str]) -> None:
    entries = {
        key: {"dtype": "F32", "shape": [1], "data_offsets": [4 * number, 4 * number + 4]}
        for number, key in enumerate(keys)
    }
    head = json.dumps(entries).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + 4 * len(keys))
