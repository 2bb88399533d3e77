"""Tables whose rows stay on the disk, of a checkpoint in a store: in copies on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save

from asyncloader import (
    CheckpointError,
    DiskTable,
    Loader,
    LoadReport,
    PlanError,
    gen_slice,
    load_tensors,
    open_table,
)
from asyncloader.options import ReadOptions
from tests.oracle import write_checkpoint
from tests.servers.liar import Answer, liar
from tests.support import data, open_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.liar import Asked, Liar

pytest.importorskip("obstore")

DiskTable([1])  # the first one imports numba, for which an event loop has no time

CONTENT = data([7, -1, 65543, *range(100, 60_000, 7)], width=16, exp_avg=16)
ROWS = CONTENT.slots["embedding"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Liar]:
    write_checkpoint(tmp_path / "c", {"t": CONTENT}, {"w": torch.ones(1000)}, ranks=2)
    files = {f"c/{path.name}": path.read_bytes() for path in (tmp_path / "c").iterdir()}
    with liar(files) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(server: Liar, **how: Any) -> tuple[DiskTable, LoadReport]:  # noqa: ANN401  # of Loader
    table = DiskTable([16], name="t", slice=how.pop("slice", None))
    table.add_slot("exp_avg", [16])
    return table, Loader(f"{server.url}/c", {"t": table}, strict=True, **how).load()


def check(table: DiskTable, ids: torch.Tensor = CONTENT.ids) -> None:
    for slot, rows in CONTENT.slots.items():
        row_of = dict(zip(CONTENT.ids.tolist(), rows, strict=True))
        wanted = torch.stack([row_of[id_] for id_ in ids.tolist()])
        assert torch.equal(table.lookup(ids, slot), wanted)


async def test_rows_are_there_when_the_server_is_gone(server: Liar, cache: Path) -> None:
    options = ReadOptions(cache_dir=cache)
    async with open_table(f"{server.url}/c", "t", options=options) as table:
        server.files.clear()
        asked = len(server.asked)
        assert torch.equal(await table.alookup(CONTENT.ids), ROWS)
        assert len(server.asked) == asked
    assert not [name for name in open_files() if str(cache) in name]


def test_a_second_load_asks_for_nothing(server: Liar, cache: Path) -> None:
    first, _ = load(server, cache_dir=cache)
    asked = len(server.asked)
    second, report = load(server, cache_dir=cache)
    assert len(server.asked) == asked
    assert report.bytes_cached >= report.bytes_read >= 2 * ROWS.nbytes
    check(first)
    check(second)


def test_without_cache_dir_nothing_is_asked_for(server: Liar) -> None:
    with pytest.raises(PlanError, match=r"table 't': its rows would stay in http.*give cache_dir"):
        load(server)
    assert server.asked == []


def test_a_bank_has_each_table_where_its_checkpoint_is(
    server: Liar, cache: Path, tmp_path: Path
) -> None:
    other = data([3, 4], width=2)
    write_checkpoint(tmp_path / "here", {"u": other}, {})
    entries = [
        {"path": f"{server.url}/c", "load": ["t"]},
        {"path": str(tmp_path / "here"), "load": ["u"]},
    ]

    def tables() -> dict[str, DiskTable]:
        return {"t": DiskTable([16], name="t"), "u": DiskTable([2], name="u")}

    with pytest.raises(PlanError, match=r"table 't': its rows would stay in .*give cache_dir"):
        Loader.from_bank(entries, tables()).load()
    found = tables()
    Loader.from_bank(entries, found, cache_dir=cache).load()
    assert torch.equal(found["t"].lookup(CONTENT.ids), ROWS)
    assert torch.equal(found["u"].lookup(other.ids), other.slots["embedding"])


def test_a_slice_takes_its_rows(server: Liar, cache: Path) -> None:
    mine = gen_slice(1, 4)
    table, _ = load(server, cache_dir=cache, slice=mine)
    ids = table.ids()
    inside = (CONTENT.ids % 65536 >= mine.begin) & (CONTENT.ids % 65536 < mine.end)
    assert len(ids) > 1000
    assert ids.sort().values.tolist() == CONTENT.ids[inside].sort().values.tolist()
    check(table, ids)


def test_other_loads_may_add_to_a_copy_that_is_open(server: Liar, cache: Path) -> None:
    mine = gen_slice(0, 2)
    table = DiskTable([16], name="t", slice=mine)
    Loader(f"{server.url}/c", {"t": table}, cache_dir=cache).load()
    held = table.ids()
    whole, _ = load(server, cache_dir=cache)
    assert torch.equal(load_tensors(f"{server.url}/c", cache_dir=cache)["w"], torch.ones(1000))
    assert torch.equal(table.lookup(held), whole.lookup(held))
    check(whole)


def test_damaged_copies_are_read_anew(server: Liar, cache: Path) -> None:
    load(server, cache_dir=cache)[0].close()
    for copy in cache.glob("*.bytes"):
        damaged = bytearray(copy.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        copy.write_bytes(damaged)
    table, report = load(server, cache_dir=cache)
    assert report.bytes_cached < report.bytes_read
    check(table)


def test_copies_stay_while_a_table_has_them_open(cache: Path, server: Liar) -> None:
    table, _ = load(server, cache_dir=cache)
    held = {Path(name) for name in open_files() if str(cache) in name}
    nbytes = sum(copy.stat().st_blocks * 512 for copy in held)
    server.files["big.safetensors"] = save({"x": torch.ones(nbytes // 4)})
    options = {"cache_dir": cache, "cache_bytes": nbytes + (1 << 20)}
    load_tensors(f"{server.url}/big.safetensors", **options)  # type: ignore[arg-type]
    assert held <= set(cache.glob("*.bytes"))
    check(table)
    table.close()
    load_tensors(f"{server.url}/big.safetensors", **options)  # type: ignore[arg-type]
    assert not held <= set(cache.glob("*.bytes"))


def not_loaded(server: Liar, match: str, **how: Any) -> None:  # noqa: ANN401  # of Loader
    """Fail unless a load fails, and leaves its table as it was."""
    table = DiskTable([16], name="t")
    url = f"{server.url}/c"
    with pytest.raises((PlanError, CheckpointError), match=match):
        Loader(url, {"t": table}, **how).load()
    assert len(table) == 0
    assert not [name for name in open_files() if str(how["cache_dir"]) in name]
    Loader(url, {"t": table}, cache_dir=f"{how['cache_dir']} 2").load()
    assert torch.equal(table.lookup(CONTENT.ids), ROWS)


def test_rows_that_cannot_fit_are_refused_before_they_are_read(server: Liar, cache: Path) -> None:
    room = ROWS.nbytes - 1
    match = rf"the rows of 't' take {ROWS.nbytes:,} bytes, and cache_bytes={room:,}"
    not_loaded(server, match, cache_dir=cache, cache_bytes=room)
    first = server.asked[: next(n for n, one in enumerate(server.asked) if one.begin)]
    assert all(one.begin == 0 for one in first)


def test_rows_that_did_not_fit_are_an_error(server: Liar, cache: Path) -> None:
    match = r"its rows could not be kept in .*full of what is being loaded"
    not_loaded(server, match, cache_dir=cache, cache_bytes=ROWS.nbytes)


def test_a_folder_that_cannot_be_used_is_an_error_before_rows_are_read(
    server: Liar, cache: Path
) -> None:
    cache.mkdir()
    cache.chmod(0o777)

    def script(asked: Asked) -> Answer:
        assert not asked.begin or Path(f"{cache} 2").exists(), "rows were read"
        return Answer()

    server.script = script
    not_loaded(server, r"its rows could not be kept in .*others can write to it", cache_dir=cache)


def test_objects_without_a_strong_etag_are_an_error(server: Liar, cache: Path) -> None:
    server.tag = "W/"
    table = DiskTable([16], name="t")
    with pytest.raises(CheckpointError, match="sends no strong ETag"):
        Loader(f"{server.url}/c", {"t": table}, cache_dir=cache).load()
    assert len(table) == 0


def test_a_copy_that_is_removed_meanwhile_serves_on(server: Liar, cache: Path) -> None:
    table, _ = load(server, cache_dir=cache)
    for file in cache.iterdir():
        file.unlink()
    check(table)


def test_more_shards_than_copies_stay_open(tmp_path: Path, cache: Path) -> None:
    content = data(range(3000), width=2)
    write_checkpoint(tmp_path / "many", {"t": content}, {}, ranks=150)
    files = {f"c/{path.name}": path.read_bytes() for path in (tmp_path / "many").iterdir()}
    with liar(files) as server:
        for _ in range(2):
            table = DiskTable([2], name="t")
            Loader(f"{server.url}/c", {"t": table}, strict=True, cache_dir=cache).load()
            assert torch.equal(table.lookup(content.ids), content.slots["embedding"])
            table.close()
