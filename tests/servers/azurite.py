"""Azurite, Microsoft's emulator of Azure's blobs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import urllib.request
from dataclasses import dataclass
from email.utils import formatdate
from typing import TYPE_CHECKING

from obstore.store import AzureStore

from tests.servers.child import HOST, child, free_port, until_it_answers
from tests.servers.environments import AZURITE, node_with

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""What every Azurite takes; it is in its manual."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureServer:
    """Where Azurite answers."""

    endpoint: str

    def store(self, container: str, *, key: str = KEY) -> AzureStore:
        """Open a container, which need not be there."""
        return AzureStore(
            container,
            account_name=ACCOUNT,
            account_key=key,
            endpoint=self.endpoint,
            client_options={"allow_http": True},
        )

    def make_container(self, container: str) -> None:
        """Make a container: obstore cannot, so the request is signed here (Azure's Shared Key)."""
        date, version = formatdate(usegmt=True), "2021-08-06"
        said = (
            "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n"
            f"/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
        )
        digest = hmac.new(base64.b64decode(KEY), said.encode(), hashlib.sha256).digest()
        headers = {
            "x-ms-date": date,
            "x-ms-version": version,
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
        }
        url = f"{self.endpoint}/{container}?restype=container"
        request = urllib.request.Request(url, method="PUT", headers=headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=30):  # noqa: S310
            pass


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[AzureServer]:
    """Run an Azurite that keeps everything in a folder.

    Raises:
        UnavailableError: This machine cannot have it.
    """
    program = node_with(AZURITE) / "azurite/dist/src/blob/main.js"
    port, log = free_port(), folder / "azurite.log"
    command: list[str | Path] = [
        "node", program, "--blobHost", HOST, "--blobPort", str(port), "--location", folder,
        "--silent", "--disableTelemetry", "--skipApiVersionCheck",
    ]  # fmt: skip
    with child(command, log) as process:
        until_it_answers(process, port, log)
        yield AzureServer(endpoint=f"http://{HOST}:{port}/{ACCOUNT}")
