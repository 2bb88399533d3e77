"""Calls of `torch.classes.recis.HashtableImpl`, in the releases of RecIS that differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .schema import Slot, as_slot

if TYPE_CHECKING:
    from .schema import Longs


def ids_and_places(
    table: Any,  # noqa: ANN401  # RecIS's
) -> tuple[Longs, Longs]:
    """Return all ids, encoded, and the places of their rows: int64 `[n]` each."""
    try:
        ids, places = table.ids_map()
    except (RuntimeError, TypeError):  # from 1.1.28 on it has to be told a child, or `None`
        ids, places = table.ids_map(None)
    return _host(ids), _host(places)


def look_up(
    table: Any,  # noqa: ANN401  # RecIS's
    ids: Longs,
    device: torch.device,
    *,
    readonly: bool = False,
) -> Longs:
    """Return the places of ids, encoded, int64 `[n]`; unknown ids come in, or have -1.

    The device is the table's.
    """
    # It may keep or change the ids that it gets: a copy. And it copies all rows out.
    index, _ = table.embedding_lookup(torch.tensor(ids, device=device), readonly)
    return _host(index)


def device_of(
    table: Any,  # noqa: ANN401  # RecIS's
) -> torch.device:
    """Return the device of a table's rows; it lists all blocks."""
    return _sample(table.slot_group().slot_by_name("embedding")).device


def described(
    slot: Any,  # noqa: ANN401  # RecIS's
) -> Slot:
    """Describe a slot; its initial values are RecIS's."""
    like = _sample(slot)
    return as_slot(slot.name(), tuple(like.shape[1:]), like.dtype, 0.0)


def _sample(
    slot: Any,  # noqa: ANN401  # RecIS's
) -> torch.Tensor:
    """Return a tensor of the dtype, row shape and device of a slot's rows."""
    blocks = slot.values()
    found: torch.Tensor = blocks[0] if blocks else slot.value()  # which copies all rows
    return found


def _host(numbers: torch.Tensor) -> Longs:
    found: Longs = numbers.detach().to("cpu", torch.int64).contiguous().numpy()
    return found
