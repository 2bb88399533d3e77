"""Checkpoints read over HTTP, by ranges, from a server that cuts, lies, and changes its mind."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import save

from asyncloader import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    HashTable,
    Loader,
    ReadError,
    Saver,
    load_tensors,
    read_extra,
    read_io_state,
)
from asyncloader._storage.retrying import LaterError, RetryingStorage
from asyncloader.cli import run
from asyncloader.tools import ainspect, averify
from tests.genuine import NEWEST, RUN, truth
from tests.servers.liar import Answer, Asked, liar
from tests.support import rows_in, rows_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.liar import Liar

pytestmark = pytest.mark.both_loops

pytest.importorskip("obstore")

FILE = "model.safetensors"
# More than comes along with the first look.
TENSORS = {name: torch.arange(200_000.0) + at for at, name in enumerate("ab")}


@pytest.fixture
def server() -> Iterator[Liar]:
    files = {f"run/{path.name}": path.read_bytes() for path in (RUN / NEWEST).iterdir()}
    files[FILE] = save(TENSORS)
    with liar(files) as running:
        yield running


async def load(server: Liar, **options: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401  # of Loader
    into = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    await Loader(f"{server.url}/{FILE}", tensors=into, **options).aload()
    return into


def check(into: dict[str, torch.Tensor]) -> None:
    for name, tensor in TENSORS.items():
        assert torch.equal(into[name], tensor), name


async def test_a_genuine_checkpoint_comes_whole_by_every_door(server: Liar) -> None:
    url, held = f"{server.url}/run", truth(NEWEST)
    tables, tensors = held.destinations()
    report = await Loader(url, tables, tensors, strict=True).aload()
    assert report.missing == ()
    for name, table in tables.items():
        assert rows_in(table) == rows_on_disk(held.tables[name])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, held.tensors[name])
    assert (await ainspect(url)).location == url
    found = await averify(url)
    assert (found.problems, found.ids) == ((), sum(map(len, tables.values())))


def test_scripts_read_it_too(server: Liar) -> None:
    url, held = f"{server.url}/run/", truth(NEWEST)
    for name, tensor in load_tensors(url).items():
        assert torch.equal(tensor, held.tensors[name])
    assert len(CheckpointReader(url).read_tensor("user@id")) == 111
    dense = load_tensors(f"{server.url}/run/model.pt")
    assert dense.keys() == held.dense.keys()


async def test_a_header_takes_one_request_and_so_does_a_chunk(server: Liar) -> None:
    check(await load(server, chunk_bytes=400_000))
    size = len(server.files[FILE])
    assert sum(one.end - one.begin for one in server.asked) <= size + (256 << 10)
    assert len(server.asked) == 1 + 1_600_000 // 400_000


@pytest.mark.parametrize("part", range(16))
async def test_a_read_that_is_cut_goes_on_at_the_last_byte(server: Liar, part: int) -> None:
    cut: list[Asked] = []

    def script(asked: Asked) -> Answer:
        if asked.begin and not cut:
            cut.append(asked)
            return Answer(cut=(asked.end - asked.begin) * part // 16)
        return Answer()

    server.script = script
    into = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    report = await Loader(f"{server.url}/{FILE}", tensors=into).aload()
    check(into)
    assert report.retries == 1
    [again] = [one for one in server.asked[cut[0].number + 1 :] if one.end == cut[0].end]
    came = (cut[0].end - cut[0].begin) * part // 16
    # Pieces of 1 MiB that were filled are not read again, nor is less than that of the last one.
    assert cut[0].begin <= again.begin <= cut[0].begin + came


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_what_may_pass_is_tried_again(server: Liar, status: int) -> None:
    server.script = lambda asked: Answer(status=status if asked.number == 1 else 0)
    check(await load(server))


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (Answer(whole=True), ReadError, "ignores ranges"),
        (Answer(headers={"ETag": '"another"'}), CheckpointChangedError, "replaced"),
        (Answer(headers={"Content-Range": "bytes 0-9/1600144"}), ReadError, "answers with the ra"),
        (Answer(headers={"Content-Range": "bytes 0-9/7"}), CheckpointChangedError, "replaced"),
        (Answer(headers={"Content-Range": ""}), ReadError, "answers with the range ''"),
        (Answer(status=403), ReadError, "refuses: 403"),
        (Answer(status=410), ReadError, "answers 410"),
        (Answer(status=307), ReadError, "answers 307"),
    ],
)
async def test_a_wrong_answer_is_an_error_that_names_file_and_range(
    server: Liar, answer: Answer, error: type[Exception], words: str
) -> None:
    size = len(server.files[FILE])
    headers = {name: text.replace("1600144", str(size)) for name, text in answer.headers.items()}
    wrong = Answer(status=answer.status, headers=headers, whole=answer.whole)
    server.script = lambda asked: wrong if asked.begin else Answer()
    with pytest.raises(error, match=words) as caught:
        await load(server)
    assert FILE in str(caught.value)
    if error is ReadError:
        assert "bytes [" in str(caught.value)


async def test_an_object_that_is_replaced_is_never_mixed(server: Liar) -> None:
    def script(asked: Asked) -> Answer:
        if asked.begin:
            server.files[FILE] = save({name: tensor + 1 for name, tensor in TENSORS.items()})
        return Answer()

    server.script = script
    with pytest.raises(CheckpointChangedError):
        await load(server, chunk_bytes=300_000, parallel=1)


async def test_an_object_that_is_replaced_during_its_last_read_is_noticed(server: Liar) -> None:
    def script(asked: Asked) -> Answer:  # the answer is still of the object before
        if asked.begin:
            server.files[FILE] = save({name: tensor + 1 for name, tensor in TENSORS.items()})
        return Answer()

    server.script = script
    with pytest.raises(CheckpointChangedError):
        await load(server)


async def test_cancelling_ends_a_request_at_once(server: Liar) -> None:
    waits, came = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def script(asked: Asked) -> Answer:
        if not asked.begin:
            return Answer()
        loop.call_soon_threadsafe(came.set)
        return Answer(waits=waits)

    server.script = script
    try:
        task = asyncio.create_task(load(server))
        await came.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not waits.is_set()
    finally:
        waits.set()


async def test_a_server_that_is_silent_is_given_up(server: Liar) -> None:
    waits = threading.Event()
    server.script = lambda asked: Answer(waits=waits if asked.begin else None)
    try:
        with pytest.raises(ReadError, match="stall_timeout"):
            await load(server, stall_timeout=0.2)
    finally:
        waits.set()


def test_headers_of_a_user_go_to_no_other_server(server: Liar) -> None:
    with liar(server.files) as other:
        told = {"Location": f"{other.url}/{FILE}"}
        server.script = lambda asked: Answer(status=302, headers=told) if asked.begin else Answer()
        secret: dict[str, Any] = {"default_headers": {"X-Key": "secret"}}
        check(load_tensors(f"{server.url}/{FILE}", storage_options={"client_options": secret}))
        assert {one.key for one in server.asked} == {"secret"}
        assert {one.key for one in other.asked} == {None}


def test_options_that_http_does_not_have_are_refused(server: Liar) -> None:
    with pytest.raises(ValueError, match="client_options alone"):
        load_tensors(f"{server.url}/{FILE}", storage_options={"region": "x"})


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothing/here", "no such object; looked for 'index'"),
        ("nothing.safetensors", "no such object"),
    ],
)
async def test_what_is_not_there_is_said(server: Liar, path: str, words: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=words):
        await Loader(f"{server.url}/{path}").aload()


async def test_an_empty_file_is_no_checkpoint(server: Liar) -> None:
    server.files["empty/index"] = b""
    server.files["empty/tensorkey.json"] = b"{}"
    with pytest.raises(CheckpointError, match="index"):
        await Loader(f"{server.url}/empty").aload()


def test_names_of_objects_are_any_text(server: Liar) -> None:
    name = "a b%20ü/model.safetensors"
    server.files[quote(name)] = server.files[FILE]
    assert load_tensors(f"{server.url}/{quote(name)}").keys() == TENSORS.keys()


def test_plain_values_are_read_where_no_names_are_listed(server: Liar) -> None:
    assert int(read_extra(f"{server.url}/run")["global_step"]) == 30
    with pytest.raises(CheckpointError, match=r"io_state_7\.pt: is not there"):
        read_io_state(f"{server.url}/run", 7)


def test_over_tls_a_certificate_has_to_be_trusted(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate", tmp_path / "key"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 "
        "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 "
        "-addext basicConstraints=critical,CA:FALSE "
        f"-out {certificate} -keyout {key}"
    )
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with liar({FILE: save(TENSORS)}, tls=context) as server:
        with pytest.raises(CheckpointError, match="certificate is not trusted"):
            load_tensors(f"{server.url}/{FILE}")
        trusted: dict[str, Any] = {"root_certificate": certificate.read_text()}
        check(load_tensors(f"{server.url}/{FILE}", storage_options={"client_options": trusted}))
        blind: dict[str, Any] = {"allow_invalid_certificates": True}
        check(load_tensors(f"{server.url}/{FILE}", storage_options={"client_options": blind}))


def test_a_server_that_is_busy_is_told_of_and_waited_for(
    server: Liar, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a command would be silent for a minute; and it comes back no sooner than it may."""
    busy = {0: Answer(status=503), 1: Answer(status=429, headers={"Retry-After": "0"})}
    server.script = lambda asked: busy.get(asked.number, Answer())
    assert run(["load", f"{server.url}/{FILE}"]) == 0
    told = capsys.readouterr().err
    assert "trying again, 1 of 8" in told
    assert told.count("503") == 1
    assert "Traceback" not in told


async def test_progress_tells_of_retries(server: Liar) -> None:
    server.script = lambda asked: Answer(status=503) if asked.number < 3 else Answer()
    seen = []
    await load(server, progress=lambda moment: seen.append(moment.retries))
    assert seen[-1] == 3


@pytest.mark.parametrize("wish", ["1", "1000000", "x", "-1", "Wed, 21 Oct 2065 07:28:00 GMT", "²"])
async def test_who_asks_for_a_pause_gets_it_within_bounds(wish: str) -> None:
    pauses: list[float] = []

    class Busy:
        location, lost, resumed = "https://host/x", 0, 0

        async def size(self, _: str, /) -> int:
            if len(pauses) < 2:
                raise LaterError("503", wish)
            return 7

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    storage: Any = Busy()
    assert await RetryingStorage(storage, sleep=sleep).size("x") == 7
    least = {"1": 1, "1000000": 30}.get(wish, 0)
    assert all(least <= pause <= least + 0.2 for pause in pauses)


@pytest.mark.parametrize("what", ["a tensor", "a table"])
async def test_a_pause_that_a_server_asks_for_ends_with_the_load(tmp_path: Path, what: str) -> None:
    """On the loop, and on a thread; and it is no stall."""
    tables, tensors = {"t": HashTable([64], name="t")}, {"w": torch.ones(200_000)}
    tables["t"].insert(torch.arange(2_000), torch.ones(2_000, 64))
    held = ({"t": tables["t"]}, {}) if what == "a table" else ({}, tensors)
    Saver.to(tmp_path / "c", *held, parallel=1).save()
    asked, loop = asyncio.Event(), asyncio.get_running_loop()

    def script(one: Asked) -> Answer:
        if one.end - one.begin <= 256 << 10:
            return Answer()
        loop.call_soon_threadsafe(asked.set)
        return Answer(status=503, headers={"Retry-After": "30"})

    with liar({f"c/{path.name}": path.read_bytes() for path in (tmp_path / "c").iterdir()}) as far:
        far.script = script
        into = ({"t": HashTable([64], name="t")}, {}) if what == "a table" else ({}, tensors)
        loader = Loader(f"{far.url}/c", *into, stall_timeout=1, verify="off")
        loading = asyncio.ensure_future(loader.aload())
        await asked.wait()
        done, _ = await asyncio.wait([loading], timeout=2)
        assert not done
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(10):
                await loading
