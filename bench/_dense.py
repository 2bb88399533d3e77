"""The contenders that fill tensors which are there already."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from bench._cache import warm
from bench._cases import poison, tensor_loader
from bench._measure import Contender
from bench._peers import PEERS
from bench._raw import raw_into_tensors

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Collection
    from pathlib import Path

    from torch import Tensor

    from bench._cases import DenseCase
    from bench._peers import Peer


def raw(case: DenseCase, tensors: dict[str, Tensor]) -> list[Contender]:
    """Return the plain threads that read into these tensors."""
    return raw_into_tensors(
        case.files(),
        tensors,
        poison=lambda _: poison(tensors),
        check=lambda: case.check(tensors),
    )


def named(direct_io: bool | None) -> str:
    """Return what to call our loader with this option; `None` is none."""
    return "asyncloader" if direct_io is None else f"asyncloader, direct_io={direct_io}"


def ours(
    case: DenseCase,
    tensors: dict[str, Tensor],
    runner: asyncio.Runner,
    prepare: Callable[[list[Path]], object] = len,
    *,
    direct_io: bool | None = None,
) -> Contender:
    """Return our loader, planning included; `prepare` gets the files before each run."""
    files = case.files()
    return Contender(
        name=named(direct_io),
        role="ours" if direct_io is None else "variant",
        prepare=partial(prepare, files),
        run=lambda _: runner.run(tensor_loader(case.path, tensors, direct_io=direct_io).aload()),
        poison=lambda _: poison(tensors),
        check=lambda _: case.check(tensors),
    )


def peers(
    case: DenseCase,
    tensors: dict[str, Tensor],
    names: Collection[str],
    prepare: Callable[[list[Path]], object] = len,
) -> tuple[list[Contender], list[str]]:
    """Return the peers of these names, and the names of those that are not installed."""
    chosen = [one for one in PEERS if one.name in names]
    contenders = []
    for one in chosen:
        if one.installed:
            files = case.files(one.suffix)
            contenders.append(
                Contender(
                    name=one.name,
                    role="peer",
                    prepare=partial(prepare, files),
                    run=partial(_fill, one, files, tensors),
                    poison=lambda _: poison(tensors),
                    check=lambda _: case.check(tensors),
                    fresh=int(one.takes * case.nbytes),
                )
            )
    return contenders, [one.name for one in chosen if not one.installed]


def _fill(one: Peer, files: list[Path], tensors: dict[str, Tensor], _: object) -> None:
    one.fill(files, tensors)


def warm_all(case: DenseCase, names: Collection[str]) -> None:
    """Have the page cache hold the checkpoint, in all formats that these peers read."""
    suffixes = {one.suffix for one in PEERS if one.installed and one.name in names}
    suffixes.add("safetensors")
    warm(file for suffix in suffixes for file in case.files(suffix))
