"""Files of a folder of shards that lies on a server: http(s) by requests, s3 and gs by fsspec.

Nothing is ever executed for a URL, so `pipe:` and its like are refused. What may pass (server errors,
stalls, broken connections, bytes of another hash) is tried again; what will not is told at once.
"""

import hashlib
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
import requests
import urllib3

from megafusion.errors import UserError

SCHEMES = ("http", "https", "s3", "gs")
NUM_TRIES = 6
FIRST_WAIT_SECONDS = 0.5
TIMEOUT_SECONDS = (10.0, 30.0)  # to connect; between two bytes
CHUNK = 1 << 20


class _MayPass(Exception):
    """A failure that another try may not meet."""


def is_remote(location: Path | str) -> bool:
    """Whether a location is a URL and no path."""
    return "://" in str(location)


def check_location(location: Path | str) -> str:
    """A path or a URL that can be read. Raises ValueError for others, `pipe:` above all."""
    text = str(location)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    if not scheme:
        return text
    if scheme[1] not in SCHEMES or not is_remote(text):
        raise ValueError(
            f"{text}: can be a path, or a URL of {', '.join(f'{s}://' for s in SCHEMES)}; no command is "
            "ever run for a configuration (write ./ before a path with a colon)"
        )
    if re.search(r"[?#\s]", text):
        raise ValueError(f"{text}: a folder's URL has no query, no fragment and no spaces")
    return text.rstrip("/")


def read_remote(url: str) -> bytes:
    """A small file. Raises UserError where it is not to be had."""
    return _tried(url, lambda: b"".join(_chunks(url)))


def fetch(url: str, into: BinaryIO, size: int, sha256: str) -> None:
    """Write a file whose size and hash are known. Raises UserError where what comes is another one."""

    def once() -> None:
        into.seek(0)
        found, left = hashlib.sha256(), size
        for chunk in _chunks(url):
            left -= len(chunk)
            if left < 0:
                break
            found.update(chunk)
            into.write(chunk)
        if left:
            raise _MayPass(f"{'more' if left < 0 else left} bytes {'' if left < 0 else 'fewer '}than {size}")
        if found.hexdigest() != sha256:
            raise _MayPass(f"bytes of hash {found.hexdigest()[:12]} where the manifest says {sha256[:12]}")

    _tried(url, once)


def _tried(url: str, once):
    for number in range(NUM_TRIES):
        try:
            return once()
        except _MayPass as error:
            reason = error
        if number + 1 < NUM_TRIES:
            time.sleep(FIRST_WAIT_SECONDS * 2**number * random.uniform(0.5, 1.5))
    raise UserError(f"{url}: not to be had in {NUM_TRIES} tries, the last: {reason}")


def _chunks(url: str) -> Iterator[bytes]:
    yield from _http_chunks(url) if url.startswith("http") else _object_chunks(url)


def _http_chunks(url: str) -> Iterator[bytes]:
    try:
        headers = {"Accept-Encoding": "identity"}
        with requests.get(url, stream=True, timeout=TIMEOUT_SECONDS, headers=headers) as answer:
            if answer.status_code >= 500 or answer.status_code in (408, 429):
                raise _MayPass(f"the server answers {answer.status_code} {answer.reason}")
            if answer.status_code != 200:
                raise UserError(f"{url}: the server answers {answer.status_code} {answer.reason}")
            yield from answer.iter_content(CHUNK)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise _MayPass(str(error)) from error
    except urllib3.exceptions.HTTPError as error:
        raise _MayPass(str(error)) from error
    except requests.RequestException as error:
        raise UserError(f"{url}: {error}") from error


def _object_chunks(url: str) -> Iterator[bytes]:
    try:
        file = fsspec.open(url, "rb").open()
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{url}: no such object") from error
    except Exception as error:  # each store's client has errors of its own
        raise _MayPass(f"{type(error).__name__}: {error}") from error
    with file:
        while True:
            try:
                chunk = file.read(CHUNK)
            except Exception as error:
                raise _MayPass(f"{type(error).__name__}: {error}") from error
            if not chunk:
                return
            yield chunk
