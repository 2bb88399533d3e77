"""Checkpoints saved to object stores: real servers, requests that fail, and processes that die."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import obstore
import pytest
import torch

from asyncloader import (
    CheckpointNotFoundError,
    HashTable,
    Loader,
    ReadOptions,
    SaveError,
    Saver,
    gen_slice,
    latest,
    load_tensors,
    read_extra,
    read_io_state,
    verify,
)
from asyncloader._addresses import address_of
from asyncloader._saving.part import RankPart
from asyncloader._saving.store_commit import StoreCommit
from asyncloader._storage.bucket import Bucket
from asyncloader._storage.bucket_folder import BucketFolder
from asyncloader._storage.folders import Folders
from asyncloader.tools import averify
from tests.forks import Forked
from tests.live import Events, build, live, version_in
from tests.servers.faults import Fault, faulty_proxy

if TYPE_CHECKING:
    from pathlib import Path

    from obstore import PutMode
    from torch import Tensor

    from asyncloader._storage.folder import Entry
    from tests.servers.places import Place

# Each request is a connection of its own, and is tried once: the proxy counts them.
EACH_ALONE = {
    "client_options": {"pool_max_idle_per_host": "0"},
    "retry_config": {"max_retries": 0},
}


def model(version: int) -> tuple[dict[str, HashTable], dict[str, Tensor]]:
    """Make a small model whose every value tells its version."""
    table = HashTable([4], name="t")
    ids = torch.arange(10 + version, dtype=torch.int64) * 7919
    table.insert(ids, torch.full((len(ids), 4), float(version)))
    return {"t": table}, {"w": torch.full((3,), float(version))}


def url_of(place: Place, prefix: str) -> str:
    return f"{place.run.removesuffix('ctr')}{prefix}"


def saver(url: str, version: int, options: dict[str, Any], **how: Any) -> Saver:  # noqa: ANN401  # of Saver
    return Saver.to(url, *model(version), parallel=2, storage_options=options, **how)


def version_at(url: str, options: dict[str, Any]) -> int | None:
    """Return the version of a checkpoint, whole, with every byte verified; `None` if it is none."""
    tables, tensors = {"t": HashTable([4], name="t")}, {"w": torch.zeros(3)}
    loader = Loader(url, tables, tensors, strict=True, verify="require", storage_options=options)
    try:
        loader.load()
    except CheckpointNotFoundError:
        return None
    version = int(tensors["w"][0])
    assert len(tables["t"]) == 10 + version
    assert bool((tables["t"].lookup(tables["t"].ids()) == version).all())
    return version


def names_in(place: Place, prefix: str) -> set[str]:
    pages = obstore.list(place.store, f"{prefix}/")
    return {one["path"].removeprefix(f"{prefix}/") for page in pages for one in page}


def forget_claim(place: Place, prefix: str) -> None:
    """Do what time does: who died while it committed holds up others for five minutes."""
    with contextlib.suppress(FileNotFoundError):
        obstore.delete(place.store, f"{prefix}/.saving-claim")


def test_what_was_saved_comes_back(any_bucket: Place) -> None:
    url, options = url_of(any_bucket, "saved/plain"), any_bucket.options
    report = saver(url, 1, options).save()
    assert (report.location, report.committed) == (url, True)
    assert version_at(url, options) == 1
    assert names_in(any_bucket, "saved/plain") == {
        "index",
        "tensorkey.json",
        "asyncloader.json",
        "torch_rank_weights_embs_table_multi_shard.json",
        *report.shards,
    }


def test_what_is_larger_than_a_part_is_sent_in_parts(s3: Place, tmp_path: Path) -> None:
    """Of `model.pt` headers come before the bytes that they are about: these are read twice."""
    url, options = url_of(s3, "saved/run/ckpt_1"), s3.options
    tensors = {"a": torch.rand(7_000_001), "b": torch.rand(3), "c": torch.rand(1_234_567)}
    saved = Saver(
        path=url, tensors=tensors, layout="run", parallel=2, storage_options=options
    ).save()
    assert saved.shards == ("model.pt",)
    found = load_tensors(url, storage_options=options)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert verify(url, options=ReadOptions(storage_options=options)).problems == ()
    copy = tmp_path / "model.pt"
    copy.write_bytes(bytes(obstore.get(s3.store, "saved/run/ckpt_1/model.pt").bytes()))
    read = torch.load(copy, weights_only=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    plain = url_of(s3, "saved/large")
    Saver(path=plain, tensors=tensors, parallel=1, storage_options=options).save()
    found = load_tensors(plain, verify="require", storage_options=options)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_checkpoint_is_replaced_only_if_that_was_asked_for(s3: Place) -> None:
    url, options = url_of(s3, "replaced/ckpt_1"), s3.options
    run = {"layout": "run", "extra": {"step": 1}, "io_state": {"at": 1}}
    saver(url, 1, options, **run).save()
    before = names_in(s3, "replaced")
    with pytest.raises(SaveError, match="there is a checkpoint already, and nothing was written"):
        saver(url, 2, options, **run).save()
    assert names_in(s3, "replaced") == before
    assert version_at(url, options) == 1
    assert read_extra(url, storage_options=options)["step"] == 1
    saver(url, 2, options, overwrite=True, **run | {"extra": {"step": 2}}).save()
    assert version_at(url, options) == 2
    assert len(names_in(s3, "replaced")) == len(before)
    assert read_extra(url, storage_options=options)["step"] == 2
    assert read_io_state(url, 0, storage_options=options) == {"at": 1}


def test_a_place_that_holds_something_else_is_refused(s3: Place) -> None:
    obstore.put(s3.store, "other/notes.txt", b"mine")
    with pytest.raises(SaveError, match=r"something else than a checkpoint: 'notes\.txt'"):
        saver(url_of(s3, "other"), 1, s3.options).save()
    assert names_in(s3, "other") == {"notes.txt"}


def test_a_server_of_http_is_read_only(http: Place) -> None:
    with pytest.raises(ValueError, match="is read only: save to a folder or an object store"):
        saver(f"{http.run}/new", 1, {})


async def test_several_ranks_make_one_checkpoint(s3: Place) -> None:
    url, options, ranks = url_of(s3, "ranks"), s3.options, 3

    def of_rank(rank: int) -> Saver:
        tables, tensors = model(5)
        ids = tables["t"].ids()
        part = gen_slice(rank, ranks)
        position = ids % part.size
        ids = ids[(part.begin <= position) & (position < part.end)]
        mine = HashTable([4], name="t", slice=part)
        mine.insert(ids, tables["t"].lookup(ids))
        return Saver(
            rank,
            ranks,
            2,
            url,
            {"t": mine},
            tensors if rank == 0 else {},
            save_id="one",
            storage_options=options,
        )

    reports = await asyncio.gather(*(of_rank(rank).asave() for rank in range(ranks)))
    assert [report.committed for report in reports] == [True, False, False]
    assert await asyncio.to_thread(version_at, url, options) == 5
    assert not [name for name in names_in(s3, "ranks") if name.startswith(".")]


async def test_a_rank_that_fails_ends_the_save_of_all(s3: Place) -> None:
    url, options = url_of(s3, "failing-rank"), s3.options

    def of_rank(rank: int) -> Saver:
        tables, tensors = model(5)
        how: dict[str, Any] = {"save_id": "x", "storage_options": options, "for_recis": True}
        odd = {"ranks differ": torch.ones(1)} if rank else tensors
        return Saver(rank, 2, 2, url, tables, odd, **how)

    results = await asyncio.gather(
        *(of_rank(rank).asave() for rank in range(2)), return_exceptions=True
    )
    assert any(isinstance(result, SaveError) for result in results), results
    assert "index" not in names_in(s3, "failing-rank")


@pytest.mark.parametrize(("layout", "overwrite"), [("run", False), ("checkpoint", True)])
async def test_of_saves_at_once_what_is_there_is_one_whole(
    bucket: Place, layout: str, overwrite: bool
) -> None:
    """And each that says so has committed."""
    prefix = f"both/{layout}-{overwrite}/c"
    url, options = url_of(bucket, prefix), bucket.options
    how: dict[str, Any] = {"overwrite": overwrite, "layout": layout}
    if layout == "run":
        how["extra"] = {"step": torch.ones(1000)}
    results = await asyncio.gather(
        *(saver(url, version, options, **how).asave() for version in (1, 2, 3)),
        return_exceptions=True,
    )
    failures = [result for result in results if isinstance(result, BaseException)]
    assert all(isinstance(failure, SaveError) for failure in failures), failures
    committed = [version for version, one in enumerate(results, 1) if one not in failures]
    assert committed if overwrite else len(committed) == 1
    assert await asyncio.to_thread(version_at, url, options) in committed
    assert ".saving-claim" not in names_in(bucket, prefix)
    problems = await averify(url, options=ReadOptions(storage_options=options))
    assert problems.problems == ()


class Lost(BucketFolder):
    """A folder of which the answer to one request is lost."""

    lost = ""

    def put(self, name: str, data: bytes, /, *, over: Entry | None) -> str:
        tag = super().put(name, data, over=over)
        if name == self.lost:
            raise OSError(errno.EIO, "no answer", name)
        return tag


async def test_where_it_is_not_known_whether_it_was_committed_nothing_is_removed(
    s3: Place,
) -> None:
    url = url_of(s3, "unsure")
    real = folder_at(s3, "unsure")
    folder = Lost(real._bucket, real.location, real._key)
    folder.lost = "index"
    one = saver(url, 1, s3.options)
    with pytest.raises(SaveError, match="whether it was committed is not known"):
        await one._asave(one._now(), lambda: folder)
    assert await asyncio.to_thread(version_at, url, s3.options) == 1
    assert ".saving-claim" in names_in(s3, "unsure"), "others are to wait"


def test_a_write_whose_first_answer_was_lost_is_known_again(s3: Place) -> None:
    folder, tried = folder_at(s3, "again"), 0
    real = folder._bucket.put_once

    class Losing(Bucket):
        def put_once(self, key: str, data: bytes, mode: PutMode) -> str:
            nonlocal tried
            tried += 1
            tag = real(key, data, mode)
            if tried == 1:
                raise OSError(errno.EIO, "no answer", key)
            return tag

    address = address_of("s3://models/again", "path")
    losing = BucketFolder(Losing(address, s3.options), folder.location, folder._key)
    tag = losing.put("index", b"ours", over=None)
    assert (tried, losing.stat("index").tag) == (2, tag)  # type: ignore[union-attr]
    with pytest.raises(FileExistsError):
        losing.put("index", b"theirs", over=None)


def test_a_file_that_no_store_copies_is_written_over_no_checkpoint(s3: Place) -> None:
    saver(url_of(s3, "huge"), 1, s3.options).save()
    commit = StoreCommit(folder_at(s3, "huge"), "abc", 0, 1, replaces=True)
    commit.begin()
    assert commit.place("model.pt", 5 << 30).endswith("-abc/model.pt")
    with pytest.raises(SaveError, match=r"model\.pt: larger than 5 GiB"):
        commit.place("model.pt", (5 << 30) + 1)
    fresh = StoreCommit(folder_at(s3, "huge-new"), "abc", 0, 1)
    fresh.begin()
    assert fresh.place("model.pt", (5 << 30) + 1) == "model.pt"


def part_of(*, rank: int) -> RankPart:
    return RankPart.of([], {}, {}, {}, {}, save_id="abc", rank=rank, ranks=2)


def test_a_rank_that_has_told_of_its_shards_removes_none(s3: Place) -> None:
    """Rank 0 may commit them at any moment."""
    folder = folder_at(s3, "told")
    commit = StoreCommit(folder, "abc", 1, 2)
    commit.begin()
    shard = "model-000001-of-000002-abc.safetensors"
    obstore.put(s3.store, f"told/{shard}", b"rows")
    commit.publish(part_of(rank=1))
    commit.abandon([shard], "cancelled")
    assert shard in names_in(s3, "told")


async def test_a_save_waits_for_one_that_commits_and_takes_over_from_one_that_died(
    bucket: Place,
) -> None:
    url, options = url_of(bucket, "claimed"), bucket.options
    obstore.put(bucket.store, "claimed/.saving-claim", b"another")
    saving = asyncio.ensure_future(saver(url, 1, options).asave())
    while "part-" not in " ".join(await asyncio.to_thread(names_in, bucket, "claimed")):
        assert not saving.done()
    forget_claim(bucket, "claimed")
    await saving
    obstore.put(bucket.store, "claimed/.saving-claim", b"dead")
    late = StoreCommit(folder_at(bucket, "claimed"), "abc", 0, 1, lease=-1.0)
    with ThreadPoolExecutor(1) as threads:
        await late.ready(threads)
    assert bytes(obstore.get(bucket.store, "claimed/.saving-claim").bytes()) == b"abc"


async def test_a_save_that_another_one_has_cleared_away_ends(s3: Place) -> None:
    """It does not wait for parts of ranks that are gone."""
    folder = folder_at(s3, "cleared")
    commit = StoreCommit(folder, "abc", 0, 2)
    with ThreadPoolExecutor(1) as threads:
        await asyncio.to_thread(commit.begin)
        await asyncio.to_thread(commit.publish, part_of(rank=0))
        assert await commit.missing(threads) == (1,)
        folder.remove(f"{commit.staging}/begun")
        with pytest.raises(SaveError, match="another save has committed here meanwhile"):
            await commit.part_texts(threads, timeout=None)


def test_the_bucket_itself_is_no_checkpoint_of_a_run() -> None:
    with pytest.raises(ValueError, match="is a bucket, which no run is in"):
        Saver(path="s3://models", layout="run")


def test_a_bucket_that_is_not_there_is_named(s3: Place) -> None:
    with pytest.raises(SaveError, match="no such bucket"):
        saver("s3://no-such-bucket/c", 1, s3.options).save()


async def test_a_save_of_which_any_request_fails_leaves_no_checkpoint(
    s3: Place, every_step: bool
) -> None:
    """Or a whole one: what follows on `index` only tidies up."""
    port, at, outcomes = int(s3.options["endpoint"].rpartition(":")[2]), -1, []

    async with faulty_proxy(
        port, lambda number: Fault(status=403) if number == at else Fault()
    ) as proxy:
        options = {**s3.options, **EACH_ALONE, "endpoint": proxy.endpoint}
        while True:
            at, proxy.connections = at + (1 if every_step else 5), 0
            url, failed = url_of(s3, f"failing/{at}"), False
            try:
                await saver(url, 1, options).asave()
            except SaveError as error:
                failed = "the checkpoint is there, whole" not in str(error)
            found = await asyncio.to_thread(version_at, url, s3.options)
            assert found == (None if failed else 1)
            if failed:
                left = names_in(s3, f"failing/{at}")
                assert len([name for name in left if "safetensors" in name]) <= 1, left
            outcomes.append(failed)
            forget_claim(s3, f"failing/{at}")
            await saver(url, 2, s3.options, overwrite=True).asave()
            assert await asyncio.to_thread(version_at, url, s3.options) == 2
            assert len(names_in(s3, f"failing/{at}")) == 6
            if proxy.connections <= at:
                break
    assert outcomes.count(True) >= 2
    assert not outcomes[-1]


CHILD = """
import json, sys
from tests.test_store_saving import saver
url, options = json.loads(sys.argv[1])
saver(url, 1, options, overwrite=True).save()
"""


@pytest.mark.timeout(240)
async def test_a_saver_that_is_killed_at_any_request_leaves_no_checkpoint(
    s3: Place, every_step: bool
) -> None:
    port, at, killed, outcomes = int(s3.options["endpoint"].rpartition(":")[2]), 0, True, []
    child: list[Forked] = []

    def fault(number: int) -> Fault:
        if number == at:
            os.kill(child[0].pid, signal.SIGKILL)
        return Fault()

    async with faulty_proxy(port, fault) as proxy:
        options = {**s3.options, **EACH_ALONE, "endpoint": proxy.endpoint}
        while killed:
            url, proxy.connections = url_of(s3, f"killed/{at}"), 0
            child[:] = [Forked(["-c", CHILD, json.dumps([url, options])])]
            _, errors = await asyncio.to_thread(child[0].communicate)
            killed = child[0].returncode == -signal.SIGKILL
            assert killed or not child[0].returncode, errors
            found = await asyncio.to_thread(version_at, url, s3.options)
            assert found == 1 if not killed else found in {None, 1}
            outcomes.append(found)
            forget_claim(s3, f"killed/{at}")
            await saver(url, 2, s3.options, overwrite=True).asave()
            assert await asyncio.to_thread(version_at, url, s3.options) == 2
            assert len(names_in(s3, f"killed/{at}")) == 6
            at += 1 if every_step else 9
    assert outcomes[0] is None
    assert outcomes[-1] == 1


async def test_a_save_that_is_cancelled_leaves_nothing(s3: Place) -> None:
    """Parts of uploads that have not ended are removed, too."""
    url, options = url_of(s3, "cancelled"), s3.options
    before, begun = s3.parts(), asyncio.Event()

    def told(progress: Any) -> None:  # noqa: ANN401  # Progress
        if progress.bytes_done:
            begun.set()

    tensors = {str(number): torch.rand(5_000_000) for number in range(8)}
    arguments: dict[str, Any] = {"storage_options": options, "progress": told, "parallel": 2}
    saving = asyncio.ensure_future(Saver(path=url, tensors=tensors, **arguments).asave())
    await begun.wait()
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert names_in(s3, "cancelled") == set()
    assert s3.parts() == before


async def test_a_run_that_is_saved_to_a_bucket_is_followed(any_bucket: Place) -> None:
    """And older checkpoints of it go."""
    run, options = url_of(any_bucket, "trained"), any_bucket.options

    def trained(version: int) -> Saver:
        tables, tensors = build()
        for table in tables.values():
            table.insert(torch.arange(200), torch.full((200, 4), float(version)))
        tensors["w"].fill_(version)
        how: dict[str, Any] = {"layout": "run", "max_keep": 2, "storage_options": options}
        return Saver.to(f"{run}/v{version}", tables, tensors, parallel=2, **how)

    events = Events()
    await trained(1).asave()
    arguments = {"storage_options": options}
    async with live(run, events, loader_options=arguments) as it, asyncio.timeout(60):
        for version in (2, 3):
            report = await trained(version).asave()
            while it.current.version != f"v{version}":
                await events.next()
            with it.use() as held:
                assert version_in(held) == version
    assert report.evicted == ("v1",)
    assert await asyncio.to_thread(latest, run, storage_options=options) == f"{run}/v3"
    assert names_in(any_bucket, "trained") >= {"checkpoint", "v2/index", "v3/index"}
    assert not [name for name in names_in(any_bucket, "trained") if name.startswith("v1/")]


async def test_checkpoints_that_are_saved_at_once_are_all_in_the_list(bucket: Place) -> None:
    """Where a store knows no conditional writes but for new objects, as Swift, one may be lost."""
    run, options = url_of(bucket, "listed"), bucket.options
    savers = [saver(f"{run}/c{number}", 1, options, layout="run") for number in range(4)]
    await savers[0].asave()
    await asyncio.gather(*(one.asave() for one in savers[1:]))
    lines = bytes(obstore.get(bucket.store, "listed/checkpoint").bytes()).decode().split()
    if run.startswith("az://"):
        assert sorted(lines) == ["c0", "c1", "c2", "c3"]
    assert len(lines) == len(set(lines))


def test_secrets_are_in_no_message(s3: Place) -> None:
    options = s3.options | {"secret_access_key": "not-the-secret"}
    one = saver(url_of(s3, "secret"), 1, options)
    with pytest.raises(SaveError, match="refused; do the credentials allow it") as caught:
        one.save()
    for text in (str(caught.value), repr(one)):
        assert "not-the-secret" not in text
        assert "X-Amz" not in text


def folder_at(place: Place, prefix: str) -> BucketFolder:
    found = Folders(place.options).at(url_of(place, prefix))
    assert not hasattr(found, "move")
    return found


def test_a_write_that_waits_for_one_that_failed_is_woken(s3: Place) -> None:
    file = folder_at(s3, "woken").create("f", size=100)
    file.abandon()
    with pytest.raises(OSError, match="given up"):
        file.write(10, [memoryview(b"later")])
    file.close()
    assert names_in(s3, "woken") == set()
