"""Whatever is saved by however many ranks is there again for however many ranks, bit for bit."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncloader import HashTable, Loader, Saver, gen_slice
from tests.oracle import DTYPES, TableData, read_checkpoint, rows_of, write_checkpoint
from tests.support import raw, rows_in
from tests.test_load_properties import ODD_NAMES, filled, some_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

MOST_RANKS = 3
SLOTS = ["m", "exp_avg", "step filter", "ä.b/c^d"]
_LOW52 = 2**52 - 1


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is to be saved, made from a seed: every process makes the same."""

    seed: int
    size: int
    """Of the slices."""

    children: tuple[str, ...]
    """One alone is a table that is not coalesced."""

    slots: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    """The first is the embedding."""

    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]

    def content(self) -> tuple[dict[str, TableData], dict[str, Tensor]]:
        rng = random.Random(self.seed)
        tables = {}
        for child in self.children:
            ids = list(dict.fromkeys(some_ids(rng, rng.choice([0, 1, 5, 60]))))
            if len(self.children) > 1:  # a coalesced table's ids have 52 bits
                ids = list(dict.fromkeys(id_ & _LOW52 for id_ in ids))
            rows = {
                name: filled(rng, (len(ids), *shape), dtype) for name, shape, dtype in self.slots
            }
            tables[child] = TableData(ids=torch.tensor(ids, dtype=torch.int64), slots=rows)
        return tables, {name: filled(rng, shape, dtype) for name, shape, dtype in self.tensors}

    def empty(self, rank: int, ranks: int) -> HashTable:
        (_, shape, dtype), *others = self.slots
        table = HashTable(
            shape,
            block_size=16,
            dtype=dtype,
            coalesced=len(self.children) > 1,
            children=self.children,
            slice=gen_slice(rank, ranks, self.size),
            name="t",
        )
        for name, each_shape, each_dtype in others:
            table.add_slot(name, each_shape, each_dtype)
        return table

    def table(self, rank: int, ranks: int) -> HashTable:
        """Return the table as a rank holds it, put together in several steps."""
        table = self.empty(rank, ranks)
        tables, _ = self.content()
        for child, data in tables.items():
            mine = [n for n, id_ in enumerate(data.ids.tolist()) if table.slice.accepts(id_)]
            for half in (mine[::2], mine[1::2]):
                for name, rows in data.slots.items():
                    table.insert(data.ids[half], rows[half], name, child)
        return table


def save(model: Model, path: Path, rank: int, ranks: int, parallel: int) -> int:
    """Save as one rank; runs in a process of its own."""
    tensors = model.content()[1]
    tables = {"t": model.table(rank, ranks)}
    saver = Saver(rank, ranks, parallel, path, tables, tensors, save_id="s", timeout=60)
    return saver.save().bytes_written


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(MOST_RANKS, mp_context=context) as pool:
        yield pool


shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, *DTYPES.values()])
facts = st.tuples(shapes, dtypes)
names = st.sampled_from(ODD_NAMES)


@st.composite
def models(draw: st.DrawFn) -> Model:
    slots = draw(st.lists(st.sampled_from(SLOTS), unique=True, max_size=3))
    tensors = draw(st.lists(names, unique=True, max_size=4))
    taken = {*tensors}
    children = draw(
        st.lists(names.filter(lambda name: name not in taken), unique=True, min_size=1, max_size=3)
    )
    return Model(
        seed=draw(st.integers(0, 2**32)),
        size=draw(st.sampled_from([65536, 97, 7])),
        children=tuple(children),
        slots=tuple((name, *draw(facts)) for name in ("embedding", *slots)),
        tensors=tuple((name, *draw(facts)) for name in tensors),
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@settings(max_examples=settings().max_examples // 2)  # many processes
@given(
    model=models(),
    ranks=st.integers(1, MOST_RANKS),
    loaders=st.integers(1, MOST_RANKS),
    parallel=st.integers(1, 4),
    older=st.booleans(),
)
def test_what_ranks_save_other_ranks_load(  # noqa: PLR0917
    processes: ProcessPoolExecutor,
    model: Model,
    ranks: int,
    loaders: int,
    parallel: int,
    older: bool,
) -> None:
    tables, tensors = model.content()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if older:
            write_checkpoint(path, {"older": TableData(ids=torch.arange(9))}, {"x": torch.ones(3)})
        saving = [
            processes.submit(save, model, path, rank, ranks, parallel) for rank in range(ranks)
        ]
        written = sum(each.result() for each in saving)
        assert written == sum(file.stat().st_size for file in path.glob("*.safetensors"))
        check_as_written(path, tables, tensors)
        check_as_loaded(path, model, loaders)


def check_as_written(path: Path, tables: dict[str, TableData], tensors: dict[str, Tensor]) -> None:
    """Compare with what a reader finds that is not ours."""
    found_tables, found_tensors = read_checkpoint(path)
    assert found_tables.keys() == tables.keys()
    for name, data in tables.items():
        assert rows_of(found_tables[name].ids, found_tables[name].slots) == rows_of(
            data.ids, data.slots
        )
    assert {name: raw(tensor) for name, tensor in found_tensors.items()} == {
        name: raw(tensor) for name, tensor in tensors.items()
    }


def check_as_loaded(path: Path, model: Model, ranks: int) -> None:
    tables, tensors = model.content()
    found: dict[str, dict[int, dict[str, bytes]]] = {child: {} for child in model.children}
    for rank in range(ranks):
        table = model.empty(rank, ranks)
        places = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        report = Loader(path, {"t": table}, places, strict=True, verify="require").load()
        assert (report.missing, report.unexpected) == ((), ())
        assert report.bytes_verified == report.bytes_wanted
        assert {name: raw(tensor) for name, tensor in places.items()} == {
            name: raw(tensor) for name, tensor in tensors.items()
        }
        for child in model.children:
            mine = rows_in(table, child)
            assert not mine.keys() & found[child].keys()
            found[child] |= mine
    for child, data in tables.items():
        assert found[child] == rows_of(data.ids, data.slots)
