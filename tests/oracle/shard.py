"""Writes one shard file, right or deliberately wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .values import flat_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

CHUNK = 16 << 20
"""Bytes gathered and written at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The bytes of a tensor, or of some of its rows; nothing is copied before it is written."""

    tensor: Tensor

    order: NDArray[np.int64] | None = None
    """Row numbers in the order to write them; all of them as they are when `None`."""

    @property
    def nbytes(self) -> int:
        """Bytes that `chunks` gives in all."""
        if self.order is None:
            return self.tensor.numel() * self.tensor.element_size()
        return len(self.order) * self.tensor[:1].numel() * self.tensor.element_size()

    def chunks(self) -> Iterator[memoryview]:
        """Give the bytes piece by piece."""
        if not self.nbytes:
            return
        flat = flat_bytes(self.tensor).numpy()
        if self.order is None:
            yield from (flat[start : start + CHUNK].data for start in range(0, len(flat), CHUNK))
            return
        rows = flat.reshape(len(self.tensor), -1)
        step = max(1, CHUNK // rows.shape[1])
        for start in range(0, len(self.order), step):
            yield rows.take(self.order[start : start + step], axis=0).data


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One entry of a shard's header, and its bytes."""

    key: str
    """The key in the shard's header."""

    dtype: str
    """As the header spells it; not checked."""

    shape: tuple[int, ...]
    """As the header tells it; need not agree with `data`."""

    data: bytes | bytearray | memoryview | Rows

    index_key: str | None = None
    """The key in `index`, where it differs from `key`."""

    name: str | None = None
    """The block name in `tensorkey.json`; `None` for a dense tensor."""

    @property
    def nbytes(self) -> int:
        """Length of `data` in bytes."""
        return memoryview(self.data).nbytes if not isinstance(self.data, Rows) else self.data.nbytes


def shard_entries(blocks: Sequence[Block]) -> dict[str, dict[str, Any]]:
    """Return the header of a shard that holds these blocks back to back."""
    entries: dict[str, dict[str, Any]] = {}
    begin = 0
    for block in blocks:
        if block.key in entries:
            raise ValueError(f"two blocks of one shard have the key {block.key!r}")
        end = begin + block.nbytes
        entries[block.key] = {
            "dtype": block.dtype,
            "shape": list(block.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    return entries


def header_bytes(entries: Mapping[str, Mapping[str, Any]], *, pad: bool = True) -> bytes:
    """Return the header's JSON, padded as RecIS does: 1 to 8 spaces to a multiple of 8."""
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (8 - len(text) % 8) if pad else text


def write_shard(
    path: Path,
    blocks: Sequence[Block],
    *,
    pad_header: bool = True,
    header: bytes | None = None,
    header_length: int | None = None,
    data_offsets: Mapping[str, tuple[int, int]] | None = None,
    trailing: bytes = b"",
) -> None:
    """Write the blocks back to back in the order given, with no alignment.

    Args:
        path: The file.
        blocks: What it holds, in order.
        pad_header: Whether to pad the header; without, the data starts at any offset.
        header: The header's bytes, taken as they are in place of the right ones.
        header_length: The length to declare in place of the header's own.
        data_offsets: By key, the offsets to declare in place of the right ones. The bytes
            stay where they are.
        trailing: What follows the last block.
    """
    entries = shard_entries(blocks)
    for key, offsets in (data_offsets or {}).items():
        entries[key]["data_offsets"] = list(offsets)
    head = header_bytes(entries, pad=pad_header) if header is None else header
    length = len(head) if header_length is None else header_length
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.write(head)
        for block in blocks:
            pieces = block.data.chunks() if isinstance(block.data, Rows) else [block.data]
            for piece in pieces:
                file.write(piece)
        file.write(trailing)
