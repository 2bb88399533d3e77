"""Produces the load info and the plan: which bytes go where. Touches no destination.

Names and headers are read; everything else is pure work, on threads, so that the event loop
gets its turn.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._addresses import is_url
from asyncloader._disk_table.table import DiskTable
from asyncloader._planning.choice import choose
from asyncloader._planning.hints import did_you_mean
from asyncloader._planning.planner import plan_load
from asyncloader._planning.targets import Targets, checked_load_info, default_load_info
from asyncloader._table.recis import RecISTable
from asyncloader._threads.jobs import run_jobs, undisturbed
from asyncloader.errors import PlanError

from .checks import describe_tables
from .destinations import describe_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.index import Catalog
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._planning.choice import Choice
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._planning.targets import Casting, LoadInfo
    from asyncloader._table.protocol import LoadableTable
    from asyncloader.options import ReadOptions

    from .destinations import Destinations
    from .progress import Tracer
    from .session import Session

_log = logging.getLogger(__name__)

_NAMED = 20


def identity(info: LoadInfo) -> LoadInfo:
    """Return the load info as it is: the `filter_func` that changes nothing."""
    return info


@dataclass(kw_only=True)
class Planner:
    """Plans loads into tables and tensors."""

    tables: Mapping[str, LoadableTable]  # by any name
    tensors: Mapping[str, Tensor]
    filter_func: Callable[[LoadInfo], LoadInfo]  # returns the load info to use
    strict: bool  # whether something that is asked for but not in the checkpoint is an error
    cast: Casting | None  # which values may be converted
    tracer: Tracer

    def default_load_info(self) -> LoadInfo:
        """Return the load info that `filter_func` gets: every destination from its own name."""
        return default_load_info(self.describe()[1])

    async def plan(self, session: Session) -> tuple[LoadPlan, Destinations]:
        """Read names and headers, and decide which bytes go where.

        Returns the plan, and the tensors as they were described for it; their memory is held on to.

        Raises:
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            PlanError: If checkpoint and destinations disagree.
            TypeError: If `filter_func` returns something else than a load info.
        """
        kernels, described, info = session.threads.kernels, None, None
        if self.filter_func is not identity:
            [described] = await run_jobs(kernels, [undisturbed(self.describe)])
            info = await self._load_info(session, described[1])
        with self.tracer.span("plan", "names"):
            choose_now = partial(self._choose, described, info)
            into, catalog, choice, shards = await session.with_names(choose_now)
        with self.tracer.span("plan", "headers"):
            manifest = await session.manifest(catalog, shards)
        with self.tracer.span("plan", "plan"):
            [(plan, warnings)] = await run_jobs(
                kernels, [undisturbed(partial(self.decide, manifest, choice, into, session))]
            )
        self.warn(plan.location, warnings)
        return plan, into

    def check_place(self, path: str, options: ReadOptions) -> None:
        """Refuse tables whose rows would stay in an object store, before anything is asked for.

        Raises:
            PlanError: If there are such.
        """
        if options.cache_dir is None and is_url(path) and self.filter_func is identity:
            tables = [name for name, one in self.tables.items() if isinstance(one, DiskTable)]
            if tables:
                raise PlanError(path, [_remote(name, path) for name in tables])

    def warn(self, location: str, warnings: Sequence[str]) -> None:
        for warning in warnings:
            _log.warning("%s: %s", location, warning)

    async def _load_info(self, session: Session, targets: Targets) -> LoadInfo:
        """Return the load info that `filter_func` makes of the default."""
        kernels = session.threads.kernels
        [default] = await run_jobs(kernels, [partial(default_load_info, targets)])
        [info] = await run_jobs(kernels, [partial(checked_load_info, self.filter_func(default))])
        return info

    def describe(self) -> tuple[Destinations, Targets]:
        """Describe the destinations as they are now, and hold on to their memory."""
        into = describe_tensors(self.tensors)
        return into, Targets(tensors=into.targets, tables=describe_tables(self.tables))

    def _choose(
        self,
        described: tuple[Destinations, Targets] | None,
        info: LoadInfo | None,
        parse: Callable[[], Catalog],
    ) -> tuple[Destinations, Catalog, Choice, tuple[str, ...]]:
        """Choose the blocks to load; return also the shards whose headers are needed."""
        into, targets = described or self.describe()
        catalog = parse()
        choice = choose(catalog, info, targets)
        if choice.lacking:
            catalog.whole()
        return into, catalog, choice, choice.shards()

    def _problems(self, choice: Choice, session: Session) -> list[str]:
        """Return what tables themselves say against being filled."""
        remote = [
            _remote(part.target.name, part.ids.shard)
            for part in choice.parts
            if session.options.cache_dir is None
            and part.target.locates
            and session.is_remote(part.ids.shard)
        ]
        if remote:
            return list(dict.fromkeys(remote))
        wanted: dict[str, set[str]] = {}
        for part in choice.parts:
            wanted.setdefault(part.target.name, set()).update(part.slots)
        return [
            problem
            for name, slots in wanted.items()
            if isinstance(table := self.tables[name], RecISTable)
            for problem in table.problems(sorted(slots))
        ]

    def decide(
        self, manifest: Manifest, choice: Choice, into: Destinations, session: Session
    ) -> tuple[LoadPlan, list[str]]:
        """Return the plan of a load by a session, and warnings."""
        choice.problems += [*into.overlaps(choice.tensors), *into.unsafe(choice.tensors)]
        choice.problems += self._problems(choice, session)
        plan = plan_load(manifest, choice, strict=self.strict, casting=self.cast)
        _check_room(plan, session)
        warnings = list(plan.warnings)
        if plan.missing:
            hints = did_you_mean(plan.missing, plan.unexpected)
            named = ", ".join(f"{name!r}{hints[name]}" for name in plan.missing[:_NAMED])
            warnings.append(
                f"not in the checkpoint, so what it would fill keeps its values: {named} "
                f"({len(plan.missing)} in all; strict=True makes this an error)"
            )
        return plan, warnings


def _remote(table: str, shard: str) -> str:
    return (
        f"table {table!r}: its rows would stay in {shard}, which is not on a disk of this machine: "
        "give cache_dir (of ReadOptions), a folder for copies of them, or load it into a HashTable"
    )


def _check_room(plan: LoadPlan, session: Session) -> None:
    """Refuse a load whose rows cannot stay in `cache_dir`, as far as is known before it."""
    most = session.options.cache_bytes
    if most is None:
        return
    rows = {
        table.name: sum(
            block.nbytes
            for shard, blocks in table.row_blocks().items()
            if session.is_remote(shard)
            for block in blocks
        )
        for table in plan.tables
        if table.locates
    }
    if sum(rows.values()) > most:
        names = ", ".join(repr(name) for name, nbytes in rows.items() if nbytes)
        problem = (
            f"the rows of {names} take {sum(rows.values()):,} bytes, and cache_bytes={most:,} is "
            "all that may stay on the disk: give more, or load fewer tables or a slice"
        )
        raise PlanError(plan.location, [problem])
