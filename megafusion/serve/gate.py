"""Middleware in front of the routes: a request's host, key, slot, size and time, and its client's leaving."""

import asyncio
import hmac
import time
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megafusion.serve.answers import sse
from megafusion.serve.config import LOCAL_HOSTS, ServeConfig
from megafusion.serve.errors import Refusal
from megafusion.serve.metrics import Metrics
from megafusion.serve.worker import NoSlot, Worker

ROUTES = ("/v1/chat/completions", "/v1/images/generations", "/v1/images/edits")
LINGER_SECONDS, LINGER_BYTES = 5.0, 40_000_000
"""Limits of what is read of a request that is refused already."""
CLIENT_LEFT = 499
"""Status in the metrics, as nginx's, of a request whose client left."""


class Gate:
    """ASGI middleware. A request that generates holds a slot from its headers to the end of its answer."""

    def __init__(self, app: ASGIApp, worker: Worker, config: ServeConfig, keys: Sequence[str]):
        self.app, self.worker, self.config, self.keys = app, worker, config, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http" or scope["path"] == "/health":
            return await self.app(scope, receive, send)
        try:
            self._check_sender(scope["path"], Headers(scope=scope))
        except Refusal as refusal:
            return await refuse_unread(refusal, scope, receive, send)
        if scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            try:
                self._check_size(scope["method"], Headers(scope=scope))
                if self.worker.is_closing and scope["path"].startswith("/v1/"):
                    raise self._no_slot(NoSlot(True, self.worker.retry_seconds))
            except Refusal as refusal:
                return await refuse_unread(refusal, scope, receive, send)
            return await self.app(scope, receive, send)
        answer = _Answer(scope, receive, send, self.worker.metrics)
        try:
            with self.worker.slot():
                await self._answer_in_time(answer)
        except NoSlot as error:
            await answer.refuse(self._no_slot(error))
        except Exception:  # a fault of ours, which the layer above answers and logs
            answer.status, answer.is_complete = 500, True
            raise
        finally:
            answer.observe()

    def _check_sender(self, path: str, headers: Headers) -> None:
        """Raise Refusal for a wrong key; without keys, for what another site's page made a browser send."""
        if not self.keys:
            host = headers.get("host", "")
            if _split(f"//{host}").hostname not in LOCAL_HOSTS:
                raise Refusal(403, f"Host {host:.80}: this server answers for localhost alone")
            if (origin := headers.get("origin")) and _split(origin).netloc != host:
                raise Refusal(403, f"Origin {origin:.80}: pages of other sites may not ask this server")
        elif path.startswith("/v1/") or path == "/metrics":
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            # Every key is compared, so that the time tells nothing.
            if not sum(hmac.compare_digest(given, key.encode()) for key in self.keys):
                raise Refusal(401, "Authorization: Bearer KEY is missing or not a key of this server")

    def _check_size(self, method: str, headers: Headers) -> None:
        """Raise Refusal for a body of the page's routes that is too large or does not tell its size."""
        declared = headers.get("content-length", "0" if method in ("GET", "HEAD", "OPTIONS") else "")
        if "transfer-encoding" in headers or not declared.isdecimal():
            raise Refusal(411, "Content-Length is missing", {"connection": "close"})
        if exceeds(declared, most := self.config.max_body_bytes):
            raise too_large(most)

    def _no_slot(self, error: NoSlot) -> Refusal:
        """The refusal of a request for which there is no slot."""
        status, seconds = 503 if error.is_closing else 429, str(error.retry_seconds)
        limit = "" if error.is_closing else f": max_requests {self.config.max_requests} are in progress"
        return Refusal(status, f"{error}{limit}; try again", {"retry-after": seconds})

    async def _answer_in_time(self, answer: "_Answer") -> None:
        limit = self.config.timeout_seconds
        try:
            async with asyncio.timeout(limit):
                await answer.read_body(self.config.max_body_bytes)
                await answer.run(self.app)
        except TimeoutError:
            answer.is_read = True  # for a body that has not come by now nobody waits
            with suppress(TimeoutError):
                async with asyncio.timeout(1):  # the client may not read
                    await answer.refuse(Refusal(504, f"not answered within timeout_seconds {limit:g}"))
        except Refusal as refusal:
            await answer.refuse(refusal)


async def refuse_unread(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with a refusal, and read the rest of the request before the answer ends.

    A server that closes while the client still sends has it reset, and the answer may be lost with that.
    """

    async def send_and_read(message: Message) -> None:
        if message["type"] == "http.response.body":
            await send({**message, "more_body": True})
            await _skip_body(receive)
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    await refusal.response()(scope, receive, send_and_read)


async def _skip_body(receive: Receive) -> None:
    """Read what is left of a request, up to the limits."""
    size, more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while more and size < LINGER_BYTES:
                message = await receive()
                size, more = size + len(message.get("body", b"")), message.get("more_body", False)


def exceeds(declared: str, most: int) -> bool:
    """Whether a declared size, in decimal digits, is larger; of very many digits, it is."""
    return len(declared) > 18 or int(declared) > most


def too_large(most: int) -> Refusal:
    """The refusal of a body."""
    return Refusal(413, f"body exceeds max_body_bytes {most}", {"connection": "close"})


def _split(address: str) -> SplitResult:
    """The parts of an address; none of one that cannot be read."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


class _Answer:
    """One request: its body, its answer and what became of it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, metrics: Metrics):
        self.scope, self._receive, self._send, self.metrics = scope, receive, send, metrics
        self.start_time = time.monotonic()
        self.status: int | None = None
        self.is_read = self.is_stream = self.is_complete = False
        self._body: list[Message] = []

    async def read_body(self, most: int) -> None:
        """Read the body; of one that is too large, nothing beyond the limit. Raises Refusal."""
        declared = Headers(scope=self.scope).get("content-length", "0")
        if declared.isdecimal() and exceeds(declared, most):
            raise too_large(most)
        body, more = bytearray(), True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.is_read = True  # there is no more
                raise Refusal(CLIENT_LEFT, "the client left")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                raise too_large(most)
        self.is_read = True
        self._body = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def run(self, app: ASGIApp) -> None:
        """Let an application answer, until the client leaves."""

        async def receive() -> Message:
            if self._body:
                return self._body.pop()  # which may be large: it is not kept
            await asyncio.Event().wait()  # this object waits for the client's leaving
            raise AssertionError

        answered = asyncio.ensure_future(app(self.scope, receive, self.send))
        left = asyncio.ensure_future(self._wait_until_left())
        try:
            await asyncio.wait({answered, left}, return_when=asyncio.FIRST_COMPLETED)
            if answered.done():
                answered.result()
        finally:
            for task in (answered, left):
                task.cancel()
            await asyncio.gather(answered, left, return_exceptions=True)

    async def _wait_until_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-")
        await self._send(message)
        if message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body", False)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal; in an answer that has begun, as an event, if it is a stream of them."""
        if self.status is None:
            self.status = refusal.status
            if self.is_read:
                await refusal.response()(self.scope, self._receive, self._send)
            else:
                await refuse_unread(refusal, self.scope, self._receive, self._send)
            self.is_complete = True
        elif self.is_stream and not self.is_complete:
            self.status = refusal.status
            await self._send({"type": "http.response.body", "body": sse(refusal.body())})
            self.is_complete = True

    def observe(self) -> None:
        """Count the request."""
        path = self.scope["path"] if self.scope["path"] in ROUTES else "other"
        status = self.status if self.is_complete else CLIENT_LEFT
        self.metrics.requests.labels(path, status).inc()
        self.metrics.seconds.labels(path).observe(time.monotonic() - self.start_time)
