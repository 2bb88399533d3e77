"""The genuine run, on servers of object stores and of HTTP."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import obstore
from obstore.store import AzureStore, S3Store

from tests.genuine import NEWEST, RUN
from tests.servers.azurite import ACCOUNT, KEY, azurite
from tests.servers.gcs import gcs
from tests.servers.nginx import nginx
from tests.servers.swift import swift

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from obstore.store import ObjectStore


_LARGE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the genuine run is, and how it is reached.

    Attributes:
        run: The URL of its folder.
        options: As `storage_options`.
        client: Of the bucket, to change what is in it; `None` of a server of HTTP.
        files: Where Swift keeps its objects.
    """

    run: str
    options: dict[str, Any]
    client: ObjectStore | None = None
    files: Path | None = None

    @property
    def url(self) -> str:
        return f"{self.run}/{NEWEST}"

    @property
    def store(self) -> ObjectStore:
        assert self.client is not None, "this place is written to"
        return self.client

    def parts(self) -> int:
        """Count the large objects of Swift, and the parts of uploads, whether they ended or not."""
        assert self.files is not None, "this place is Swift"
        return sum(path.stat().st_size > _LARGE for path in self.files.rglob("*.data"))

    def copy(self, folder: Path, prefix: str) -> str:
        """Bring the files of a folder under a prefix of the bucket; return its URL."""
        upload(self.store, folder, prefix)
        return f"{self.run.removesuffix('ctr')}{prefix}"


def upload(store: ObjectStore, folder: Path, prefix: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            obstore.put(store, f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


@contextlib.contextmanager
def on_s3(folder: Path) -> Iterator[Place]:
    """Swift, with the run in a bucket."""
    with swift(folder) as server:
        server.make_bucket("models")
        options: dict[str, Any] = {
            "endpoint": server.endpoint,
            "access_key_id": server.access_key,
            "secret_access_key": server.secret_key,
            "region": server.region,
        }
        config: Any = options
        store = S3Store("models", config=config, client_options={"allow_http": True})
        upload(store, RUN, "ctr")
        yield Place(run="s3://models/ctr", options=options, client=store, files=folder)


@contextlib.contextmanager
def on_azure(folder: Path) -> Iterator[Place]:
    """Azurite, with the run in a container."""
    with azurite(folder) as server:
        server.make_container("models")
        options: dict[str, Any] = {
            "endpoint": server.endpoint,
            "account_name": ACCOUNT,
            "account_key": KEY,
        }
        config: Any = options
        store = AzureStore("models", config=config, client_options={"allow_http": True})
        upload(store, RUN, "ctr")
        yield Place(run="az://models/ctr", options=options, client=store)


@contextlib.contextmanager
def on_gcs(folder: Path) -> Iterator[Place]:
    """Google Cloud Storage's API before Swift, with the run in a bucket."""
    with gcs(folder) as server:
        server.make_bucket("models")
        store = server.store("models")
        upload(store, RUN, "ctr")
        options: dict[str, Any] = {"service_account_key": server.service_account}
        yield Place(run="gs://models/ctr", options=options, client=store)


@contextlib.contextmanager
def on_http(folder: Path) -> Iterator[Place]:
    """Have nginx give the run out."""
    with nginx(folder, RUN.absolute()) as url:
        yield Place(run=url.rstrip("/"), options={})
