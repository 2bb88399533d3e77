"""Opens all checkpoints of a bank, and plans one load from them."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncloader._addresses import is_url
from asyncloader._checkpoint.catalog import SHARDED, SINGLE
from asyncloader._checkpoint.finished import has_file
from asyncloader._checkpoint.format import INDEX
from asyncloader._checkpoint.joined import Used, join_catalogs, join_headers, split_shard
from asyncloader._checkpoint.manifest import Manifest
from asyncloader._checkpoint.run_folder import is_run_folder, listed, newest_version, sub_folder
from asyncloader._planning.bank import resuming
from asyncloader._planning.choice import choose
from asyncloader._planning.names import WORDS, ModelNames, SourceNames
from asyncloader._planning.resolution import Resolving
from asyncloader._storage.joined import JoinedStorage
from asyncloader._storage.looks import Looks
from asyncloader._storage.protocol import Traffic
from asyncloader._storage.unpacking import UnpackingStorage
from asyncloader._threads.jobs import for_each, run_jobs, undisturbed
from asyncloader.errors import CheckpointError

from .extras import read_words
from .opening import holding, open_files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from asyncloader._checkpoint.index import Catalog
    from asyncloader._planning.bank import Bank, Entry
    from asyncloader._planning.choice import Choice
    from asyncloader._planning.origins import Resolution
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._planning.targets import Targets
    from asyncloader._storage.folder import Folder
    from asyncloader._storage.kept import KeptFile
    from asyncloader.options import ReadOptions

    from .destinations import Destinations
    from .planner import Planner
    from .runtime import Runtime
    from .session import Ranges, Session

_log = logging.getLogger("asyncloader")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenBank:
    """The checkpoints of a bank, open for reading.

    Attributes:
        session: Reads from all of them.
        sources: One for each path.
        entries: Each entry that is used or checked, and the path of its checkpoint; the run that is
            resumed last.
        bank: The bank itself.
    """

    session: Session
    sources: Mapping[str, Session]
    entries: Sequence[tuple[Entry, str | None]]
    bank: Bank


@contextlib.asynccontextmanager
async def open_bank(
    bank: Bank, options: ReadOptions, *, runtime: Runtime | None
) -> AsyncIterator[OpenBank]:
    """Find the checkpoint of each entry, and hold all of them open for the length of the block.

    Raises:
        CheckpointNotFoundError: If a run folder has no finished checkpoint.
    """
    async with contextlib.AsyncExitStack() as stack:
        resources, watched = await stack.enter_async_context(
            holding(bank.location, options, runtime)
        )
        entries = await _find(bank, options)
        sources = {}
        for path in dict.fromkeys(path for _, path in entries if path is not None):
            opening = open_files(path, options, resources, watched)
            sources[path] = await stack.enter_async_context(opening)
        storages = {path: source.storage for path, source in sources.items()}
        # Any of them: an empty bank reads nothing.
        opening = open_files(bank.location, options, resources, watched)
        session = replace(
            next(iter(sources.values())) if sources else await stack.enter_async_context(opening),
            location=bank.location,
            file=None,
            keep_open=partial(_keep_open, sources),
            ensure=partial(_ensure, sources),
            is_remote=lambda name: is_url(split_shard(name)[0]),
            traffic=lambda: sum((one.traffic() for one in sources.values()), Traffic()),
            storage=UnpackingStorage(JoinedStorage(storages, bank.location)),
        )
        yield OpenBank(session=session, sources=sources, entries=entries, bank=bank)


async def _keep_open(sources: Mapping[str, Session], name: str, ranges: Ranges) -> KeptFile:
    path, file = split_shard(name)
    return await sources[path].hold_open(file, ranges)


async def _ensure(sources: Mapping[str, Session], name: str) -> None:
    path, file = split_shard(name)
    await sources[path].ensure_held(file)


async def _find(bank: Bank, options: ReadOptions) -> list[tuple[Entry, str | None]]:
    """Return each entry with its checkpoint, `None` if it is skipped; then the resumed run's."""
    found: dict[str, str] = {}
    entries = list(bank.entries)
    failures: dict[str, CheckpointError] = {}
    with Looks(
        bank.location,
        stall_timeout=options.stall_timeout,
        storage_options=options.storage_options,
    ) as looks:
        if bank.resume is not None and await listed(looks, looks.folder(bank.resume)):
            entries.append(resuming(bank.resume))
        elif bank.resume is not None:
            _log.warning("%s: no checkpoint is listed there, so nothing is resumed", bank.resume)
        for path in dict.fromkeys(entry.path for entry in entries if not entry.skip):
            try:
                found[path] = await checkpoint_of(looks, path)
            except CheckpointError as error:
                failures[path] = error
    _raise_first(failures, failures)
    return [(entry, None if entry.skip else found[entry.path]) for entry in entries]


async def checkpoint_of(looks: Looks, location: str) -> str:
    """Return the newest checkpoint of a run folder; other folders are checkpoints themselves."""
    folder = looks.folder(location)
    if not await looks(_is_run, folder):
        return location
    return sub_folder(location, await newest_version(looks, folder, finished=True))


def _is_run(folder: Folder) -> bool:
    itself = any(has_file(folder, name) for name in (INDEX, SHARDED, SINGLE))
    return not itself and is_run_folder(folder)


@contextlib.asynccontextmanager
async def planned_bank(
    bank: Bank, planner: Planner, options: ReadOptions, *, runtime: Runtime | None
) -> AsyncIterator[tuple[Session, LoadPlan, Destinations]]:
    """Hold the checkpoints of a bank open, planned, for the length of the block."""
    async with open_bank(bank, options, runtime=runtime) as opened:
        plan, into = await _plan(planner, opened)
        async with opened.session.explaining():
            yield opened.session, plan, into


async def _plan(planner: Planner, opened: OpenBank) -> tuple[LoadPlan, Destinations]:
    """Resolve the names, and decide which bytes of which checkpoint go where.

    Raises:
        CheckpointError: If a checkpoint is missing, unreadable, or contradicts itself.
        PlanError: If entries, checkpoints and destinations disagree.
    """
    session, kernels = opened.session, opened.session.threads.kernels
    [(into, targets)] = await run_jobs(kernels, [undisturbed(planner.describe)])
    with planner.tracer.span("plan", "names"):
        model = ModelNames.of_targets(targets)
        known = await read_names(opened)
        resolution, extra = await resolve(opened, known, model)
        choosing = partial(_choose, resolution, known, model, targets)
        [(catalog, choice)] = await run_jobs(kernels, [undisturbed(choosing)])
    with planner.tracer.span("plan", "headers"):
        manifest = await _read_headers(opened, known, catalog, choice)
    with planner.tracer.span("plan", "plan"):
        deciding = partial(planner.decide, manifest, choice, into, session)
        [(plan, warnings)] = await run_jobs(kernels, [undisturbed(deciding)])
    planner.warn(session.location, warnings)
    return replace(plan, bank=resolution, extra=extra), into


async def read_names(opened: OpenBank) -> dict[str, SourceNames]:
    """Return the names of the tables and tensors in each checkpoint, by its path.

    Raises:
        CheckpointError: For the first checkpoint that cannot be read; the others are notes on it.
    """
    found: dict[str, SourceNames] = {}
    failures: dict[str, CheckpointError] = {}

    async def read(path: str) -> None:
        source = opened.sources[path]
        try:
            async with source.explaining():
                found[path] = SourceNames(path=path, catalog=await source.catalog())
        except CheckpointError as error:
            failures[path] = error

    workers = opened.session.options.parallel
    await for_each(opened.sources, read, workers=workers, name="asyncloader-names")
    _raise_first(opened.sources, failures)
    return {path: found[path] for path in opened.sources}


async def resolve(
    opened: OpenBank, known: Mapping[str, SourceNames], model: ModelNames
) -> tuple[Resolution, dict[str, Any]]:
    """Say where each name comes from; return the plain values, too.

    These are read where an entry takes them, one file at a time: an optimizer's state may be large.

    Raises:
        CheckpointError: If a file of plain values cannot be read.
    """
    kernels = opened.session.threads.kernels
    sources = [(one, None if path is None else known[path]) for one, path in opened.entries]
    beginning = undisturbed(partial(Resolving, model, sources))
    [resolving] = await run_jobs(kernels, [beginning])
    extra: dict[str, Any] = {}
    for entry, names in reversed(sources):
        if names is None or not (words := resolving.words_of(entry) & opened.bank.words):
            continue
        source = opened.sources[names.path]
        sidecar = names.catalog.sidecar
        digests = None if sidecar is None else sidecar.files
        async with source.explaining():
            values = await read_words(source, rank=opened.bank.rank, words=words, digests=digests)
        resolving.take_words(entry, names, words, values)
        extra |= values
    [resolution] = await run_jobs(kernels, [undisturbed(resolving.result)])
    return resolution, {word: extra[word] for word in WORDS if word in extra}


def _raise_first(paths: Iterable[str], failures: Mapping[str, CheckpointError]) -> None:
    """Raise the error of the first checkpoint that has one; the others are notes on it."""
    errors = [failures[path] for path in paths if path in failures]
    for other in errors[1:]:
        errors[0].add_note(f"also: {other}")
    if errors:
        raise errors[0]


def _choose(
    resolution: Resolution, known: Mapping[str, SourceNames], model: ModelNames, targets: Targets
) -> tuple[Catalog, Choice]:
    """Choose the blocks to load."""
    catalog = join_catalogs(_used(resolution, model, known))
    choice = choose(catalog, resolution.load_info(model), targets, fills=True)
    choice.missing += [name for name in resolution.missing if name not in model.tensors]
    choice.unexpected, choice.cleared = resolution.unexpected, resolution.cleared
    choice.problems[:0] = resolution.problems
    choice.warnings += resolution.warnings
    choice.warnings += [
        f"{path}: {odd}" for path, one in known.items() for odd in one.catalog.oddities
    ]
    return catalog, choice


def _used(
    resolution: Resolution, model: ModelNames, known: Mapping[str, SourceNames]
) -> dict[str, Used]:
    tensors: dict[str, list[str]] = {path: [] for path in known}
    tables: dict[str, dict[str, None]] = {path: {} for path in known}
    for name, origin in resolution.origins.items():
        if name in model.slots:
            slot = model.slots[name][1]
            tables[origin.path][origin.name.removesuffix(f"@{slot}")] = None
        elif not model.is_word(name):
            tensors[origin.path].append(origin.name)
    return {
        path: Used(catalog=one.catalog, tensors=tensors[path], tables=tables[path])
        for path, one in known.items()
    }


async def _read_headers(
    opened: OpenBank, known: Mapping[str, SourceNames], catalog: Catalog, choice: Choice
) -> Manifest:
    """Read the headers of the chosen shards, a checkpoint after the other."""
    wanted: dict[str, list[str]] = {}
    for shard in choice.shards():
        path, file = split_shard(shard)
        wanted.setdefault(path, []).append(file)
    manifests: dict[str, Manifest] = {}
    failures: dict[str, CheckpointError] = {}
    for path, files in wanted.items():
        source = opened.sources[path]
        try:
            async with source.explaining():
                manifests[path] = await source.manifest(known[path].catalog, files)
        except CheckpointError as error:
            failures[path] = error
    _raise_first(wanted, failures)
    return Manifest(opened.session.location, catalog, join_headers(manifests))
