"""Reads files of a folder of shards on a server: http(s) by requests, s3 and gs by fsspec.

Nothing is ever executed for a URL, so `pipe:` and similar schemes are refused. Transient failures (server
errors, stalls, broken connections, a wrong hash) are retried; others are raised at once. requests and fsspec
are imported when a URL is first read, because most data worker processes read local files.
"""

import hashlib
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from megafusion.errors import UserError
from megafusion.storage import expand_path

SCHEMES = ("http", "https", "s3", "gs")
NUM_TRIES = 6
FIRST_WAIT_SECONDS = 0.5
TIMEOUT_SECONDS = (10.0, 30.0)  # to connect, between two bytes
CHUNK = 1 << 20
T = TypeVar("T")


class _Transient(Exception):
    """A failure that may not recur."""


def is_remote(location: Path | str) -> bool:
    """Whether a location is a URL, not a path."""
    return "://" in str(location)


def check_location(location: Path | str) -> str:
    """A path or URL that can be read. Raises ValueError for others, such as `pipe:`."""
    text = str(location)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    if not scheme:
        return expand_path(text)
    if scheme[1] not in SCHEMES or not is_remote(text):
        raise ValueError(
            f"{text}: must be a path or a URL of {', '.join(f'{s}://' for s in SCHEMES)}; commands are "
            "never run (write ./ before a path with a colon)"
        )
    if re.search(r"[?#\s]", text):
        raise ValueError(f"{text}: a folder's URL may not have a query, a fragment or spaces")
    return text.rstrip("/")


def read_remote(url: str) -> bytes:
    """A small file. Raises UserError if it cannot be read."""
    return _retry(url, lambda: b"".join(_chunks(url)))


def fetch(url: str, into: BinaryIO, size: int, sha256: str) -> None:
    """Write a file of known size and hash. Raises UserError if it cannot be read or differs."""

    def once() -> None:
        into.seek(0)
        found, num_bytes = hashlib.sha256(), 0
        for chunk in _chunks(url):
            num_bytes += len(chunk)
            if num_bytes > size:
                break
            found.update(chunk)
            into.write(chunk)
        if num_bytes != size:
            raise _Transient(
                f"more than {size} bytes" if num_bytes > size else f"{num_bytes} of {size} bytes"
            )
        if found.hexdigest() != sha256:
            raise _Transient(f"hash {found.hexdigest()[:12]} where the manifest says {sha256[:12]}")

    _retry(url, once)


def _retry(url: str, once: Callable[[], T]) -> T:
    """Call `once` until it succeeds, with exponential backoff. Raises UserError after NUM_TRIES."""
    for number in range(NUM_TRIES):
        try:
            return once()
        except _Transient as error:
            reason = error
        if number + 1 < NUM_TRIES:
            time.sleep(FIRST_WAIT_SECONDS * 2**number * random.uniform(0.5, 1.5))
    raise UserError(f"{url}: not available in {NUM_TRIES} tries; the last: {reason}")


def _chunks(url: str) -> Iterator[bytes]:
    yield from _http_chunks(url) if url.startswith("http") else _object_chunks(url)


def _http_chunks(url: str) -> Iterator[bytes]:
    import requests
    import urllib3

    try:
        headers = {"Accept-Encoding": "identity"}
        with requests.get(url, stream=True, timeout=TIMEOUT_SECONDS, headers=headers) as answer:
            if answer.status_code >= 500 or answer.status_code in (408, 429):
                raise _Transient(f"the server answers {answer.status_code} {answer.reason}")
            if answer.status_code != 200:
                raise UserError(f"{url}: the server answers {answer.status_code} {answer.reason}")
            yield from answer.iter_content(CHUNK)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise _Transient(str(error)) from error
    except urllib3.exceptions.HTTPError as error:
        raise _Transient(str(error)) from error
    except requests.RequestException as error:
        raise UserError(f"{url}: {error}") from error


def _object_chunks(url: str) -> Iterator[bytes]:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{url}: no such object") from error
    except PermissionError as error:
        raise UserError(f"{url}: access denied ({error}); check the credentials of this machine") from error
    except Exception as error:  # each store's client raises its own errors
        raise _Transient(f"{type(error).__name__}: {error}") from error
