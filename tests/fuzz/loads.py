"""Whole loads from a folder into poisoned destinations, against the strict reader."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from functools import cache
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from asyncloader import (
    AsyncLoaderError,
    HashTable,
    Loader,
    Slice,
    latest,
    load_tensors,
)
from asyncloader.runs import versions
from tests.oracle import DTYPES, ModelTable, Part, flat_bytes
from tests.oracle import Slice as Claim
from tests.oracle.strict import StrictFolder
from tests.support import poison, raw, rows_in

from .choices import Choices
from .drafts import INDEX, SHARDED, SINGLE, SLOTS, TABLES, TENSORS, draft_of, spoiled
from .watch import watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

__all__ = ["TARGETS", "load", "read", "runs"]

BUDGET = 1 << 20
HELD = 5
"""An id that the tables hold before, and that checkpoints hold, too."""


@contextlib.contextmanager
def folder_of(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Write files into a folder in memory, beside which lies one that nobody may read."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
    outer = Path(tempfile.mkdtemp(prefix="asyncloader-fuzz-", dir=memory))
    try:
        (outer / "outside").write_bytes(b"\2\0\0\0\0\0\0\0{}")
        inner = outer / "inside"
        inner.mkdir()
        for name, content in files.items():
            (inner / name).write_bytes(content)
        yield inner
    finally:
        shutil.rmtree(outer)


@cache
def warm_up() -> None:
    """Load once: the first load of a process imports, compiles, and opens what stays open."""
    with folder_of(spoiled(draft_of("recis", 1), Choices(b""))) as folder:
        _attempt(folder, {name: _table(name, half=False) for name in TABLES}, {})
        load_tensors(folder)


def _files(choices: Choices) -> dict[str, bytes]:
    kind = choices.of(["recis", "recis", "plain"])
    return spoiled(draft_of(kind, choices.below(256)), choices)


# --- Loader


def load(data: bytes) -> None:
    """Load into tables and tensors."""
    choices = Choices(data)
    half = choices.below(4) == 1
    check_load(_files(choices), half=half)


def check_load(files: Mapping[str, bytes], *, half: bool) -> bool:
    """Load, maybe `half` of the ids; compare what came of it, and say whether anything did."""
    tables = {name: _table(name, half=half) for name in TABLES}
    held = {name: rows_in(table) for name, table in tables.items()}
    tensors = {name: _poisoned(*spec) for name, spec in TENSORS.items()}
    before = {name: raw(tensor) for name, tensor in tensors.items()}
    warm_up()
    with folder_of(files) as folder, watched().within(folder):
        touched = _attempt(folder, tables, tensors)
    if touched is None:
        _compare(StrictFolder(files, verify=not half), tables, tensors, half=half)
        return True
    assert {name: rows_in(table) for name, table in tables.items()} == held
    for name, tensor in tensors.items():
        assert name in touched or raw(tensor) == before[name], name
    return False


def _attempt(
    folder: Path, tables: Mapping[str, HashTable], tensors: Mapping[str, Tensor]
) -> tuple[str, ...] | None:
    """Load; on failure, return the tensors that were written to."""
    try:
        Loader(folder, tables, tensors, parallel=2, max_inflight_bytes=BUDGET).load()
    except AsyncLoaderError as error:
        return error.touched
    return None


def _table(name: str, *, half: bool) -> HashTable:
    part = Slice(0, 32768, 65536) if half else None
    table = HashTable([2], block_size=8, name=name, slice=part)
    table.add_slot("s", [3], torch.uint8)
    table.insert(torch.tensor([HELD]), torch.full((1, 2), -1.0))
    return table


def _poisoned(dtype: str, shape: tuple[int, ...], _: int) -> Tensor:
    return poison(torch.empty(shape, dtype=DTYPES[dtype]))


def _compare(
    strict: StrictFolder,
    tables: Mapping[str, HashTable],
    tensors: Mapping[str, Tensor],
    *,
    half: bool,
) -> None:
    """Check that all is as the strict reader says, which must not refuse."""
    for name, tensor in tensors.items():
        found = strict.tensor(name)
        wanted = _poisoned(*TENSORS[name]) if found is None else _tensor(*found)
        assert raw(tensor) == raw(wanted), name
    part = (0, 32768 if half else 65536, 65536)
    for name, table in tables.items():
        model = ModelTable(
            slots={
                slot: (row, DTYPES[dtype], 0.0)
                for slot, (dtype, row, _) in SLOTS.items()
                if slot != "id"
            },
            slice=part,
        )
        model.put(torch.tensor([HELD]), {"embedding": torch.full((1, 2), -1.0)})
        model.apply(0, starmap(_part, strict.parts(name, SLOTS, part)), SLOTS)
        assert rows_in(table) == model.rows, name


def _part(
    claim: tuple[int, int, int], slots: Mapping[str, tuple[str, tuple[int, ...], bytes]]
) -> Part:
    made = {slot: _tensor(*block) for slot, block in slots.items()}
    return Part(claim=Claim(*claim), ids=made.pop("id"), slots=made)


def _tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(shape)


# --- load_tensors

NEWER = {
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
"""What torch calls dtypes that its oldest version here lacks."""


def read(data: bytes) -> None:
    """Read all tensors into memory of their own, whatever they are."""
    choices = Choices(data)
    check_read(_files(choices))


def check_read(files: Mapping[str, bytes]) -> bool:
    """Read, compare, and say whether anything was read."""
    with folder_of(files) as folder:
        path = folder
        if SINGLE in files and not {INDEX, SHARDED} & files.keys():
            path = folder / SINGLE
        warm_up()
        with watched().within(folder):
            found = _tensors(path)
    if found is None:
        return False
    strict = StrictFolder(files)
    assert list(found) == list(strict.tensors)
    for name, tensor in found.items():
        block = strict.tensor(name)
        assert block is not None
        dtype, shape, content = block
        if dtype == "F4":  # torch counts two as one
            shape = (*shape[:-1], shape[-1] // 2)
        known = DTYPES.get(dtype) or getattr(torch, NEWER[dtype])
        assert (tensor.dtype, tuple(tensor.shape)) == (known, shape)
        assert flat_bytes(tensor).numpy().tobytes() == content
    return True


def _tensors(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_tensors(path, parallel=2)
    except AsyncLoaderError:
        return None


# --- run folders

LINES = [
    b"1", b"2", b"3", b"..", b".", b"", b"/etc", b"1/..", b"\0", b"1\0", b"\xff", b"1\r", b" 2 ",
    b"a" * 300, b"../outside", b".hidden", b"index", b"checkpoint", b"\xed\xa0\x80", b"9" * 5000,
]  # fmt: skip


def runs(data: bytes) -> None:
    """Look for the newest version of a run."""
    choices = Choices(data)
    files = {"checkpoint": b"\n".join(choices.of(LINES) for _ in range(choices.below(6)))}
    with folder_of(files if choices.below(4) else {}) as folder:
        for name in ["1", "2", "3", ".hidden", "9" * 200, "x1y22"][: choices.below(7)]:
            (folder / name).mkdir()
            if choices.below(2):
                (folder / name / "index").write_bytes(b"{}")
        with watched().within(folder):
            _check_runs(folder)


def _check_runs(folder: Path) -> None:
    there = versions(folder)
    committed = {version.name for version in there if version.committed}
    assert all((folder / version.name).is_dir() for version in there)
    try:
        found = latest(folder)
    except AsyncLoaderError:
        assert not committed
    else:
        assert found.parent == folder
        assert found.name in committed


TARGETS: dict[str, Callable[[bytes], None]] = {"load": load, "read": read, "runs": runs}
