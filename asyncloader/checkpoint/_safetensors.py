"""Reads what plain safetensors files say of themselves: one file, or a folder of Hugging Face's.

The key in a file's header is the tensor's name, as it stands. Of several files `SHARDED` says which
tensor stands in which: `{"metadata": {...}, "weight_map": {tensor: file}}`.
"""

from __future__ import annotations

from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING

from asyncloader.errors import CheckpointError

from ._index import Catalog, Places, is_file_name, json_object, members_of_objects

if TYPE_CHECKING:
    from ._header import ShardHeader

__all__ = ["SHARDED", "SINGLE", "catalog_of_file", "parse_weight_map"]

SHARDED = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def catalog_of_file(header: ShardHeader) -> Catalog:
    """Return the names in one file's header."""
    keys = {key: key for key in header.blocks}
    return Catalog(Places(keys, dict.fromkeys(keys, header.shard)), {}, header.shard, header=header)


def parse_weight_map(location: str, text: bytes | bytearray) -> Catalog:
    """Read the text of `SHARDED`.

    Raises:
        CheckpointError: If it is not what it should be.
    """
    value = json_object(location, SHARDED, text, members_of_objects)
    weight_map = value.get("weight_map")
    if not isinstance(weight_map, dict):
        problem = f"its weight_map is {shown(weight_map)}, not an object {{tensor: file}}"
        raise CheckpointError(location, problem, SHARDED)
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or not is_file_name(shard):
            problem = f"its file {shown(shard)} is not a plain file name"
            raise CheckpointError(location, problem, SHARDED, key)
    return Catalog(Places({key: key for key in weight_map}, weight_map), {}, SHARDED)
