"""What `Folder` promises, of all that promise it: a disk, object stores, a server of HTTP."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import obstore
import pytest

from asyncloader._storage.folder import ConditionalFolder
from asyncloader._storage.folders import Folders
from tests.genuine import NAMES, NEWEST, RUN

if TYPE_CHECKING:
    from pathlib import Path

    from asyncloader._storage.folder import Folder, TargetFolder
    from tests.servers.places import Place

FILES = {path.name: path.read_bytes() for path in (RUN / NEWEST).iterdir()}
PART = 8 << 20


@pytest.fixture(params=["disk", "s3", "azure", "gcs", "http"])
def run(request: pytest.FixtureRequest) -> Folder:
    """Open the folder of the genuine run."""
    if request.param == "disk":
        return Folders().at(str(RUN))
    place: Place = request.getfixturevalue(request.param)
    return Folders(place.options).at(place.run)


@pytest.fixture(params=["disk", "s3", "azure", "gcs"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> TargetFolder:
    """Open an empty folder that can be written to."""
    if request.param == "disk":
        return Folders().at(str(tmp_path))
    place: Place = request.getfixturevalue(request.param)
    prefix = f"contract/{request.node.name}"
    return Folders(place.options).at(f"{place.run.removesuffix('ctr')}{prefix}")


def lists(folder: Folder) -> bool:
    return not folder.location.startswith("http")


def test_a_file_is_told_by_its_length_and_an_identity_that_stays(run: Folder) -> None:
    for name, content in FILES.items():
        entry = run.stat(f"{NEWEST}/{name}")
        assert entry is not None
        assert entry.size == len(content)
        assert entry == run.inside(NEWEST).stat(name)
        assert entry.modified > 1.5e9
    assert run.stat("no-such-file") is None
    assert run.stat(f"{NEWEST}/index/below-a-file") is None


def test_files_and_folders_are_listed_where_that_can_be(run: Folder) -> None:
    if not lists(run):
        with pytest.raises(OSError, match="lists no names") as caught:
            run.files("")
        assert caught.value.errno == errno.ENOTSUP
        return
    found = run.files(NEWEST)
    assert {name: entry.size for name, entry in found.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert found == run.inside(NEWEST).files("")
    assert sorted(run.folders("")) == sorted(NAMES)
    assert "checkpoint" in run.files("")
    assert run.total(NEWEST) == sum(map(len, FILES.values()))
    for look in (run.files, run.folders):
        with pytest.raises(FileNotFoundError):
            look("no-such-folder")


def test_a_file_is_read_whole_or_a_part_of_it(run: Folder) -> None:
    name, content = max(FILES.items(), key=lambda item: len(item[1]))
    at = f"{NEWEST}/{name}"
    assert run.read(at) == content
    assert run.read(at, first=10) == content[:10]
    assert run.read(at, last=10) == content[-10:]
    assert run.read(at, first=1 << 30) == run.read(at, last=1 << 30) == content
    with pytest.raises(FileNotFoundError):
        run.read("no-such-file")


@pytest.mark.parametrize("last", [-1, 7])
async def test_a_file_can_be_read_by_threads(run: Folder, last: int) -> None:
    with ThreadPoolExecutor(1) as threads:
        found = await run.aread(f"{NEWEST}/index", threads, last=last)
    assert found == (FILES["index"] if last < 0 else FILES["index"][-last:])


def test_where_folders_lie(run: Folder) -> None:
    inside = run.inside(NEWEST)
    assert inside.location == f"{run.location}/{NEWEST}"
    assert inside.above().location == run.location
    assert inside.above().inside(NAMES[0]).stat("index") == run.stat(f"{NAMES[0]}/index")
    assert inside.resolved().read("index") == FILES["index"]


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART])
def test_a_file_is_what_was_written(target: TargetFolder, size: int) -> None:
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    target.make("a b")
    file = target.create("a b/ü+%20", size=size)
    step = max(size // 3, 1)
    for at in range(0, size, step):
        piece = memoryview(content)[at : at + step]
        file.write(at, [piece[:5], piece[5:]])
    file.sync()
    file.close()
    assert target.read("a b/ü+%20") == content
    assert target.size("a b/ü+%20") == size
    assert target.names("") == ["a b/"]
    target.remove("a b/ü+%20")
    if not target.location.startswith("/"):
        target.remove("a b/ü+%20")  # as where the first answer was lost
    target.remove_folder("a b")
    assert target.names("") == []


def test_writes_may_come_from_many_threads_in_any_order(target: TargetFolder) -> None:
    content = bytes(range(256)) * (5 << 12)
    step = 600_001
    with ThreadPoolExecutor(4) as threads:
        file = target.create("f", size=len(content))
        writes = [
            threads.submit(file.write, at, [memoryview(content)[at : at + step]])
            for at in range(0, len(content), step)
        ]
        for write in writes:
            write.result()
        file.sync()
        file.close()
    assert target.read("f") == content


def test_an_object_is_there_once_it_is_whole(target: TargetFolder) -> None:
    if not target.shows_whole:
        return
    file = target.create("f", size=3 * PART)
    file.write(0, [memoryview(bytes(2 * PART))])
    assert target.stat("f") is None
    file.close()
    assert target.stat("f") is None


def test_of_writes_on_a_condition_one_takes_place(target: TargetFolder) -> None:
    if not isinstance(target, ConditionalFolder):
        return
    tag = target.put("list", b"1", over=None)
    entry = target.files("")["list"]
    assert entry.tag == tag
    with pytest.raises(FileExistsError):
        target.put("list", b"2", over=None)
    seen = target.stat("list")
    if target.location.startswith("s3"):  # Swift knows the condition for new objects alone
        with pytest.raises(OSError, match="501") as caught:
            target.put("list", b"3", over=seen)
        assert caught.value.errno == errno.ENOTSUP
        return
    target.put("list", b"3", over=seen)
    with pytest.raises(FileExistsError):
        target.put("list", b"4", over=seen)
    assert target.read("list") == b"3"


@pytest.mark.slow
def test_lists_are_not_cut_at_a_page(s3: Place) -> None:
    """Of S3 a page has 1,000 names."""
    prefix, number = "pages", 1005
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda at: obstore.put(s3.store, f"{prefix}/v{at}/x", b""), range(number)))
    folder = Folders(s3.options).at(f"s3://models/{prefix}")
    assert len(folder.folders("")) == number
