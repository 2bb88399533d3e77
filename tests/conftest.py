"""What holds for every test: which event loop, that it is not blocked, examples that repeat."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
import torch
import uvloop
from blockbuster import blockbuster_ctx
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.places import Place

# xdist tells its workers how wide a terminal is that they do not have; what is written into a pipe,
# and a test reads, is not cut.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)

# CI tries the same examples each time, so that a failure there belongs to the change at hand.
# Twenty of each, as all tests are to take five minutes; `--hypothesis-profile=thorough` has more.
settings.register_profile(
    "asyncloader", deadline=None, max_examples=20, derandomize=os.environ.get("CI") == "true"
)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("asyncloader")


ASYNCIO = ("asyncio", {"debug": True})


# Of the module, not of the function: hypothesis runs many examples within one function's fixtures.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(ASYNCIO, id="asyncio"),
        pytest.param(
            ("asyncio", {"debug": False, "loop_factory": uvloop.new_event_loop}), id="uvloop"
        ),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return request.param


@pytest.fixture(autouse=True)
def no_blocking_calls_on_the_loop() -> Iterator[None]:
    with blockbuster_ctx("asyncloader") as blockbuster:
        # load() inside a running loop blocks that loop by definition.
        allowed = blockbuster.functions["threading.Lock.acquire"]
        allowed.can_block_in("asyncloader/_threads/blocking.py", {"run_blocking"})
        # The last threads of a load are idle when they are joined; somebody has to.
        allowed.can_block_in("asyncloader/_threads/pool.py", {"_close"})
        allowed.can_block_in("asyncloader/_serving/service.py", {"_wind_up"})
        allowed.can_block_in("asyncloader/_storage/looks.py", {"close"})
        allowed.can_block_in("coverage/collector.py", {"lock_data"})
        yield


@contextlib.contextmanager
def _place(kind: str, folder: Path) -> Iterator[Place]:
    from tests.servers import places  # noqa: PLC0415  # `make test-lowest` has no obstore
    from tests.servers.child import or_skip  # noqa: PLC0415

    server = getattr(places, f"on_{kind}")
    with or_skip(server(folder)) as found:
        yield found


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with _place("s3", tmp_path_factory.mktemp("swift")) as found:
        yield found


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with _place("azure", tmp_path_factory.mktemp("azurite")) as found:
        yield found


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with _place("gcs", tmp_path_factory.mktemp("gcs")) as found:
        yield found


@pytest.fixture(scope="session")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with _place("http", tmp_path_factory.mktemp("nginx")) as found:
        yield found


@pytest.fixture(params=["s3", "azure", "gcs", "http"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each kind of server, with the genuine run."""
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["s3", "azure", "gcs"])
def any_bucket(request: pytest.FixtureRequest) -> Place:
    """Each kind of store, where its ways with conditions, versions and keys matter."""
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["s3", "azure", pytest.param("gcs", marks=pytest.mark.every_step)])
def bucket(request: pytest.FixtureRequest) -> Place:
    """Each kind of store, with the genuine run; tests write beneath prefixes of their own."""
    found: Place = request.getfixturevalue(request.param)
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-swaps", type=int, default=25, help="how many versions the soak test takes in"
    )
    parser.addoption("--soak-loads", type=int, default=40, help="how many loads the soak test does")
    parser.addoption(
        "--soak-seconds", type=float, default=3.0, help="how long two processes save and load"
    )
    parser.addoption(
        "--every-step",
        action="store_true",
        help="fail and kill at every step, not once for each kind of step",
    )
    parser.addoption(
        "--both-loops",
        action="store_true",
        help="run all async tests on asyncio's loop, too, not only those marked both_loops",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that no worker is left alone with one in the end.

    And leave tests out on asyncio's own loop where nothing depends on which loop it is; and those
    that only `--every-step` is patient enough for.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    left_out = []
    if not config.getoption("both_loops"):
        left_out += [item for item in items if _on_asyncio(item) and not _wants_both(item)]
    if not config.getoption("every_step"):
        left_out += [item for item in items if item.get_closest_marker("every_step")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _on_asyncio(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    return call is not None and call.params.get("anyio_backend") == ASYNCIO


def _wants_both(item: pytest.Item) -> bool:
    return item.get_closest_marker("both_loops") is not None


@pytest.fixture(scope="session")
def every_step(request: pytest.FixtureRequest) -> bool:
    """Whether sweeps go through every step, and not through one of each kind."""
    return bool(request.config.getoption("every_step"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
