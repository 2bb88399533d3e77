"""What users import to load a checkpoint."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Unpack

from ._arguments import as_dict, check_callable, check_progress, checked_path
from ._loading.claims import Claim
from ._loading.destinations import describe_tensors
from ._loading.execution import Execution
from ._loading.progress import Meter
from ._loading.progress_bar import progress_bar
from ._loading.report import LoadReport
from ._loading.runtime import Runtime
from ._loading.session import open_session
from ._loading.tables import check_tables, describe_tables
from ._loading.trace import Tracer
from ._planning.casts import checked_cast
from ._planning.choice import choose
from ._planning.hints import RENAME, did_you_mean
from ._planning.load_info import checked_load_info, default_load_info
from ._planning.planner import plan_load
from ._planning.targets import Targets
from ._table.protocol import UpdateCounts
from ._threads.blocking import run_blocking
from ._threads.collector import undisturbed
from ._threads.jobs import run_jobs
from .errors import AsyncLoaderError
from .options import ReadOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import torch

    from ._loading.destinations import Destinations
    from ._loading.progress import Progress
    from ._loading.session import Session
    from ._loading.trace import Span
    from ._planning.casts import Casting
    from ._planning.load_info import LoadInfo
    from ._planning.plan import LoadPlan
    from ._table.protocol import LoadableTable
    from .options import LoadKeywords

__all__ = ["Loader", "identity"]

_log = logging.getLogger(__name__)

_NAMED = 20


def identity(info: LoadInfo) -> LoadInfo:
    """Return what it is given: the `filter_func` that changes nothing."""
    return info


class Loader:
    """Fills hash tables and dense tensors from a checkpoint in RecIS's format, or from safetensors.

    A load is planned first: whatever can be wrong with names, dtypes, shapes, offsets and sizes is
    found before the first byte is written, and listed in one error. A table shows no row of a load
    before all of them are there; a load that fails, times out or is cancelled leaves every table as
    it was. Dense tensors are filled in place: if the *storage* fails half-way, the error says in
    `touched` which of them were written to.

    The first five arguments are those of RecIS's `Loader`, in its order. A loader may be used any
    number of times.

    Args:
        checkpoint_path: A folder that holds `index`; for dense tensors also a safetensors file, or
            a folder of these, as Hugging Face's are.
        hashtables: Tables to fill, by any name; their own `children` say which ids they take.
        tensors: Tensors to fill, by name: allocated, of the right shape and dtype, on any device,
            contiguous or not. Their storage must not be resized or exchanged during a load.
        parallel: Reads in flight; `None` is what `options` say, 16 by default.
        filter_func: Gets the plan, `{destination: {source: [slot, ...]}}`, and returns the one to
            use: leave out what shall stay, name other sources to rename.
        strict: Whether something that is asked for but not in the checkpoint is an error. If not,
            the destination keeps its values, a warning is logged, the report lists it.
        progress: Called on the event loop with a `Progress`, at most ten times a second; `True`
            shows a bar on stderr.
        trace: Called on the event loop with a `Span` after every step of the load. (To have them in
            a file: `asyncloader load --trace FILE`.)
        on_plan: Called on the event loop with the `LoadPlan`, before tables take memory or a byte
            is written; what it raises ends the load. May be a coroutine function: it is awaited.
        runtime: Threads and bytes to share with other loads, in place of such of its own;
            `max_inflight_bytes`, `max_loop_lag` and `pressure` are the runtime's then, and
            `parallel` is no more than the runtime's. Not for `load()`, which has a loop of its own.
        cast: Which values are converted on their way, of tensors and of tables' slots: `"widen"`,
            to a dtype that holds every value of the one in the checkpoint (bfloat16 to float32,
            int32 to int64); `"any"`, floats to any floats and integers to any integers, as
            `Tensor.to` does it, which rounds and wraps around; `None`, none: another dtype is an
            error. Ids, bools and complex numbers are never converted, nor integers to floats or
            back. The plan and the report list all that is. Digests are of the bytes as stored.
        options: How to read: reads in flight, memory for them, time-outs, digests, the lag of the
            event loop.
        **read: Fields of `ReadOptions`, which go before `options`.

    Attributes:
        options: How it reads.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense, or a tensor cannot be written to.
    """

    def __init__(  # RecIS's order
        self,
        checkpoint_path: str | os.PathLike[str],
        hashtables: Mapping[str, LoadableTable] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        parallel: int | None = None,
        filter_func: Callable[[LoadInfo], LoadInfo] = identity,
        *,
        strict: bool = False,
        cast: Casting | None = None,
        progress: Callable[[Progress], object] | bool | None = None,
        on_plan: Callable[[LoadPlan], object] | None = None,
        trace: Callable[[Span], object] | None = None,
        runtime: Runtime | None = None,
        options: ReadOptions | None = None,
        **read: Unpack[LoadKeywords],
    ) -> None:
        given = {} if parallel is None else {"parallel": parallel}
        self.options = ReadOptions.of(options, {**given, **read})
        self._runtime = _checked_runtime(runtime, self.options)
        check_callable(filter_func, "filter_func")
        check_progress(progress)
        if trace is not None:
            check_callable(trace, "trace")
        if on_plan is not None:
            check_callable(on_plan, "on_plan", awaited=True)
        self._path = checked_path(checkpoint_path, "checkpoint_path")
        self._tensors = as_dict(tensors, "tensors")
        self._filter = filter_func
        self._strict = strict
        self._progress = progress
        self._cast = checked_cast(cast)
        self._on_plan = on_plan
        self._tracer = Tracer(trace)
        self._tables = as_dict(hashtables, "hashtables")
        check_tables(self._tables, self._tensors, able="begin")
        describe_tensors(self._tensors)

    def __repr__(self) -> str:
        return f"<Loader {self._path!r}: {len(self._tables)} tables, {len(self._tensors)} tensors>"

    def default_load_info(self) -> LoadInfo:
        """Return the plan that `filter_func` gets: every destination from its own name."""
        return default_load_info(self._targets(describe_tensors(self._tensors)))

    async def plan(self) -> LoadPlan:
        """Say what a load would do. Reads names and headers, touches nothing.

        Raises:
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            PlanError: If checkpoint and destinations disagree.
            ReadError: If the storage failed.
            LoadTimeoutError: If `timeout` passed.
        """
        async with self._session() as session:
            return await self._plan(session, await self._destinations(session))

    async def aload(self) -> LoadReport:
        """Load, on the caller's event loop, which goes on serving meanwhile.

        Raises:
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            PlanError: If checkpoint and destinations disagree.
            CheckpointChangedError: If it was replaced or written to meanwhile; likewise.
            ReadError: If the storage failed half-way; tensors may be partly overwritten.
            ReadStalledError: If it gave no answer for `stall_timeout`; likewise.
            LoadTimeoutError: If `timeout` passed; likewise.
            RuntimeError: If one of the tables is being loaded or changed by somebody else, or
                another load fills memory of the tensors at the same time, under whatever names.
        """
        with contextlib.ExitStack() as stack:
            listener = self._progress
            if listener is True:
                listener = stack.enter_context(progress_bar())
            claim = stack.enter_context(Claim())
            return await self._load(None if isinstance(listener, bool) else listener, claim)

    def load(self) -> LoadReport:
        """Load, and return when it is done; raises what `aload` raises.

        Runs an event loop of its own, from any thread, also where a loop is running already (which
        it then blocks: inside a coroutine, `await aload()`).
        """
        return run_blocking(self.aload)

    async def _load(
        self, listener: Callable[[Progress], object] | None, claim: Claim
    ) -> LoadReport:
        meter = Meter(0, listener)
        with contextlib.ExitStack() as unless_committed:
            async with self._session() as session:
                into = await self._destinations(session)
                plan = await self._plan(session, into)
                if self._on_plan is not None:
                    answer = self._on_plan(plan)
                    if inspect.isawaitable(answer):
                        await answer
                tables = {load.name: self._tables[load.name] for load in plan.tables}
                take = partial(claim.take, into, plan.tensors.names, tables, plan.location)
                await run_jobs(session.threads.kernels, [take])
                meter.total = plan.nbytes
                execution = Execution(
                    plan=plan,
                    tensors=into,
                    tables=self._tables,
                    storage=session.storage,
                    threads=session.threads,
                    budget=session.budget,
                    meter=meter,
                    parallel=session.options.parallel,
                    chunk_bytes=session.options.read_bytes,
                    verifier=session.verifier,
                    tracer=self._tracer,
                    touched={},
                )
                unless_committed.push(partial(_name_touched, execution))
                unless_committed.callback(execution.abort)
                await execution.run()
                tell = undisturbed(partial(self._report, execution, session))
                [report] = await run_jobs(session.threads.kernels, [tell])
            # No await from here on: who is cancelled finds the tables as they were.
            start = time.perf_counter()
            counts = execution.commit()
            unless_committed.pop_all()
        self._tracer.note("commit", "all tables", start)
        for warning in execution.warnings:
            _log.warning("%s: %s", plan.location, warning)
        lag = None if session.watch is None else session.watch.lag
        report = replace(report, tables={**report.tables, **counts}, lag=lag)
        _log.info("%s", report)
        return report

    def _session(self) -> contextlib.AbstractAsyncContextManager[Session]:
        return open_session(self._path, self.options, runtime=self._runtime)

    async def _destinations(self, session: Session) -> Destinations:
        """Describe the tensors as they are now, and hold on to their memory."""
        with self._tracer.span("plan", "destinations"):
            describe = undisturbed(partial(describe_tensors, self._tensors))
            [into] = await run_jobs(session.threads.kernels, [describe])
        return into

    def _targets(self, into: Destinations) -> Targets:
        """Say what there is to fill, as it is now: slots may have come."""
        return Targets(tensors=into.targets, tables=describe_tables(self._tables))

    async def _plan(self, session: Session, into: Destinations) -> LoadPlan:
        pool = session.threads.kernels  # planning is all Python: on a thread the loop gets its turn
        [targets] = await run_jobs(pool, [partial(self._targets, into)])
        info = None
        if self._filter is not identity:
            [default] = await run_jobs(pool, [partial(default_load_info, targets)])
            filtered = self._filter(default)
            [info] = await run_jobs(pool, [partial(checked_load_info, filtered)])
        with self._tracer.span("plan", "names"):
            catalog = await session.catalog()
        with self._tracer.span("plan", "choice"):
            [choice] = await run_jobs(pool, [undisturbed(partial(choose, catalog, info, targets))])
        with self._tracer.span("plan", "headers"):
            [shards] = await run_jobs(pool, [choice.shards])
            manifest = await session.manifest(catalog, shards)
        odd = [partial(look, choice.tensors) for look in (into.overlaps, into.unsafe)]
        for problems in await run_jobs(pool, odd):
            choice.problems += problems
        with self._tracer.span("plan", "plan"):
            decide = undisturbed(
                partial(plan_load, manifest, choice, strict=self._strict, casting=self._cast)
            )
            [plan] = await run_jobs(pool, [decide])
        for warning in plan.warnings:
            _log.warning("%s: %s", plan.location, warning)
        if plan.missing:
            guess = partial(did_you_mean, plan.missing, plan.unexpected, rename=RENAME)
            [hints] = await run_jobs(pool, [guess])
            _log.warning(
                "%s: not in the checkpoint, so what it would fill keeps its values: %s "
                "(%d in all; strict=True makes this an error)",
                plan.location,
                ", ".join(f"{name!r}{hints[name]}" for name in plan.missing[:_NAMED]),
                len(plan.missing),
            )
        return plan

    def _report(
        self,
        execution: Execution,
        session: Session,
    ) -> LoadReport:
        """Say what was done, but for what `commit` does to tables; belongs on a thread."""
        plan, meter = execution.plan, execution.meter
        nothing = UpdateCounts(rows=0, new=0, replaced=0, duplicates=0, dropped=0)
        done = dict.fromkeys(plan.tensors.names, "loaded")
        done |= {name: f"shared with {other!r}" for name, other in plan.shared.items()}
        done |= {name: "copied" for name, staged in execution.touched.items() if staged}
        done |= dict.fromkeys(plan.skipped, "not asked for")
        tensors = {name: done.get(name, "missing") for name in self._tensors}
        return LoadReport(
            location=plan.location,
            bytes_read=meter.read,
            bytes_wanted=meter.wanted,
            bytes_verified=meter.verified,
            reads=meter.reads,
            seconds=meter.seconds,
            tables=dict.fromkeys(self._tables, nothing),
            tensors=tensors,
            filled=sum(outcome in {"loaded", "copied"} for outcome in tensors.values()),
            missing=plan.missing,
            unexpected=plan.unexpected,
            warnings=(*plan.warnings, *execution.warnings),
            casts=plan.casts,
            retries=0 if session.retrying is None else session.retrying.retries,
        )


def _checked_runtime(runtime: Runtime | None, options: ReadOptions) -> Runtime | None:
    if runtime is not None and not isinstance(runtime, Runtime):
        raise TypeError(f"runtime must be a Runtime or None, got {runtime!r}")
    if runtime is not None and options.promises:
        raise ValueError("max_loop_lag and pressure are for all loads of a runtime: give it them")
    return runtime


def _name_touched(execution: Execution, _: object, error: BaseException | None, __: object) -> None:
    """Say on an error which tensors are no longer what they were."""
    names = tuple(sorted(execution.touched))
    if isinstance(error, AsyncLoaderError):
        error.touched = names
    if names and error is not None:
        still = ", and until the disk answers; take new ones for another load"
        more = still if execution.lost else ""
        error.add_note(f"tensors written to: {', '.join(names[:_NAMED])}{more}")
