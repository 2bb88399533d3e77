"""Runs a server of S3 for a person: `make serve-s3`."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import tempfile
from pathlib import Path

from tests.servers.child import UnavailableError
from tests.servers.swift import swift

BUCKET = "models"


def main() -> int:
    """Run it until Ctrl-C or SIGTERM, and return the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="asyncloader-s3-") as folder,
    ):
        try:
            with swift(Path(folder)) as server:
                server.make_bucket(BUCKET)
                variables = {
                    "AWS_ENDPOINT_URL": server.endpoint,
                    "AWS_ACCESS_KEY_ID": server.access_key,
                    "AWS_SECRET_ACCESS_KEY": server.secret_key,
                    "AWS_REGION": server.region,
                }
                lines = (f"export {name}={shlex.quote(text)}" for name, text in variables.items())
                print("\n".join(["# In another terminal:", *lines]))
                print(f"make serve SOURCE=s3://{BUCKET}/ctr", flush=True)
                signal.pause()
        except UnavailableError as error:
            print(f"there is no server of S3 on this machine: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
