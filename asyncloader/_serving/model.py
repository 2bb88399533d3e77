"""One version of a model: how a user's functions build and check it, and what memory it takes."""

from __future__ import annotations

import asyncio
import inspect
import math
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from torch import nn

from asyncloader._addresses import as_path
from asyncloader._disk_table.table import DiskTable
from asyncloader._table.recis import RecISTable, is_of_recis
from asyncloader._threads.jobs import run_jobs
from asyncloader.model import targets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Executor

    from torch import Tensor

    from asyncloader._disk_table.stats import TableStats
    from asyncloader._loading.report import LoadReport
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._table.hashtable import HashTable
    from asyncloader.options import ReadOptions

    from .events import Event
    from .source import Candidate


# The id itself, and two words of the index, which begins half full.
_ID_BYTES = 8 + 16
# Of a table whose rows stay on the disk: the id, and the number of its row where ids come unsorted.
_LOCATED_BYTES = 8 + 4
_SHORT = 80

Table: TypeAlias = "HashTable | DiskTable"

Built: TypeAlias = "tuple[Mapping[str, Table] | None, Mapping[str, Tensor] | None] | nn.Module"
"""The values that a user's `build` may return."""

_Contents: TypeAlias = "tuple[Mapping[str, Table], Mapping[str, Tensor], nn.Module | None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a user wants; `Live` documents the fields. `read` is a part of the `loader_options`."""

    build: Callable[[], object]
    check: Callable[[Model], object] | None
    on_event: Callable[[Event], object] | None
    keep: int
    poll: float
    loader_options: Mapping[str, Any]
    read: ReadOptions
    max_memory: int | None
    retry_pause: float


class Model:
    """One version of a model: its tables and tensors, all of one checkpoint.

    Nothing in it changes while it is pinned. Once its memory has been given back, its attributes
    raise `RuntimeError`: the caller has kept the model beyond the `with` block that pinned it.

    Attributes:
        path: Its checkpoint; of an object store, its URL.
        version: The name of its folder.
        report: The report of its load.
    """

    __slots__ = ("_contents", "path", "report", "version")

    report: LoadReport

    def __init__(
        self,
        version: Candidate,
        tables: Mapping[str, Table],
        tensors: Mapping[str, Tensor],
        module: nn.Module | None,
    ) -> None:
        self.path: Final = as_path(version.location)
        self.version: Final = version.name
        self._contents: _Contents | None = (
            MappingProxyType(dict(tables)),
            MappingProxyType(dict(tensors)),
            module,
        )

    def __repr__(self) -> str:
        if self._contents is None:
            return f"<Model {self.version!r}: its memory was given back>"
        tables, tensors, _ = self._contents
        return f"<Model {self.version!r}: {len(tables)} tables, {len(tensors)} tensors>"

    @property
    def tables(self) -> Mapping[str, Table]:
        """By the names that `build` gave them, or, of a module, by their own."""
        return self._held[0]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By name; of a module, those of its `state_dict()`."""
        return self._held[1]

    @property
    def module(self) -> nn.Module:
        """The module that `build` returned.

        Raises:
            AttributeError: If `build` returned no module.
        """
        module = self._held[2]
        if module is None:
            raise AttributeError("build() returned tables and tensors, not a torch.nn.Module")
        return module

    @property
    def _held(self) -> _Contents:
        if self._contents is None:
            raise RuntimeError(
                f"version {self.version!r} was let go and its memory given back: use a model "
                "within the `with live.use()` block that pins it"
            )
        return self._contents

    def table_stats(self) -> dict[str, TableStats]:
        """Return what the lookups of each table came to whose rows stay on the disk."""
        tables = {} if self._contents is None else self._contents[0]
        return {
            name: table.stats() for name, table in tables.items() if isinstance(table, DiskTable)
        }

    def take_contents(self) -> object:
        """Return all that takes memory, which is given back when the caller drops it."""
        contents, self._contents = self._contents, None
        return contents

    def shares_memory_with(self, other: Model) -> bool:
        """Say whether both have a table or a tensor that is the same. Looks at every tensor."""
        if (theirs := other._contents) is None:
            return False
        return not _identities(*self._held[:2]).isdisjoint(_identities(*theirs[:2]))


def tensor_bytes(model: Model) -> int:
    """Return the bytes that a model's tensors take; tensors that share memory count once."""
    storages = {
        (storage.device, storage.data_ptr()): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in model.tensors.values())
    }
    return sum(storages.values())


def row_bytes(plan: LoadPlan, model: Model) -> int:
    """Return the bytes that a model's tables take once a plan is carried out.

    An estimate where the checkpoint was written by another number of ranks.
    """
    total = 0
    for load in plan.tables:
        table = model.tables[load.name]
        if isinstance(table, DiskTable):
            total += load.expected * _LOCATED_BYTES + table.cache_bytes
            continue
        slots = table.slots().values()
        row = sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in slots)
        total += load.expected * (_ID_BYTES + row)
    return total


def _identities(tables: Mapping[str, Table], tensors: Mapping[str, Tensor]) -> set[int]:
    """Return numbers that tell tables and tensors from those of another model."""
    storages = (tensor.untyped_storage() for tensor in tensors.values())
    memory = {storage.data_ptr() for storage in storages if storage.nbytes()}
    return memory | {id(table) for table in tables.values()}


class RefusedError(Exception):
    """A version will not serve.

    Either it would not fit `beside` the versions in memory, in bytes, or `check` raised `error`.
    """

    def __init__(
        self, reason: str, *, beside: int | None = None, error: Exception | None = None
    ) -> None:
        super().__init__(reason)
        self.beside = beside
        self.error = error


async def built_model(settings: Settings, version: Candidate, executor: Executor) -> Model:
    """Return a model that a user's `build` has made for a version, still empty."""
    try:
        built = await _called(executor, settings.build)
    except asyncio.CancelledError as error:
        if _is_cancelled():
            raise
        raise RuntimeError("build() was cancelled by something of its own") from error
    except Exception as error:
        error.add_note("raised by build()")
        raise
    [model] = await run_jobs(executor, [partial(_model_of, version, built)])
    return model


def _model_of(version: Candidate, built: object) -> Model:
    if isinstance(built, nn.Module):
        return Model(version, *targets(built), built)
    if isinstance(built, tuple) and len(built) == 2:  # noqa: PLR2004  # tables, tensors
        tables, tensors = built
        for name, table in (tables or {}).items():
            if is_of_recis(table) or isinstance(table, RecISTable):
                raise TypeError(
                    f"build() made {name!r}, a table of RecIS, whose rows show as they come, so "
                    "that a version could serve by halves: make a HashTable"
                )
        return Model(version, tables or {}, tensors or {}, None)
    raise TypeError(
        f"build() returns (hashtables, tensors) or a torch.nn.Module, got {type(built).__name__}"
    )


async def pass_check(settings: Settings, model: Model, executor: Executor) -> None:
    """Let a user's `check` look at a version; raise `RefusedError` if it says no, or raises."""
    if settings.check is None:
        return
    try:
        verdict = await _called(executor, partial(settings.check, model))
    except asyncio.CancelledError as error:
        if _is_cancelled():
            raise
        raise RefusedError("check was cancelled by something of its own") from error
    except Exception as error:
        reason = f"check raised {type(error).__name__}: {error}"
        raise RefusedError(reason, error=error) from error
    if verdict is None:
        return
    try:
        # Of text or a list, `bool` would say whether it is empty.
        answer = bool(verdict) if hasattr(type(verdict), "__bool__") else None
    except (RuntimeError, ValueError):  # of tensors and arrays of several values
        answer = None
    if answer:
        return
    text = repr(verdict)
    reason = f"check returned {text if len(text) <= _SHORT else f'a {type(verdict).__name__}'}"
    if answer is None:
        raise TypeError(f"{reason}, which is neither true nor false: return True, False or None")
    raise RefusedError(reason, error=ValueError(reason))


async def _called(executor: Executor, function: Callable[[], object]) -> object:
    """Call a user's function on a thread; await on the event loop what it returns."""
    [result] = await run_jobs(executor, [function])
    return await result if inspect.isawaitable(result) else result


def _is_cancelled() -> bool:
    """Say whether this task was cancelled; otherwise a user's code raised that by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
