"""Google Cloud Storage's XML API before a server of S3, for tests: run by any Python.

`python gcs_process.py SETTINGS` prints the port, and ends when its standard input does. SETTINGS is
JSON: of the server of S3 `port`, `access_key`, `secret_key` and `region`, of the service account
that is let in `email`, `key_id` and `modulus` of its public key.

What differs from S3 is done here: who asks is known by RS256 tokens and by signed URLs, objects
have generations, and of writes on a condition one takes place.
"""

from __future__ import annotations

import base64
import calendar
import contextlib
import hashlib
import hmac
import http.client
import http.server
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Mapping

HOST = "127.0.0.1"
_SIGNED_HOST = (
    "storage.googleapis.com"  # in signatures; obstore puts it there whatever the endpoint
)
_EXPONENT = 65537
_SHA256 = bytes.fromhex("3031300d060960864801650304020105000420")  # what PKCS #1 writes before one
_STAMP = "%Y%m%dT%H%M%SZ"
_SKEW = 900.0  # seconds that clocks may differ
_BLOCK = 256 << 10
_ASKED = (
    "content-type", "content-encoding", "content-language", "content-disposition", "cache-control",
    "range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since",
)  # fmt: skip
_ANSWERED = (*_ASKED[:5], "content-range", "accept-ranges", "etag", "last-modified")
_OWN, _THEIRS = "x-goog-meta-", "x-amz-meta-"


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(status, code, message)
        said = f"<Code>{code}</Code><Message>{escape(message)}</Message>"
        self.status = status
        self.body = f"<?xml version='1.0' encoding='UTF-8'?><Error>{said}</Error>".encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Lets one service account in."""

    email: str
    key_id: str
    modulus: int

    def check(self, method: str, path: str, query: dict[str, str], token: str) -> None:
        """Raise `RefusedError` unless a request is signed, or has a token.

        Args:
            method: Of the request.
            path: As it was sent.
            query: Decoded.
            token: The header `Authorization`.
        """
        if "X-Goog-Signature" in query:
            self._check_url(method, path, query)
        elif not token:
            raise RefusedError(401, "AuthenticationRequired", "Anonymous caller has no access.")
        elif not self._is_good(token):
            raise RefusedError(401, "AuthenticationRequired", "Invalid credentials.")

    def _is_good(self, token: str) -> bool:
        """Say whether it is a JWT that the service account has made for itself."""
        text, _, signature = token.removeprefix("Bearer ").rpartition(".")
        try:
            if not self._has_signed(text, _decoded(signature)):
                return False
        except ValueError:
            return False
        head, claims = (json.loads(_decoded(part)) for part in text.split("."))
        now = time.time()
        return (
            (head["alg"], head["kid"]) == ("RS256", self.key_id)
            and claims["iss"] == claims["sub"] == self.email
            and claims["scope"].startswith("https://www.googleapis.com/auth/")
            and claims["iat"] - _SKEW < now < claims["exp"] <= claims["iat"] + 3600
        )

    def _check_url(self, method: str, path: str, query: dict[str, str]) -> None:
        given = query.get
        date, expires = given("X-Goog-Date", ""), given("X-Goog-Expires", "")
        scope = f"{date[:8]}/auto/storage/goog4_request"
        asked = {name: text for name, text in query.items() if name != "X-Goog-Signature"}
        request = (
            f"{method}\n{path}\n{_joined(asked)}\nhost:{_SIGNED_HOST}\n\nhost\nUNSIGNED-PAYLOAD"
        )
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = f"GOOG4-RSA-SHA256\n{date}\n{scope}\n{digest}"
        try:
            is_ours = self._has_signed(text, bytes.fromhex(query["X-Goog-Signature"]))
            made = calendar.timegm(time.strptime(date, _STAMP))
            seconds = int(expires)
        except ValueError as error:
            raise RefusedError(400, "AuthenticationRequired", str(error)) from error
        if not is_ours or given("X-Goog-Credential") != f"{self.email}/{scope}":
            raise RefusedError(403, "SignatureDoesNotMatch", "Access denied.")
        if not made - _SKEW < time.time() < made + min(seconds, 604800):
            raise RefusedError(400, "ExpiredToken", "Invalid argument.")

    def _has_signed(self, text: str, signature: bytes) -> bool:
        """Say whether it is the signature of a text (RSASSA-PKCS1-v1_5 with SHA-256)."""
        length = (self.modulus.bit_length() + 7) // 8
        tail = b"\0" + _SHA256 + hashlib.sha256(text.encode()).digest()
        wanted = b"\0\1".ljust(length - len(tail), b"\xff") + tail
        found = pow(int.from_bytes(signature), _EXPONENT, self.modulus).to_bytes(length)
        return len(signature) == length and found == wanted


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "==", altchars=b"-_")


def _joined(query: Mapping[str, str]) -> str:
    """Return a query as both kinds of signatures have it."""
    pairs = sorted((quote(name, safe=""), quote(text, safe="")) for name, text in query.items())
    return "&".join(f"{name}={text}" for name, text in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3:
    """The server that keeps everything."""

    port: int
    access_key: str
    secret_key: str
    region: str

    def ask(
        self, method: str, path: str, query: Mapping[str, str], headers: dict[str, str], body: bytes
    ) -> http.client.HTTPResponse:
        """Send a request, signed (AWS's Signature Version 4), and return the answer.

        Args:
            method: Of the request.
            path: Decoded.
            query: Decoded.
            headers: Their names in lower case.
            body: All of it.
        """
        date, payload = time.strftime(_STAMP, time.gmtime()), "UNSIGNED-PAYLOAD"
        where = quote(path, safe="/")
        headers = {
            **headers,
            "host": f"{HOST}:{self.port}",
            "x-amz-date": date,
            "x-amz-content-sha256": payload,
        }
        signed = sorted(name for name in headers if name == "host" or name.startswith("x-amz-"))
        lines = "".join(f"{name}:{headers[name]}\n" for name in signed)
        request = f"{method}\n{where}\n{_joined(query)}\n{lines}\n{';'.join(signed)}\n{payload}"
        digest = hashlib.sha256(request.encode()).hexdigest()
        scope = f"{date[:8]}/{self.region}/s3/aws4_request"
        key = f"AWS4{self.secret_key}".encode()
        for part in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{digest}"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.access_key}/{scope}, "
            f"SignedHeaders={';'.join(signed)}, Signature={key.hex()}"
        )
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        connection.request(method, f"{where}?{_joined(query)}", body=body, headers=headers)
        return connection.getresponse()


@dataclass(slots=True)
class Generations:
    """The generations of objects, by their paths, and a lock for each of them.

    What is written behind this server's back has a generation from when it is first seen.
    """

    _numbers: dict[str, int] = field(default_factory=dict)
    _locks: dict[str, threading.Lock] = field(default_factory=dict)

    def lock(self, path: str) -> threading.Lock:
        return self._locks.setdefault(path, threading.Lock())

    def of(self, path: str) -> int:
        """Return an object's; whoever calls any of these has the lock."""
        return self._numbers.get(path) or self.next(path)

    def next(self, path: str) -> int:
        """Make one for what was written: microseconds, as in the cloud, yet never the same."""
        now = max(time.time_ns() // 1000, self._numbers.get(path, 0) + 1)
        self._numbers[path] = now
        return now


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of a connection, one after the other."""

    gate: Gate
    s3: S3
    generations = Generations()
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as in the base class
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has gone
            super().handle()

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        try:
            self.gate.check(self.command, parts.path, query, self.headers.get("Authorization", ""))
            query = {name: text for name, text in query.items() if "x-goog-" not in name.lower()}
            self._pass_on(*self._asked(unquote(parts.path), query, body))
        except RefusedError as no:
            self._send(no.status, {"content-type": "application/xml"}, no.body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815  # as in the base class

    def _asked(
        self, path: str, query: dict[str, str], body: bytes
    ) -> tuple[http.client.HTTPResponse, int | None]:
        """Return the answer of S3, and the generation of the object that it is about."""
        method, headers = self.command, {}
        for name, text in self.headers.items():
            if (lower := name.lower()) in _ASKED or lower.startswith(_OWN):
                headers[lower.replace(_OWN, _THEIRS)] = text
        if (source := self.headers.get("x-goog-copy-source")) is not None:
            headers["x-amz-copy-source"] = "/" + quote(unquote(source).lstrip("/"), safe="/")
        is_part = "uploads" in query or ("uploadId" in query and method != "POST")
        if not path[1:].partition("/")[2] or is_part:  # of a bucket, or of no object yet
            return self.s3.ask(method, path, query, headers, body), None
        wanted = self.headers.get("x-goog-if-generation-match")
        generation = query.pop("generation", None)
        with self.generations.lock(path):
            if wanted is not None or generation is not None or method == "DELETE":
                found = self.s3.ask("HEAD", path, {}, {}, b"").status == http.HTTPStatus.OK
                now = str(self.generations.of(path)) if found else "0"
                if wanted not in {None, now}:
                    raise RefusedError(412, "PreconditionFailed", "Of another generation.")
                if (now == "0" and method == "DELETE") or generation not in {None, now}:
                    raise RefusedError(404, "NoSuchKey", "No such object.")
            answer = self.s3.ask(method, path, query, headers, body)
            if answer.status >= http.HTTPStatus.MULTIPLE_CHOICES or method == "DELETE":
                return answer, None
            is_read = method in {"GET", "HEAD"}
            return answer, (self.generations.of if is_read else self.generations.next)(path)

    def _pass_on(self, answer: http.client.HTTPResponse, generation: int | None) -> None:
        headers = {}
        for name, text in answer.getheaders():
            if (lower := name.lower()) in _ANSWERED or lower.startswith(_THEIRS):
                headers[lower.replace(_THEIRS, _OWN)] = text
        if generation is not None:
            headers |= {"x-goog-generation": str(generation), "x-goog-metageneration": "1"}
        with contextlib.closing(answer):
            length = answer.headers.get("Content-Length")
            if length is None or self.command not in {"GET", "HEAD"}:
                self._send(answer.status, headers, answer.read())
                return
            self._send(answer.status, headers, None, length)
            while block := answer.read(_BLOCK):
                self.wfile.write(block)
            self.close_connection |= bool(answer.length)  # it was cut

    def _send(
        self, status: int, headers: dict[str, str], body: bytes | None, length: str = ""
    ) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        if status != http.HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", length or str(len(body or b"")))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    """Has a thread for each connection, and takes as many at once as come."""

    request_queue_size = 1024
    daemon_threads = True


def main() -> None:
    told: dict[str, Any] = json.loads(sys.argv[1])
    Handler.gate = Gate(
        email=told["email"], key_id=told["key_id"], modulus=int(told["modulus"], 16)
    )
    Handler.s3 = S3(**{name: told[name] for name in ("port", "access_key", "secret_key", "region")})
    server = Server((HOST, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)  # noqa: T201
    sys.stdin.read()


if __name__ == "__main__":
    main()
