"""Checkpoints read from servers of object stores and of HTTP, real ones, on loopback."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import obstore
import pytest
import torch
from obstore.store import S3Store
from safetensors.torch import save

from asyncloader import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    DiskTable,
    Loader,
    ReadOptions,
    SaveError,
    aload_tensors,
    load_tensors,
    read_extra,
    read_io_state,
)
from asyncloader.cli import run
from asyncloader.tools import convert, diff, inspect, verify
from tests.genuine import NEWEST, RUN, truth
from tests.servers.faults import Fault, faulty_proxy
from tests.support import rows_in, rows_on_disk

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers.places import Place


def test_a_genuine_checkpoint_comes_whole(place: Place) -> None:
    held = truth(NEWEST)
    tables, tensors = held.destinations()
    loader = Loader(place.url, tables, tensors, strict=True, storage_options=place.options)
    report = loader.load()
    assert (report.location, report.missing) == (place.url, ())
    for name, table in tables.items():
        assert rows_in(table) == rows_on_disk(held.tables[name])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, held.tensors[name])


def test_every_other_door_reads_it_too(place: Place, tmp_path: Path) -> None:
    held, options = truth(NEWEST), ReadOptions(storage_options=place.options)
    for name, tensor in load_tensors(place.url, options=options).items():
        assert torch.equal(tensor, held.tensors[name])
    assert len(CheckpointReader(place.url, options=options).read_tensor("user@id")) == 111
    assert inspect(place.url, options=options).location == place.url
    assert verify(place.url, options=options).problems == ()
    assert diff(place.url, RUN / NEWEST, options=options).equal
    convert(place.url, tmp_path / "here", options=options)
    assert diff(place.url, tmp_path / "here", options=options).equal


def test_rows_of_disk_tables_stay_in_copies(place: Place, tmp_path: Path) -> None:
    held = truth(NEWEST)
    for _ in range(2):  # once into the copies, once from them
        tables: dict[str, Any] = {}
        for name, found in held.tables.items():
            rows = found.slots["embedding"]
            tables[name] = DiskTable(rows.shape[1:], rows.dtype, name=name)
        Loader(
            place.url, tables, strict=True, storage_options=place.options, cache_dir=tmp_path / "c"
        ).load()
        for name, found in held.tables.items():
            assert torch.equal(tables[name].lookup(found.ids), found.slots["embedding"]), name


def test_a_checkpoint_is_converted_into_a_store(bucket: Place, tmp_path: Path) -> None:
    options, base = ReadOptions(storage_options=bucket.options), bucket.run.removesuffix("ctr")
    for name in ("ckpt", "one.safetensors"):
        url, here = f"{base}converted/{name}", tmp_path / name
        convert(RUN / NEWEST, here)
        done = convert(RUN / NEWEST, url, options=options)
        assert done.destination == url
        assert diff(here, url, options=options).equal
        with pytest.raises(SaveError, match="is there already; give another place"):
            convert(RUN / NEWEST, url, options=options)
        convert(bucket.url, url, overwrite=True, options=options)
        assert diff(here, url, options=options).equal
    one = bytes(obstore.get(bucket.store, "converted/one.safetensors").bytes())
    assert one == (tmp_path / "one.safetensors").read_bytes()
    convert(f"{base}converted/one.safetensors", tmp_path / "back", options=options)
    assert set(load_tensors(tmp_path / "back")) == set(load_tensors(bucket.url, options=options))
    ranks = convert(bucket.url, f"{base}converted/wide", shards=3, options=options)
    assert ranks.ranks == 3
    with pytest.raises(SaveError, match="is the source itself"):
        convert(bucket.url, f"{bucket.url}/", overwrite=True, options=options)


def test_files_beside_the_tensors_are_found_where_names_are_listed(bucket: Place) -> None:
    options = ReadOptions(storage_options=bucket.options)
    assert int(read_extra(bucket.url, options=options)["global_step"]) == 30
    assert "train_io" in read_io_state(bucket.url, 0, options=options)
    assert inspect(bucket.url, options=options).beside.global_step == 30  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("url", "more", "error", "words"),
    [
        ("s3://models/ctr/ckpt_99", {}, CheckpointNotFoundError, "no such object; looked for"),
        ("s3://no-such-bucket/ctr", {}, CheckpointNotFoundError, "no such bucket; looked for"),
        (None, {"secret_access_key": "wrong"}, CheckpointError, "refused; do the credentials"),
        (None, {"access_key_id": "nobody"}, CheckpointError, "refused; do the credentials"),
        (None, {"retry_config": {"max_tries": 1}}, ValueError, "retry_config has no max_tries"),
        (None, {"acces_key": "x"}, ValueError, "'acces_key' is not valid for store 'S3'"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(
    s3: Place, url: str | None, more: dict[str, str], error: type[Exception], words: str
) -> None:
    url = s3.url if url is None else url
    with pytest.raises(error, match=words) as caught:
        Loader(url, storage_options=s3.options | more).load()
    assert url in str(caught.value)
    assert "X-Amz" not in str(caught.value)
    assert str(s3.options["secret_access_key"]) not in str(caught.value)


def test_keys_are_any_text_and_a_folder_is_listed(any_bucket: Place) -> None:
    """Those of Google's store are signed by obstore as if they were quoted already."""
    tensor = torch.arange(200_000.0)  # more than comes with the first look
    obstore.put(any_bucket.store, "odd/a b%20ü+/model.fp16.safetensors", save({"w": tensor}))
    root = any_bucket.run.removesuffix("ctr")
    found = load_tensors(f"{root}odd/a b%20ü+", storage_options=any_bucket.options)
    assert torch.equal(found["w"], tensor)


def test_the_command_line_takes_the_environment(
    s3: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("endpoint", "access_key_id", "secret_access_key", "region"):
        monkeypatch.setenv(f"AWS_{name.upper()}", str(s3.options[name]))
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for command in ("inspect", "verify", "load"):
        assert run([command, s3.url, "--json"]) == 0, capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert run(["load", s3.url]) == 2
    assert "refused" in capsys.readouterr().err
    assert os.environ["AWS_REGION"]


SIGNED = b"X-Amz-Signature"


def port_of(s3: Place) -> int:
    return int(s3.options["endpoint"].rpartition(":")[2])


async def test_where_signed_urls_are_refused_the_client_reads(s3: Place) -> None:
    """As by a policy of the bucket; and where its key is missing, credentials cannot sign."""
    held = truth(NEWEST)
    async with faulty_proxy(port_of(s3), lambda _: Fault(status=403), SIGNED) as proxy:
        tables, tensors = held.destinations()
        through = s3.options | {"endpoint": proxy.endpoint}
        await Loader(s3.url, tables, tensors, strict=True, storage_options=through).aload()
        assert proxy.connections > 0
    for name, table in tables.items():
        assert rows_in(table) == rows_on_disk(held.tables[name])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, held.tensors[name])


@pytest.mark.parametrize("skips", [{}, {"skip_signature": False}])
async def test_urls_are_signed_where_that_is_not_switched_off(
    s3: Place, skips: dict[str, bool]
) -> None:
    tensor = torch.arange(200_000.0)  # more than comes with the first look
    obstore.put(s3.store, "plain/model.safetensors", save({"w": tensor}))
    async with faulty_proxy(port_of(s3), lambda _: Fault(), SIGNED) as proxy:
        through = s3.options | skips | {"endpoint": proxy.endpoint}
        found = await aload_tensors("s3://models/plain", storage_options=through)
        assert proxy.connections > 0
    assert torch.equal(found["w"], tensor)


async def test_what_the_client_reads_is_one_object(s3: Place) -> None:
    """It is replaced once the first signed URL has been refused."""
    tensors = {name: torch.arange(400_000.0) + at for at, name in enumerate("ab")}
    obstore.put(s3.store, "swapped/model.safetensors", save(tensors))

    def replaced(number: int) -> Fault:
        if number == 0:
            changed = {name: tensor + 1 for name, tensor in tensors.items()}
            obstore.put(s3.store, "swapped/model.safetensors", save(changed))
        return Fault(status=403)

    async with faulty_proxy(port_of(s3), replaced, SIGNED) as proxy:
        through = s3.options | {"endpoint": proxy.endpoint}
        with pytest.raises(CheckpointChangedError):
            await aload_tensors("s3://models/swapped", storage_options=through)


@pytest.mark.parametrize("part", range(16))
async def test_a_connection_that_is_cut_anywhere_costs_no_byte(s3: Place, part: int) -> None:
    """Of those that bring bulk: they have signed URLs."""
    tensors = {name: torch.arange(400_000.0) + at for at, name in enumerate("ab")}
    content = save(tensors)
    options: dict[str, Any] = {"client_options": {"allow_http": True}, **s3.options}
    await obstore.put_async(S3Store("models", **options), "cut/model.safetensors", content)
    script = dict.fromkeys(range(2), Fault(reset_at=len(content) * part // 16))
    answer = lambda number: script.get(number, Fault())  # noqa: E731  # short
    async with faulty_proxy(port_of(s3), answer, SIGNED) as proxy:
        through = s3.options | {"endpoint": proxy.endpoint}
        into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        loader = Loader("s3://models/cut", tensors=into, storage_options=through)
        report = await loader.aload()
    assert report.retries >= 1
    for name, tensor in tensors.items():
        assert torch.equal(into[name], tensor)
