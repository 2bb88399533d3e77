"""The server in examples/, as a client, a browser and an operator see it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil
import pytest
import uvicorn
import uvloop
from prometheus_client import generate_latest
from selenium import webdriver
from selenium.webdriver.common.by import By

from asyncloader import CheckpointNotFoundError, Saver
from asyncloader.runs import aversions
from examples.serve import model
from examples.serve.app import Server, create_app
from examples.serve.feed import Feed, message
from examples.serve.writer import write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from examples.serve.app import Service
    from tests.servers.places import Place

ROOT = Path(__file__).resolve().parents[1]
IDS = 2000
PATIENCE = 30.0

T = TypeVar("T")


def until(condition: Callable[[], T | None]) -> T:
    """Return the first result of `condition` that counts as true."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return result


@dataclass(frozen=True, kw_only=True)
class Process:
    """A server as `make serve` starts it."""

    popen: subprocess.Popen[bytes]
    url: str
    folder: Path
    """What it has for temporary files."""

    def versions(self) -> list[int]:
        """Return the versions on the disk."""
        return sorted(model.number_of(path.parent.name) for path in self.folder.glob("*/v*/index"))


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Process]:
    temporary = folder / "temporary"
    temporary.mkdir()
    output = folder / "output"
    command = [*(sys.executable, "-W", "error", "-m", "examples.serve"), "--port=0", "--every=1"]
    with output.open("wb") as file:
        popen = subprocess.Popen(
            [*command, f"--ids={IDS}", "--poll=0.1"],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(temporary)},
            stdout=file,
            stderr=file,
        )
    try:
        address = re.compile(r"Serving on (\S+)")
        found = until(lambda: address.search(output.read_text()) or popen.poll() is not None)
        assert isinstance(found, re.Match), output.read_text()
        yield Process(popen=popen, url=found[1], folder=temporary)
    finally:
        popen.terminate()
        popen.wait(PATIENCE)
    assert "Traceback" not in output.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with started(tmp_path_factory.mktemp("serve")) as process:
        yield process


@dataclass(frozen=True, kw_only=True)
class Thread:
    """A server within this process, on a thread."""

    url: str
    service: Service


@contextlib.contextmanager
def served_on_a_thread(run: Path, *, lifespan: Literal["on", "off"] = "on") -> Iterator[Thread]:
    app = create_app(run)
    service: Service = app.state.service
    ready = threading.Event()
    server = Server(
        uvicorn.Config(app, log_config=None, lifespan=lifespan),
        feed=service.feed,
        started=ready.set,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: uvloop.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            assert ready.wait(PATIENCE)
            yield Thread(url=url, service=service)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture
def of_one_version(tmp_path: Path) -> Iterator[Thread]:
    tables, _ = model.build()
    model.fill(tables, 1, range(IDS))
    Saver(path=tmp_path / "v1", hashtables=tables, tensors=model.tower(1)).save()
    with served_on_a_thread(tmp_path) as thread:
        yield thread


def call(url: str, body: object = None, *, method: str = "GET") -> tuple[int, Any]:
    """Return the status and what was answered, decoded if it is JSON."""
    request = urllib.request.Request(  # noqa: S310  # our own address
        url,
        None if body is None else json.dumps(body).encode(),
        {"content-type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
            text = answer.read()
            is_json = answer.headers["content-type"] == "application/json"
            return answer.status, json.loads(text) if is_json else text.decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@contextlib.contextmanager
def watching(url: str) -> Iterator[Iterator[tuple[str, Any]]]:
    """Yield the events of a stream."""

    def events() -> Iterator[tuple[str, Any]]:
        for line in stream:
            kind = line.decode().removeprefix("event: ").strip()
            data = next(stream).decode().removeprefix("data: ")
            assert next(stream) == b"\n"
            yield kind, json.loads(data)

    with urllib.request.urlopen(f"{url}/events", timeout=PATIENCE) as stream:  # noqa: S310
        assert stream.headers["content-type"].startswith("text/event-stream")
        yield events()


def test_each_answer_is_of_one_version_while_others_come_in(server: Process) -> None:
    seen: set[str] = set()
    answers = 0
    while len(seen) < 3:
        user, items = answers % IDS, [answers * n % IDS for n in range(1, 30)]
        status, answer = call(f"{server.url}/rank", {"user": user, "items": items}, method="POST")
        assert status == 200
        version = model.number_of(answer["version"])
        assert answer["scores"] == model.expected(version, user=user, items=items)
        seen.add(answer["version"])
        answers += 1
    assert answers > 3


@pytest.mark.parametrize(
    "query",
    [
        {"user": 1},
        {"user": "x", "items": []},
        {"user": 1, "items": [2**63]},
        {"user": 1, "items": [0] * 10_001},
    ],
)
def test_a_query_that_makes_no_sense_is_refused(server: Process, query: object) -> None:
    status, answer = call(f"{server.url}/rank", query, method="POST")
    assert status == 422
    assert answer["detail"]


@pytest.mark.parametrize("items", [[], [-1, 2**63 - 1, -(2**63)]])
def test_nothing_to_rank_and_unknown_ids_are_no_errors(server: Process, items: list[int]) -> None:
    status, answer = call(f"{server.url}/rank", {"user": -7, "items": items}, method="POST")
    assert status == 200
    assert len(answer["scores"]) == len(items)


def test_the_model_says_what_is_in_memory_and_how_its_load_went(server: Process) -> None:
    status, health = call(f"{server.url}/health")
    assert (status, list(health)) == (200, ["serving"])
    until(lambda: call(f"{server.url}/model")[1]["last_load"]["lag"])  # the first is not paced
    found = call(f"{server.url}/model")[1]
    assert [one["version"] for one in found["versions"] if one["serving"]] == [found["serving"]]
    assert found["nbytes"] == sum(one["nbytes"] for one in found["versions"]) > 0
    assert found["following"] is True
    assert found["problem"] is None
    assert found["last_load"]["rows"] == 2 * IDS
    assert found["last_load"]["lag"]["bound"] == 0.005
    assert found["users"] == 0


def test_metrics_count_what_happened(server: Process) -> None:
    def swaps() -> float:
        status, text = call(f"{server.url}/metrics")
        assert status == 200
        match = re.search(r"^asyncloader_swaps_total\{.*?\} (\S+)$", text, re.MULTILINE)
        assert match is not None, text
        return float(match[1])

    before = swaps()
    until(lambda: swaps() > before)


def test_a_stream_tells_of_a_swap_and_of_the_lag(server: Process) -> None:
    kinds: dict[str, Any] = {}
    with watching(server.url) as stream:
        for kind, data in stream:
            kinds[data["kind"] if kind == "happened" else kind] = data
            if {"history", "state", "LoadStarted", "LoadFinished", "Swapped"} <= kinds.keys():
                break
    assert kinds["Swapped"]["text"].startswith("serves")
    assert 0 <= kinds["state"]["lag"]["p50"] <= kinds["state"]["lag"]["worst"]
    assert kinds["history"]["samples"]


def test_nothing_serves_before_a_version_is_there(tmp_path: Path) -> None:
    with served_on_a_thread(tmp_path, lifespan="off") as thread:
        status, answer = call(f"{thread.url}/health")
        assert status == 503
        assert "no version serves" in answer["detail"]
        assert call(f"{thread.url}/model")[1]["serving"] is None


def test_there_is_nothing_to_go_back_to_at_first(of_one_version: Thread) -> None:
    status, answer = call(f"{of_one_version.url}/rollback", method="POST")
    assert status == 409
    assert answer["detail"] == "nothing has changed: no version served before 'v1'"
    assert call(f"{of_one_version.url}/model")[1]["following"] is True


def test_clients_that_go_away_leave_nothing_behind(of_one_version: Thread) -> None:
    feed = of_one_version.service.feed
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            next(stack.enter_context(watching(of_one_version.url)))
        assert len(feed) == 5
    until(lambda: len(feed) == 0)


async def test_what_waits_for_a_slow_client_does_not_grow() -> None:
    feed = Feed()
    with feed.open(message("history", b"{}")) as stream:
        for n in range(1000):
            feed.post(message("happened", b"%d" % n))
            feed.show(message("state", b"%d" % n))
        text = await anext(stream)
        assert text.startswith(b"event: missed\ndata: 937\n\nevent: happened\ndata: 936\n\n")
        assert text.count(b"event: happened") == 64
        assert text.endswith(b"data: 999\n\nevent: state\ndata: 999\n\n")
        feed.post(message("happened", b"1000"))
        assert await anext(stream) == message("happened", b"1000")
        feed.close()
        assert [text async for text in stream] == []
    with feed.open(b"") as stream:
        assert [text async for text in stream] == []
    assert len(feed) == 0


async def test_the_writer_goes_on_from_the_last_version_and_keeps_some(tmp_path: Path) -> None:
    await written(str(tmp_path), until="v3")
    await written(str(tmp_path), until="v6")
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names >= {"v4", "v5", "v6"}
    assert names.isdisjoint({"v1", "v2"})


async def written(run: str, *, until: str) -> None:
    """Have versions written up to one."""
    writing = asyncio.ensure_future(write(run, every=0.0, ids=10))
    try:
        found: set[str] = set()
        while until not in found:
            assert not writing.done()
            with contextlib.suppress(CheckpointNotFoundError):  # the first is not there yet
                found = {one.name for one in await aversions(run) if one.committed}
    finally:
        writing.cancel()
        await asyncio.wait([writing])


async def test_a_bucket_is_written_to_and_served(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("endpoint", "access_key_id", "secret_access_key", "region"):
        monkeypatch.setenv(f"AWS_{name.upper()}", s3.options[name])
    run = "s3://models/served"
    await written(run, until="v2")
    service = create_app(run).state.service
    async with service.live:
        with service.live.use() as held:
            assert (await model.rank(held, user=1, items=[2])).isfinite().all()


@pytest.mark.slow
def test_sigterm_ends_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with started(tmp_path) as process, watching(process.url) as stream:
        next(stream)
        family = [psutil.Process(process.popen.pid)]
        family += family[0].children(recursive=True)
        assert len(family) == 2
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(10) == 0
        assert {kind for kind, _ in stream} <= {"state", "happened"}  # it ended after an event
    assert not [one for one in family if one.is_running()]
    assert not list(process.folder.iterdir())


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs the commands chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


@pytest.mark.slow
def test_a_person_rolls_back_and_resumes(server: Process, browser: webdriver.Chrome) -> None:
    def shown(name: str) -> str:
        return browser.find_element(By.CSS_SELECTOR, f"[data-testid={name}]").text

    def serving() -> int:
        text = shown("serving")
        return model.number_of(text) if text.startswith("v") else 0

    def press(name: str) -> None:
        browser.find_element(By.CSS_SELECTOR, f"[data-testid={name}]").click()

    browser.get(server.url)
    first = until(serving)
    until(lambda: serving() > first)
    assert shown("following") == "following"
    assert "swapped" in shown("log")
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "[data-testid=chart] path.worst"))

    press("rollback")
    outcome = until(lambda: re.match(r"v(\d+) serves again", shown("outcome")))
    held = int(outcome[1])
    until(lambda: serving() == held)
    until(lambda: shown("following").startswith("held"))
    assert "serves" in shown("versions").splitlines()[0]
    until(lambda: max(server.versions()) > held + 2)
    assert serving() == held
    assert call(f"{server.url}/model")[1]["following"] is False

    press("resume")
    until(lambda: "Following" in shown("outcome"))
    until(lambda: serving() > held + 2)
    assert shown("following") == "following"

    press("traffic")
    until(lambda: shown("answered").replace(",", "").isdecimal() and shown("rps") != "0")
    press("traffic")
    assert browser.execute("getLog", {"type": "browser"})["value"] == []


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
async def test_rows_are_served_from_the_disk(tmp_path: Path, cache_bytes: int) -> None:
    await written(str(tmp_path), until="v2")
    service = create_app(tmp_path, disk=True, cache_bytes=cache_bytes).state.service
    async with service.live:
        with service.live.use() as held:
            for _ in range(2):
                scores = await model.rank(held, user=1, items=[2, 9])
                version = model.number_of(held.version)
                assert scores.tolist() == model.expected(version, user=1, items=[2, 9])
            rows = service.rows.seen(service.live.state.tables.values())
            text = generate_latest(service.registry).decode()
    assert rows is not None
    assert rows["cache_bytes"] == cache_bytes
    assert 'asyncloader_table_lookups_total{model="default",table="user_emb"} 3.0' in text
    assert 'asyncloader_table_lookup_seconds_count{model="default",table="user_emb"} 3.0' in text
