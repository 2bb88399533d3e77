"""What obstore raises, in a line of ours, without a secret."""

from __future__ import annotations

import contextlib
import errno
import re
from http import HTTPStatus
from typing import TYPE_CHECKING

from .folder import StoreRefusalError
from .opening import FileChangedError

if TYPE_CHECKING:
    from collections.abc import Iterator


NO_BUCKET = "no such bucket"
_NO_BUCKETS = ("NoSuchBucket", "ContainerNotFound")
_STATUS = re.compile(r"status code: ((\d\d\d)[\w ]*)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
_UNTRUSTED = re.compile(r"InvalidCertificate\(\s*(\w+)")
_UNCONNECTED = re.compile(r'ConnectError\(.*?(?:message|error): "([^"]*)"', re.DOTALL)
_SERVER = re.compile(r"\w+://[^/\s]*")
# Who is asked for credentials if none are given: a machine of the cloud would answer.
_MACHINE = "//169.254."
_CREDENTIALS = {
    "S3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "GCS": "GOOGLE_APPLICATION_CREDENTIALS",
    "MicrosoftAzure": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
# Of messages: what follows a URL's `?` may be a signature.
_QUERY = re.compile(r"\?[^\s)\"']*")
_LONGEST = 300


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise an `OSError` about an object in place of what obstore raises."""
    import obstore.exceptions as errors  # noqa: PLC0415  # an extra

    try:
        yield
    except FileNotFoundError as error:
        no_bucket = any(code in str(error) for code in _NO_BUCKETS)
        problem = NO_BUCKET if no_bucket else "no such object"
        raise FileNotFoundError(errno.ENOENT, problem, what) from error
    except errors.PreconditionError as error:
        raise FileChangedError(what.rpartition("/")[2]) from error
    except errors.NotSupportedError as error:
        raise OSError(errno.ENOTSUP, _in_words(error), what) from error
    except errors.BaseError as error:
        raise _explained(error, what) from error


def _explained(error: BaseException, what: str) -> OSError:
    import obstore.exceptions as errors  # noqa: PLC0415  # an extra

    text = str(error)
    found = _STATUS.search(text)
    status = int(found[2]) if found else 0
    if _MACHINE in text:
        store = next((name for name in _CREDENTIALS if f"{name} error" in text), "S3")
        problem = f"no credentials: give storage_options, or set {_CREDENTIALS[store]}"
        return StoreRefusalError(errno.EACCES, problem, what)
    refused = isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError)
    if refused or status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        problem = f"refused; do the credentials allow it? ({_in_words(error)})"
        return StoreRefusalError(errno.EACCES, problem, what)
    if status == HTTPStatus.NOT_FOUND:  # of a list
        return FileNotFoundError(errno.ENOENT, NO_BUCKET, what)
    if (why := _UNTRUSTED.search(text)) is not None:
        problem = f"the server's certificate is not trusted: {why[1]}"
        return OSError(errno.EPROTO, problem, what)
    if status == HTTPStatus.NOT_IMPLEMENTED:
        return OSError(errno.ENOTSUP, _in_words(error), what)
    stays = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
    number = errno.EPROTO if stays and status not in _PASSING else errno.EIO
    return OSError(number, _in_words(error), what)


def _in_words(error: BaseException) -> str:
    """Say what a server answered, or why there was none; else what obstore says."""
    text = str(error)
    if (status := _STATUS.search(text)) is not None:
        code = _CODE.search(text)
        return f"{status[1].strip()}, {code[1]}" if code else status[1].strip()
    if (why := _UNCONNECTED.search(text)) is not None:
        server = _SERVER.search(text)
        return f"no connection to {server[0] if server else 'the server'}: {why[1]}"
    first, *_ = text.strip().splitlines() or [type(error).__name__]
    return _QUERY.sub("?…", first)[:_LONGEST]
