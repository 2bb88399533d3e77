"""The description of a checkpoint that RecIS writes for people and other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .values import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .shard import Block

DESCRIPTION = "torch_rank_weights_embs_table_multi_shard.json"


def describe(key: str, block: Block, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a block, given its key in `index` and its entry in the header."""
    table, _, slot = (block.name or "").rpartition("^")[0].rpartition("@")
    if block.name is not None and slot != "embedding":
        return {"dense": False, **entry}
    dtype = str(DTYPES.get(block.dtype.upper(), block.dtype)).removeprefix("torch.")
    facts: dict[str, Any] = {"name": key, "dtype": dtype, "shape": list(block.shape)}
    if block.name is None:
        return {**facts, "dense": True, "dimension": 0, "is_hashmap": False}
    ids = f"{table}@id".replace("@", ".", 1) + key[key.rindex("/part_") :]
    return {
        **facts,
        "dense": False,
        "dimension": block.shape[1] if len(block.shape) > 1 else 0,
        "is_hashmap": True,
        "hashmap_key": ids,
        "hashmap_key_dtype": "int64",
        "hashmap_value": key,
    }
