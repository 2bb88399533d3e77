"""Adds the tensors of RecIS's `model.pt` to the names of its checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from asyncloader.errors import CheckpointError

from .format import MODEL, SIDECAR
from .index import Catalog, Places, parse_recis
from .problems import Problem
from .torch_file import parse_archive

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .archive import Archive
    from .problems import Problems
    from .strict_json import Text


def parse_checkpoint(
    problems: Problems,
    files: Mapping[str, Text],
    sidecar: Text | None,
    model: Archive | CheckpointError | None,
) -> Catalog:
    """Parse all files of names; see `parse_recis`.

    `model` is `model.pt`, if there is one, or why it cannot be read. Who wants none of its tensors
    is not kept from the rest: so a load raises that later, where a tensor is lacking.

    Raises:
        CheckpointError: If `index` is damaged.
    """
    catalog = parse_recis(problems, files, sidecar)
    if model is None:
        if catalog.sidecar is not None and MODEL in catalog.sidecar.shards:
            problems.add(f"is missing, but {SIDECAR} has digests of it; copy it", MODEL)
        return catalog
    try:
        if isinstance(model, CheckpointError):
            raise model
        return _with_model(problems, catalog, model)
    except CheckpointError as error:
        if problems.keeps:
            problems.error(error)
        odd = Problem(MODEL, error.key, f"{error.problem}; so its tensors cannot be loaded")
        return replace(catalog, broken=error, oddities=(*catalog.oddities, odd))


def _with_model(problems: Problems, catalog: Catalog, model: Archive) -> Catalog:
    """Add the tensors of `model.pt`. A name that is known already stays what it is."""
    digests = None if catalog.sidecar is None else catalog.sidecar.shards.get(MODEL)
    header, known = parse_archive(problems, model, digests), catalog.tensors
    new = {name: name for name in header.blocks if name not in known.block_keys}
    oddities = [
        Problem(MODEL, name, f"stands in {known.shards[name]!r}, too, which is taken")
        for name in header.blocks
        if name in known.block_keys
    ]
    if catalog.sidecar is not None and digests is None:
        odd = f"{SIDECAR} has no digests of it, so its tensors are not verified"
        oddities.append(Problem(MODEL, None, odd))
    return replace(
        catalog,
        tensors=Places({**known.block_keys, **new}, {**known.shards, **dict.fromkeys(new, MODEL)}),
        files=(*catalog.files, MODEL),
        oddities=(*catalog.oddities, *oddities),
        headers={MODEL: header},
    )
