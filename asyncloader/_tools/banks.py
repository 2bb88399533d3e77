"""Which entry of a bank each name comes from, by names alone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from asyncloader._loading.banking import open_bank, read_names, resolve
from asyncloader._loading.opening import open_session
from asyncloader._planning.names import ModelNames
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncloader._checkpoint.index import Catalog
    from asyncloader._planning.bank import Bank
    from asyncloader._planning.origins import Resolution
    from asyncloader.options import ReadOptions


async def resolve_bank(bank: Bank, *, like: str | None, options: ReadOptions) -> Resolution:
    """Say where the names come from that a checkpoint `like` has; `None` is all of the bank's.

    Raises:
        CheckpointError: If a checkpoint is missing, unreadable, or contradicts itself.
        PlanError: With all that is wrong with the entries.
    """
    async with open_bank(bank, options, runtime=None) as opened:
        known = await read_names(opened)
        catalogs = [one.catalog for one in known.values()]
        if like is not None:
            async with open_session(like, options) as session:
                catalogs = [await session.catalog()]
        [model] = await run_jobs(opened.session.threads.kernels, [partial(_names_of, catalogs)])
        found, _ = await resolve(opened, known, model)
    if found.problems:
        raise PlanError(bank.location, found.problems)
    return found


def _names_of(catalogs: Iterable[Catalog]) -> ModelNames:
    tables: dict[str, dict[str, None]] = {}
    tensors: dict[str, None] = {}
    for catalog in catalogs:
        tensors |= dict.fromkeys(catalog.tensors)
        for table, slots in catalog.tables.items():
            tables.setdefault(table, {}).update(dict.fromkeys(slots))
    return ModelNames.of({t: tuple(slots) for t, slots in tables.items()}, tensors.keys())
