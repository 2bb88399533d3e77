from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from asyncloader import CheckpointNotFoundError, Loader, Progress, load_tensors
from asyncloader._threads.blocking import run_blocking
from tests.forks import Forked, python
from tests.oracle import write_checkpoint
from tests.support import data, table_for, unchanged

pytestmark = pytest.mark.both_loops

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "c", {}, {"w": torch.arange(1000.0)})
    return tmp_path / "c"


def loads_right(checkpoint: Path) -> bool:
    tensor = torch.zeros(1000)
    report = Loader(checkpoint, tensors={"w": tensor}).load()
    return report.tensors == {"w": "loaded"} and bool((tensor == torch.arange(1000.0)).all())


def test_load_works_where_no_loop_runs(checkpoint: Path) -> None:
    before = threading.enumerate()
    assert loads_right(checkpoint)
    assert threading.enumerate() == before


async def test_load_works_within_a_running_loop(checkpoint: Path) -> None:
    before = threading.enumerate()
    assert loads_right(checkpoint)
    assert threading.enumerate() == before


def test_load_works_on_any_thread(checkpoint: Path) -> None:
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(loads_right(checkpoint))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 3


def test_a_load_that_fails_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.enumerate()
    with pytest.raises(CheckpointNotFoundError):
        Loader(tmp_path).load()
    assert threading.enumerate() == before


async def test_a_load_that_fails_within_a_running_loop_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.enumerate()
    with pytest.raises(CheckpointNotFoundError):
        Loader(tmp_path).load()
    assert threading.enumerate() == before


async def test_the_private_loop_is_another_one_and_closed_afterwards() -> None:
    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    private = run_blocking(loop)
    assert private is not asyncio.get_running_loop()
    assert private.is_closed()


# Loads in tiny reads, which takes many seconds; says when it is at it, and who is left afterwards.
SCRIPT = """
    import asyncio, sys, threading
    import torch
    from asyncloader import Loader

    tensor = torch.zeros(4 << 20)

    def load():
        begun = lambda progress: print("loading", flush=True)
        Loader(sys.argv[1], tensors={"w": tensor}, chunk_bytes=128, progress=begun).load()

    async def in_a_loop():
        load()

    try:
        if sys.argv[2] == "plain":
            load()
        elif sys.argv[2] == "loop":
            asyncio.run(in_a_loop())
        else:  # nobody turns Ctrl-C into a cancellation
            asyncio.new_event_loop().run_until_complete(in_a_loop())
    except KeyboardInterrupt:
        names = [thread.name for thread in threading.enumerate()]
        print("interrupted", names, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT to send")
@pytest.mark.parametrize("where", ["plain", "loop", "loop as in Jupyter"])
def test_control_c_ends_a_load_and_its_threads(tmp_path: Path, where: str) -> None:
    write_checkpoint(tmp_path / "c", {}, {"w": torch.zeros(4 << 20)})
    script = textwrap.dedent(SCRIPT)
    process = Forked(["-c", script, tmp_path / "c", where])
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert out.splitlines()[-1] == "interrupted ['MainThread']"


# Presses Ctrl-C itself, at the beginning and at the end of a load; says what became of it.
AT_BOTH_ENDS = """
    import asyncio, os, signal, sys, threading
    import torch
    from asyncloader import HashTable, Loader

    def press():
        os.kill(os.getpid(), signal.SIGINT)

    def attempt(where, point):
        table = HashTable([2], name="t")
        table.insert(torch.tensor([-5]), torch.ones(1, 2))

        def at_the_beginning(info):
            if point == "beginning":
                press()
            return info

        def at_the_end(progress):
            if point == "end" and progress.bytes_done == progress.bytes_total:
                press()

        loader = Loader(
            sys.argv[1], {"t": table}, filter_func=at_the_beginning, progress=at_the_end
        )

        async def in_a_loop():
            loader.load()

        try:
            if where == "plain":
                loader.load()
            elif where == "loop":
                asyncio.run(in_a_loop())
            else:
                asyncio.new_event_loop().run_until_complete(in_a_loop())
            outcome = "done"
        except KeyboardInterrupt:
            outcome = "interrupted"
        threads = [thread.name for thread in threading.enumerate()]
        print(where, point, outcome, len(table), *threads, sep=", ", flush=True)
        table.insert(torch.tensor([-6]), torch.ones(1, 2))

    for where in ("plain", "loop", "loop as in Jupyter"):
        for point in ("beginning", "end"):
            attempt(where, point)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT to send")
def test_control_c_leaves_a_table_as_it_was_or_loaded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data(list(range(1000)))}, {})
    done = python("-c", textwrap.dedent(AT_BOTH_ENDS), tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split(", ") for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for where, _, outcome, count, *threads in lines:
        assert (outcome, threads) == ("interrupted", ["MainThread"])
        # A load on a thread of its own may be done before its caller notices.
        assert count in ({"1"} if where == "plain" else {"1", "1001"})


# The second Ctrl-C comes while the call that the first one ended is still at work.
TWICE = """
    import asyncio, os, signal, threading
    from asyncloader._threads.blocking import run_blocking

    def press():
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGUSR1, print)  # so that a handler may come in between
    stopping, left = threading.Event(), threading.Event()
    early = []

    def write_to_memory():
        press()
        stopping.wait()
        press()
        early.append(left.wait(0.5))

    async def main():
        work = asyncio.get_running_loop().run_in_executor(None, write_to_memory)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            stopping.set()
            await work
            raise

    try:
        run_blocking(main)
    except KeyboardInterrupt:
        left.set()
        print("interrupted", *early, *(thread.name for thread in threading.enumerate()))
"""

# A handler may come while its thread holds the lock of a log, which every other thread waits for.
LOGGING = """
    import functools, logging, os, signal, sys, torch
    from asyncloader import Saver

    class Stream:
        def write(self, text):
            if "step" in text:
                signal.raise_signal(signal.SIGTERM)
            sys.stdout.write(text)

        flush = sys.stdout.flush

    def save(*_):
        Saver.to(sys.argv[1], None, {"w": torch.ones(3)}).save()
        print("saved", flush=True)
        sys.exit(0)

    class Service:
        def end(self, *_):
            save()

        __call__ = end

    handlers = {
        "function": save, "partial": functools.partial(save), "method": Service().end,
        "object": Service(),
    }
    logging.basicConfig(level=logging.INFO, stream=Stream())
    signal.signal(signal.SIGTERM, handlers[sys.argv[2]])
    os.makedirs(sys.argv[1] + "/.saving-1-dead/x/y")  # cannot be removed, and a log line says so
    logging.info("step")
"""

# A handler may need whatever a step of the loop holds: locks, the log's, those of threads.
BETWEEN = """
    import asyncio, os, signal, threading
    from asyncloader._threads.blocking import run_blocking

    step = threading.Lock()

    def handle(*_):
        with step:
            print("handled", run_blocking(inner), threading.current_thread().name)

    async def inner():
        return threading.current_thread().name

    async def main():
        with step:
            os.kill(os.getpid(), signal.SIGUSR1)
            for _ in range(1000):
                pass
        await asyncio.sleep(0)
        return threading.current_thread().name

    signal.signal(signal.SIGUSR1, handle)
    print(run_blocking(main), signal.getsignal(signal.SIGUSR1) is handle)
"""

# Two of them, one while the other one's handler runs, and many more.
MANY = """
    import asyncio, os, signal
    from asyncloader._threads.blocking import run_blocking

    seen = []

    def handle(number, _):
        seen.append(number)
        if number == signal.SIGUSR1:
            os.kill(os.getpid(), signal.SIGUSR2)

    async def main():
        for _ in range(50):
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.sleep(0)
        return "done"

    signal.signal(signal.SIGUSR1, handle)
    signal.signal(signal.SIGUSR2, handle)
    print(run_blocking(main), len(seen) >= 50, seen.count(signal.SIGUSR2) > 0)
"""

# One that stands in the last step is handled before the call returns, and may end it.
LAST = """
    import os, signal, sys
    from asyncloader._threads.blocking import run_blocking

    def end(*_):
        sys.exit(7)

    async def main():
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        run_blocking(main)
    except SystemExit as error:
        print("exit", error.code, signal.getsignal(signal.SIGTERM) is end)
"""

# A callback that does not return: Ctrl-C waits for the loop for a second, and then no longer.
STUCK = """
    import os, signal, threading
    from asyncloader._threads.blocking import run_blocking

    async def main():
        while True:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        run_blocking(main)
    except KeyboardInterrupt:
        print("interrupted")
"""


# The same signal again, in the same step, while its thread holds the lock of a log: once is enough.
TWICE_IN_A_STEP = """
    import logging, os, signal, sys, torch
    from asyncloader import Loader, Saver

    folder, sends = sys.argv[1], [2]
    tensors = {"w": torch.ones(3)}
    saved = []

    def save(*_):
        if not saved:
            saved.append(Saver.to(folder + "/second", None, tensors).save())

    class Handler(logging.Handler):
        def emit(self, record):
            for _ in range(sends.pop() if sends else 0):
                os.kill(os.getpid(), signal.SIGTERM)

    Saver.to(folder + "/first", None, tensors).save()
    signal.signal(signal.SIGTERM, save)
    logging.basicConfig(level=logging.INFO, handlers=[Handler()])
    Loader(folder + "/first", None, {"w": torch.zeros(3)}).load()
    print(len(saved), len(sends))
"""

# A handler that raises at any moment, such as a time-out: the others are put back.
PUT_BACK = """
    import asyncio, random, signal
    from asyncloader._threads.blocking import run_blocking

    class Late(Exception):
        pass

    def alarm(*_):
        raise Late

    def end(*_):
        pass

    async def main():
        await asyncio.sleep(0)

    handlers = {signal.SIGALRM: alarm, signal.SIGTERM: end, signal.SIGINT: end}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    late, random_moment = 0, random.Random(1)
    for _ in range(400):
        try:
            signal.setitimer(signal.ITIMER_REAL, random_moment.uniform(1e-6, 1e-3))
            run_blocking(main)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Late:
            late += 1
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Late:
            pass
        assert all(signal.getsignal(n) is one for n, one in handlers.items())
    print(late > 0)
"""

# A loop that rests while a call blocks: its signals reach it afterwards.
RESTING = """
    import asyncio, os, signal
    from asyncloader._threads.blocking import run_blocking

    seen = []
    loop = asyncio.new_event_loop()

    async def listen():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, seen.append, "told")

    async def main():
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0)

    loop.run_until_complete(listen())
    run_blocking(main)
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(asyncio.sleep(0))
    print(seen)
"""

# What a call installed in the place of a handler may outlive it: kept by a library, or in a fork.
OUTLIVED = """
    import os, signal
    from asyncloader._threads.blocking import run_blocking

    seen, kept = [], []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))

    async def main():
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(len(seen))
        print("in the child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        kept.append(signal.signal(signal.SIGTERM, lambda *_: seen.append("library")))

    run_blocking(main)
    signal.signal(signal.SIGTERM, kept.pop())
    os.kill(os.getpid(), signal.SIGTERM)
    print(seen)
"""

# Two signals in the last step: both handlers run, though the first one raises.
BOTH = """
    import os, signal
    from asyncloader._threads.blocking import run_blocking

    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("told"))

    async def main():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        run_blocking(main)
    except KeyboardInterrupt:
        print("interrupted", seen)
"""

# Ctrl-C at any moment beside a running loop: it ends the wait, and the call.
BESIDE = """
    import asyncio, random, signal
    from asyncloader._threads.blocking import run_blocking

    class Pressed(BaseException):
        pass

    def press(*_):
        raise Pressed

    async def main():
        await asyncio.sleep(0)

    async def outer():
        pressed, moment = 0, random.Random(1)
        for _ in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, moment.uniform(1e-6, 1e-3))
                run_blocking(main)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Pressed:
                pressed += 1
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Pressed:
                pass
        return pressed

    signal.signal(signal.SIGALRM, press)
    print(asyncio.run(outer()) > 0)
"""


def output_of(script: str, *arguments: str) -> str:
    done = python("-c", textwrap.dedent(script), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT to send")
def test_control_c_once_more_does_not_leave_a_call_that_writes_to_memory() -> None:
    assert output_of(TWICE) == "interrupted False MainThread\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM to send")
@pytest.mark.parametrize("handler", ["function", "partial", "method", "object"])
def test_a_handler_may_save_while_its_thread_writes_a_log(tmp_path: Path, handler: str) -> None:
    assert output_of(LOGGING, str(tmp_path / "saved"), handler).endswith("saved\n")
    assert load_tensors(tmp_path / "saved")["w"].tolist() == [1, 1, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGUSR1 to send")
def test_handlers_run_between_two_steps_of_the_loop_and_all_of_it_on_the_main_thread() -> None:
    assert output_of(BETWEEN) == "handled MainThread MainThread\nMainThread True\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGUSR1 to send")
def test_many_signals_do_not_disturb_a_call() -> None:
    assert output_of(MANY) == "done True True\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM to catch")
def test_a_handler_whose_signal_comes_at_the_end_runs_before_the_call_returns() -> None:
    assert output_of(LAST) == "exit 7 True\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM to send")
def test_a_signal_that_comes_again_in_a_step_counts_once(tmp_path: Path) -> None:
    assert output_of(TWICE_IN_A_STEP, str(tmp_path)) == "1 0\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no timers that send signals")
@pytest.mark.parametrize("script", [PUT_BACK, BESIDE], ids=["put back", "beside a loop"])
def test_a_handler_may_raise_at_any_moment(script: str) -> None:
    assert output_of(script) == "True\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM to send")
def test_a_loop_that_rests_during_a_call_is_told_of_its_signals() -> None:
    assert output_of(RESTING) == "['told']\n"


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs fork")
def test_a_stand_in_for_a_handler_that_outlives_its_call_calls_that_handler() -> None:
    assert output_of(OUTLIVED) == "in the child 1\n['mine']\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM to send")
def test_every_handler_runs_though_one_of_them_raises() -> None:
    assert output_of(BOTH) == "interrupted ['told']\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT to send")
def test_control_c_once_more_ends_a_callback_that_does_not_return() -> None:
    assert output_of(STUCK) == "interrupted\n"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_within_a_callback_leaves_nothing_behind(
    checkpoint: Path, kind: type[BaseException]
) -> None:
    content = data([1, 2, 3])
    write_checkpoint(checkpoint, {"t": content}, {})
    table = table_for(content)

    def interrupt(_: Progress) -> None:
        raise kind

    with unchanged(table), pytest.raises(kind):
        Loader(checkpoint, {"t": table}, progress=interrupt).load()


FEW = """
import os, resource, sys
import torch
from asyncloader import CheckpointReader, Saver, load_tensors
from asyncloader.cli import run

folder = sys.argv[1]
new = folder + "/new"
works = {
    "load_tensors": lambda: load_tensors(folder + "/c"),
    "read": lambda: CheckpointReader(folder + "/c").read_tensor("w"),
    "save": lambda: Saver(path=new, tensors={"w": torch.ones(3)}).save(),
}

def causes(error):
    while error is not None:
        yield error
        error = error.__cause__

in_use = lambda: sorted(map(int, os.listdir("/proc/self/fd")))[:-1]
for work in works.values():
    work()
before = in_use()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for spare in range(1, 17):
    for what, work in works.items():
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[-1] + 1 + spare, hard))
        said = []
        try:
            work()
        except Exception as error:
            said = [str(cause) for cause in causes(error)]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not said or any("Too many open files" in text for text in said), (spare, what, said)
        assert spare > 6 or "ulimit -n" in said[0], (spare, what, said)
        assert in_use() == before, (spare, what, in_use(), before)
resource.setrlimit(resource.RLIMIT_NOFILE, (before[-1] + 4, hard))
assert run(["inspect", folder + "/c"]) == 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what is open in /proc")
def test_too_few_descriptors_is_what_the_error_says_and_none_stays_open(checkpoint: Path) -> None:
    """A service with a leak of its own was told of a running event loop, and lost more."""
    command = [sys.executable, "-c", FEW, str(checkpoint.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Too many open files" in done.stderr
    assert done.stderr.count("\n") == 1


def no_thread(_: threading.Thread) -> NoReturn:
    raise RuntimeError("can't start new thread")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what is open in /proc")
async def test_where_no_thread_is_to_be_had_nothing_stays_open() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            run_blocking(partial(asyncio.sleep, 0), start=no_thread)
    assert set(Path("/proc/self/fd").iterdir()) == before


MEANWHILE = """
    import faulthandler
    import os
    import signal
    import sys

    import torch

    from asyncloader import Saver

    faulthandler.dump_traceback_later(60, exit=True)
    folder, tensors = sys.argv[1], {"w": torch.zeros(1000)}

    def save_and_exit(*_):
        print("saved", Saver.to(f"{folder}/last", {}, tensors).save().committed, flush=True)
        sys.exit(7)

    def interrupt(_):
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, save_and_exit)
    Saver.to(f"{folder}/first", {}, tensors, progress=interrupt).save()
    while True:  # until the handler has run
        pass
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM to catch")
def test_a_signals_handler_may_save_and_exit_while_a_save_goes_on(tmp_path: Path) -> None:
    """It came in at any point of the loop that was saving, which never ended then."""
    done = python("-c", textwrap.dedent(MEANWHILE), tmp_path)
    assert (done.returncode, done.stdout) == (7, "saved True\n"), done.stderr
    assert (tmp_path / "last" / "index").exists()


LATE = """
    import asyncio
    import atexit
    import os
    import signal
    import sys
    import threading

    import torch

    from asyncloader import HashTable, Loader, Saver

    where, folder = sys.argv[1:]
    table = HashTable([2], name="t")
    table.insert(torch.arange(100), torch.ones(100, 2))

    def save_and_load(*_):
        Saver(path=folder, hashtables={"t": table}, tensors={"w": torch.ones(3)}).save()
        again, tensor = HashTable([2], name="t"), torch.zeros(3)
        asyncio.run(Loader(folder, {"t": again}, {"w": tensor}).aload())
        print(len(again), tensor.sum().item(), flush=True)

    def after_the_main_thread():
        threading.main_thread().join()
        if where == "thread":
            save_and_load()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    if where == "atexit":
        atexit.register(save_and_load)
    else:
        signal.signal(signal.SIGTERM, save_and_load)
        threading.Thread(target=after_the_main_thread).start()
"""


@pytest.mark.parametrize("where", ["atexit", "thread", "signal"])
def test_what_is_saved_while_the_program_ends_is_saved_or_an_error_says_why(
    tmp_path: Path, where: str
) -> None:
    """`concurrent.futures` takes no more work then; threads can still be started, but by 3.12."""
    done = python("-c", textwrap.dedent(LATE), where, tmp_path)
    assert done.returncode == 0, done.stderr
    if "can't create new thread" in done.stderr:
        assert sys.version_info[:2] == (3, 12)
        assert "at interpreter shutdown: load or save before the program ends" in done.stderr
        assert list(tmp_path.iterdir()) == []
    else:
        assert (done.stdout, done.stderr) == ("100 3.0\n", "")
