"""Reads which names a checkpoint holds, whatever it is: RecIS's, Hugging Face's, or one file."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._storage.protocol import opening_error, read_small
from asyncloader._threads.collector import undisturbed
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError, CheckpointNotFoundError, ReadStalledError

from .files import INDEX, SIDECAR, TENSORKEY
from .index import Catalog, Places, parse_catalog
from .manifest import check_unchanged, read_header
from .safetensors import (
    SHARDED,
    SINGLE,
    catalog_of_file,
    in_words,
    is_weight_map,
    model_in,
    parse_weight_map,
)
from .sidecar import check_files, parse_sidecar
from .strict_json import MAX_NAMES, MAX_SIDECAR

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from concurrent.futures import Executor

    from asyncloader._storage.protocol import Storage
    from asyncloader.options import Verify

    from .sidecar import Sidecar


"""Whether bytes are compared with digests: where there are any, always or not at all, or never."""

# What a storage raises where there is no such file; it has a `strerror` that says what is missing.
_ABSENT = (FileNotFoundError, NotADirectoryError)


async def read_catalog(
    storage: Storage,
    *,
    executor: Executor,
    verify: Verify,
    file: str | None = None,
    names: Callable[[], Awaitable[Sequence[str]]] | None = None,
) -> Catalog:
    """Read which names there are, and where; parse on a thread, the loop goes on meanwhile.

    A folder that has `index` is a checkpoint of RecIS's, others are Hugging Face's; so is one that
    has a model but no `tensorkey.json`, whatever else is called `index` there.

    Args:
        storage: The folder.
        executor: For parsing.
        file: The one safetensors file to look at, or the weight map, instead of the folder that
            holds it.
        names: Lists the folder, for models whose names are not known beforehand.
        verify: Whether to take the digests along, if there are any.

    Raises:
        CheckpointNotFoundError: If there is no committed checkpoint, or no such file.
        CheckpointChangedError: If it was replaced meanwhile.
        CheckpointError: If a file that says so is no good.
        ReadError: If the storage failed.
    """
    where = storage.location
    if file is not None:
        try:
            read = _read_sharded if is_weight_map(file) else _read_file
            catalog = await read(storage, executor, file)
            return _without_digests(f"{where}/{file}", verify, catalog)
        except _ABSENT as error:
            problem = f"cannot be opened: {error.strerror}"
            raise CheckpointNotFoundError(f"{where}/{file}", problem) from error
    absent: OSError | CheckpointError
    try:
        return await _read_recis(storage, executor, verify)
    except _ABSENT as error:
        absent = error
    except CheckpointError as error:
        absent = error
        if not await _lacks(storage, TENSORKEY):
            await check_unchanged(storage, INDEX)  # that would explain it
            raise
    for read in (_read_sharded, _read_file):
        try:
            return _without_digests(where, verify, await read(storage, executor))
        except _ABSENT as error:
            absent = absent if isinstance(absent, CheckpointError) else error
    listed = () if names is None else await names()
    if (model := model_in(where, listed)) is not None:
        read = _read_sharded if is_weight_map(model) else _read_file
        return _without_digests(where, verify, await read(storage, executor, model))
    if isinstance(absent, CheckpointError):
        await check_unchanged(storage, INDEX)
        raise absent
    holds = f"; the folder holds {in_words(listed)}" if listed else ""
    problem = (
        f"no finished checkpoint here: {absent.strerror}; looked for {INDEX!r}, which "
        f"RecIS's have and which is written last, and for {SHARDED!r} and {SINGLE!r}. Give the "
        f"folder that holds one of them, or a file whose name ends in .safetensors{holds}"
    )
    raise CheckpointNotFoundError(where, problem) from absent


async def _read_recis(storage: Storage, executor: Executor, verify: Verify) -> Catalog:
    where = storage.location
    index = await _read_json(storage, INDEX)
    try:
        tensorkey = await _read_json(storage, TENSORKEY)
    except _ABSENT as error:
        raise CheckpointError(where, f"cannot be opened: {error}", TENSORKEY) from error
    try:
        sidecar = None if verify == "off" else await _read_json(storage, SIDECAR)
    except _ABSENT:
        sidecar = None

    files = {INDEX: index, TENSORKEY: tensorkey}
    parse = undisturbed(partial(parse_recis, where, verify, files, sidecar))
    [catalog] = await run_jobs(executor, [parse])
    return catalog


def parse_recis(
    where: str, verify: Verify, files: Mapping[str, bytearray], text: bytearray | None
) -> Catalog:
    """Parse all files of names together.

    Args:
        where: The checkpoint, for messages.
        verify: Whether there have to be digests.
        files: `index` and `tensorkey.json`.
        text: The sidecar, if there is one and it is wanted.

    Raises:
        CheckpointError: If one is no good, or they contradict each other.
    """
    sidecar, odd = (None, ()) if text is None else _parse_digests(where, files, text)
    catalog = parse_catalog(where, files[INDEX], files[TENSORKEY])
    catalog = replace(catalog, sidecar=sidecar, warnings=odd)
    return catalog if sidecar is not None else _without_digests(where, verify, catalog)


def _parse_digests(
    where: str, files: Mapping[str, bytearray], text: bytearray
) -> tuple[Sidecar | None, tuple[str, ...]]:
    """Return what the sidecar says, or why it cannot be used."""
    sidecar = parse_sidecar(where, text, parts=False)
    if sidecar is None:
        odd = f"{SIDECAR} is of a format that is not known here, so nothing is verified"
    elif check_files(where, sidecar, files):
        return sidecar, ()
    else:
        odd = f"{SIDECAR} belongs to another save than {INDEX}, so nothing is verified"
    return None, (odd,)


def _without_digests(where: str, verify: Verify, catalog: Catalog) -> Catalog:
    """Return a catalog as it is, unless digests are required."""
    if verify == "require":
        problem = (
            f"has no digests that belong to it ({SIDECAR}), and verify='require' asks for them; "
            "take the folder of a checkpoint that asyncloader.Saver wrote, or verify='auto'"
        )
        raise CheckpointError(where, problem)
    return catalog


async def _lacks(storage: Storage, name: str) -> bool:
    try:
        await storage.size(name)
    except _ABSENT:
        return True
    except OSError:
        return False
    return False


async def _read_sharded(storage: Storage, executor: Executor, name: str = SHARDED) -> Catalog:
    text = await _read_json(storage, name)
    parse = partial(parse_weight_map, storage.location, text, name)
    [catalog] = await run_jobs(executor, [parse])
    return catalog


async def _read_file(storage: Storage, executor: Executor, name: str = SINGLE) -> Catalog:
    try:
        await storage.size(name)
    except _ABSENT:
        raise
    except OSError as error:
        raise opening_error(storage.location, name, error) from error
    catalog = Catalog(Places({}, {}), {}, name)
    header = await read_header(
        storage, name, executor=executor, catalog=catalog, turns=asyncio.Lock()
    )
    [catalog] = await run_jobs(executor, [partial(catalog_of_file, header)])
    return catalog


async def _read_json(storage: Storage, name: str) -> bytearray:
    """Return a file of names; let `_ABSENT` errors pass, and translate the others."""
    try:
        limit = MAX_SIDECAR if name == SIDECAR else MAX_NAMES
        return await read_small(storage, name, limit=limit)
    except (*_ABSENT, ReadStalledError):
        raise
    except OSError as error:
        raise opening_error(storage.location, name, error) from error
