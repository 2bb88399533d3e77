"""Whatever is wrong with a checkpoint or its storage: load it right, or raise our error.

And leave nothing behind: no row, no open file, no thread, no lock.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import random
import tempfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncloader import (
    AsyncLoaderError,
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    HashTable,
    Loader,
    LoadTimeoutError,
    PlanError,
    Progress,
    ReadError,
    ReadStalledError,
    TruncatedShardError,
    gen_slice,
)
from asyncloader._threads.jobs import ByteBudget
from tests.oracle import (
    DTYPES,
    edit_header,
    edit_json,
    shard_header,
    shard_holding,
    write_checkpoint,
)
from tests.oracle.strict import Refused, StrictFolder
from tests.support import (
    MemoryStorage,
    Run,
    data,
    debug_off,
    nothing_left_behind,
    poison,
    raw,
    rows_in,
    rows_on_disk,
    table_for,
    unchanged,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from asyncloader import LoadReport

CONTENT = data([5, -6], exp_avg=1)
STORED = {"w": torch.arange(1.0, 4.0), "v": torch.tensor([True, False])}
NESTED = 1020  # as deep as the parser allows, deeper than Python's stack


class Destination:
    """A table that holds a row and tensors that hold poison, to be loaded into."""

    def __init__(self, folder: str | Path, **how: Any) -> None:  # noqa: ANN401  # Loader's arguments
        self.folder = Path(folder)
        self.table = table_for(CONTENT)
        self.table.insert(torch.tensor([5]), torch.full((1, 2), -1.0))
        self.tensors = {name: poison(torch.empty_like(stored)) for name, stored in STORED.items()}
        self.loader = Loader(folder, {"t": self.table}, self.tensors, parallel=2, **how)

    async def attempt(self) -> AsyncLoaderError | LoadReport:
        """Load, and check that a failure leaves no trace."""
        rows = rows_in(self.table)
        tensors = {name: raw(tensor) for name, tensor in self.tensors.items()}
        with debug_off(), nothing_left_behind(self.table):
            try:
                return await self.loader.aload()
            except AsyncLoaderError as error:
                failure = error
        assert rows_in(self.table) == rows
        if not isinstance(failure, ReadError | CheckpointChangedError):
            assert failure.touched == ()
            assert {name: raw(tensor) for name, tensor in self.tensors.items()} == tensors
        return failure

    def is_loaded(self) -> bool:
        """Tell whether everything is as it was written."""
        return rows_in(self.table) == rows_on_disk(CONTENT) and all(
            raw(self.tensors[name]) == raw(stored) for name, stored in STORED.items()
        )


def written(folder: Path, *, writers: int = 1) -> Path:
    """Write the checkpoint that all tests here break, and return its first shard."""
    write_checkpoint(folder, {"t": CONTENT}, STORED, writers=writers)
    return min(folder.glob("*.safetensors"))


# --- shards cut short, or full of garbage


def test_a_shard_cut_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    shard = written(tmp_path)
    whole = shard.read_bytes()
    destination = Destination(tmp_path)

    async def cut_ever_shorter() -> None:
        for length in range(len(whole) - 1, -1, -1):
            os.truncate(shard, length)
            error = await destination.attempt()
            assert isinstance(error, TruncatedShardError)
            assert (error.shard, error.size) == (shard.name, length)
            assert error.begin <= error.size < error.end <= len(whole)
            assert f"ends at {length}" in str(error)

    asyncio.run(cut_ever_shorter())


GARBAGE = {
    "zeros": bytes(100),
    "text": b"This is a text file, and a long enough one to be taken for something else.",
    "no JSON": (8).to_bytes(8, "little") + b"{}}}}}}}",
    "no object": (4).to_bytes(8, "little") + b"[{}]",
    "a number": (4).to_bytes(8, "little") + b"  17",
    "only spaces": (4).to_bytes(8, "little") + b"    ",
    "no UTF-8": (10).to_bytes(8, "little") + b'{"\xff\xfe": {}',
    "a lone surrogate": (16).to_bytes(8, "little") + b'{"\\ud800": null}',
    "empty": (2).to_bytes(8, "little") + b"{}",
    "only metadata": (19).to_bytes(8, "little") + b'{"__metadata__":{}}',
    "a pickle": pickle.dumps({"w": [1.0] * 30}),
    "unclosed": (6).to_bytes(8, "little") + b'{"a":{',
    "nested deeply": b"".join(
        [(6 + 2 * NESTED).to_bytes(8, "little"), b'{"a":', b"[" * NESTED, b"]" * NESTED, b"}"]
    ),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
async def test_a_shard_that_is_none_is_an_error_that_names_it(
    tmp_path: Path, content: bytes
) -> None:
    shard = written(tmp_path)
    shard.write_bytes(content)

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert error.shard == shard.name


ENTRIES: dict[str, object] = {
    "null": None,
    "a list": [],
    "no dtype": {"shape": [3], "data_offsets": [0, 12]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 12]},
    "no offsets": {"dtype": "F32", "shape": [3]},
    "an unknown dtype": {"dtype": "F-33", "shape": [3], "data_offsets": [0, 12]},
    "a dtype that is no text": {"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]},
    "a dtype in lower case": {"dtype": "f32", "shape": [3], "data_offsets": [0, 12]},
    "a negative size": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]},
    "a size that is no int": {"dtype": "F32", "shape": [3.0], "data_offsets": [0, 12]},
    "a size that is a bool": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
    "a shape that is no list": {"dtype": "F32", "shape": {"3": 3}, "data_offsets": [0, 12]},
    "a dtype as long as a book": {"dtype": "F" * 10**6, "shape": [3], "data_offsets": [0, 12]},
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
async def test_an_entry_that_makes_no_sense_is_an_error_that_names_it(
    tmp_path: Path, entry: object
) -> None:
    shard = written(tmp_path)
    edit_header(shard, lambda header: header.update({"w^ ": entry}))

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert (error.shard, error.key) == (shard.name, "w^ ")
    assert len(str(error)) < 1000


async def test_all_bad_shards_are_named_at_once(tmp_path: Path) -> None:
    written(tmp_path, writers=2)
    shards = sorted(tmp_path.glob("*.safetensors"))
    for shard in shards:
        shard.write_bytes(b"")

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert error.shard == shards[0].name
    assert [shards[1].name in note for note in error.__notes__] == [True]


# --- fuzz


def as_stored(folder: Path) -> bool:
    """Tell whether a reader that is strict finds there what was written."""
    try:
        found = StrictFolder({file.name: file.read_bytes() for file in folder.iterdir()})
        tensors = {name: found.tensor(name) for name in STORED}
        [(claim, slots)] = found.parts("t", ["id", *CONTENT.slots], (0, 65536, 65536))
    except (Refused, ValueError):
        return False
    rows = {"id": CONTENT.ids, **CONTENT.slots}
    return claim == (0, 65536, 65536) and tensors == blocks(STORED) and slots == blocks(rows)


def blocks(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return what the strict reader finds of tensors that are stored as they are."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    stored = {name: raw(tensor) for name, tensor in tensors.items()}
    return {
        name: (names[dtype], shape, content) for name, (dtype, shape, content) in stored.items()
    }


def loads_or_fails(destination: Destination, outcome: AsyncLoaderError | LoadReport) -> bool:
    """Tell whether what is loaded is what a reader that trusts the header finds.

    What nobody can object to has to be loaded, or all would be well if all were refused.
    """
    if isinstance(outcome, AsyncLoaderError):
        return not as_stored(destination.folder)
    for name, how in outcome.tensors.items():
        if how == "loaded":
            shard = shard_holding(destination.folder, f"{name}^ ")
            begin, end = shard_header(shard)[f"{name}^ "]["data_offsets"]
            content = shard.read_bytes()
            start = 8 + int.from_bytes(content[:8], "little")
            if raw(destination.tensors[name])[2] != content[start + begin : start + end]:
                return False
        elif raw(destination.tensors[name]) != raw(poison(torch.empty_like(STORED[name]))):
            return False
    return True


def reverse_blocks(index: dict[str, dict[str, int]]) -> None:
    index["block_index"] = dict(reversed(index["block_index"].items()))


async def test_what_is_spelled_in_another_way_is_loaded(tmp_path: Path) -> None:
    """The strict reader, which judges what has to be loaded, accepts some changes."""
    shard = written(tmp_path)
    assert as_stored(tmp_path)
    edit_header(shard, lambda header: header.update({"w^ ": header.pop("w^ ")}))  # comes last
    edit_json(tmp_path / "index", reverse_blocks)
    assert as_stored(tmp_path)

    outcome = await Destination(tmp_path).attempt()

    assert not isinstance(outcome, AsyncLoaderError)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 8), values=st.sampled_from(['"0:,[{-', ""]))
async def test_any_change_to_a_header_loads_right_or_raises_our_error(
    seed: int, count: int, values: str
) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        shard = written(Path(folder))
        content = bytearray(shard.read_bytes())
        end = 8 + int.from_bytes(content[:8], "little")
        for _ in range(count):
            content[rng.randrange(end)] = ord(rng.choice(values)) if values else rng.randrange(256)
        shard.write_bytes(content)
        destination = Destination(folder)

        assert loads_or_fails(destination, await destination.attempt())


numbers = st.one_of(
    st.integers(), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1, 0]), st.floats()
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=9), st.just("F64")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Any], object]:
    """Put anything anywhere into a JSON document, or take something out, or put it elsewhere."""
    seed, value = draw(st.integers(0, 2**32)), draw(anything)
    kind = draw(st.sampled_from(["replace", "remove", "rename", "add"]))

    def change(document: Any) -> object:  # noqa: ANN401  # JSON
        rng = random.Random(seed)
        here = document
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                return None
            key = rng.choice(keys)
            if not isinstance(here[key], dict | list) or rng.random() < 1 / 4:
                break
            here = here[key]
        if kind == "remove" or isinstance(here, list):
            return here.pop(key)
        if kind == "replace":
            here[key] = value
        else:
            here[str(value)] = here.pop(key) if kind == "rename" else copy.deepcopy(here[key])
        return None

    return change


@pytest.mark.parametrize("file", ["index", "tensorkey.json", "*.safetensors"])
@given(changes=st.lists(changes(), min_size=1, max_size=3))
async def test_any_change_to_the_json_loads_right_or_raises_our_error(
    file: str, changes: list[Callable[[Any], object]]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, writers=2)
        [path, *_] = folder.glob(file)
        for change in changes:
            (edit_header if file.startswith("*") else edit_json)(path, change)
        destination = Destination(folder)

        assert loads_or_fails(destination, await destination.attempt())


@pytest.mark.parametrize("file", ["index", "tensorkey.json"])
@given(content=st.binary(max_size=40) | anything.map(lambda value: json.dumps(value).encode()))
async def test_anything_in_place_of_the_json_loads_right_or_raises_our_error(
    file: str, content: bytes
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder))
        (Path(folder) / file).write_bytes(content)
        destination = Destination(folder)

        assert loads_or_fails(destination, await destination.attempt())


# --- what is not there, or no file


async def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = written(tmp_path)
    shard.unlink()

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert error.shard == shard.name
    assert "missing" in str(error)
    assert not isinstance(error, CheckpointNotFoundError)


async def test_a_block_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    shard = written(tmp_path)
    edit_header(shard, lambda header: header.pop("v^ "))

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert (error.shard, error.key) == (shard.name, "v^ ")
    assert "index" in str(error)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_empty(path: Path) -> None:
    path.touch()


NOT_A_FILE = [make_folder, make_fifo, make_dangling_link, make_loop, make_device, make_empty]


@pytest.mark.parametrize("make", NOT_A_FILE)
async def test_a_shard_that_cannot_be_read_is_named(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    shard = written(tmp_path)
    shard.unlink()
    make(shard)

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert error.shard == shard.name


@pytest.mark.parametrize("make", NOT_A_FILE)
@pytest.mark.parametrize("name", ["index", "tensorkey.json"])
async def test_an_index_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    written(tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert f"{tmp_path}: " in str(error)
    assert name in str(error)


def with_no_folder(path: Path) -> Path:
    return path / "nowhere"


def with_an_empty_folder(path: Path) -> Path:
    return path


def with_shards_alone(path: Path) -> Path:
    written(path)
    (path / "index").unlink()
    return path


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (with_no_folder, "no such folder"),
        (with_an_empty_folder, "looked for 'index'"),
        (with_shards_alone, "holds 1 shard file but no 'index'"),
    ],
)
async def test_where_no_checkpoint_is_the_error_says_what_was_looked_for(
    tmp_path: Path, prepare: Callable[[Path], Path], says: str
) -> None:
    path = prepare(tmp_path)

    error = await Destination(path).attempt()

    assert isinstance(error, CheckpointNotFoundError)
    assert isinstance(error, FileNotFoundError)
    assert str(path) in str(error)
    assert says in str(error)
    assert isinstance(error.__cause__, OSError)


async def test_a_checkpoint_without_tensorkey_is_an_error(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "tensorkey.json").unlink()

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert error.shard == "tensorkey.json"


# --- an index that means harm


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/b", "..", ".", "", "\0", "a\0b", "\\\\server\\share"]
)
async def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    shard = written(folder)
    (tmp_path / "outside").write_bytes(shard.read_bytes())
    edit_json(folder / "index", lambda index: index.update(file_index={name: 0}))

    error = await Destination(folder).attempt()

    assert isinstance(error, CheckpointError)
    assert "not a plain file name" in str(error)


@pytest.mark.parametrize("name", ["x" * 300, "nul\u00e9" * 100])
async def test_a_name_that_no_file_can_have_is_an_error(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    edit_json(tmp_path / "index", lambda index: index.update(file_index={name: 0}))

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert error.shard == name


NESTED_LIST = b"[" * NESTED + b"]" * NESTED
INDEXES = {
    "no JSON": b"{",
    "no object": b"[]",
    "neither part": b"{}",
    "no block_index": b'{"file_index": {}}',
    "a list of files": b'{"file_index": [], "block_index": {}}',
    "a file without number": b'{"file_index": {"a": null}, "block_index": {}}',
    "one number for two files": b'{"file_index": {"a": 0, "b": 0}, "block_index": {}}',
    "true for a number": b'{"file_index": {"a": true}, "block_index": {}}',
    "a block without number": b'{"file_index": {"a": 0}, "block_index": {"w^ ": "0"}}',
    "a block in no file": b'{"file_index": {"a": 0}, "block_index": {"w^ ": 1}}',
    "a file nested deeply": b'{"file_index": {"a": ' + NESTED_LIST + b'}, "block_index": {}}',
    "a block nested deeply": b'{"file_index": {}, "block_index": {"w": ' + NESTED_LIST + b"}}",
}


@pytest.mark.parametrize("content", INDEXES.values(), ids=INDEXES)
async def test_an_index_that_contradicts_itself_is_an_error(tmp_path: Path, content: bytes) -> None:
    written(tmp_path)
    (tmp_path / "index").write_bytes(content)

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert error.shard == "index"


@pytest.mark.parametrize(
    "name",
    [
        None,
        7,
        ["t@id^00000@65536@65536"],
        "",
        "t@id",
        "t^00000@65536@65536",
        "t@id^",
        "t@id^65536",
        "t@id^0@1",
        "t@id^1@0@65536",
        "t@id^0@9@8",
        "t@id^0@0@0",
        "t@id^-1@5@10",
        "t@id^0@1@" + "9" * 5000,
        "t@id^0@1@" + "9" * 19,
        "t@id^\u0660@\u0661@\u0662",
        "t@id^0@1@2\n",
    ],
    ids=lambda name: repr(name)[:30],
)
async def test_a_block_name_that_makes_no_sense_is_an_error(tmp_path: Path, name: object) -> None:
    written(tmp_path)
    key = "t.id/part_0_1"
    edit_json(tmp_path / "tensorkey.json", lambda names: names.update({key: name}))

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert (error.shard, error.key) == ("tensorkey.json", key)


async def test_a_block_that_only_tensorkey_names_is_an_error(tmp_path: Path) -> None:
    written(tmp_path)
    name = "u@id^00000@65536@65536"
    edit_json(tmp_path / "tensorkey.json", lambda names: names.update({"u.id/part_0_1": name}))

    error = await Destination(tmp_path).attempt()

    assert isinstance(error, CheckpointError)
    assert (error.shard, error.key) == ("tensorkey.json", "u.id/part_0_1")


# --- every error can be sent to another process


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("here", "broken", "shard", "key"),
        CheckpointError("here", "broken"),
        CheckpointNotFoundError("here", "nothing"),
        TruncatedShardError("here", "shard", "key", 8, 16, 12),
        PlanError("here", ["one", "two"]),
        ReadError("shard", 8, 16, "broken"),
        ReadStalledError("shard", 8, 16, "no answer"),
        LoadTimeoutError("here", 1.5),
        LoadTimeoutError("here", 1.5, ["shard: bytes [0, 8)"]),
    ],
    ids=repr,
)
def test_an_error_survives_pickling_with_all_its_facts(error: AsyncLoaderError) -> None:
    error.touched = ("w",)

    again = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own

    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


# --- a storage that fails


class Several:
    """Everything that is read in a way of its own: whole and in part, as it lies and copied."""

    def __init__(self, folder: Path) -> None:
        self.content = data(list(range(-50, 50)), exp_avg=1)
        self.stored = {"plain": torch.randn(9), "turned": torch.randn(3, 5)}
        write_checkpoint(
            folder, {"t": self.content, "u": self.content}, self.stored, ranks=2, writers=2
        )
        self.files = MemoryStorage.of(folder).files
        self.third = gen_slice(1, 3, 100)

    def run(self, storage: MemoryStorage, *, chunk_bytes: int = 300) -> Run:
        """Return a load into fresh destinations."""
        part = table_for(self.content, name="u", slice=self.third)
        tables = {"t": table_for(self.content), "u": part}
        held = next(id_ for id_ in self.content.ids.tolist() if self.third.accepts(id_))
        for table in tables.values():
            table.insert(torch.tensor([held]), torch.full((1, 2), -1.0))
        tensors = {"plain": torch.zeros(9), "turned": torch.zeros(5, 3).T}
        return Run(storage=storage, tables=tables, tensors=tensors, chunk_bytes=chunk_bytes)

    def is_loaded(self, run: Run) -> bool:
        """Tell whether everything is as it was written."""
        return (
            rows_in(run.tables["t"]) == rows_on_disk(self.content)
            and rows_in(run.tables["u"]) == rows_on_disk(self.content, keep=self.third.accepts)
            and all(raw(run.tensors[name]) == raw(self.stored[name]) for name in self.stored)
        )


@pytest.mark.parametrize("at_most", [1, 7, 1 << 20])
@pytest.mark.parametrize("chunk_bytes", [8, 100, 1 << 20])
async def test_every_byte_arrives_however_few_of_them_a_read_gives(
    tmp_path: Path, at_most: int, chunk_bytes: int
) -> None:
    several = Several(tmp_path)
    run = several.run(MemoryStorage(several.files, at_most=at_most), chunk_bytes=chunk_bytes)

    with debug_off():
        await run.load()

    assert several.is_loaded(run)


@pytest.mark.parametrize("budget", [1, 200, 1 << 20])
async def test_no_more_is_in_flight_than_the_budget_allows(tmp_path: Path, budget: int) -> None:
    several = Several(tmp_path)
    storage = MemoryStorage(several.files)
    run = several.run(storage, chunk_bytes=100)
    run.budget = ByteBudget(budget)

    def check(_: int) -> None:
        if storage.reads[-1][0].endswith(".safetensors") and storage.reads[-1][1]:
            assert storage.in_flight <= max(budget, 100)

    storage.before_read = check
    await run.load()

    assert several.is_loaded(run)
    assert run.budget.in_use == 0


async def test_whichever_read_fails_its_range_is_named_and_nothing_is_left_behind(
    tmp_path: Path,
) -> None:
    several = Several(tmp_path)
    good = MemoryStorage(several.files)
    await several.run(good).load()
    number = 0
    while True:
        cause = OSError(5, f"broken on read {number}")
        storage = MemoryStorage(
            several.files,
            before_read=lambda read, bad=number, cause=cause: cause if read == bad else None,  # type: ignore[misc]
        )
        run = several.run(storage)
        before = {name: raw(tensor) for name, tensor in run.tensors.items()}
        with debug_off(), nothing_left_behind(*run.tables.values()):
            rows = [rows_in(table) for table in run.tables.values()]
            failure = None
            try:
                await run.load()
            except ReadError as error:
                failure = error
        if failure is None:
            break
        name, offset, length = storage.reads[number]
        assert (failure.shard, failure.offset, failure.length) == (name, offset, length)
        assert (failure.__cause__, failure.problem) == (cause, str(cause))
        assert f"[{offset}, {offset + length})" in str(failure)
        assert [rows_in(table) for table in run.tables.values()] == rows
        assert (run.budget.in_use, storage.in_flight) == (0, 0)
        after = {name for name, tensor in run.tensors.items() if raw(tensor) != before[name]}
        assert after <= run.touched.keys()
        number += 1
    assert several.is_loaded(run)
    assert number >= len(good.reads) - run.parallel


async def test_an_error_says_which_tensors_were_written_to(tmp_path: Path) -> None:
    shard = written(tmp_path)

    def fail(_: Progress) -> None:
        raise ReadError(shard.name, 0, 1, "as if the storage had failed at the end")

    destination = Destination(tmp_path, progress=fail)
    error = await destination.attempt()

    assert isinstance(error, ReadError)
    assert error.touched == ("v", "w")
    assert any("tensors written to: v, w" in note for note in error.__notes__)


async def test_whatever_a_progress_listener_raises_ends_the_load(tmp_path: Path) -> None:
    written(tmp_path)

    def fail(_: Progress) -> None:
        raise ZeroDivisionError("mine")

    destination = Destination(tmp_path, progress=fail)
    with unchanged(destination.table), pytest.raises(ZeroDivisionError, match="mine"):
        await destination.attempt()


async def test_whatever_filter_func_raises_ends_the_load(tmp_path: Path) -> None:
    written(tmp_path)

    def fail(_: object) -> dict[str, dict[str, list[str]]]:
        raise ZeroDivisionError("mine")

    destination = Destination(tmp_path, filter_func=fail)
    with (
        unchanged(destination.table, tensors=destination.tensors),
        pytest.raises(ZeroDivisionError, match="mine"),
    ):
        await destination.attempt()


class FullTable(HashTable):
    """A table for which there is no memory."""

    def begin(self, *, most: int, expected: int) -> Any:  # noqa: ANN401  # never returns
        raise MemoryError(f"no room for {most} rows")


async def test_where_there_is_no_memory_for_one_table_the_others_stay_as_they_were(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path, {"t": CONTENT, "u": CONTENT}, STORED)
    table, full = table_for(CONTENT), FullTable([2], name="u")
    tensors = {name: poison(torch.empty_like(stored)) for name, stored in STORED.items()}

    with unchanged(table, tensors=tensors), pytest.raises(MemoryError, match="no room for 2 rows"):
        await Loader(tmp_path, {"t": table, "u": full}, tensors).aload()


async def test_after_every_failure_the_same_loader_loads_once_the_checkpoint_is_mended(
    tmp_path: Path,
) -> None:
    shard = written(tmp_path)
    whole = shard.read_bytes()
    destination = Destination(tmp_path)
    for length in 0, 9, len(whole) - 1:
        shard.write_bytes(whole[:length])
        assert isinstance(await destination.attempt(), CheckpointError)
    shard.write_bytes(whole)

    await destination.attempt()

    assert destination.is_loaded()


def test_a_long_file_of_nothing_is_no_reason_to_take_memory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.zeros(4)})
    [shard] = tmp_path.glob("*.safetensors")
    with shard.open("r+b") as file:
        file.write((90_000_000).to_bytes(8, "little") + b"{")
        file.truncate(100_000_000)  # sparse: it takes no room on disk
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="zero"):
            Loader(tmp_path, tensors={"w": torch.zeros(4)}).load()
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
