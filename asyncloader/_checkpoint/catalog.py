"""Reads the names in a checkpoint: of RecIS's, of Hugging Face's, or of one file."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from asyncloader._storage.protocol import opening_error, read_small
from asyncloader._threads.call import StalledError
from asyncloader._threads.jobs import run_jobs, undisturbed
from asyncloader.errors import CheckpointError, CheckpointNotFoundError, ReadStalledError

from .format import INDEX, MAX_NAMES, MAX_SIDECAR, MODEL, SIDECAR, STAGING, TENSORKEY
from .index import Catalog, Places, catalog_of_file, parse_weight_map
from .manifest import check_unchanged, read_header
from .model_file import parse_checkpoint
from .problems import Problems
from .torch_file import read_archive

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from concurrent.futures import Executor

    from asyncloader._storage.protocol import Storage, ThreadedStorage
    from asyncloader.options import Verify

    from .archive import Archive


T = TypeVar("T")

SHARDED = "model.safetensors.index.json"  # says which tensor stands in which of several files
SINGLE = "model.safetensors"

# A storage raises these where there is no such file; `strerror` says which one is missing.
_ABSENT = (FileNotFoundError, NotADirectoryError)

# The names that libraries give: transformers, diffusers, peft. The first one found counts, and a
# file without a variant comes before a file with one.
_STEMS = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights")
_SHARD = re.compile(r"model-\d{6,}-of-\d{6,}(-.+)?\.safetensors")  # of RecIS, and of a save
_WEIGHT_MAP = re.compile(r".+\.safetensors\.index(\.[^.]+)?\.json")
# A shard, `model.fp16-00001-of-00002.safetensors`, is no variant.
_VARIANT = r"(\.(?![^.]+-\d+-of-\d+\.)[^.]+)?"
_MODEL = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)}){_VARIANT}\.safetensors(?:\.index{_VARIANT}\.json)?"
)
_NAMED = 8


async def read_catalog(
    storage: ThreadedStorage,
    job: Callable[[Callable[[], Catalog]], T],
    *,
    executor: Executor,
    verify: Verify,
    file: str | None = None,
    names: Callable[[], Awaitable[Sequence[str]]] | None = None,
) -> T:
    """Read which names there are, and where; a thread does a job with them.

    Args:
        storage: The folder.
        job: Gets a function that parses the texts.
        executor: For the job, and for parsing a header.
        verify: Whether to take the digests along, if there are any.
        file: The one safetensors file, or weight map, to look at, instead of the whole folder.
        names: Lists the folder, to find a model under another name than the usual ones.

    Returns:
        The result of the job.

    Raises:
        CheckpointNotFoundError: If there is no committed checkpoint, or no such file.
        CheckpointChangedError: If it was replaced meanwhile.
        CheckpointError: If a file of names is damaged, or `verify` asks for digests and there are
            none.
        ReadError: If the storage failed.
    """
    source = await find_source(storage, file, names)
    problems, recis, digests = Problems(storage.location), is_recis(source, file), verify != "off"
    try:
        parse = await read_texts(
            storage, source, problems, executor=executor, recis=recis, digests=digests
        )
        if verify == "require":
            where = storage.location if file is None else f"{storage.location}/{file}"
            parse = partial(_digested, parse, where)
        [result] = await run_jobs(executor, [undisturbed(partial(job, parse))])
    except CheckpointError:
        if file is None:
            await check_unchanged(storage, source)  # that would explain it
        raise
    return result


def _digested(parse: Callable[[], Catalog], location: str) -> Catalog:
    """Return a catalog, if it has digests."""
    catalog = parse().whole()
    if catalog.sidecar is None:
        problem = (
            f"has no digests that belong to it ({SIDECAR}), and verify='require' asks for them; "
            "take the folder of a checkpoint that asyncloader.Saver wrote, or verify='auto'"
        )
        raise CheckpointError(location, problem)
    if lacking := sorted(catalog.headers.keys() - catalog.sidecar.shards.keys()):
        problem = (
            f"{SIDECAR} has no digests of it, and verify='require' asks for them; save it with "
            "asyncloader.Saver, too, or take verify='auto'"
        )
        raise CheckpointError(location, problem, lacking[0])
    return catalog


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
    problem = _unfinished(listed) or (
        f"no finished checkpoint here: {absent.strerror}; looked for {INDEX!r}, which a checkpoint "
        f"of RecIS has, and for {SHARDED!r} and {SINGLE!r}. Give the folder that holds one of "
        "them, or a file whose name ends in .safetensors"
    ) + (f"; the folder holds {_in_words(listed)}" if listed else "")
    raise CheckpointNotFoundError(where, problem) from absent


def _unfinished(names: Iterable[str]) -> str:
    """Say why a folder into which a save wrote is no checkpoint; nothing of other folders."""
    names = sorted(names)
    shards = sum(_SHARD.fullmatch(name) is not None for name in names)
    found = [f"{shards:,} shard file{'s' * (shards != 1)}"] if shards else []
    if not (held := ", ".join([*found, *(one for one in names if one.startswith(STAGING))])):
        return ""
    return (
        f"not committed: holds {held} but no {INDEX!r}, which is written last, nor {SHARDED!r}; "
        "the save is still going on, or it did not finish"
    )


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


def is_weight_map(name: str) -> bool:
    """Say whether a file is called like one that says which tensor stands in which file."""
    return _WEIGHT_MAP.fullmatch(name) is not None


def model_in(location: str, names: Iterable[str]) -> str | None:
    """Return the file of a folder that names a model's tensors: a weight map, or the only file.

    Raises:
        CheckpointError: If several variants of a model are equally good.
    """
    found = [match for match in map(_MODEL.fullmatch, sorted(names)) if match is not None]
    for stem in _STEMS:
        variants: dict[str, list[str]] = {}
        for match in found:
            if match["stem"] == stem:
                variants.setdefault((match[2] or "") + (match[3] or ""), []).append(match[0])
        plain = variants.get("")
        equal = variants.values() if plain is None else [plain]
        files = [file for own in equal for file in list(filter(is_weight_map, own)) or own]
        if len(files) > 1:
            problem = f"holds several variants, {', '.join(map(repr, files))}: give one's path"
            raise CheckpointError(location, problem)
        if files:
            return files[0]
    return None


def _in_words(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, sorted(names)[:_NAMED])) + more


async def read_texts(
    storage: ThreadedStorage,
    source: str,
    problems: Problems,
    *,
    executor: Executor,
    recis: bool,
    digests: bool,
) -> Callable[[], Catalog]:
    """Read the file that `find_source` found; return a function that parses it.

    `recis` says whether it is RecIS's `index`, `digests` whether to read the sidecar, too.
    `problems` receives the problems of all files of names.

    Raises:
        CheckpointError: If a file cannot be opened, or is no text.
        ReadError: If the storage failed.
    """
    if recis:
        files, sidecar = {INDEX: await read_file(storage, INDEX, MAX_NAMES)}, None
        with problems.caught():
            files[TENSORKEY] = await read_file(storage, TENSORKEY, MAX_NAMES)
        if digests and await _absence(storage, SIDECAR) is None:
            with problems.caught():
                sidecar = await read_file(storage, SIDECAR, MAX_SIDECAR)
        model = await _read_model(storage, executor)
        return partial(parse_checkpoint, problems, files, sidecar, model)
    if is_weight_map(source):
        text = await read_file(storage, source, MAX_NAMES)
        return partial(parse_weight_map, problems, text, source)
    catalog, turns = Catalog(Places({}, {}), {}, source), asyncio.Lock()
    header = await read_header(
        storage, source, executor=executor, catalog=catalog, turns=turns, problems=problems
    )
    return partial(catalog_of_file, header)


async def _read_model(
    storage: ThreadedStorage, executor: Executor
) -> Archive | CheckpointError | None:
    """Return what `model.pt` holds, or why it cannot be read; `None` if there is none."""
    if await _absence(storage, MODEL) is not None:
        return None
    try:
        size = await storage.size(MODEL)
        return await read_archive(storage, MODEL, size, executor=executor)
    except ReadStalledError:  # an OSError, too
        raise
    except CheckpointError as error:
        return error
    except OSError as error:
        raise opening_error(storage.location, MODEL, error) from error


async def read_file(storage: Storage, name: str, limit: int) -> bytearray:
    """Return a file of at most `limit` bytes; raises what `read_texts` raises."""
    try:
        return await read_small(storage, name, limit=limit)
    except ReadStalledError:  # an OSError, too
        raise
    except OSError as error:
        raise opening_error(storage.location, name, error) from error
