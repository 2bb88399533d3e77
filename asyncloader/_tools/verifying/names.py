"""Which names a checkpoint has, and which files to look at."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.files import DESCRIPTION, INDEX, SIDECAR, TENSORKEY
from asyncloader._checkpoint.safetensors import is_weight_map, model_in
from asyncloader._checkpoint.strict_json import MAX_NAMES, MAX_SIDECAR
from asyncloader._storage.protocol import read_small
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError, CheckpointNotFoundError, ReadError, ReadStalledError

from .catalog import sift_catalog
from .sidecars import sift_sidecar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncloader._checkpoint.index import Catalog
    from asyncloader._checkpoint.sidecar import Sidecar
    from asyncloader._loading.session import Session

    from .findings import Findings


# As much as a load reads; it reads no description.
_MOST = {INDEX: MAX_NAMES, TENSORKEY: MAX_NAMES, SIDECAR: MAX_SIDECAR}
_MOST[DESCRIPTION] = 1 << 30
_RECIS = "RecIS checkpoint"
_SHARD = re.compile(r".+\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a checkpoint is called to hold."""

    kind: str
    source: str
    """The file that says so."""

    catalog: Catalog | None
    """`None` if nobody says, so that only the shards can be looked at, each by itself."""

    refused: frozenset[str]
    """Keys that the catalog lacks because something is wrong with them."""

    sidecar: Sidecar | None
    shards: tuple[str, ...]
    """Files to look at."""

    others: int
    """Files besides the shards that were read."""

    @property
    def recis(self) -> bool:
        """Whether it is in RecIS's format."""
        return self.kind == _RECIS


async def read_names(session: Session, findings: Findings) -> Names:
    """Read which names there are.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
    """
    there = await _listed(session)
    model = session.file if session.file in there else model_in(session.location, there)
    if INDEX in there and (model is None or TENSORKEY in there):
        return await _recis(session, there, findings)
    if model is not None and is_weight_map(model):
        return await _hugging_face(session, there, model, findings)
    if model is not None:
        return _alone(model)
    await session.catalog()  # knows how to say what is missing
    raise CheckpointNotFoundError(session.location, "was changed meanwhile; try again")


async def _listed(session: Session) -> frozenset[str]:
    def names() -> frozenset[str]:
        if session.file is None:
            return frozenset(os.listdir(session.storage.location))  # noqa: PTH208  # names
        path = os.path.join(session.storage.location, session.file)  # noqa: PTH118  # never raises
        return frozenset([session.file] if os.path.lexists(path) else ())

    try:
        return await session.on_disk(names)
    except ReadStalledError:  # an OSError, too
        raise
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as error:
        problem = f"cannot be listed: {error.strerror}"
        raise CheckpointError(session.location, problem) from error


def _alone(file: str) -> Names:
    return Names(
        kind="safetensors file",
        source=file,
        catalog=None,
        refused=frozenset(),
        sidecar=None,
        shards=(file,),
        others=0,
    )


async def _hugging_face(
    session: Session, there: frozenset[str], source: str, findings: Findings
) -> Names:
    catalog = None
    try:
        catalog = await session.catalog()
    except CheckpointError as error:
        findings.error(error)
    shards = _named(catalog) if catalog else {name for name in there if _SHARD.fullmatch(name)}
    _note_strangers(there - shards, source, findings)
    return Names(
        kind="Hugging Face folder",
        source=source,
        catalog=catalog,
        refused=frozenset(),
        sidecar=None,
        shards=tuple(sorted(shards)),
        others=1,
    )


async def _recis(session: Session, there: frozenset[str], findings: Findings) -> Names:
    texts = {}
    for name in (INDEX, TENSORKEY, SIDECAR, DESCRIPTION):
        if name in there or name in {INDEX, TENSORKEY}:
            text = await _text(session, name, findings)
            if text is not None:
                texts[name] = text
    index, tensorkey = texts.get(INDEX), texts.get(TENSORKEY)
    sift = partial(sift_catalog, session.location, index, tensorkey, findings)
    [(sifted, files)] = await run_jobs(session.threads.kernels, [sift])
    check = partial(sift_sidecar, session.location, texts, findings)
    [sidecar] = await run_jobs(session.threads.kernels, [check])
    shards = set(files) if sifted.parsed else {name for name in there if _SHARD.fullmatch(name)}
    if sifted.parsed:
        _note_strangers(there - shards, INDEX, findings)
    return Names(
        kind=_RECIS,
        source=INDEX,
        catalog=sifted.parsed,
        refused=frozenset(error.key for error in sifted.errors if error.key is not None),
        sidecar=sidecar,
        shards=tuple(sorted(shards)),
        others=len(texts),
    )


async def _text(session: Session, name: str, findings: Findings) -> bytearray | None:
    try:
        return await read_small(session.storage, name, limit=_MOST[name])
    except ReadError as error:
        findings.problem(f"cannot be read: {error.problem}", file=name)
    except OSError as error:
        findings.problem(f"cannot be opened: {error.strerror or error}", file=name)
    return None


def _named(catalog: Catalog) -> set[str]:
    """Return the shards that hold what there is."""
    return {place.shard for place in catalog.tensors.values()}


def _note_strangers(names: Iterable[str], source: str, findings: Findings) -> None:
    for name in names:
        if _SHARD.fullmatch(name):
            findings.note(
                f"{source} does not name this file, so nobody reads it; left behind by an older "
                "save?",
                file=name,
            )
