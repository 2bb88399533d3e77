"""Runs in object stores and on servers of HTTP: which version is the newest, and following it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from asyncloader import (
    CheckpointError,
    CheckpointNotFoundError,
    Loader,
    ReadOptions,
    Swapped,
    alatest,
    inspect,
    latest,
    read_extra,
)
from asyncloader.cli import run as command
from asyncloader.runs import versions
from tests.genuine import NAMES, NEWEST, RUN, copy_of_run, truth
from tests.live import Events, live, publish, version_in
from tests.servers.faults import Fault, faulty_proxy
from tests.support import rows_in, rows_on_disk

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers.places import Place


def test_the_newest_of_a_run_is_the_last_one_that_its_list_names(place: Place) -> None:
    assert latest(place.run, storage_options=place.options) == place.url
    assert latest(f"{place.run}/", storage_options=place.options) == place.url
    step = read_extra(place.run, storage_options=place.options)["global_step"]
    assert int(step) == 30


def test_all_versions_are_found_where_names_are_listed(bucket: Place) -> None:
    options = ReadOptions(storage_options=bucket.options)
    found = versions(bucket.run, storage_options=bucket.options)
    assert [(one.name, one.committed, one.lack) for one in found] == [
        (name, True, "") for name in NAMES
    ]
    summed_up = inspect(bucket.run, options=options)
    assert summed_up.latest == NEWEST  # type: ignore[union-attr]
    sizes = [one.bytes for one in summed_up.versions]  # type: ignore[union-attr]
    assert sizes == [sum(path.stat().st_size for path in (RUN / name).iterdir()) for name in NAMES]


def test_where_no_names_are_listed_that_is_said(http: Place) -> None:
    with pytest.raises(CheckpointError, match="cannot be listed: a server of HTTP lists no names"):
        versions(http.run)


def test_a_bank_takes_runs_of_a_store_and_of_a_disk(place: Place) -> None:
    held = truth(NEWEST)
    tables, tensors = held.destinations()
    entries = [{"path": str(RUN), "load": ["*"]}, {"path": place.run, "load": ["user@*"]}]
    loader = Loader.from_bank(entries, tables, tensors, storage_options=place.options)
    assert loader.load().sources["user@id"].path == place.url
    for name, table in tables.items():
        assert rows_in(table) == rows_on_disk(held.tables[name])


def test_without_a_list_the_last_name_counts(bucket: Place, tmp_path: Path) -> None:
    """To ask each version when it was written would cost a request a version."""
    run = copy_of_run(tmp_path)
    (run / "checkpoint").unlink()
    (run / NAMES[0]).rename(run / "ckpt_100")  # uploaded before the other
    assert latest(bucket.copy(run, "named"), storage_options=bucket.options).endswith("/ckpt_100")  # type: ignore[union-attr]


@pytest.mark.parametrize("missing", ["tensorkey.json", "model-000002-of-000004.safetensors"])
def test_a_version_whose_objects_still_come_is_not_taken(
    bucket: Place, tmp_path: Path, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    """RecIS 1.2 writes `tensorkey.json` after `index`."""
    run = copy_of_run(tmp_path)
    (run / NEWEST / missing).unlink()
    url = bucket.copy(run, f"half/{missing}")
    assert latest(url, storage_options=bucket.options) == f"{url}/{NAMES[0]}"
    assert f"{missing!r} is missing" in caplog.text


def test_names_that_no_store_could_have_are_passed_over(bucket: Place, tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    (run / "checkpoint").write_bytes(b"ckpt_20\nckpt_\xff\n../ckpt_30\n")
    url = bucket.copy(run, "names")
    assert latest(url, storage_options=bucket.options) == f"{url}/{NAMES[0]}"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://models/nothing", "no run folder: no object has a key that begins so"),
        ("s3://no-such-bucket/ctr", "no run folder: no such bucket"),
        (None, "no run folder but a checkpoint itself"),
    ],
)
def test_a_place_without_versions_says_so(s3: Place, url: str | None, words: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=words):
        latest(url or s3.url, storage_options=s3.options)


def test_a_wrong_secret_is_one_clear_line(s3: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="refused; do the credentials allow it") as caught:
        latest(s3.run, storage_options=s3.options | {"secret_access_key": "wrong"})
    assert "X-Amz" not in str(caught.value)
    assert command(["inspect", s3.run]) == 2  # no credentials at all
    assert "no credentials: give storage_options, or set AWS_ACC" in capsys.readouterr().err


async def test_a_run_in_a_bucket_is_followed(bucket: Place, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    source, events = bucket.copy(tmp_path, "followed"), Events()
    options = {"storage_options": bucket.options}
    async with live(source, events, loader_options=options) as it, asyncio.timeout(30):
        with it.use() as model:
            assert version_in(model) == 1
            assert (model.path, model.version) == (f"{source}/v1", "v1")
        bucket.copy(publish(tmp_path, 2), "followed/v2")
        await events.until(Swapped, version="v2")
        with it.use() as model:
            assert version_in(model) == 2
        assert (await it.rollback()).version == "v1"
        assert (await it.load(f"{source}/v2")).version == "v2"
        assert (await it.load("v1")).location == f"{source}/v1"


async def test_one_checkpoint_in_a_bucket_is_loaded_again_when_it_is_replaced(
    bucket: Place, tmp_path: Path
) -> None:
    first = publish(tmp_path, 1)
    source, events = bucket.copy(first, "same"), Events()
    options = {"storage_options": bucket.options}
    async with live(source, events, loader_options=options) as it, asyncio.timeout(30):
        bucket.copy(publish(tmp_path, 2), "same")
        while sum(isinstance(event, Swapped) for event in events.seen) < 2:
            await events.next()
        with it.use() as model:
            assert version_in(model) == 2


async def test_a_run_on_a_server_of_http_is_followed_by_its_list(http: Place) -> None:
    def fresh() -> object:
        return truth(NEWEST).destinations()

    async with live(http.run, Events(), build=fresh) as it:
        assert it.current.location == http.url
        assert await alatest(http.run) == http.url


async def test_a_store_that_throttles_is_asked_less_often(s3: Place, tmp_path: Path) -> None:
    """And is followed again as soon as it answers."""
    publish(tmp_path, 1)
    s3.copy(tmp_path, "throttled")
    events, port = Events(), int(s3.options["endpoint"].rpartition(":")[2])
    is_throttling, refused = False, asyncio.Event()

    def fault(_: int) -> Fault:
        if is_throttling:
            refused.set()
        return Fault(status=503) if is_throttling else Fault()

    async with faulty_proxy(port, fault) as proxy:
        options = {
            **s3.options,
            "endpoint": proxy.endpoint,
            "retry_config": {"max_retries": 0},
            "client_options": {"pool_max_idle_per_host": "0"},  # each request is a connection
        }
        arguments = {"storage_options": options}
        source = "s3://models/throttled"
        async with live(source, events, loader_options=arguments) as it, asyncio.timeout(30):
            is_throttling = True
            await refused.wait()
            with it.use() as model:
                assert version_in(model) == 1
            s3.copy(publish(tmp_path, 2), "throttled/v2")
            is_throttling = False
            await events.until(Swapped, version="v2")


async def test_a_look_that_is_refused_never_makes_an_older_version_the_newest(
    s3: Place,
) -> None:
    """Nor has a run no list because it could not be read."""
    port, at, refused = int(s3.options["endpoint"].rpartition(":")[2]), 0, 0

    def fault(number: int) -> Fault:
        return Fault(status=403) if number == at else Fault()

    async with faulty_proxy(port, fault) as proxy:
        alone = {"pool_max_idle_per_host": "0"}
        options = {**s3.options, "endpoint": proxy.endpoint, "client_options": alone}
        while proxy.connections >= at:
            proxy.connections = 0
            try:
                assert await alatest(s3.run, storage_options=options) == s3.url
            except CheckpointError:
                refused += 1
            at += 1
    assert refused >= 2
