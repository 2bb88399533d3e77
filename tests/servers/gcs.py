"""Google Cloud Storage, as far as obstore knows it: its XML API, before a Swift that keeps it all.

There is no emulator of it with conditional writes and uploads in parts, so `gcs_process.py` is one.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obstore.store import GCSStore

from tests.servers.child import HOST, child, first_line
from tests.servers.environments import SWIFT, python_with
from tests.servers.swift import S3Server, swift

if TYPE_CHECKING:
    from collections.abc import Iterator

EMAIL = "tests@asyncloader.iam.gserviceaccount.com"
_NEW_KEY = """
from cryptography.hazmat.primitives import serialization as to
from cryptography.hazmat.primitives.asymmetric import rsa
key = rsa.generate_private_key(65537, 2048)
print(f"{key.public_key().public_numbers().n:x}")
print(key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption()).decode())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GCSServer:
    """Where it answers, and who may do everything there.

    Attributes:
        endpoint: Stands in the key of the service account, too.
        service_account: Its key, JSON.
        s3: The Swift behind it.
    """

    endpoint: str
    service_account: str
    s3: S3Server

    @property
    def port(self) -> int:
        """Of the endpoint."""
        return int(self.endpoint.rpartition(":")[2])

    def store(self, bucket: str, *, service_account: str | None = None) -> GCSStore:
        """Open a bucket, which need not be there; for somebody else if a key is given."""
        return GCSStore(
            bucket,
            service_account_key=service_account or self.service_account,
            client_options={"allow_http": True},
        )

    def make_bucket(self, bucket: str) -> None:
        self.s3.make_bucket(bucket)


def new_key() -> tuple[str, str]:
    """Make an RSA key; return its modulus, hexadecimal, and all of it as PEM.

    Raises:
        UnavailableError: This machine cannot have Swift, which brings what makes keys.
    """
    command: list[str | Path] = [python_with(SWIFT), "-I", "-c", _NEW_KEY]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    modulus, _, pem = said.partition("\n")
    return modulus, pem


def service_account(endpoint: str, pem: str) -> str:
    """Return the key of a service account as a user downloads it, with the endpoint in it."""
    return json.dumps(
        {
            "type": "service_account",
            "client_email": EMAIL,
            "private_key_id": "1",
            "private_key": pem,
            "gcs_base_url": endpoint,
        }
    )


@contextlib.contextmanager
def gcs(folder: Path) -> Iterator[GCSServer]:
    """Run it, and a Swift that keeps everything in a folder.

    Raises:
        UnavailableError: This machine cannot have it.
    """
    program, log = Path(__file__).with_name("gcs_process.py"), folder / "gcs.log"
    with swift(folder) as s3:
        modulus, pem = new_key()
        told = {**asdict(s3), "port": s3.port, "email": EMAIL, "key_id": "1", "modulus": modulus}
        with child([sys.executable, "-I", program, json.dumps(told)], log) as process:
            endpoint = f"http://{HOST}:{first_line(process, log)}"
            yield GCSServer(
                endpoint=endpoint, service_account=service_account(endpoint, pem), s3=s3
            )
