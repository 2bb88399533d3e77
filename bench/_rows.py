"""A table of any size on the disk, made without holding it in memory; a row tells its id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

NAME = "item_emb"
POSITIONS = 65536
_BATCH = 256  # positions
_SPREAD = 1 << 20
_SHARD = "model-000000-of-000001.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsCase:
    """A checkpoint of one table: ids in our Saver's order, rows of float32.

    Attributes:
        path: Its folder.
        count: Ids.
        width: Bytes of a row.
        ids: Where the ids begin in the shard, in bytes.
        rows: Where the rows begin.
    """

    path: Path
    count: int
    width: int
    ids: int
    rows: int

    @property
    def shard(self) -> Path:
        return self.path / _SHARD

    def all_ids(self) -> NDArray[np.int64]:
        return np.fromfile(self.shard, np.int64, self.count, offset=self.ids)

    def check(self, ids: NDArray[np.int64], found: torch.Tensor) -> None:
        """Fail unless these are the rows of ids."""
        words = found.reshape(len(ids), -1).view(torch.int32).numpy()
        assert np.array_equal(words, words_of(ids, self.width))


def words_of(ids: NDArray[np.int64], width: int) -> NDArray[np.int32]:
    """Return the rows of ids, as int32 `[n, width / 4]`."""
    mixed = (ids ^ (ids >> 29)).astype(np.int32)
    return mixed[:, None] * np.arange(1, width // 2, 2, dtype=np.int32)[None, : width // 4]


def rows_case(path: Path, *, count: int, width: int) -> RowsCase:
    """Return a checkpoint of about so many ids; write it if it is not there."""
    each = max(count // POSITIONS, 1)
    count = each * POSITIONS
    keys = {f"{NAME}.id/part_0_1": f"{NAME}@id", f"{NAME}.embedding/part_0_1": f"{NAME}@embedding"}
    of_rows = count * width
    entries = zip(
        keys,
        ("I64", "F32"),
        ([count], [count, width // 4]),
        ((0, 8 * count), (8 * count, 8 * count + of_rows)),
        strict=True,
    )
    header = {
        key: {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}
        for key, dtype, shape, offsets in entries
    }
    text = json.dumps(header).encode()
    text += b" " * (8 - len(text) % 8)
    start = 8 + len(text)
    case = RowsCase(path=path, count=count, width=width, ids=start, rows=start + 8 * count)
    if not (path / "index").exists():
        path.mkdir(parents=True, exist_ok=True)
        with case.shard.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for ids in _batches(each):
                file.write(ids.tobytes())
            for ids in _batches(each):
                file.write(words_of(ids, width).tobytes())
        blocks = {key: f"{name}^00000@65536@65536" for key, name in keys.items()}
        (path / "tensorkey.json").write_text(json.dumps(blocks))
        index = {"file_index": {_SHARD: 0}, "block_index": dict.fromkeys(keys, 0)}
        (path / "index").write_text(json.dumps(index))
    return case


def _batches(each: int) -> Iterator[NDArray[np.int64]]:
    """Yield ids, by their position in a slice, then by themselves; the same ones each time."""
    rng = np.random.default_rng(7)
    for first in range(0, POSITIONS, _BATCH):
        steps = rng.integers(1, _SPREAD, (_BATCH, each))
        positions = np.arange(first, first + _BATCH)[:, None]
        yield (np.cumsum(steps, axis=1) * POSITIONS + positions).reshape(-1)
