"""Reads what is stored into memory made for it."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._memory.allocation import zeros
from asyncloader._planning.plan import LoadPlan
from asyncloader._planning.tensor_loads import TensorLoad, TensorLoads
from asyncloader._threads.jobs import run_jobs, undisturbed
from asyncloader.errors import CheckpointError

from .destinations import describe_tensors
from .load import Load
from .progress import Meter
from .transaction import complete

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from asyncloader._checkpoint.dtypes import DType
    from asyncloader._checkpoint.stored import Stored

    from .destinations import Destinations
    from .session import Session


async def read_stored(session: Session, wanted: Sequence[Stored]) -> dict[str, Tensor]:
    """Read each into a tensor of its own; return them by name.

    Raises:
        CheckpointError: If torch has no such dtype or shape.
        ReadError: If the storage failed.
        MemoryError: If there is no room.
    """
    tensors: dict[str, Tensor] = {}
    views: dict[str, Tensor] = {}
    prepare = partial(_prepare, session.location, wanted, tensors, views)
    [(plan, into)] = await run_jobs(session.threads.kernels, [undisturbed(prepare)])
    await complete(Load(session, plan, into, {}, meter=Meter(plan.nbytes)))
    return tensors


def has_dtype(dtype: DType) -> bool:
    """Say whether this version of torch has a dtype."""
    return isinstance(getattr(torch, dtype.torch, None), torch.dtype)


def has_numbers(dtype: DType) -> bool:
    """Say whether torch knows the numbers of a dtype: not where one element of its own is two."""
    return dtype.is_number and has_dtype(dtype)


def torch_dtype(location: str, stored: Stored) -> torch.dtype:
    """Return what torch calls the dtype.

    Raises:
        CheckpointError: If this version of torch does not have it.
    """
    found = getattr(torch, stored.dtype.torch, None)
    if isinstance(found, torch.dtype):
        return found
    problem = (
        f"is {stored.dtype.name}, which torch {torch.__version__} does not have; update torch, or "
        "ask for other tensors only"
    )
    raise _bad(location, stored, problem)


def _bad(location: str, stored: Stored, problem: str) -> CheckpointError:
    if not stored.blocks:
        return CheckpointError(location, f"{stored.name!r} {problem}")
    block = stored.blocks[0]
    return CheckpointError(location, problem, block.shard, block.key)


def _prepare(
    location: str,
    wanted: Sequence[Stored],
    tensors: dict[str, Tensor],
    views: dict[str, Tensor],
) -> tuple[LoadPlan, Destinations]:
    """Make the tensors, and say which block goes into which view of one."""
    loads = []
    for stored in wanted:
        tensor = tensors[stored.name] = _allocate(location, stored)
        for number, view in enumerate(_views(stored, tensor)):
            name = stored.name if len(stored.blocks) == 1 else f"{stored.name} (part {number})"
            while name in views:
                name += "'"
            views[name] = view
            loads.append(TensorLoad(name=name, block=stored.blocks[number]))
    plan = LoadPlan(
        location=location,
        tensors=TensorLoads.of(loads),
        shared={},
        skipped=(),
        tables=(),
        missing=(),
        unexpected=(),
        warnings=(),
    )
    return plan, describe_tensors(views)


def _allocate(location: str, stored: Stored) -> Tensor:
    dtype = torch_dtype(location, stored)
    try:
        return zeros(stored.shape, dtype)
    except RuntimeError as error:  # such as [0, 2**62, 8], which takes no byte
        problem = f"torch cannot make a tensor of shape {list(stored.shape)}: {error}"
        raise _bad(location, stored, problem) from error


def _views(stored: Stored, tensor: Tensor) -> list[Tensor]:
    """Return the part of a tensor that each block fills."""
    if len(stored.blocks) == 1:
        return [tensor]
    ends = itertools.accumulate(block.rows for block in stored.blocks)
    return [tensor[end - block.rows : end] for block, end in zip(stored.blocks, ends, strict=True)]
