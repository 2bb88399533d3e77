"""A server of HTTP that does what a test tells it: whole answers, cut ones, wrong ones, none."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request for bytes.

    Attributes:
        number: Of all such requests, from 0.
        path: Without the slash that it begins with.
        begin: The first byte.
        end: One past the last.
        key: The header `X-Key`.
    """

    number: int
    path: str
    begin: int
    end: int
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a request is answered: well, unless a field says otherwise.

    Attributes:
        status: In place of 206; there is no content then.
        headers: In place of, or beside, those of a good answer.
        cut: Bytes of the content after which the connection is closed.
        whole: Whether the range is ignored.
        waits: The answer comes once it is set.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    whole: bool = False
    waits: threading.Event | None = None


@dataclass(slots=True)
class Liar:
    """A server that runs.

    Attributes:
        files: What it has, by path.
        script: Says how a request is answered.
        asked: All requests for bytes.
        tag: What stands before each ETag: `W/` makes it a weak one.
    """

    files: dict[str, bytes]
    script: Callable[[Asked], Answer] = lambda _: Answer()
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    tag: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def liar(files: dict[str, bytes], *, tls: ssl.SSLContext | None = None) -> Iterator[Liar]:
    """Run a server until the block is left; with `tls`, one of HTTPS."""
    held = Liar(files)

    class Handler(_Handler):
        liar = held

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        scheme = "http" if tls is None else "https"
        held.url = f"{scheme}://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield held
        finally:
            server.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    liar: Liar
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as in the base class
        pass

    def do_HEAD(self) -> None:
        content = self.liar.files.get(self.path[1:])
        if content is None:
            self._send(404, {}, b"")
        else:
            self._send(200, {"ETag": self._tag(content)}, content, body=False)

    def do_GET(self) -> None:
        path = self.path[1:]
        content = self.liar.files.get(path)
        if content is None:
            self._send(404, {}, b"")
            return
        begin, end = 0, len(content)
        if (wanted := _RANGE.fullmatch(self.headers.get("Range", ""))) is not None:
            begin, end = int(wanted[1]), min(int(wanted[2]) + 1, end)
        with self.liar.lock:
            asked = Asked(len(self.liar.asked), path, begin, end, self.headers.get("X-Key"))
            self.liar.asked.append(asked)
        answer = self.liar.script(asked)
        if answer.waits is not None:
            answer.waits.wait()
        if self.headers.get("If-Match") not in {None, self._tag(content)}:
            self._send(412, {}, b"")
        elif answer.status:
            self._send(answer.status, answer.headers, b"")
        elif answer.whole:
            self._send(200, {"ETag": self._tag(content)} | answer.headers, content)
        else:
            where = f"bytes {begin}-{end - 1}/{len(content)}"
            headers = {"Content-Range": where, "ETag": self._tag(content)} | answer.headers
            self._send(206, headers, content[begin:end], cut=answer.cut)

    def _send(
        self,
        status: int,
        headers: dict[str, str],
        content: bytes,
        *,
        body: bool = True,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the caller has gone
            if body:
                self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def _tag(self, content: bytes) -> str:
        return f'{self.liar.tag}"{hashlib.sha256(content).hexdigest()[:16]}"'
