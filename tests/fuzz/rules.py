"""One set of rules: `verify` of names and headers, against the plan of a load."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from asyncloader import AsyncLoaderError, CheckpointNotFoundError, gen_slice
from asyncloader._checkpoint.blocks import numbered
from asyncloader._checkpoint.catalog import read_catalog
from asyncloader._checkpoint.dtypes import TensorType
from asyncloader._checkpoint.manifest import Manifest, read_manifest
from asyncloader._checkpoint.problems import AllProblems
from asyncloader._planning.choice import choose
from asyncloader._planning.planner import plan_load
from asyncloader._planning.targets import TableTarget, Targets, TensorTargets
from asyncloader._storage.unpacking import UnpackingStorage
from asyncloader._tools.structure import read_structure
from tests.support import MemoryStorage

from .choices import Choices
from .drafts import SINGLE, draft_of, spoiled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from asyncloader._checkpoint.index import Part

__all__ = ["TARGETS", "rules"]

LOADABLE = (
    "does not name it: no load reads it",
    "looks like a rank's part",
    "lie in no slice",
    "lie in several slices",
    "its slices are of different sizes",
    "of which there are no ids",
    "are no rows of anything",
    "has digests of",
    "does not tell of its part",
    "tells of",
)
"""Problems that no load looks at: it reports the names that it lacks, and no more."""


def rules(data: bytes) -> None:
    """Verify, and plan a load of everything."""
    choices = Choices(data)
    kind = choices.of(["recis", "recis", "plain"])
    check_rules(spoiled(draft_of(kind, choices.below(256)), choices))


def check_rules(files: Mapping[str, bytes]) -> bool:
    """Check that a sound checkpoint can be planned and another cannot; say whether it is sound."""
    storage = MemoryStorage(dict(files))
    file = SINGLE if set(files) == {SINGLE} else None
    found, refusal = asyncio.run(_both(storage, file))
    if found is None:
        assert isinstance(refusal, CheckpointNotFoundError)
        return False
    wrong = [one for one in found if not any(text in one for text in LOADABLE)]
    assert bool(wrong) == (refusal is not None), (wrong, refusal)
    return not found


async def _both(
    storage: MemoryStorage, file: str | None
) -> tuple[list[str] | None, AsyncLoaderError | None]:
    problems = AllProblems(storage.location)
    found, refusal = None, None
    with ThreadPoolExecutor(1) as executor:
        try:
            await _plan(storage, file, executor)
        except AsyncLoaderError as error:
            refusal = error
        try:
            await read_structure(
                UnpackingStorage(storage),
                problems,
                file=file,
                there=frozenset(storage.files),
                executor=executor,
                parallel=2,
            )
            found = [str(one) for one in problems.found]
        except CheckpointNotFoundError:
            pass
    return found, refusal


async def _plan(storage: MemoryStorage, file: str | None, executor: ThreadPoolExecutor) -> None:
    async def names() -> list[str]:
        return sorted(storage.files)

    catalog = await read_catalog(
        storage, lambda parse: parse(), executor=executor, verify="auto", file=file, names=names
    )
    manifest = await read_manifest(storage, catalog, catalog.files, parallel=2, executor=executor)
    targets = _everything(manifest)
    choice = choose(catalog, None, targets)
    if choice.shards():
        plan_load(manifest, choice, strict=False)
    if catalog.sidecar is not None:
        catalog.sidecar.all_spread(storage.location)


def _everything(manifest: Manifest) -> Targets:
    """Return destinations that take everything."""
    catalog = manifest.catalog
    blocks = [manifest.block(place) for place in catalog.tensors.values()]
    types, kinds = numbered(TensorType(block.dtype, block.shape) for block in blocks)
    tables = {
        name: TableTarget(
            name=name,
            children=(name,),
            slice=gen_slice(),
            slots={slot: _row(manifest, parts) for slot, parts in held.items() if slot != "id"},
        )
        for name, held in catalog.tables.items()
    }
    tensors = TensorTargets(list(catalog.tensors), types, np.asarray(kinds))
    return Targets(tensors=tensors, tables=tables)


def _row(manifest: Manifest, parts: tuple[Part, ...]) -> TensorType:
    first = manifest.block(parts[0].place)
    return TensorType(first.dtype, first.shape[1:])


TARGETS: dict[str, Callable[[bytes], None]] = {"rules": rules}
