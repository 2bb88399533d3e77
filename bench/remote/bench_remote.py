"""Checkpoints in object stores: beside clients that do nothing but read or write the same bytes.

The servers run on this machine, and take their share of it: a client that needs less of the
processors leaves them more.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import obstore
import pytest
import torch
import uvloop

from asyncloader import Loader, Saver
from bench._cases import QUARTER, TABLE, dense_shapes, poison, rows_at
from bench._measure import Contender, interleave, named
from bench._results import Goal, Results, Speed
from bench._truth import same_bits, table_rows, windows
from bench.remote._peers import PEERS, WRITE, installed
from bench.remote._servers import slow_link
from examples.lag import measuring_lag, percentile
from examples.made_up import empty_table
from tests.servers.child import or_skip
from tests.servers.nginx import nginx
from tests.servers.swift import swift

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from bench._measure import Role
    from bench._scale import Scale
    from bench.remote._peers import Fill
    from tests.oracle import TableData
    from tests.servers.swift import S3Server

ROUNDS = 5

pytestmark = pytest.mark.timeout(600)
CHUNK = 8 << 20
HEADER = 688  # bytes, of a shard of these
IN_FLIGHT = 16
BUCKET = "models"
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Remote:
    """A server of S3 with a checkpoint of tensors and one of a table, and what they hold."""

    server: S3Server
    tensors: dict[str, Tensor]
    table: TableData

    @property
    def options(self) -> dict[str, Any]:
        return {
            "endpoint": self.server.endpoint,
            "access_key_id": self.server.access_key,
            "secret_access_key": self.server.secret_key,
            "region": self.server.region,
        }

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def objects(self, prefix: str) -> list[tuple[str, int]]:
        """Return the shards beneath a prefix, and their lengths."""
        pages = obstore.list(self.server.store(BUCKET), f"{prefix}/")
        found = ((one["path"], one["size"]) for page in pages for one in page)
        return [one for one in found if one[0].endswith(".safetensors")]

    def filling(
        self,
        into: dict[str, Tensor],
        run: Callable[[Any], Any],
        name: str = "asyncloader",
        role: Role = "ours",
    ) -> Contender:
        """Return a contender that fills the tensors, all of which are compared."""
        return Contender(
            name=name,
            role=role,
            prepare=lambda: into,
            poison=poison,
            run=run,
            check=self.check,
        )

    def check(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            assert same_bits(tensors[name], tensor), name


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory, scale: Scale) -> Iterator[Remote]:
    shapes = dict(list(dense_shapes(scale).items())[: scale.tensors // 2])  # 1 GiB
    with or_skip(swift(tmp_path_factory.mktemp("swift"))) as server:
        server.make_bucket(BUCKET)
        made = Remote(server, windows(shapes), table_rows(scale.ids, scale.width))
        table = empty_table(TABLE, made.table)
        table.insert(made.table.ids, made.table.slots["embedding"])
        options: Any = {"storage_options": made.options}
        Saver(path=f"s3://{BUCKET}/dense", tensors=made.tensors, parallel=8, **options).save()
        Saver(path=f"s3://{BUCKET}/table", hashtables={TABLE: table}, parallel=8, **options).save()
        yield made


def ranges(objects: list[tuple[str, int]], first: int = CHUNK) -> list[tuple[str, int, int]]:
    """Cut objects into ranges, the first of each of another length."""
    found = []
    for path, size in objects:
        edges = [0, *range(first, size, CHUNK), size]
        found += [(path, begin, end) for begin, end in itertools.pairwise(edges)]
    return found


class Processor:
    """Seconds of processors that this process used, for each call of a function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self.seconds: list[float] = []

    def __call__(self, target: Any) -> Any:  # noqa: ANN401  # the function's
        before = time.process_time()
        found = self._function(target)
        self.seconds.append(time.process_time() - before)
        return found

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[1:] or self.seconds)  # the first one warms up


async def discard(remote: Remote, prefix: str, first: int = HEADER) -> None:
    """Have obstore get all ranges, and throw the bytes away.

    Swift compares the digest of a part of an upload that is read alone and whole. So ranges that
    begin behind a header, as a load's do, take half of its processor time.
    """
    store, todo = remote.server.store(BUCKET), iter(ranges(remote.objects(prefix), first))

    async def work() -> None:
        for path, begin, end in todo:
            await obstore.get_range_async(store, path, start=begin, end=end)

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def load_dense(url: str, **how: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:  # noqa: ANN401  # of Loader
    def load(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        uvloop.run(Loader(url, tensors=tensors, strict=True, **how).aload())
        return tensors

    return load


def destination(remote: Remote) -> dict[str, Tensor]:
    return {name: torch.ones(tensor.shape) for name, tensor in remote.tensors.items()}


def test_o1_dense_from_s3(remote: Remote, results: Results, scale: Scale) -> None:
    options: Any = {"storage_options": remote.options}
    aligned = Processor(lambda _: uvloop.run(discard(remote, "dense", CHUNK)))
    raw = Processor(lambda _: uvloop.run(discard(remote, "dense")))
    ours = Processor(load_dense(f"s3://{BUCKET}/dense", **options))
    into = destination(remote)
    times = interleave(
        [
            Contender(name="obstore, bytes thrown away", role="raw", run=raw),
            Contender(name="obstore, whole parts", role="variant", run=aligned),
            remote.filling(into, ours),
        ],
        rounds=scale.rounds(ROUNDS),
    )
    what = f"{remote.nbytes / 2**20:,.0f} MiB of tensors from Swift"
    speed = Speed(case="O1", what=what, nbytes=remote.nbytes, times=times)
    results.speeds.append(speed)
    rate = named(times, "obstore, bytes thrown away").median / named(times, "asyncloader").median
    results.figure("O1", "rate, of obstore's", rate, "", Goal("≥", 0.9))
    cost = ours.median / max(raw.median, 1e-9)
    results.figure("O1", "processor time, of obstore's", cost, "", Goal("≤", 1.3))


def test_o3_beside_peers(remote: Remote, results: Results, scale: Scale) -> None:
    into, keys = destination(remote), [path for path, _ in remote.objects("dense")]
    there = {name: fill for name, (module, fill) in PEERS.items() if installed(module)}
    for name in WRITE.keys() & there.keys():
        WRITE[name](remote.server, BUCKET, remote.tensors)

    def filled(fill: Fill, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        fill(remote.server, BUCKET, keys, tensors)
        return tensors

    ours = load_dense(f"s3://{BUCKET}/dense", storage_options=remote.options)
    peers = [
        remote.filling(into, partial(filled, fill), name, "peer") for name, fill in there.items()
    ]
    times = interleave([*peers, remote.filling(into, ours)], rounds=scale.rounds(ROUNDS))
    skipped = [name for name in PEERS if name not in there]
    what = "O1 beside others' loaders"
    results.speeds.append(
        Speed(case="O3", what=what, nbytes=remote.nbytes, times=times, skipped=skipped)
    )
    for name in there:
        rate = named(times, name).median / named(times, "asyncloader").median
        results.figure("O3", f"rate, of {name}'s", rate, "", Goal("≥", 1))


def received(
    url: str,
    files: list[tuple[str, int]],
    threads: int,
    into: Any,  # noqa: ANN401  # an array
    _: object,
) -> None:
    """Receive ranges into memory, on threads with a connection each."""
    parts = urlsplit(url)
    todo = iter(enumerate(ranges(files)))

    def work(_: int) -> None:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80)
        for number, (path, begin, end) in todo:
            memory = memoryview(into[number * CHUNK : (number + 1) * CHUNK])
            connection.request("GET", f"/{path}", headers={"Range": f"bytes={begin}-{end - 1}"})
            response = connection.getresponse()
            done = 0
            while done < end - begin:
                done += response.readinto(memory[done : end - begin])
            response.read()
        connection.close()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def test_o2_dense_over_http(remote: Remote, results: Results, scale: Scale, tmp_path: Path) -> None:
    Saver(path=tmp_path / "dense", tensors=remote.tensors, parallel=8).save()
    files = [
        (f"dense/{path.name}", path.stat().st_size)
        for path in (tmp_path / "dense").glob("*.safetensors")
    ]
    memory = np.ones(len(ranges(files)) * CHUNK, np.uint8)
    into = destination(remote)
    (run := tmp_path / "nginx").mkdir()
    with or_skip(nginx(run, tmp_path)) as url:
        raws = {
            threads: Processor(partial(received, url, files, threads, memory))
            for threads in (1, 2, 4, 8)
        }
        ours = Processor(load_dense(f"{url}dense", verify="off"))
        times = interleave(
            [
                *(
                    Contender(name=f"readinto, {threads} threads", role="raw", run=raw)
                    for threads, raw in raws.items()
                ),
                remote.filling(into, ours),
                Contender(
                    name="asyncloader, verified",
                    role="variant",
                    prepare=lambda: into,
                    run=load_dense(f"{url}dense"),
                ),
            ],
            rounds=scale.rounds(ROUNDS),
        )
    speed = Speed(case="O2", what="the same from nginx", nbytes=remote.nbytes, times=times)
    results.speeds.append(speed)
    assert speed.raw is not None
    rate = speed.raw.median / named(times, "asyncloader").median
    results.figure("O2", "rate, of the best of raw", rate, "", Goal("≥", 0.85))
    fastest = raws[int(speed.raw.name.split()[1])]
    above = (ours.median - fastest.median) / (remote.nbytes / GIB)
    results.figure("O2", "processor time above raw's", above, "s a GiB", Goal("≤", 0.3))


def test_o4_a_table(remote: Remote, results: Results, scale: Scale) -> None:
    options: Any = {"storage_options": remote.options}

    def load(table: Any) -> Any:  # noqa: ANN401  # HashTable
        uvloop.run(Loader(f"s3://{BUCKET}/table", {TABLE: table}, **options).aload())
        return table

    into = destination(remote)
    nbytes = sum(size for _, size in remote.objects("table"))
    times = interleave(
        [
            Contender(
                name="asyncloader, O1",
                role="variant",
                run=lambda _: load_dense(f"s3://{BUCKET}/dense", **options)(into),
                nbytes=remote.nbytes,
            ),
            Contender(
                name="obstore, bytes thrown away",
                role="raw",
                run=lambda _: uvloop.run(discard(remote, "table")),
            ),
            Contender(
                name="asyncloader",
                role="ours",
                prepare=lambda: empty_table(TABLE, remote.table),
                run=load,
                check=lambda table: _check_embedding(table, remote.table),
            ),
        ],
        rounds=scale.rounds(ROUNDS),
    )
    what = f"{scale.ids:,} ids x {len(remote.table.slots)} x {scale.width} from Swift"
    results.speeds.append(Speed(case="O4", what=what, nbytes=nbytes, times=times))
    dense = remote.nbytes / named(times, "asyncloader, O1").median
    rate = nbytes / named(times, "asyncloader").median / dense
    results.figure("O4", "rate, of O1's", rate, "", Goal("≥", 0.9))


def _check_embedding(table: Any, truth: TableData) -> None:  # noqa: ANN401  # HashTable
    assert same_bits(table.lookup(truth.ids), truth.slots["embedding"])


def test_o5_a_slow_link(remote: Remote, results: Results, scale: Scale) -> None:
    """Each request waits 50 ms, a connection has 25 MB/s, and all have 200."""
    rate = 200e6
    into = destination(remote)
    with slow_link(remote.server.port, latency=0.05, each=25e6, rate=rate) as endpoint:
        options: Any = {"storage_options": {**remote.options, "endpoint": endpoint}}
        load = load_dense(f"s3://{BUCKET}/dense", **options)
        times = interleave(
            [remote.filling(into, load)],
            rounds=min(scale.rounds(ROUNDS), 2),
        )
    results.speeds.append(
        Speed(case="O5", what="O1 over a slow link", nbytes=remote.nbytes, times=times)
    )
    part = remote.nbytes / rate / times[0].median
    results.figure("O5", "of the link", part, "", Goal("≥", 0.9))


def test_o6_a_quarter_of_the_ids(remote: Remote, results: Results) -> None:
    position = remote.table.ids.numpy().view(np.uint64) % np.uint64(QUARTER.size)
    inside = (position >= np.uint64(QUARTER.begin)) & (position < np.uint64(QUARTER.end))
    owned = rows_at(remote.table, np.flatnonzero(inside))
    table = empty_table(TABLE, owned, QUARTER)
    loader = Loader(f"s3://{BUCKET}/table", {TABLE: table}, storage_options=remote.options)
    report = uvloop.run(loader.aload())
    _check_embedding(table, owned)
    row = 8 + sum(slot[:1].nbytes for slot in owned.slots.values())
    part = report.bytes_read / (len(owned.ids) * row)
    results.figure("O6", "bytes read, of those owned", part, "", Goal("≤", 1.1))
    results.figure("O6", "requests", report.requests, "")


def test_o7_saving(remote: Remote, results: Results, scale: Scale) -> None:
    store, number = remote.server.store(BUCKET), iter(range(1000))
    shards = [bytearray() for _ in range(8)]
    for at, tensor in enumerate(remote.tensors.values()):
        shards[at % 8] += tensor.numpy().tobytes()
    tensors = {name: tensor.clone() for name, tensor in remote.tensors.items()}

    def put(_: object) -> None:
        prefix = f"put-{next(number)}"
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda at: obstore.put(store, f"{prefix}/{at}", memoryview(shards[at])),
                    range(8),
                )
            )

    def save(_: object) -> str:
        url = f"s3://{BUCKET}/saved-{next(number)}"
        Saver(path=url, tensors=tensors, parallel=8, storage_options=remote.options).save()
        return url

    def check(url: str) -> None:
        into = destination(remote)
        Loader(url, tensors=into, verify="require", storage_options=remote.options).load()
        remote.check(into)

    def clear() -> None:
        for prefix in ("put-", "saved-"):
            pages = obstore.list(store, "")
            paths = [
                one["path"] for page in pages for one in page if one["path"].startswith(prefix)
            ]
            for path in paths:
                obstore.delete(store, path)

    putting, saving = Processor(put), Processor(save)
    times = interleave(
        [
            Contender(name="obstore.put, 8 threads", role="raw", prepare=clear, run=putting),
            Contender(name="asyncloader", role="ours", prepare=clear, run=saving, check=check),
        ],
        rounds=scale.rounds(ROUNDS),
    )
    clear()
    what = f"{remote.nbytes / 2**20:,.0f} MiB of tensors to Swift"
    results.speeds.append(Speed(case="O7", what=what, nbytes=remote.nbytes, times=times))
    rate = named(times, "obstore.put, 8 threads").median / named(times, "asyncloader").median
    results.figure("O7", "rate, of obstore's", rate, "", Goal("≥", 0.9))
    cost = saving.median / max(putting.median, 1e-9)
    results.figure("O7", "processor time, of obstore's", cost, "")


PEAK = """
import json, sys
from pathlib import Path
import torch, uvloop
from asyncloader import Loader
from bench._peak import resident
url, options, shapes = json.loads(sys.argv[1])
warm = {name: torch.ones(shape) for name, shape in list(shapes.items())[:1]}
uvloop.run(Loader(url, tensors=warm, storage_options=options).aload())
tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
before = resident("VmRSS")
uvloop.run(Loader(url, tensors=tensors, storage_options=options).aload())
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark"
)
def test_o8_memory(remote: Remote, results: Results) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in remote.tensors.items()}
    given = json.dumps([f"s3://{BUCKET}/dense", remote.options, shapes])
    command = [sys.executable, "-c", PEAK, given]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    above = int(run.stdout) / 2**20
    results.figure("O8", "memory above the destination", above, "MiB", Goal("≤", 128 + 64))


def test_o9_lag(remote: Remote, results: Results, scale: Scale) -> None:
    into, lags = destination(remote), list[float]()
    for _ in range(max(scale.rounds(ROUNDS), 1)):
        loader = Loader(f"s3://{BUCKET}/dense", tensors=into, storage_options=remote.options)
        uvloop.run(measuring_lag(loader.aload(), lags))
    results.figure("O9", "lag, 99th percentile", percentile(lags, 99) * 1e3, "ms", Goal("≤", 5))
