"""OpenStack Swift, which speaks S3: a proxy and one server each of accounts, containers, objects.

It lives in an environment of its own, which `make servers` installs: what it needs must not touch
what we need.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .processes import UnavailableError, free_ports, running

if TYPE_CHECKING:
    from collections.abc import Iterator

SWIFT = "2.38.3"
_HOME = Path(__file__).parents[2] / ".venv-swift"
_INSTALLED = _HOME / f"installed-{SWIFT}"
_KEY, _SECRET = "test:tester", "testing"
_RINGS = ("account", "container", "object")
_PIPELINE = "catch_errors gatekeeper healthcheck s3api tempauth copy slo dlo proxy-server"
_PROXY = f"""
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {{port}}
workers = 0
swift_dir = {{root}}
log_address = /dev/null
log_level = WARNING
[pipeline:main]
pipeline = {_PIPELINE}
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
object_post_as_copy = false
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
dns_compliant_bucket_names = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {_SECRET} .admin
""" + "".join(
    f"[filter:{name}]\nuse = egg:swift#{name}\n"
    for name in ("catch_errors", "gatekeeper", "healthcheck", "copy", "slo", "dlo")
)
_SERVER = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
mount_check = false
disable_fallocate = true
swift_dir = {root}
devices = {root}/devices
log_address = /dev/null
log_level = WARNING
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
_HASHES = """
[swift-hash]
swift_hash_path_prefix = tests
swift_hash_path_suffix = tests
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swift:
    """A server that runs.

    Attributes:
        endpoint: Its URL.
        options: obstore's, for `storage_options`.
    """

    endpoint: str

    @property
    def options(self) -> dict[str, object]:
        return {
            "endpoint": self.endpoint,
            "access_key_id": _KEY,
            "secret_access_key": _SECRET,
            "region": "us-east-1",
            "virtual_hosted_style_request": False,
        }


@contextlib.contextmanager
def swift() -> Iterator[Swift]:
    """Run Swift until the block is left.

    Raises:
        UnavailableError: If this machine cannot have it.
    """
    programs = _programs()
    with tempfile.TemporaryDirectory(prefix="swift-") as folder:
        root = Path(folder)
        (root / "devices" / "d1").mkdir(parents=True)
        _check_attributes(root)
        (root / "swift.conf").write_text(_HASHES)
        proxy, *ports = free_ports(1 + len(_RINGS))
        commands = {}
        for name, port in zip(_RINGS, ports, strict=True):
            (root / f"{name}.conf").write_text(_SERVER.format(name=name, port=port, root=root))
            _make_ring(programs, root, name, port)
            commands[port] = [str(programs / f"swift-{name}-server"), str(root / f"{name}.conf")]
        (root / "proxy.conf").write_text(_PROXY.format(port=proxy, root=root))
        commands[proxy] = [str(programs / "swift-proxy-server"), str(root / "proxy.conf")]
        with running(commands, root / "log"):
            yield Swift(endpoint=f"http://127.0.0.1:{proxy}")


def _programs() -> Path:
    """Return the folder of Swift's programs."""
    if not _INSTALLED.exists():
        raise UnavailableError("Swift is not installed: make servers")
    return _HOME / "bin"


def install() -> None:
    """Install Swift, unless it is there."""
    if not _INSTALLED.exists():
        python = str(_HOME / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(_HOME)], check=True)
        subprocess.run([*pip, f"swift=={SWIFT}"], check=True)
        _INSTALLED.touch()


def _check_attributes(root: Path) -> None:
    try:
        os.setxattr(root, "user.swift", b"1")
    except OSError as error:
        raise UnavailableError(f"Swift needs extended attributes in {root}: {error}") from error


def _make_ring(programs: Path, root: Path, name: str, port: int) -> None:
    builder = [str(programs / "swift-ring-builder"), str(root / f"{name}.builder")]
    for command in (
        ["create", "2", "1", "1"],
        ["add", f"r1z1-127.0.0.1:{port}/d1", "1"],
        ["rebalance"],
    ):
        subprocess.run([*builder, *command], check=True, capture_output=True)


if __name__ == "__main__":
    install()
