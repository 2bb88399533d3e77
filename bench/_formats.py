"""Writes the same tensors in the formats that peers have of their own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from bench._raw import blocks, shards, tensor_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

MOST_ENTRIES = 2_000
"""Tensors in a file of tensorizer's, which has room for the names of some thousands only."""


def files_of(path: Path, suffix: str, truth: Mapping[str, Tensor]) -> list[Path]:
    """Return a checkpoint's tensors as files of another format; write them unless they are there.

    They are split as the checkpoint is: a file for every shard.
    """
    if suffix == "safetensors":
        return shards(path)
    folder = path.with_name(f"{path.name}-{suffix}")
    if not folder.exists():
        draft = path.with_name(f"{path.name}-{suffix}-draft")
        draft.mkdir(exist_ok=True)
        names = [[tensor_name(key) for key, _, _ in blocks(shard)] for shard in shards(path)]
        _WRITERS[suffix](draft, names, truth)
        os.sync()  # writing it back later would compete with what is measured
        draft.rename(folder)
    return sorted(folder.glob(f"*.{suffix}"))


def _apart(names: Sequence[str], truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies: those of the truth share memory, which torch would save once and whole."""
    return {name: truth[name].clone() for name in names}


def _torch(folder: Path, names: Sequence[Sequence[str]], truth: Mapping[str, Tensor]) -> None:
    for number, some in enumerate(names):
        torch.save(_apart(some, truth), folder / f"{number:02d}.pt")


def _tensorizer(folder: Path, names: Sequence[Sequence[str]], truth: Mapping[str, Tensor]) -> None:
    from tensorizer import TensorSerializer  # noqa: PLC0415  # need not be installed

    parts = [
        some[at : at + MOST_ENTRIES] for some in names for at in range(0, len(some), MOST_ENTRIES)
    ]
    for number, some in enumerate(parts):
        serializer = TensorSerializer(folder / f"{number:02d}.tensors")
        serializer.write_state_dict(_apart(some, truth))
        serializer.close()


def _distributed(folder: Path, names: Sequence[Sequence[str]], truth: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter  # noqa: PLC0415  # slow
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    every = _apart([name for some in names for name in some], truth)
    # As many threads, as many files.
    writer = FileSystemWriter(folder, thread_count=len(names), sync_files=False)
    save(every, storage_writer=writer, no_dist=True)


_WRITERS = {"pt": _torch, "tensors": _tensorizer, "distcp": _distributed}
