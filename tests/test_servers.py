"""What the servers of the tests do when obstore speaks to them: facts that storages rest on."""

from __future__ import annotations

import os
import urllib.request
from typing import TYPE_CHECKING

import obstore
import pytest
from obstore.exceptions import (
    AlreadyExistsError,
    GenericError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, HTTPStore, S3Store

from tests.servers.azurite import AzureServer, azurite
from tests.servers.child import or_skip
from tests.servers.faults import Fault, faulty_proxy
from tests.servers.nginx import nginx
from tests.servers.swift import S3Server, swift

if TYPE_CHECKING:
    from collections.abc import Iterator

BODY = bytes(range(256)) * 64


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with or_skip(swift(tmp_path_factory.mktemp("swift"))) as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    with or_skip(azurite(tmp_path_factory.mktemp("azurite"))) as server:
        server.make_container("bucket")
        yield server


@pytest.fixture(params=["s3", "azure"])
def store(request: pytest.FixtureRequest) -> S3Store | AzureStore:
    server: S3Server | AzureServer = request.getfixturevalue(request.param)
    return server.store("bucket")


def test_an_object_is_read_whole_and_in_ranges(store: S3Store | AzureStore) -> None:
    obstore.put(store, "read/a b%é", BODY)
    assert bytes(obstore.get(store, "read/a b%é").bytes()) == BODY
    assert bytes(obstore.get_range(store, "read/a b%é", start=5, end=9)) == BODY[5:9]
    got = obstore.get_ranges(store, "read/a b%é", starts=[0, 9000], ends=[7, 9009])
    assert [bytes(part) for part in got] == [BODY[:7], BODY[9000:9009]]
    head = obstore.head(store, "read/a b%é")
    assert (head["size"], bool(head["e_tag"])) == (len(BODY), True)


def test_a_listing_with_a_delimiter_has_folders_and_objects(store: S3Store | AzureStore) -> None:
    for name in ("list/a", "list/deep/b", "list/deep/c"):
        obstore.put(store, name, b"x")
    names = [entry["path"] for batch in obstore.list(store, "list") for entry in batch]
    assert sorted(names) == ["list/a", "list/deep/b", "list/deep/c"]
    level = obstore.list_with_delimiter(store, "list")
    assert [entry["path"] for entry in level["objects"]] == ["list/a"]
    assert level["common_prefixes"] == ["list/deep"]


def test_an_object_is_created_once(store: S3Store | AzureStore) -> None:
    obstore.put(store, "once", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "once", b"second", mode="create")
    assert bytes(obstore.get(store, "once").bytes()) == b"first"


def test_a_read_of_a_replaced_object_fails(store: S3Store | AzureStore) -> None:
    before = obstore.put(store, "pinned", b"before")["e_tag"]
    assert before is not None
    pinned = obstore.get(store, "pinned", options={"if_match": before, "range": (0, 3)})
    assert bytes(pinned.bytes()) == b"bef"
    obstore.put(store, "pinned", b"after!")
    with pytest.raises(PreconditionError):
        obstore.get(store, "pinned", options={"if_match": before, "range": (0, 3)})


def test_parts_are_one_object_when_the_last_is_there(store: S3Store | AzureStore) -> None:
    body = os.urandom(1 << 20) * 11
    with obstore.open_writer(store, "parts", buffer_size=5 << 20) as writer:
        writer.write(body)
    assert bytes(obstore.get(store, "parts").bytes()) == body


def test_a_deleted_object_is_not_found(store: S3Store | AzureStore) -> None:
    obstore.put(store, "gone", b"x")
    obstore.delete(store, "gone")
    with pytest.raises(FileNotFoundError):
        obstore.head(store, "gone")


def test_a_missing_bucket_is_an_error(request: pytest.FixtureRequest) -> None:
    missing = request.getfixturevalue("s3").store("missing")
    with pytest.raises(FileNotFoundError):
        obstore.get(missing, "a")


def test_a_wrong_secret_is_an_error(s3: S3Server) -> None:
    wrong = S3Server(endpoint=s3.endpoint, access_key=s3.access_key, secret_key="wrong")  # noqa: S106
    with pytest.raises((PermissionDeniedError, UnauthenticatedError)):
        obstore.get(wrong.store("bucket"), "a")
    with pytest.raises((GenericError, PermissionDeniedError, UnauthenticatedError)):
        obstore.list_with_delimiter(wrong.store("bucket"))


def test_nginx_serves_ranges_of_what_is_in_a_folder(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    served = tmp_path_factory.mktemp("served")
    (served / "a").write_bytes(BODY)
    with or_skip(nginx(tmp_path_factory.mktemp("nginx"), served)) as url:
        store = HTTPStore(url, client_options={"allow_http": True})
        assert bytes(obstore.get_range(store, "a", start=5, end=9)) == BODY[5:9]
        with urllib.request.urlopen(url + "a", timeout=30) as answer:  # noqa: S310
            assert answer.read() == BODY
        with pytest.raises(FileNotFoundError):
            obstore.get(store, "b")


async def test_a_request_through_the_proxy_keeps_its_signature(s3: S3Server) -> None:
    async with faulty_proxy(s3.port, lambda _: Fault()) as proxy:
        store = s3.store("bucket", endpoint=proxy.endpoint)
        await obstore.put_async(store, "through", BODY)
        assert bytes(await obstore.get_range_async(store, "through", start=5, end=9)) == BODY[5:9]


@pytest.mark.parametrize("fault", [Fault(reset_at=0), Fault(status=503)])
async def test_obstore_tries_again_where_a_connection_fails(s3: S3Server, fault: Fault) -> None:
    obstore.put(s3.store("bucket"), "again", BODY)
    async with faulty_proxy(s3.port, lambda number: Fault() if number else fault) as proxy:
        store = s3.store("bucket", endpoint=proxy.endpoint)
        assert bytes(await obstore.get_range_async(store, "again", start=0, end=9)) == BODY[:9]
        assert proxy.connections == 2
