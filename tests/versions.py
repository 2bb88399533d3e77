"""A process that saves one version after the other, and what a load that meets it may find."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from asyncloader import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    HashTable,
    Loader,
    Saver,
    latest,
)
from tests.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

KEPT = 1
STOP = ".stop"
IDS, WIDE = 3000, 50_000


def save_on(base: str) -> None:
    """Save versions until told to stop: each into a folder of its own, and into one for all."""
    run, version = Path(base) / "run", 0
    while not (run / STOP).exists():
        version += 1
        path = run / f"v{version}"
        save(path, version)
        with (run / "checkpoint").open("a") as names:
            names.write(f"{path.name}\n")
        shutil.rmtree(run / f"v{version - KEPT}", ignore_errors=True)
        save(run.with_name("same"), version)


def save(path: Path, version: int) -> None:
    """Save a version whose every value tells which it is, and whose shards differ in number."""
    table = HashTable([4], name="t")
    ids = torch.arange(IDS + version % 7)
    table.insert(ids, torch.full((len(ids), 4), float(version)))
    tensors = {name: torch.full((WIDE,), float(version)) for name in ("w", "v")}
    Saver(path=path, hashtables={"t": table}, tensors=tensors, parallel=1 + version % 4).save()


@dataclass
class Savers:
    """The process, for the length of a block."""

    base: Path

    def __enter__(self) -> Self:
        (self.base / "run").mkdir()
        code = f"from tests.versions import save_on; save_on({str(self.base)!r})"
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        return self

    def __exit__(self, *_: object) -> None:
        (self.base / "run" / STOP).touch()
        try:
            self.process.wait(timeout=30)
        finally:
            self.process.kill()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


@dataclass
class Finder:
    """Loads whatever is there, and remembers what it found."""

    base: Path
    in_run: bool
    """Whether the newest of a run folder, or whatever is in the one folder."""

    versions: list[int] = field(default_factory=list)
    missed: int = 0
    """Looks at which a checkpoint was just being replaced."""

    def look(self) -> None:
        """Load once; fails if that finds a mixture, or says anything but to look again."""
        table = HashTable([4], name="t")
        tensors = {name: torch.zeros(WIDE) for name in ("w", "v")}
        try:
            path = latest(self.base / "run") if self.in_run else self.base / "same"
            Loader(path, {"t": table}, tensors, strict=True, chunk_bytes=1 << 16).load()
        except (CheckpointChangedError, CheckpointNotFoundError):
            self.missed += 1
            assert not len(table)
        else:
            self.versions.append(version_of(table, tensors))


def version_of(table: HashTable, tensors: Mapping[str, Tensor]) -> int:
    """Return the version that all of it is of; fails if it is of several."""
    values = {value for tensor in tensors.values() for value in tensor.tolist()}
    values |= {*table.lookup(table.ids()).flatten().tolist()}
    assert len(values) == 1, f"a mixture: {values}"
    [version] = map(int, values)
    assert len(table) == IDS + version % 7
    return version
