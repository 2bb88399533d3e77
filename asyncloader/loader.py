"""For users who load a checkpoint."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, Unpack

from ._arguments import as_dict, check_callable, check_progress
from ._loading.banking import planned_bank
from ._loading.checks import check_tables
from ._loading.claims import Claim
from ._loading.destinations import describe_tensors
from ._loading.load import Load
from ._loading.opening import checked_runtime, open_session
from ._loading.planner import Planner, identity
from ._loading.progress import Meter, Tracer, listening
from ._loading.report import LoadReport, report_of
from ._loading.transaction import or_take_back, run
from ._planning.bank import Bank
from ._planning.targets import checked_cast
from ._table.protocol import UpdateCounts
from ._table.recis import adapted
from ._threads.blocking import run_blocking
from ._threads.jobs import run_jobs, undisturbed
from .options import ReadOptions

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Mapping

    import torch

    from ._loading.destinations import Destinations
    from ._loading.keywords import LoaderKeywords
    from ._loading.progress import Progress, Span
    from ._loading.runtime import Runtime
    from ._loading.session import Session
    from ._planning.bank import Entries
    from ._planning.plan import LoadPlan
    from ._planning.targets import Casting, LoadInfo
    from ._ready_stores import Source
    from ._table.protocol import LoadableTable
    from .options import LoadKeywords

__all__ = ["Loader", "identity"]

_log = logging.getLogger(__name__)

_NOTHING = UpdateCounts(rows=0, new=0, replaced=0, duplicates=0, dropped=0)


class Loader:
    """Fills hash tables and dense tensors from a checkpoint in RecIS's format, or from safetensors.

    A load is planned first: all that is wrong with names, dtypes, shapes, offsets and sizes is
    found before the first byte is written, and listed in one error. A table shows no row of a load
    before all of them are there; a load that fails, times out or is cancelled leaves every table as
    it was. Dense tensors are filled in place: if the *storage* fails half-way, the error's
    `touched` names the tensors that were written to.

    The first five arguments are those of RecIS's `Loader`, in its order. It may be used again.

    Args:
        checkpoint_path: A folder that holds `index`; for dense tensors also a safetensors file, or
            a folder of these, as Hugging Face's are. Its URL, too, or a store of obstore.
        hashtables: Tables to fill, by any name; a table's own `children` say which ids it takes.
            RecIS's own tables, too, whose rows show as they come: see `RecISTable`.
        tensors: Tensors to fill, by name: allocated, of the right shape and dtype, on any device,
            contiguous or not. Their storage must not be resized or exchanged during a load.
        parallel: Reads in flight; `None` takes the number of `options`, 16 by default.
        filter_func: Gets the load info, `{destination: {source: [slot, ...]}}`, and returns the one
            to use. A destination that is left out stays as it is; another source renames it.
        strict: Whether a name that is asked for but not in the checkpoint is an error. If not, the
            destination keeps its values, a warning is logged, and the report lists the name.
        progress: Called on the event loop with a `Progress`, at most ten times a second; `True`
            shows a bar on stderr.
        trace: Called on the event loop with a `Span` after every step of the load.
        on_plan: Called, or awaited, on the event loop with the `LoadPlan`, before tables take
            memory or a byte is written; an error that it raises ends the load.
        runtime: Threads and bytes that loads share; without one, a load makes its own. With one,
            `max_inflight_bytes`, `max_loop_lag` and `pressure` are the runtime's, and `parallel` is
            at most the runtime's. Not for `load()`, which has a loop of its own.
        cast: Which values of tensors and of slots are converted while they are loaded. `"widen"`:
            to a dtype that holds every value of the dtype in the checkpoint (bfloat16 to float32,
            int32 to int64). `"any"`: floats to any floats and integers to any integers, as
            `Tensor.to` does it, which rounds and wraps around. `None`: none; another dtype is an
            error. Ids, bools and complex numbers are never converted, nor integers to floats or
            back. The plan and the report list all conversions. Digests are of the bytes as stored.
        options: How to read: reads in flight, memory for them, time-outs, digests, lag.
        **read: Fields of `ReadOptions`, which go before `options`.

    Attributes:
        options: How the loader reads.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense, or a tensor cannot be written to.
    """

    def __init__(  # RecIS's order
        self,
        checkpoint_path: Source,
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
        self._runtime = checked_runtime(runtime, self.options)
        check_callable(filter_func, "filter_func")
        check_progress(progress)
        if trace is not None:
            check_callable(trace, "trace")
        if on_plan is not None:
            check_callable(on_plan, "on_plan", awaited=True)
        self._path, self.options = self.options.at(checkpoint_path, "checkpoint_path")
        self._tensors = as_dict(tensors, "tensors")
        self._tables = adapted(as_dict(hashtables, "hashtables"))
        self._progress = progress
        self._on_plan = on_plan
        self._bank: Bank | None = None
        self._tracer = Tracer(trace)
        self._planner = Planner(
            tables=self._tables,
            tensors=self._tensors,
            filter_func=filter_func,
            strict=strict,
            cast=checked_cast(cast),
            tracer=self._tracer,
        )
        check_tables(self._tables, self._tensors, able="begin")
        describe_tensors(self._tensors)

    def __repr__(self) -> str:
        return f"<Loader {self._path!r}: {len(self._tables)} tables, {len(self._tensors)} tensors>"

    def default_load_info(self) -> LoadInfo:
        """Return the load info that `filter_func` gets: every destination from its own name."""
        return self._planner.default_load_info()

    @classmethod
    def from_bank(
        cls,
        entries: Entries | Bank,
        hashtables: Mapping[str, LoadableTable] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        resume: str | os.PathLike[str] | None = None,
        parallel: int | None = None,
        *,
        load_conf: Mapping[str, Any] | None = None,
        rank: int = 0,
        **how: Unpack[LoaderKeywords],
    ) -> Self:
        """Return a loader that fills one model from several checkpoints: RecIS's ModelBank.

        All are planned together and loaded at once: all or nothing. `plan()` shows where each name
        comes from, `LoadReport.sources` tells it. An entry is a path, or a dict. Patterns are those
        of `fnmatch`, over the model's names: `table@id`, `table@slot`, and the tensors' names.

        | field | meaning |
        |---|---|
        | `path` | a checkpoint, or a run folder, of which the newest finished checkpoint is taken |
        | `load`, `exclude` | lists of patterns, `["*"]` and `[]` by default; `"user"` is a table |
        | `oname` | `{model's name: checkpoint's}`, or a list of such dicts; `*` on both sides |
        | `hashtable_clear` | whether tables whose ids come from here are emptied first; `True` |
        | `ignore_error` | whether what `load` names and the checkpoint lacks is only a warning |
        | `skip`, `is_dynamic` | the entry is not used; `Live(bank=…)` follows it |

        A name goes to the last entry that loads it, does not exclude it, and has it. RecIS's plain
        values (`global_step`, …) are the report's `extra`. docs/recis.md has all rules.

        Args:
            entries: The bank; later entries come before earlier ones.
            hashtables: As of `Loader`.
            tensors: As of `Loader`.
            resume: A run folder; if its list names a checkpoint, the newest comes before all.
            parallel: As of `Loader`.
            load_conf: RecIS 1.0.0's switches `load`, `exclude` (of `sparse`, `dense`, `extra`,
                `sparse_opt`, `io_state`) and `strict`, for entries without `load` and `exclude`.
            rank: Whose `io_state_<rank>.pt` to read.
            **how: As of `Loader`.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument makes no sense; lists all that is wrong with entries.
        """
        if "filter_func" in how:
            raise TypeError(
                "a bank has no filter_func: its load, exclude and oname say what to load"
            )
        bank = Bank.of(entries, load_conf=load_conf, resume=resume, rank=rank)
        loader = cls(bank.location, hashtables, tensors, parallel, **how)
        loader._bank = bank
        return loader

    async def plan(self) -> LoadPlan:
        """Say what a load would do. Reads names and headers, and writes nothing.

        Raises:
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            PlanError: If checkpoint and destinations disagree.
            ReadError: If the storage failed.
            LoadTimeoutError: If `timeout` passed.
        """
        async with self._planned() as (_, plan, _into):
            return plan

    async def aload(self) -> LoadReport:
        """Load on the caller's event loop, which goes on serving meanwhile.

        If an error comes while bytes are read, its `touched` names the tensors that may be partly
        overwritten; tables are as they were.

        Raises:
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            PlanError: If checkpoint and destinations disagree.
            CheckpointChangedError: If the checkpoint was replaced or written to meanwhile.
            ReadError: If the storage failed half-way.
            ReadStalledError: If the storage gave no answer for `stall_timeout`.
            LoadTimeoutError: If `timeout` passed.
            RuntimeError: If one of the tables is being loaded or changed elsewhere, or another load
                fills memory of the tensors at the same time, under any names.
        """
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(listening(self._progress, "loading"))
            return await self._load(listener, stack.enter_context(Claim()))

    def load(self) -> LoadReport:
        """Load, and return when it is done; raises what `aload` raises.

        Runs an event loop of its own. May be called on any thread, also where a loop runs already
        (which it blocks: inside a coroutine, `await aload()`). Signal handlers run between two
        steps of its loop; an error that a handler raises ends the call, and is raised.
        """
        return run_blocking(self.aload)

    async def _load(
        self, listener: Callable[[Progress], object] | None, claim: Claim
    ) -> LoadReport:
        meter = Meter(0, listener)
        with contextlib.ExitStack() as unless_committed:
            async with self._planned() as (session, plan, into):
                if self._on_plan is not None:
                    answer = self._on_plan(plan)
                    if inspect.isawaitable(answer):
                        await answer
                meter.total = plan.nbytes
                load = Load(
                    session, plan, into, self._tables,
                    meter=meter, claim=claim, tracer=self._tracer,
                )  # fmt: skip
                unless_committed.push(partial(_explain, load))
                unless_committed.callback(load.abort)
                await run(load)
                tell = partial(report_of, load, tensors=self._tensors, session=session)
                telling = run_jobs(session.threads.kernels, [undisturbed(tell)])
                [report] = await or_take_back(load, telling)
            # No await from here on: a load that is cancelled leaves the tables as they were.
            start = time.perf_counter()
            counts = load.commit()
            unless_committed.pop_all()
        self._tracer.note("commit", "all tables", start)
        for warning in load.warnings:
            _log.warning("%s: %s", plan.location, warning)
        lag = None if session.watch is None else session.watch.lag
        done = {name: counts.get(name, _NOTHING) for name in self._tables}
        _log.info("%s", report := replace(report, tables=done, lag=lag))
        return report

    @contextlib.asynccontextmanager
    async def _planned(self) -> AsyncIterator[tuple[Session, LoadPlan, Destinations]]:
        """Hold what is loaded from open, planned, for the length of the block."""
        if self._bank is None:
            self._planner.check_place(self._path, self.options)
            async with open_session(self._path, self.options, runtime=self._runtime) as session:
                yield session, *await self._planner.plan(session)
            return
        bank = planned_bank(self._bank, self._planner, self.options, runtime=self._runtime)
        async with bank as planned:
            yield planned


def _explain(load: Load, _: object, error: BaseException | None, __: object) -> None:
    if error is not None:
        load.explain(error)
