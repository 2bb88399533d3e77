"""All of an OpenStack Swift in one process group, for tests: run by a Python that has `swift`.

`python swift_process.py FOLDER` keeps everything below FOLDER, prints the port of the proxy when
every server takes requests, and ends when its standard input does.

The four servers listen before the first of them is started, so a port is never guessed; each is a
fork of this process, so Swift is imported once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from swift.common.utils import monkey_patch

monkey_patch()

from swift.common import constraints, storage_policy, utils  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402
from swift.common.wsgi import run_server  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG = 1

_SWIFT = """
[swift-hash]
swift_hash_path_suffix = tests
[storage-policy:0]
name = only
default = yes
"""

_BACKEND = """
[DEFAULT]
swift_dir = {folder}
devices = {folder}
mount_check = false
disable_fallocate = true
log_level = ERROR
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
disk_chunk_size = 1048576
network_chunk_size = 1048576
mb_per_sync = 4096
allow_versions = true
"""

_PROXY = """
[DEFAULT]
swift_dir = {folder}
log_level = ERROR
[pipeline:main]
pipeline = catch_errors memory s3api tempauth slo dlo proxy-server
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:memory]
paste.filter_factory = swift_process:remembering
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
auth_pipeline_check = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
user_test_reader = reading
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
object_chunk_size = 1048576
client_chunk_size = 1048576
"""


class Memory:
    """As much of a memcached as one proxy needs."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, float]] = {}

    def get(self, key: str, **_: object) -> Any:  # noqa: ANN401
        value, until = self._kept.get(key, (None, 0.0))
        return value if until == 0 or time.time() < until else None

    def set(self, key: str, value: Any, time: float = 0, **_: object) -> None:  # noqa: ANN401
        self._kept[key] = (value, time and _later(time))

    def incr(self, key: str, delta: int = 1, time: float = 0, **_: object) -> int:
        value = max(0, int(self.get(key) or 0) + delta)
        self.set(key, value, time=time)
        return value

    def delete(self, key: str, **_: object) -> None:
        self._kept.pop(key, None)


def _later(seconds: float) -> float:
    return time.time() + seconds


def remembering(_: dict[str, str], **__: str) -> Callable[[Any], Any]:
    """Give every request the cache that Swift looks for in its environment."""
    memory = Memory()

    def wrap(app: Any) -> Any:  # noqa: ANN401
        def answer(environ: dict[str, Any], start: Any) -> Any:  # noqa: ANN401
            environ["swift.cache"] = memory
            return app(environ, start)

        return answer

    return wrap


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _listen() -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    return listener


def _write_ring(path: Path, port: int) -> None:
    builder = RingBuilder(2, 1, 0)
    builder.add_dev({
        "region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "disk", "weight": 1,
    })  # fmt: skip
    builder.rebalance()
    builder.get_ring().save(str(path))


def _serve(kind: str, listener: socket.socket, folder: Path, ready: int) -> NoReturn:
    """Answer until killed; what goes wrong stands on standard error."""
    _die_with_parent()
    file = folder / f"{kind}.conf"
    file.write_text((_PROXY if kind == "proxy" else _BACKEND).format(folder=folder, kind=kind))
    conf = utils.readconf(
        str(file), f"app:{kind}-server" if kind != "proxy" else "app:proxy-server"
    )
    logger = utils.get_logger(conf, kind, log_to_console=True)
    run_server(conf, logger, listener, ready_callback=lambda: os.write(ready, b"."))
    os._exit(0)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    (folder / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text(_SWIFT)
    utils.SWIFT_CONF_FILE = str(folder / "swift.conf")
    utils.HASH_PATH_SUFFIX = b"tests"
    constraints.reload_constraints()
    storage_policy.reload_storage_policies()
    sys.modules["swift_process"] = sys.modules["__main__"]  # paste finds remembering() by it

    listeners = {kind: _listen() for kind in ("account", "container", "object", "proxy")}
    for kind, listener in listeners.items():
        if kind != "proxy":
            _write_ring(folder / f"{kind}.ring.gz", listener.getsockname()[1])
    readable, ready = os.pipe()
    for kind, listener in listeners.items():
        if os.fork() == 0:
            _serve(kind, listener, folder, ready)
    os.close(ready)
    started = 0
    while started < len(listeners):
        told = os.read(readable, 16)
        if not told:
            raise SystemExit("a server of Swift has not started")
        started += len(told)
    print(listeners["proxy"].getsockname()[1], flush=True)  # noqa: T201
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
