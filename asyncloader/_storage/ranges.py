"""Reads ranges of objects over HTTP, straight into memory, on threads.

A client as obstore makes a copy of its own first. `recv_into` needs none: a load from a server on
the same machine was 1.2 times as fast, at a little more than half of the processor time
(docs/performance.md). And a read that breaks has kept what came.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import ssl
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from .flight import end_of, shut
from .opening import FileChangedError
from .retrying import LaterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .flight import Flight, Target

_SILENCE = 20.0  # seconds without a byte
_SLOWEST = 256 << 10  # bytes a second: a request that gets fewer is given up, and goes on anew
_LEAST = 30.0  # seconds that every request may take
_STEP = 1 << 20
# What came before a connection broke counts, if it is as much: a server that sends a few bytes a
# connection would have us come back for ever.
_WORTH = 16 << 10
_REDIRECTS = 5
_ELSEWHERE = {301, 302, 303, 307, 308}
_PASSING = {
    HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS,
}  # fmt: skip


class RangeReader:
    """Connections to servers, kept open from one request to the next. Thread-safe.

    Args:
        options: obstore's `client_options`. Of them count `default_headers`, `proxy_url`,
            `root_certificate` and `allow_invalid_certificates`.

    Attributes:
        asked: One for each request: appending is safe on many threads, `+= 1` is not.
        resumed: How often a request went on at the last byte, after a connection had broken.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.resumed = 0
        self.asked: list[None] = []
        self._options = dict(options or {})
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = defaultdict(list)
        self._lock = threading.Lock()
        self._is_closed = False
        self._context: ssl.SSLContext | None = None  # made for the first server that wants it

    def close(self) -> None:
        """Close all idle connections."""
        with self._lock:
            self._is_closed = True  # a thread that was given up may come back yet
            idle, self._idle = self._idle, defaultdict(list)
        for connection in (one for some in idle.values() for one in some):
            connection.close()

    def read(
        self, target: Target, offset: int, views: Sequence[memoryview], flight: Flight, /
    ) -> int:
        """Fill views from `offset` on, as far as one request goes; return the bytes read.

        Raises:
            FileChangedError: If it is another object by now.
            OSError: If that failed.
        """
        end = end_of(target, offset, views)
        if end <= offset:
            return 0
        flight.reading.unsure = True  # the gate goes by the thread's time
        done = 0
        try:
            for piece in self._pieces(target, offset, end, views, flight):
                done += piece
                flight.reading.begun += 1  # whoever waits for it waits for the next piece
        except (OSError, http.client.HTTPException) as error:
            flight.check(None)
            if done < _WORTH:
                raise _in_words(error) from error
            self.resumed += 1
        return done

    def _pieces(
        self, target: Target, offset: int, end: int, views: Sequence[memoryview], flight: Flight
    ) -> Iterator[int]:
        """Fill views; yield after each piece how long it was."""
        answer = self._answer(target, offset, end, flight)
        until = time.monotonic() + _LEAST + (end - offset) / _SLOWEST
        left = end - offset
        with answer.closed_on_error():
            for view in views:
                for at in range(0, min(view.nbytes, left), _STEP):
                    piece = view[at : min(at + _STEP, left)]
                    _fill(answer.response, piece)
                    flight.check(answer.shut)
                    yield piece.nbytes
                    _check_time(until)
                left -= min(view.nbytes, left)
            flight.check(None)  # or an interrupt might end what the connection is used for next
        self._keep(target.url or "", answer)

    def _answer(self, target: Target, offset: int, end: int, flight: Flight) -> _Answer:
        """Return the answer to a request, checked."""
        url = target.url
        assert url is not None, "else the store's client reads"
        headers = {"Range": f"bytes={offset}-{end - 1}"}
        if target.tag is not None:
            headers["If-Match"] = target.tag
        own = self._options.get("default_headers", {})  # for the first server alone: secrets, maybe
        for _ in range(_REDIRECTS):
            self.asked.append(None)
            answer = self._asked(url, headers | own, flight)
            where = answer.response.headers.get("Location")
            if answer.response.status not in _ELSEWHERE or where is None:
                break
            answer.close()
            before, url = url, urljoin(url, where)
            if urlsplit(before).netloc != urlsplit(url).netloc:
                own = {}
        with answer.closed_on_error():
            _check(target, offset, end, answer.response)
        return answer

    def _asked(self, url: str, headers: dict[str, str], flight: Flight) -> _Answer:
        parts = urlsplit(url)
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        while True:
            connection, is_fresh = self._take(parts.scheme, parts.netloc)
            try:
                if connection.sock is None:
                    connection.connect()
                # Where the server ends the connection, it lets go of the socket with the answer.
                stop = partial(shut, connection.sock)
                flight.check(stop)
                connection.request("GET", path, headers=headers)
                return _Answer(connection, connection.getresponse(), stop)
            except (ConnectionError, http.client.RemoteDisconnected):
                connection.close()
                if is_fresh:
                    raise
                # The server has closed it since it was last used.
            except BaseException:
                connection.close()
                raise

    def _take(self, scheme: str, host: str) -> tuple[http.client.HTTPConnection, bool]:
        """Return a connection, and whether it is a new one."""
        with self._lock:
            if idle := self._idle[scheme, host]:
                return idle.pop(), False
            if scheme == "https" and self._context is None:
                self._context = self._trusting()
        proxy = self._options.get("proxy_url")
        if proxy is None and not proxy_bypass(host):
            proxy = getproxies().get(scheme)
        to = host if proxy is None else urlsplit(proxy).netloc
        connection = (
            http.client.HTTPSConnection(to, timeout=_SILENCE, context=self._context)
            if scheme == "https"
            else http.client.HTTPConnection(to, timeout=_SILENCE)
        )
        if proxy is not None:
            connection.set_tunnel(host)
        return connection, True

    def _trusting(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if (certificate := self._options.get("root_certificate")) is not None:
            text = certificate if isinstance(certificate, str) else certificate.decode()
            context.load_verify_locations(cadata=text)
        if self._options.get("allow_invalid_certificates"):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context

    def _keep(self, url: str, answer: _Answer) -> None:
        parts = urlsplit(url)
        with self._lock:
            if answer.is_over and not self._is_closed:
                self._idle[parts.scheme, parts.netloc].append(answer.connection)
                return
        answer.close()


@dataclass(frozen=True, slots=True)
class _Answer:
    """A connection, and what came on it; `shut` ends a wait for more."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse
    shut: Callable[[], object]

    @property
    def is_over(self) -> bool:
        """Whether another request may follow on the connection."""
        return self.response.isclosed() and not self.response.will_close

    def close(self) -> None:
        # Of a server that ends the connection, the response has the socket.
        self.response.close()
        self.connection.close()

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


def _fill(response: http.client.HTTPResponse, view: memoryview) -> None:
    while view:
        if not (count := response.readinto(view)):
            raise OSError(errno.EIO, "the server closed the connection early")
        view = view[count:]


def _check_time(until: float) -> None:
    if time.monotonic() > until:
        raise OSError(errno.ETIMEDOUT, "the server is too slow")


def _check(target: Target, offset: int, end: int, response: http.client.HTTPResponse) -> None:
    """Raise unless an answer is the wanted range of the object that was found first."""
    status, reason = response.status, f"{response.status} {response.reason}"
    if status == HTTPStatus.PRECONDITION_FAILED:
        raise FileChangedError(target.name)
    if status == HTTPStatus.NOT_FOUND:
        raise FileNotFoundError(errno.ENOENT, "no such object")
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        raise PermissionError(errno.EACCES, f"the server refuses: {reason}")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _PASSING:
        raise LaterError(f"the server answers {reason}", response.headers.get("Retry-After"))
    if status == HTTPStatus.OK:
        raise OSError(errno.EPROTO, "the server ignores ranges: it answers 200, with all of it")
    if status != HTTPStatus.PARTIAL_CONTENT:
        raise OSError(errno.EPROTO, f"the server answers {reason}")
    tag = response.headers.get("ETag")
    where, _, size = response.headers.get("Content-Range", "").partition("/")
    if (target.tag is not None and tag != target.tag) or size not in {"", "*", str(target.size)}:
        raise FileChangedError(target.name)
    if where != f"bytes {offset}-{end - 1}":
        raise OSError(errno.EPROTO, f"the server answers with the range {where!r}")


def _in_words(error: OSError | http.client.HTTPException) -> OSError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return OSError(errno.EPROTO, f"its certificate is not trusted: {error.verify_message}")
    if isinstance(error, TimeoutError):
        return OSError(errno.EIO, f"no byte for {_SILENCE:g} seconds")
    if isinstance(error, FileChangedError | FileNotFoundError | PermissionError | LaterError):
        return error
    if isinstance(error, ConnectionError | http.client.HTTPException):
        return OSError(errno.EIO, f"the connection broke: {error!r}")
    return error
