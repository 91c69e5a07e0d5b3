"""A relay between a node and its SuperLink: fleet calls pass, seen by a judge, and nothing else.

The coordinator's public door is one such relay, a device's way out another. What a stranger can
make it keep is bounded: headers and bodies by size and time, calls by the key that they show.
"""

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedia3.errors import BadInput, BadSetting, Conflict
from fedia3.proto.fleet import (
    KEY_HEADER,
    MAX_BODY,
    OPERATIONS,
    Answer,
    Call,
    Judge,
    refusal,
)

MAX_ANSWER = 16 << 20  # bytes of a response: an app has at most 10 MB
MAX_HEADERS = 16 << 10  # bytes
CALLS_OF_ONE = 16  # under way at once for one key; a node has up to six
FIRST_REQUEST_S = 30.0  # from a connection's first byte to the end of its first headers
BODY_S = 120.0  # for a request's body to come
UPSTREAM_S = 25.0  # a node gives up after 30, and the fleet's door holds an idle poll for 20
IDLE_S = 3.0  # before the SuperLink's 5: a connection must not be used as it is closed

HANGS_UP = {400, 401, 404, 408, 413, 429}  # answered before the body was read, perhaps


class Upstream:
    """The SuperLink, or the next relay on the way to it."""

    def __init__(self, address: str, ca_pem: str, max_connections: int = 100) -> None:
        """``address`` is host:port; only a certificate that ``ca_pem``'s authority signed holds."""
        verify = ssl.create_default_context(cadata=ca_pem)
        limits = httpx.Limits(
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=IDLE_S,
        )
        self._client = httpx.AsyncClient(
            base_url=f"https://{address}",
            verify=verify,
            limits=limits,
            headers={"accept-encoding": "identity"},
            timeout=httpx.Timeout(UPSTREAM_S, connect=5.0),
            trust_env=False,  # no proxy in between
        )

    async def send(self, call: Call) -> Answer:
        """The answer; 502 and 504 where there is none, or one that is too large."""
        headers = {name: value for name, value in call.headers.items() if _is_passed_on(name)}
        try:
            async with self._client.stream(
                "POST", call.operation.path, content=call.body, headers=headers
            ) as response:
                return await _answer_of(response)
        except httpx.TimeoutException:
            return refusal(504, "the coordinator does not answer in time")
        except httpx.HTTPError as error:
            return refusal(502, f"the coordinator is not there ({type(error).__name__})")

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.aclose()


def _is_passed_on(header: str) -> bool:
    return header.startswith("flwr-") or header in ("content-type", "accept")


async def _answer_of(response: httpx.Response) -> Answer:
    body = bytearray()
    async for piece in response.aiter_raw():  # a packed answer could unpack to gigabytes
        body += piece
        if len(body) > MAX_ANSWER:
            return refusal(502, f"the coordinator's answer has more than {MAX_ANSWER} bytes")
    headers = response.headers
    return Answer(
        response.status_code, bytes(body), headers.get("content-type", ""), headers.get("date", "")
    )


class Relay:
    """An ASGI application: fleet calls through ``judge`` to ``upstream``, 404 for all else."""

    def __init__(self, upstream: Upstream, judge: Judge, max_body: int = MAX_BODY) -> None:
        self._upstream = upstream
        self._judge = judge
        self._max_body = max_body
        self._under_way = Counter[str]()  # calls, by the key that they show

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        with contextlib.suppress(ClientDisconnect):
            answer = await self._answer(request)
            if answer is None:
                return
            # what is still unread of a refused body cannot stay in the connection
            close = {"connection": "close"} if answer.status in HANGS_UP else None
            response = Response(answer.body, answer.status, close, media_type=answer.media_type)
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Answer | None:
        """The answer; None for a caller who has gone."""
        operation = OPERATIONS.get(request.url.path)
        if operation is None or request.method != "POST":
            return refusal(404, "there is nothing here")
        call = Call(operation, dict(request.headers), b"")
        try:
            return await self._judge.greet(call) or await self._counted(request, call)
        except BadInput as error:
            return refusal(400, str(error))

    async def _counted(self, request: Request, call: Call) -> Answer | None:
        """The answer, unless the same key has too many calls under way."""
        key = call.headers.get(KEY_HEADER, "")
        if self._under_way[key] >= CALLS_OF_ONE:
            return refusal(429, f"{CALLS_OF_ONE} calls are under way already; come again later")
        self._under_way[key] += 1
        try:
            return await self._read(request, call)
        finally:
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]

    async def _read(self, request: Request, call: Call) -> Answer | None:
        limit = min(self._max_body, call.operation.max_body)
        try:
            async with asyncio.timeout(BODY_S):
                body = await _body(request, limit)
        except TimeoutError:
            return refusal(408, f"the body did not come within {BODY_S:g} s")
        if body is None:
            return refusal(413, f"a {call.operation.name} has at most {limit} bytes")
        return await _while_connected(request, self._judged(replace(call, body=body)))

    async def _judged(self, call: Call) -> Answer:
        if (answer := await self._judge.before(call)) is not None:
            return answer
        return await self._judge.after(call, await self._upstream.send(call))


async def _while_connected(
    request: Request, answering: Coroutine[Any, Any, Answer]
) -> Answer | None:
    """The answer, given up when its caller goes: a message fetched for nobody would be lost."""
    answer = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(request.receive())  # behind the body there is only one event
    try:
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        gone.cancel()
        answer.cancel()


async def _body(request: Request, limit: int) -> bytes | None:
    """The request's body; None where it is longer than ``limit``.

    As much again is read and dropped before giving up: a caller that is cut off while it writes
    does not read why.
    """
    announced = request.headers.get("content-length", "0")
    body, dropped = bytearray(), 0
    is_long = not announced.isdigit() or int(announced) > limit
    async for piece in request.stream():
        if is_long := is_long or len(body) + len(piece) > limit:
            dropped += len(piece)
        else:
            body += piece
        if dropped > limit:
            break
    return None if is_long else bytes(body)


class RelayServer:
    """Serves an ASGI application over TLS in the running loop."""

    def __init__(
        self, app: Any, *, host: str, port: int, certificate: Path, private_key: Path
    ) -> None:
        """``port`` 0 takes a free one; ``certificate`` is a PEM chain.

        Raises:
            Conflict: somebody else has the port.
            BadSetting: this machine has no such address.
        """
        self._socket = _listening(host, port)
        config = uvicorn.Config(
            app,
            ssl_certfile=certificate,
            ssl_keyfile=private_key,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            log_config=None,
            http=_PromptConnection,  # h11 beneath: httptools would collect headers without end
            h11_max_incomplete_event_size=MAX_HEADERS,
            timeout_keep_alive=30,  # longer than a node's pause between polls
            timeout_graceful_shutdown=10,
        )
        self._server = _QuietServer(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        """Serve from now on; back when it does.

        Raises:
            BadSetting: the certificate or its key cannot be read.
        """
        try:
            self._server.config.load()
        except (OSError, ssl.SSLError) as error:
            raise BadSetting(f"cannot serve with this certificate: {error}") from error
        assert self._server.config.ssl is not None
        self._server.config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)

    async def wait(self) -> None:
        """Until it has stopped."""
        if self._task is not None:
            await self._task

    async def stop(self) -> None:
        """Finish the calls under way, take no more."""
        self._server.should_exit = True
        await self.wait()
        self._socket.close()


class _PromptConnection(H11Protocol):
    """Hangs up on who connects and sends no whole headers: each such costs a file and memory."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(FIRST_REQUEST_S, self._require_request)

    def _require_request(self) -> None:
        if self.scope is None:
            self.transport.close()


class _QuietServer(uvicorn.Server):
    """Leaves the process's signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno is None:
            raise BadSetting(f"this machine has no address {host}: {error}") from error
        raise Conflict(
            f"cannot listen on {host}:{port}: {error.strerror}; is another coordinator running?"
        ) from error
