"""Reads the names in a checkpoint: of RecIS's, of Hugging Face's, or of one file."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._storage.protocol import opening_error, read_small
from asyncloader._threads.call import StalledError
from asyncloader._threads.jobs import run_jobs, undisturbed
from asyncloader.errors import CheckpointError, CheckpointNotFoundError, ReadStalledError

from .files import INDEX, SIDECAR, TENSORKEY
from .index import Catalog, Places, parse_catalog
from .manifest import check_unchanged, read_header
from .problems import Problem, Problems
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


# A storage raises these where there is no such file; `strerror` says which one is missing.
_ABSENT = (FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class Names:
    """The texts that say which names there are."""

    storage: Storage
    source: str
    file: str | None
    verify: Verify
    _parse: Callable[[], Catalog]

    def parse(self) -> Catalog:
        """Make a catalog of them. Pure work: belongs on a thread.

        Raises:
            CheckpointError: If one of the texts is no good, or there are no digests that `verify`
                asks for.
        """
        catalog = self._parse()
        if self.verify == "require" and catalog.sidecar is None:
            problem = (
                f"has no digests that belong to it ({SIDECAR}), and verify='require' asks for "
                "them; take the folder of a checkpoint that asyncloader.Saver wrote, or "
                "verify='auto'"
            )
            location = self.storage.location
            where = location if self.file is None else f"{location}/{self.file}"
            raise CheckpointError(where, problem)
        return catalog

    async def check_unchanged(self) -> None:
        """Look whether a change explains what is wrong with them.

        Raises:
            CheckpointChangedError: If it does.
        """
        if self.file is None:
            await check_unchanged(self.storage, self.source)


async def read_catalog(
    storage: Storage,
    *,
    executor: Executor,
    verify: Verify,
    file: str | None = None,
    names: Callable[[], Awaitable[Sequence[str]]] | None = None,
) -> Catalog:
    """Read which names there are, and where; parse them on a thread. See `read_names`."""
    found = await read_names(storage, executor=executor, verify=verify, file=file, names=names)
    try:
        [catalog] = await run_jobs(executor, [undisturbed(found.parse)])
    except CheckpointError:
        await found.check_unchanged()
        raise
    return catalog


async def read_names(
    storage: Storage,
    *,
    executor: Executor,
    verify: Verify,
    file: str | None = None,
    names: Callable[[], Awaitable[Sequence[str]]] | None = None,
) -> Names:
    """Read which names there are, and where.

    Args:
        storage: The folder.
        executor: For parsing a header, where that is the source.
        file: The one safetensors file to look at, or the weight map, instead of the folder that
            holds it.
        names: Lists the folder, to find a model under another name than the usual ones.
        verify: Whether to take the digests along, if there are any.

    Raises:
        CheckpointNotFoundError: If there is no committed checkpoint, or no such file.
        CheckpointChangedError: If it was replaced meanwhile.
        CheckpointError: If a file that says so is no good.
        ReadError: If the storage failed.
    """
    source = await find_source(storage, file, names)
    reader = CatalogReader(storage, executor, Problems(storage.location))
    try:
        parse = await reader.texts(source, recis=is_recis(source, file), digests=verify != "off")
    except CheckpointError:
        if file is None:
            await check_unchanged(storage, source)  # that would explain it
        raise
    return Names(storage, source, file, verify, parse)


def is_recis(source: str, file: str | None) -> bool:
    """Say whether a checkpoint is in RecIS's format, given what `find_source` takes and returns."""
    return file is None and source == INDEX


async def find_source(
    storage: Storage,
    file: str | None,
    names: Callable[[], Awaitable[Sequence[str]]] | None = None,
) -> str:
    """Return the file that says which names there are.

    A folder with `index` and `tensorkey.json` is a checkpoint of RecIS's. Others are Hugging
    Face's, also where some file is called `index`.

    Raises:
        CheckpointNotFoundError: If there is none.
        CheckpointError: If several are equally good.
        ReadError: If the storage gave no answer.
    """
    where = storage.location
    if file is not None:
        if (error := await _absence(storage, file)) is not None:
            problem = f"cannot be opened: {error.strerror}"
            raise CheckpointNotFoundError(f"{where}/{file}", problem) from error
        return file
    absent = await _absence(storage, INDEX)
    if absent is None and await _absence(storage, TENSORKEY) is None:
        return INDEX
    for name in (SHARDED, SINGLE):
        if await _absence(storage, name) is None:
            return name
    listed = () if names is None else await names()
    if (model := model_in(where, listed)) is not None:
        return model
    if absent is None:
        return INDEX
    holds = f"; the folder holds {in_words(listed)}" if listed else ""
    problem = (
        f"no finished checkpoint here: {absent.strerror}; looked for {INDEX!r}, which "
        f"RecIS's have and which is written last, and for {SHARDED!r} and {SINGLE!r}. Give the "
        f"folder that holds one of them, or a file whose name ends in .safetensors{holds}"
    )
    raise CheckpointNotFoundError(where, problem) from absent


async def _absence(storage: Storage, name: str) -> OSError | None:
    """Return the error of a file that is not there. One that cannot be opened is there."""
    try:
        await storage.size(name)
    except _ABSENT as error:
        return error
    except OSError as error:
        if isinstance(error, StalledError):
            raise opening_error(storage.location, name, error) from error
    return None


@dataclass(frozen=True, slots=True)
class CatalogReader:
    """Reads files of names, and hands their problems to `problems`."""

    storage: Storage
    executor: Executor
    problems: Problems

    async def read(self, source: str, *, recis: bool, digests: bool) -> Catalog:
        """Read the file that `find_source` found, and parse it on a thread; see `texts`."""
        parse = await self.texts(source, recis=recis, digests=digests)
        [catalog] = await run_jobs(self.executor, [undisturbed(parse)])
        return catalog

    async def texts(self, source: str, *, recis: bool, digests: bool) -> Callable[[], Catalog]:
        """Read the file that `find_source` found; return what parses it.

        Args:
            source: The file.
            recis: Whether it is RecIS's `index`.
            digests: Whether to read the sidecar, too.

        Raises:
            CheckpointError: If nothing can be made of it.
            ReadError: If the storage failed.
        """
        if recis:
            return await self._recis(digests=digests)
        if is_weight_map(source):
            text = await self.text(source, MAX_NAMES)
            return partial(parse_weight_map, self.problems, text, source)
        header = await read_header(
            self.storage,
            source,
            executor=self.executor,
            catalog=Catalog(Places({}, {}), {}, source),
            turns=asyncio.Lock(),
            problems=self.problems,
        )
        return partial(catalog_of_file, header)

    async def _recis(self, *, digests: bool) -> Callable[[], Catalog]:
        files, sidecar = {INDEX: await self.text(INDEX, MAX_NAMES)}, None
        with self.problems.caught():
            files[TENSORKEY] = await self.text(TENSORKEY, MAX_NAMES)
        if digests and await _absence(self.storage, SIDECAR) is None:
            with self.problems.caught():
                sidecar = await self.text(SIDECAR, MAX_SIDECAR)
        return partial(parse_recis, self.problems, files, sidecar)

    async def text(self, name: str, limit: int) -> bytearray:
        """Return a file of at most `limit` bytes.

        Raises:
            CheckpointError: If it cannot be opened, or is no text.
            ReadError: If the storage failed.
        """
        try:
            return await read_small(self.storage, name, limit=limit)
        except ReadStalledError:  # an OSError, too
            raise
        except OSError as error:
            raise opening_error(self.storage.location, name, error) from error


def parse_recis(
    problems: Problems, files: Mapping[str, bytearray], text: bytearray | None
) -> Catalog:
    """Parse all files of names together.

    Args:
        problems: Receives wrong entries, and contradictions between files.
        files: `index` and `tensorkey.json`, unless that could not be read.
        text: The sidecar, if there is one and it is wanted.

    Raises:
        CheckpointError: If `index` is no good.
    """
    sidecar, odd = None, ""
    if text is not None:
        with problems.caught():
            sidecar = parse_sidecar(problems.location, text)
            if sidecar is None:
                odd = "is of a format that is not known here, so nothing is verified"
            elif not check_files(problems, sidecar, files):
                sidecar = None
                odd = f"belongs to another save than {INDEX}, so nothing is verified"
    catalog = parse_catalog(problems, files[INDEX], files.get(TENSORKEY, b"{}"))
    oddities = (Problem(SIDECAR, None, odd),) if odd else ()
    return replace(catalog, sidecar=sidecar, oddities=oddities)
