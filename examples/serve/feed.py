"""Server-sent events for whoever watches, however many and however slow they are."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING

from starlette.responses import StreamingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.types import Receive, Scope, Send

__all__ = ["EventStream", "Feed", "message"]

_WAITING = 64


def message(kind: str, data: bytes) -> bytes:
    """Return one event as it goes over the wire. `data` is one line."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


class _Mailbox:
    """What one client has yet to be sent: the last events, and the latest state only."""

    def __init__(self) -> None:
        self.events: deque[bytes] = deque(maxlen=_WAITING)
        self.state = b""
        self.missed = 0
        self.closed = False
        self.news = asyncio.Event()

    def post(self, event: bytes) -> None:
        self.missed += len(self.events) == _WAITING  # the oldest one falls out
        self.events.append(event)
        self.news.set()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await self.news.wait()
        if self.closed:
            raise StopAsyncIteration
        missed = [message("missed", str(self.missed).encode())] if self.missed else []
        text = b"".join([*missed, *self.events, self.state])
        self.events.clear()
        self.state, self.missed = b"", 0
        self.news.clear()
        return text


class Feed:
    """Gives all open streams the same messages, each encoded once.

    A client that reads slowly skips states, and past the last few dozen also events, which it is
    told: what waits for it never grows beyond that. Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._mailboxes: set[_Mailbox] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._mailboxes)

    def post(self, event: bytes) -> None:
        """Send an event to everybody."""
        for mailbox in self._mailboxes:
            mailbox.post(event)

    def show(self, state: bytes) -> None:
        """Send a state, in place of one that was not sent yet."""
        for mailbox in self._mailboxes:
            mailbox.state = state
            mailbox.news.set()

    def close(self) -> None:
        """End all streams, and those to come at once: servers wait for open ones to end."""
        self._closed = True
        for mailbox in self._mailboxes:
            self._end(mailbox)

    @contextlib.contextmanager
    def open(self, first: bytes) -> Iterator[AsyncIterator[bytes]]:
        """Yield what one client is sent, from now to the end of the block."""
        mailbox = _Mailbox()
        mailbox.post(first)
        if self._closed:
            self._end(mailbox)
        self._mailboxes.add(mailbox)
        try:
            yield mailbox
        finally:
            self._mailboxes.discard(mailbox)

    @staticmethod
    def _end(mailbox: _Mailbox) -> None:
        mailbox.closed = True
        mailbox.news.set()


class EventStream(StreamingResponse):
    """The answer to a client that watches. It is known to the feed for as long as it is sent.

    Args:
        feed: What to send.
        first: What to begin with.
    """

    def __init__(self, feed: Feed, first: bytes) -> None:
        super().__init__((), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._feed = feed
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not a generator that cleans up after itself: one that is not run to its end does so only
        # when it is collected.
        with self._feed.open(self._first) as self.body_iterator:
            await super().__call__(scope, receive, send)
