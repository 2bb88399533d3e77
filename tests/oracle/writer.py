"""Writes whole checkpoints as RecIS does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .description import DESCRIPTION, describe
from .shard import Block, Rows, shard_entries, write_shard
from .values import DTYPES, Slice, TableData, split_slices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

_NEWER = {
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_SPELLING = {dtype: name for name, dtype in DTYPES.items()}
_SPELLING |= {
    getattr(torch, called): name for name, called in _NEWER.items() if hasattr(torch, called)
}


def shard_name(number: int, total: int) -> str:
    """Return the file name of one writer's shard."""
    return f"model-{number:06d}-of-{total:06d}.safetensors"


def sparse_block(
    table: str,
    slot: str,
    tensor: Tensor,
    *,
    rank: int = 0,
    ranks: int = 1,
    claim: Slice | None = None,
    order: NDArray[np.int64] | None = None,
    bool_spelling: str = "BOOL",
) -> Block:
    """Make the block of one slot (`id` is one too) of one rank's part of a table.

    `claim` is the slice to put into the name, by default this rank's of 65536; `order` picks
    the rows. Neither need fit the tensor, and slots need not agree: nothing is checked.
    """
    key = f"{table}@{slot}".replace("@", ".", 1) + f"/part_{rank}_{ranks}"
    name = f"{table}@{slot}^{claim or split_slices(65536, ranks)[rank]}"
    return Block(
        key=key,
        dtype=_spell(tensor, bool_spelling),
        shape=tuple(tensor.shape) if order is None else (len(order), *tensor.shape[1:]),
        data=Rows(tensor=tensor, order=order),
        name=name,
    )


def dense_block(name: str, tensor: Tensor, *, bool_spelling: str = "BOOL") -> Block:
    """Make the block of a dense tensor; a `/part_` in the name brings RecIS's slip about."""
    return Block(
        key=name if "/part_" in name else f"{name}^ ",
        dtype=_spell(tensor, bool_spelling),
        shape=tuple(tensor.shape),
        data=Rows(tensor=tensor),
        index_key=f"{name}^ ",
    )


def write_checkpoint(
    path: Path,
    tables: Mapping[str, TableData],
    tensors: Mapping[str, Tensor],
    *,
    ranks: int = 1,
    writers: int = 2,
    slice_size: int = 65536,
    shuffle_seed: int | None = None,
    sort: bool = False,
    bool_spelling: Literal["BOOL", "bool"] = "BOOL",
    pad_header: bool = True,
) -> None:
    """Write tables and dense tensors as `ranks` ranks of RecIS would.

    Args:
        path: The folder, made if need be. What it holds is overwritten, never removed.
        tables: By name. Each child of a coalesced table is one entry, with its ids as on disk.
        tensors: The dense tensors by name; rank 0 writes them.
        ranks: Ranks that split the rows by `uint64(id) % slice_size`.
        writers: Shard files a rank writes at most.
        slice_size: What the ranks split.
        shuffle_seed: Shuffles the rows of every table; without, a rank keeps the order given.
        sort: Sorts a rank's rows by (slice position, id as unsigned), stable for equal ids.
        bool_spelling: `"bool"` is what RecIS writes.
        pad_header: Whether to pad headers as RecIS does.
    """
    slices = split_slices(slice_size, ranks)
    blocks: list[list[Block]] = [[] for _ in slices]
    for table, data in tables.items():
        orders = _row_orders(data.ids, slices, shuffle_seed, sort=sort)
        for rank, order in enumerate(orders):
            blocks[rank] += [
                sparse_block(
                    table,
                    slot,
                    tensor,
                    rank=rank,
                    ranks=ranks,
                    claim=slices[rank],
                    order=order,
                    bool_spelling=bool_spelling,
                )
                for slot, tensor in {"id": data.ids, **data.slots}.items()
            ]
    blocks[0] += [dense_block(*item, bool_spelling=bool_spelling) for item in tensors.items()]
    write_ranks(path, blocks, writers=writers, pad_header=pad_header)


def write_ranks(
    path: Path,
    blocks: Sequence[Sequence[Block]],
    *,
    writers: int = 2,
    pad_header: bool = True,
) -> None:
    """Write a checkpoint from the blocks of every rank, round robin over the rank's writers."""
    path.mkdir(parents=True, exist_ok=True)
    file_index: dict[str, int] = {}
    block_index: dict[str, int] = {}
    names: dict[str, str] = {}
    description: dict[str, dict[str, Any]] = {}
    for number in range(len(blocks) * writers):
        mine = blocks[number // writers][number % writers :: writers]
        if not mine:
            continue
        file = shard_name(number, len(blocks) * writers)
        write_shard(path / file, mine, pad_header=pad_header)
        file_index[file] = number
        entries = shard_entries(mine)
        for block in mine:
            key = block.index_key or block.key
            if key in block_index:
                raise ValueError(f"two blocks have the key {key!r}")
            block_index[key] = number
            description[key] = describe(key, block, entries[block.key])
            if block.name is not None:
                names[key] = block.name
    (path / "tensorkey.json").write_bytes(_json(names, indent=4))
    (path / DESCRIPTION).write_bytes(_json(description, indent=4))
    draft = path / "index.tmp"
    draft.write_bytes(_json({"block_index": block_index, "file_index": file_index}))
    draft.replace(path / "index")


def _row_orders(
    ids: Tensor, slices: Sequence[Slice], seed: int | None, *, sort: bool
) -> list[NDArray[np.int64] | None]:
    """Return every rank's row numbers, or `[None]` where one rank takes them as they are."""
    if len(slices) == 1 and seed is None and not sort:
        return [None]
    unsigned: NDArray[np.uint64] = ids.detach().cpu().contiguous().numpy().view(np.uint64)
    rows = np.arange(len(unsigned), dtype=np.int64)
    if seed is not None:
        np.random.default_rng(seed).shuffle(rows)
    position = unsigned[rows] % np.uint64(slices[0].size)
    if sort:
        rows = rows[np.lexsort((unsigned[rows], position))]
        position.sort()
    ends = np.array([part.end for part in slices], dtype=np.uint64)
    # The narrow dtype makes numpy's stable sort a radix sort.
    owner = np.searchsorted(ends, position, side="right").astype(np.min_scalar_type(len(slices)))
    rows = rows[np.argsort(owner, kind="stable")]
    counts = np.bincount(owner, minlength=len(slices))
    return list(np.split(rows, np.cumsum(counts)[:-1]))


def _spell(tensor: Tensor, bool_spelling: str) -> str:
    name = _SPELLING[tensor.dtype]
    return bool_spelling if name == "BOOL" else name


def _json(value: object, *, indent: int | None = None) -> bytes:
    separators = (",", ":") if indent is None else None
    return json.dumps(
        value, ensure_ascii=False, sort_keys=True, separators=separators, indent=indent
    ).encode()
