"""What tells one save from another, so that nobody takes a dead save's part for this one's."""

from __future__ import annotations

import re
import uuid

import torch
from torch import distributed

__all__ = ["checked_save_id", "fresh_save_id", "shared_save_id"]

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def checked_save_id(save_id: object) -> str:
    """Return a save_id as text.

    Raises:
        TypeError: If it is neither text nor a number.
        ValueError: If it cannot be a part of a file's name.
    """
    if type(save_id) is int:
        save_id = str(save_id)
    if not isinstance(save_id, str):
        raise TypeError(f"save_id is text or an int, such as the step, got {save_id!r}")
    if _PLAIN.fullmatch(save_id) is None:
        raise ValueError(
            f"save_id becomes a part of a file's name: 1 to 100 of A-Z a-z 0-9 . _ -, and no sign "
            f"first, got {save_id!r}"
        )
    return save_id


def fresh_save_id() -> str:
    """Return one that no other save has."""
    return uuid.uuid4().hex[:12]


def shared_save_id(rank: int, ranks: int, device: int | None) -> str:
    """Return one that rank 0 draws and tells the others, by way of torch.distributed.

    A collective: every rank has to call it, and it may take as long as the slowest. Belongs on a
    thread.

    Args:
        rank: Ours.
        ranks: How many there are.
        device: The CUDA device to talk through, where the backend needs one.

    Raises:
        ValueError: If torch.distributed does not connect these ranks.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError(
            f"rank {rank} of {ranks} cannot know what the others save: pass save_id, the same on "
            "all ranks and another one for each try (a step's number and a start time, say), or "
            "initialise torch.distributed"
        )
    if (distributed.get_rank(), distributed.get_world_size()) != (rank, ranks):
        raise ValueError(
            f"torch.distributed says rank {distributed.get_rank()} of "
            f"{distributed.get_world_size()}, but this saver is shard {rank} of {ranks}: pass "
            "save_id, the same on all ranks and another one for each try"
        )
    ids = [fresh_save_id()]
    through = None if device is None else torch.device("cuda", device)
    distributed.broadcast_object_list(ids, src=0, device=through)
    return ids[0]
