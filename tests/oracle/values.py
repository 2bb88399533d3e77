"""What the oracle's parts exchange: slices, dtypes, tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
"""safetensors' names; the first ten are RecIS's, the others come from elsewhere."""


def flat_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes in row-major order as uint8 `[n]`, on the CPU, a view if possible."""
    whole = tensor.detach().cpu().contiguous()
    # A single element is contiguous whatever its stride, but only stride 1 can be viewed as bytes.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


class Slice(NamedTuple):
    """The ids `x` with `begin <= uint64(x) % size < end`."""

    begin: int
    end: int
    size: int

    def accepts(self, disk_id: int) -> bool:
        """Tell whether an id, as it stands on disk, belongs to the slice."""
        return self.begin <= disk_id % 2**64 % self.size < self.end

    def __str__(self) -> str:
        width = len(str(self.size))
        return f"{self.begin:0{width}}@{self.end:0{width}}@{self.size}"


def split_slices(size: int, ranks: int) -> list[Slice]:
    """Split `size` as evenly as possible, the first `size % ranks` ranks one larger."""
    share, larger = divmod(size, ranks)
    ends = [share * (rank + 1) + min(rank + 1, larger) for rank in range(ranks)]
    return [Slice(*bounds, size) for bounds in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableData:
    """What one table, or one child of a coalesced table, holds on disk."""

    ids: Tensor
    """int64 `[n]`."""

    slots: dict[str, Tensor] = field(default_factory=dict)
    """`embedding` and whatever else a row has, each `[n, *shape]`, in the table's order."""

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64 or self.ids.dim() != 1:
            raise ValueError(f"ids must be int64 [n], got {self.ids.dtype} {self.ids.shape}")
        rows = len(self.ids)
        odd = {name: slot.shape for name, slot in self.slots.items() if slot.shape[:1] != (rows,)}
        if odd or "id" in self.slots:
            raise ValueError(f"slots besides `id` must have {rows} rows: {odd or 'id'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The rows of one table that one rank wrote."""

    claim: Slice
    """The slice that the block names claim; the ids need not keep to it."""

    ids: Tensor
    slots: dict[str, Tensor] = field(default_factory=dict)
