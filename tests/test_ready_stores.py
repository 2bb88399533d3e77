"""obstore's stores in place of URLs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from asyncloader import (
    CheckpointReader,
    HashTable,
    Live,
    Loader,
    ReadOptions,
    Saver,
    latest,
    load_tensors,
    read_extra,
)
from asyncloader.runs import versions
from asyncloader.tools import empty_like, inspect, verify
from tests.genuine import NEWEST, RUN, truth

if TYPE_CHECKING:
    from pathlib import Path

    from obstore.store import ObjectStore

    from tests.servers.places import Place

pytest.importorskip("obstore")

from obstore.store import AzureStore, GCSStore, HTTPStore, LocalStore, MemoryStore, S3Store

CLIENT: Any = {"allow_http": True}


def store_of(place: Place, prefix: str) -> ObjectStore:
    """Return a store of a place, as a user makes it."""
    config: Any = place.options
    if place.run.startswith("s3"):
        return S3Store("models", prefix=prefix, config=config, client_options=CLIENT)
    if place.run.startswith("az"):
        return AzureStore("models", prefix=prefix, config=config, client_options=CLIENT)
    if place.run.startswith("gs"):
        return GCSStore("models", prefix=prefix, config=config, client_options=CLIENT)
    return HTTPStore.from_url(place.run + prefix.removeprefix("ctr"), client_options=CLIENT)


def test_a_store_stands_for_a_url_where_a_checkpoint_is_read(place: Place) -> None:
    store, held = store_of(place, f"ctr/{NEWEST}"), truth(NEWEST)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in held.tensors.items()}
    report = Loader(store, tensors=tensors).load()
    assert report.location == place.url
    for name, tensor in tensors.items():
        assert torch.equal(tensor, held.tensors[name])
    assert load_tensors(store).keys() == held.tensors.keys()
    assert len(CheckpointReader(store).read_tensor("user@id")) == 111
    assert inspect(store).location == place.url
    assert verify(store).problems == ()
    assert empty_like(store)[1].keys() == held.tensors.keys()
    run = store_of(place, "ctr")
    assert latest(run) == place.url
    assert int(read_extra(run)["global_step"]) == 30


async def test_a_store_stands_for_a_url_where_one_is_saved_and_followed(
    any_bucket: Place,
) -> None:
    target = store_of(any_bucket, "ready/1")
    await Saver(path=target, tensors={"w": torch.ones(3)}, layout="run").asave()
    assert [one.name for one in versions(store_of(any_bucket, "ready"))] == ["1"]
    live = Live(store_of(any_bucket, "ready"), lambda: ({}, {"w": torch.zeros(3)}))
    async with live:
        with live.use() as model:
            assert model.tensors["w"].tolist() == [1, 1, 1]


async def test_live_takes_the_options_that_come_with_options(s3: Place) -> None:
    options = ReadOptions(storage_options=s3.options)
    with pytest.raises(ValueError, match="has options of its own"):
        Live(S3Store("models"), lambda: ({}, {}), loader_options={"options": options})
    await Saver(
        path=f"{s3.run}-served/1", tensors={"w": torch.ones(3)}, storage_options=s3.options
    ).asave()
    live = Live(
        f"{s3.run}-served", lambda: ({}, {"w": torch.zeros(3)}), loader_options={"options": options}
    )
    async with live:
        with live.use() as model:
            assert model.tensors["w"].tolist() == [1, 1, 1]


def test_a_local_store_is_its_folder() -> None:
    assert load_tensors(LocalStore(RUN / NEWEST)).keys() == truth(NEWEST).tensors.keys()


def test_what_makes_no_sense_is_told_at_once(tmp_path: Path) -> None:
    for other in (MemoryStore(), LocalStore()):
        with pytest.raises(ValueError, match="checkpoint_path: no client but its own"):
            Loader(other)
    for prefix in ("a?b", "a#b"):
        with pytest.raises(ValueError, match="which no URL can have"):
            Loader(S3Store("models", prefix=prefix))
    secret: Any = {"access_key_id": "key", "secret_access_key": "geheim", "region": "r"}
    store = S3Store("models", config=secret)
    with pytest.raises(ValueError, match="has options of its own") as caught:
        Loader(store, storage_options=secret)
    assert "geheim" not in str(caught.value)
    assert "geheim" not in repr(Loader(store).options)
    with pytest.raises(ValueError, match="is read only"):
        Saver(path=HTTPStore.from_url("http://127.0.0.1/x"), hashtables={"t": HashTable([1])})
