"""OpenStack Swift, a production server, as a server of S3."""

from __future__ import annotations

import contextlib
import urllib.request
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.store import S3Store

from tests.servers.child import HOST, child, first_line
from tests.servers.environments import SWIFT, python_with

if TYPE_CHECKING:
    from collections.abc import Iterator

REGION = "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """Where a server of S3 answers, and a user who may do everything there."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str = REGION

    @property
    def port(self) -> int:
        """Of the endpoint."""
        return int(self.endpoint.rpartition(":")[2])

    def store(self, bucket: str, *, endpoint: str | None = None) -> S3Store:
        """Open a bucket, which need not be there; through another endpoint if one is given."""
        return S3Store(
            bucket,
            endpoint=endpoint or self.endpoint,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            region=self.region,
            client_options={"allow_http": True},
            virtual_hosted_style_request=False,
        )

    def make_bucket(self, bucket: str) -> None:
        url = obstore.sign(self.store(bucket), "PUT", "", timedelta(minutes=10))
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=30):  # noqa: S310
            pass


@contextlib.contextmanager
def swift(folder: Path) -> Iterator[S3Server]:
    """Run a Swift that keeps everything in a folder, which has to allow extended attributes.

    Raises:
        UnavailableError: This machine cannot have it.
    """
    program = Path(__file__).with_name("swift_process.py")
    log = folder / "swift.log"
    # Isolated: else this folder's swift.py would be taken for the package.
    with child([python_with(SWIFT), "-I", program, folder / "swift"], log) as process:
        port = first_line(process, log)
        yield S3Server(
            endpoint=f"http://{HOST}:{port}",
            access_key="test:tester",
            secret_key="testing",  # noqa: S106
        )
