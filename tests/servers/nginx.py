"""nginx, which serves a folder over HTTP, with ranges and entity tags."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

from tests.servers.child import HOST, UnavailableError, child, free_port, until_it_answers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# One process, so that none is left when it is killed.
_CONFIGURATION = """
daemon off;
master_process off;
pid {run}/nginx.pid;
error_log stderr error;
events {{ worker_connections 256; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    client_body_temp_path {run}/body;
    proxy_temp_path {run}/proxy;
    fastcgi_temp_path {run}/fastcgi;
    uwsgi_temp_path {run}/uwsgi;
    scgi_temp_path {run}/scgi;
    server {{ listen {host}:{port}; root {served}; }}
}}
"""


@contextlib.contextmanager
def nginx(run: Path, served: Path) -> Iterator[str]:
    """Serve a folder, and give the URL of it.

    Args:
        run: The folder for nginx's own files.
        served: The folder that it serves.

    Raises:
        UnavailableError: nginx is not installed.
    """
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        raise UnavailableError("nginx is not installed")
    port, log = free_port(), run / "nginx.log"
    configuration = run / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(run=run, host=HOST, port=port, served=served))
    with child([program, "-p", run, "-c", configuration, "-e", "stderr"], log) as process:
        until_it_answers(process, port, log)
        yield f"http://{HOST}:{port}/"
