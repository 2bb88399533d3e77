"""The names and texts of a checkpoint's files: readers look for them, a save writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from .dtypes import header_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .dtypes import DType
    from .slices import Slice


INDEX = "index"  # names the shard of each block; written last
TENSORKEY = "tensorkey.json"  # the block names of tables
DESCRIPTION = "torch_rank_weights_embs_table_multi_shard.json"  # for people; no load reads it
SIDECAR = "asyncloader.json"  # our digests
MODEL = "model.pt"  # RecIS's trainer saves the dense parameters by `torch.save`
EXTRA = "extra.pt"  # its step, its dense optimizer, the positions of its windows
IO_STATE = "io_state_{rank}.pt"  # the positions of one rank's data
IO_COUNT = "io_state_count"  # how many ranks have some
RUN_LIST = "checkpoint"  # beside the checkpoints of a run: their names, the newest last
STAGING = ".saving-"  # begins the name of a folder that a save writes to before its commit

MAX_NAMES = 128 << 20  # bytes of a file of names: two million lines of `index`
# Bytes of the sidecar, which has a hundred for each block, and two thousand for each part.
MAX_SIDECAR = 256 << 20
# Bytes of a header. As much as safetensors itself allows: a million tensors in one shard.
MAX_HEADER = 100_000_000

PREFIX = 8  # bytes of a shard before its header: the header's length
SAFETENSORS = ".safetensors"  # the end of a shard's name
DENSE_SUFFIX = "^ "  # the end of a dense tensor's key
_ALIGNMENT = 8


def shard_name(number: int, total: int, save: str = "") -> str:
    """Return the name of a shard; `save` tells it from one of another save in the same place."""
    return f"model-{number:06d}-of-{total:06d}{save and '-'}{save}.safetensors"


def dense_key(name: str) -> str:
    return name + DENSE_SUFFIX


def sparse_key(table: str, slot: str, rank: int, ranks: int) -> str:
    """Return the key of one rank's part of a slot; the ids are the slot `id`."""
    return f"{table}@{slot}".replace("@", ".", 1) + f"/part_{rank}_{ranks}"


def sparse_name(table: str, slot: str, part: Slice) -> str:
    """Return the block name of one rank's part of a slot, as `tensorkey.json` has it."""
    return f"{table}@{slot}^{part}"


def render_header(
    entries: Mapping[str, tuple[DType, tuple[int, ...], int, int]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Return the beginning of a shard, up to its first data byte.

    Padded to a multiple of 8 by 1 to 8 spaces, as RecIS does. `entries` say for each key its dtype,
    its shape, and the first byte and the end of its bytes within the data. `metadata` is free text
    that safetensors allows in a header; RecIS writes none.

    Raises:
        ValueError: If a header cannot express a tensor's shape.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for key, (dtype, shape, begin, end) in entries.items():
        stored = header_shape(dtype, shape)
        header[key] = {"dtype": dtype.name, "shape": stored, "data_offsets": (begin, end)}
    text = orjson.dumps(header)
    text += b" " * (_ALIGNMENT - len(text) % _ALIGNMENT)
    return len(text).to_bytes(PREFIX, "little") + text


def render_index(files: Mapping[str, int], blocks: Mapping[str, int]) -> bytes:
    """Return the text of `index`: shard file → number, and key → number of its shard.

    The text ends in a newline, which RecIS never writes. So a reader knows an `index` of RecIS
    beside an older sidecar of ours (see `sidecar`), even where all names are the same.
    """
    index = {"block_index": blocks, "file_index": files}
    return orjson.dumps(index, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def render_json(value: Mapping[str, object]) -> bytes:
    """Return JSON for people."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2)


def describe_tensor(key: str, dtype: DType, shape: tuple[int, ...]) -> dict[str, object]:
    """Return the entry of a dense tensor in `DESCRIPTION`."""
    facts = {"name": key, "dtype": dtype.torch, "shape": shape}
    return {**facts, "dense": True, "dimension": 0, "is_hashmap": False}


def describe_embedding(
    key: str, dtype: DType, shape: tuple[int, ...], *, ids: str
) -> dict[str, object]:
    """Return the entry of a table's embeddings in `DESCRIPTION`; `ids` is the key of their ids."""
    return {
        **describe_tensor(key, dtype, shape),
        "dense": False,
        "dimension": shape[1] if len(shape) > 1 else 0,
        "is_hashmap": True,
        "hashmap_key": ids,
        "hashmap_key_dtype": "int64",
        "hashmap_value": key,
    }


def describe_slot(
    dtype: DType, shape: tuple[int, ...], *, begin: int, end: int
) -> dict[str, object]:
    """Return the entry of ids and other slots in `DESCRIPTION`: as in the header."""
    return {"dense": False, "dtype": dtype.name, "shape": shape, "data_offsets": (begin, end)}
