"""Versions come and go under users of any thread, also where the collector ends a use."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, cast

import pytest

from asyncloader._serving.model import Model
from asyncloader._serving.shelf import Freeing, Held, Shelf
from asyncloader._serving.source import Candidate
from asyncloader._storage.folder import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asyncloader import Event


class Version:
    """Stands for what is known of a checkpoint."""

    def __init__(self, name: str) -> None:
        self.name = name

    def brings_news_to(self, other: Version) -> bool:
        return self.name != other.name


def version(name: str) -> Held:
    return Held(cast("Any", object()), cast("Candidate", Version(name)), 8, 0.0)


class Run:
    """A shelf, and what it has let go."""

    def __init__(self, *, keep: int = 1) -> None:
        self.gone: list[str] = []
        self.shelf = Shelf(keep=keep, let_go=lambda held: self.gone.append(held.candidate.name))

    def names(self) -> list[str]:
        return [held.candidate.name for held in self.shelf.held]


def test_a_version_with_users_stays_until_the_last_has_left() -> None:
    run = Run()
    run.shelf.put(version("1"))
    users = [run.shelf.pin(), run.shelf.pin()]
    run.shelf.put(version("2"))
    assert (run.names(), run.gone) == (["1", "2"], [])
    run.shelf.unpin(users[0])
    assert run.gone == []
    run.shelf.unpin(users[1])
    assert (run.names(), run.gone) == (["2"], ["1"])


def test_a_version_that_has_left_does_not_come_back() -> None:
    """Its memory is given back by then."""
    run, old = Run(), version("1")
    run.shelf.put(old)
    run.shelf.put(version("2"))
    assert run.gone == ["1"]
    assert not run.shelf.put(old)
    assert run.shelf.serving.candidate.name == "2"


def test_the_collector_may_end_a_use_at_any_time() -> None:
    """An abandoned generator did so on the thread that held the lock, and all stood still."""
    run = Run()
    run.shelf.put(version("first"))

    class Response:
        body: Iterator[str]

    def stream(response: Response) -> Iterator[str]:
        held = run.shelf.pin()
        try:
            while hasattr(response, "body"):  # a cycle: only the collector ends it
                yield held.candidate.name
        finally:
            run.shelf.unpin(held)

    def serve() -> None:
        before = gc.get_threshold()
        gc.set_threshold(1)  # at nearly every new object
        try:
            for number in range(200):
                response = Response()
                response.body = stream(response)
                next(response.body)
                del response
                run.shelf.put(version(str(number)))
                run.shelf.unpin(run.shelf.pin())
        finally:
            gc.set_threshold(*before)

    service = threading.Thread(target=serve, daemon=True)
    service.start()
    service.join(30)

    assert not service.is_alive()
    gc.collect()
    assert run.names() == ["199"]
    assert len(run.gone) == len(set(run.gone)) == 200


def test_threads_that_use_versions_while_others_come_never_have_one_that_was_let_go() -> None:
    run = Run()
    lost: list[str] = []
    run.shelf.put(version("first"))
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            held = run.shelf.pin()
            if held.candidate.name in run.gone:
                lost.append(held.candidate.name)
            run.shelf.unpin(held)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(2000):
        run.shelf.put(version(str(number)))
    done.set()
    for thread in threads:
        thread.join()

    assert lost == []
    assert run.names() == ["1999"]
    assert len(run.gone) == 2000


def test_a_shelf_that_is_closed_serves_nobody() -> None:
    run = Run(keep=2)
    run.shelf.put(version("1"))
    user = run.shelf.pin()
    run.shelf.put(version("2"))
    run.shelf.close()
    assert run.gone == ["2"]
    with pytest.raises(RuntimeError, match="was left"):
        run.shelf.pin()
    run.shelf.unpin(user)
    assert run.gone == ["2", "1"]


class Entered(Executor):
    """An executor within whose `submit` the last use of a version ends.

    The collector does that, or the handler of a signal.
    """

    def __init__(self, ends: Callable[[], object]) -> None:
        self.ends = ends
        self.busy = False
        self.entered_twice = False
        self.jobs = 0

    def submit(
        self,
        job: Callable[..., Any],
        /,
        *given: Any,  # noqa: ANN401  # of an executor
        **named: Any,  # noqa: ANN401
    ) -> Future[Any]:
        self.entered_twice |= self.busy  # it would wait for its own lock
        self.busy = True
        self.ends()
        self.busy = False
        self.jobs += 1
        done: Future[Any] = Future()
        done.set_result(job(*given, **named))
        return done


async def test_what_loses_its_last_user_while_another_is_freed_is_freed_afterwards() -> None:
    users = list[Held]()
    told: list[Event] = []

    def end() -> None:
        while users:
            shelf.unpin(users.pop())

    freeing = Freeing(executor := Entered(end), told.append)
    freeing.begin()
    shelf = Shelf(keep=1, let_go=freeing.let_go)
    first, second = model("first"), model("second")
    shelf.put(first)
    users.append(shelf.pin())
    shelf.put(second)
    shelf.put(model("third"))

    await freeing.wait()

    assert not executor.entered_twice
    assert executor.jobs == 2
    assert [event.version for event in told] == ["second", "first"]
    for held in (first, second):
        with pytest.raises(RuntimeError, match="memory given back"):
            held.model.tables  # noqa: B018  # raises


def model(name: str) -> Held:
    entry = Entry(8, (1,), 1.0)
    candidate = Candidate(location=name, name=name, identity=(entry,), files={name: entry})
    return Held(Model(candidate, {}, {}, None), candidate, 8, 0.0)


@pytest.mark.parametrize("closing", [False, True])
def test_the_handler_of_a_signal_may_use_it_while_its_thread_changes_it(closing: bool) -> None:
    run, served = Run(), list[str]()

    def use(*_: object) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed
            held = run.shelf.pin()
            served.append(held.candidate.name)
            run.shelf.unpin(held)

    class Interrupted(Version):
        def __hash__(self) -> int:  # compared with others
            signal.raise_signal(signal.SIGUSR1)
            return hash(self.name)

    before = signal.signal(signal.SIGUSR1, use)
    try:
        for name in ("1", "2"):
            candidate = cast("Candidate", Interrupted(name))
            run.shelf.put(Held(cast("Any", object()), candidate, 8, 0.0))
        if closing:
            run.shelf.close()
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert run.gone == (["1", "2"] if closing else ["1"])
    assert {*served} == {"1", "2"}
