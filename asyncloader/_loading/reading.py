"""Finds what is stored under a name, and reads it into memory made for it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._checkpoint.manifest import Manifest, stored_tensor
from asyncloader._memory.allocation import zeros
from asyncloader._planning.hints import did_you_mean
from asyncloader._planning.plan import LoadPlan, TensorLoad, TensorLoads
from asyncloader._threads.jobs import run_jobs, undisturbed
from asyncloader.errors import CheckpointError

from .destinations import describe_tensors
from .hold import Hold
from .load import Load
from .opening import open_session
from .progress import Meter
from .session import in_time
from .transaction import complete

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.dtypes import DType
    from asyncloader._checkpoint.header import ShardHeader
    from asyncloader._checkpoint.index import Catalog, Place
    from asyncloader._checkpoint.manifest import Stored
    from asyncloader.options import ReadOptions

    from .destinations import Destinations
    from .session import Session


_log = logging.getLogger(__name__)

_NAMED = 20
_GUESSED = 5


class Contents:
    """The names of one checkpoint, and the headers that were needed so far.

    Every call has a session: the one that `async with` holds open, or one of its own. All of them
    see the same files: one that is replaced after it was first opened is an error. The time-out
    is for each call.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        self._seen: dict[str, tuple[object, ...]] = {}
        self._held = Hold(
            partial(open_session, path, replace(options, timeout=None), seen=self._seen)
        )
        self._catalog: Catalog | None = None
        self._headers: dict[str, ShardHeader] = {}
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<Contents: {len(self._headers)} headers known>"

    async def __aenter__(self) -> None:
        if self._held.is_entered:
            raise RuntimeError(f"{self._path}: is open already")
        await self._held.open()

    async def __aexit__(self, *_: object) -> None:
        await self._held.close()

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[Session]:
        held = self._held
        if held.value is None or held.loop is not asyncio.get_running_loop():
            async with open_session(self._path, self._options, seen=self._seen) as session:
                yield session
            return
        with held.use() as session:
            async with in_time(self._path, self._options.timeout) as watched:
                watched.append(session.disk)
                async with session.explaining():
                    yield session

    async def catalog(self, session: Session) -> Catalog:
        """Return the names; raises what `Session.with_names` does."""
        async with session.lock:  # or many calls at once would all read it
            if self._catalog is None:
                catalog = await session.catalog(whole=False)
                if catalog.sidecar is not None:  # `parts` may be large, and is for tables only
                    catalog = replace(catalog, sidecar=replace(catalog.sidecar, parts=None))
                self._catalog = catalog
            return self._catalog

    async def find(self, session: Session, names: Iterable[str]) -> list[Stored]:
        """Return the stored tensor of each name, in their order.

        Raises:
            TypeError: If a name is no text.
            KeyError: If there are no such names; it lists them.
        """
        kernels = session.threads.kernels
        catalog = await self.catalog(session)
        [places] = await run_jobs(kernels, [partial(_places, session.location, catalog, names)])
        shards = sorted({place.shard for found in places.values() for place in found})
        async with session.lock:
            unknown = [shard for shard in shards if shard not in self._headers]
            if unknown:
                manifest = await session.manifest(catalog, unknown)
                self._headers |= manifest.headers
                for warning in manifest.warnings:
                    if warning not in self._warned:  # a reader says each once
                        self._warned.add(warning)
                        _log.warning("%s: %s", session.location, warning)
        session.know(self._headers)  # this session may be another than the one that read them
        manifest = Manifest(session.location, catalog, self._headers)
        [stored] = await run_jobs(
            kernels, [lambda: [stored_tensor(manifest, name) for name in places]]
        )
        return stored


def _places(
    location: str, catalog: Catalog, names: Iterable[object]
) -> dict[str, tuple[Place, ...]]:
    places: dict[str, tuple[Place, ...]] = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names are text, got {name!r}")
        places[name] = catalog.places(name)
    unknown = [name for name, found in places.items() if not found]
    if unknown:
        catalog.whole()
        raise KeyError(_complaint(location, catalog, unknown))
    return places


def _complaint(location: str, catalog: Catalog, unknown: Sequence[str]) -> str:
    names = catalog.names()

    def hint(name: str) -> str:
        if name in catalog.tables:
            slots = ", ".join(repr(f"{name}@{slot}") for slot in catalog.tables[name])
            return f" (a table: read {slots})"
        return did_you_mean([name], names)[name]

    listed = [
        f"{name!r}{hint(name) if number < _GUESSED else ''}"
        for number, name in enumerate(unknown[:_NAMED])
    ]
    more = f" and {len(unknown) - _NAMED:,} more" if len(unknown) > _NAMED else ""
    return (
        f"not in {location}: {', '.join(listed)}{more}; "
        "CheckpointReader.tensor_names() lists what there is"
    )


async def read_stored(session: Session, wanted: Sequence[Stored]) -> dict[str, Tensor]:
    """Read each stored tensor into memory of its own; return them by name.

    Raises:
        CheckpointError: If torch has no such dtype or shape.
    """
    tensors: dict[str, Tensor] = {}
    prepare = partial(_prepare, session.location, wanted, tensors)
    [(plan, into)] = await run_jobs(session.threads.kernels, [undisturbed(prepare)])
    await complete(Load(session, plan, into, {}, meter=Meter(plan.nbytes)))
    return tensors


def has_dtype(dtype: DType) -> bool:
    return isinstance(getattr(torch, dtype.torch, None), torch.dtype)


def has_numbers(dtype: DType) -> bool:
    """Say whether torch has a dtype, and an element of it is one number: some pack two."""
    return dtype.is_number and has_dtype(dtype)


def torch_dtype(location: str, stored: Stored) -> torch.dtype:
    """Return the dtype as torch knows it.

    Raises:
        CheckpointError: If this version of torch does not have it.
    """
    found = getattr(torch, stored.dtype.torch, None)
    if isinstance(found, torch.dtype) and not stored.dtype.is_refused:
        return found
    problem = f"is {stored.dtype.lack}"
    if not stored.dtype.is_refused:
        problem += f": torch is {torch.__version__}; update it, or ask for other tensors only"
    raise _bad(location, stored, problem)


def _bad(location: str, stored: Stored, problem: str) -> CheckpointError:
    if not stored.blocks:
        return CheckpointError(location, f"{stored.name!r} {problem}")
    block = stored.blocks[0]
    return CheckpointError(location, problem, block.shard, block.key)


def _prepare(
    location: str, wanted: Sequence[Stored], tensors: dict[str, Tensor]
) -> tuple[LoadPlan, Destinations]:
    """Make `tensors`, and say which block goes into which view of one."""
    views: dict[str, Tensor] = {}
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
