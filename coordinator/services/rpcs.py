"""The contract's methods as gRPC handlers: bytes in, bytes out, failures as google.rpc.Status.

Requests are parsed here, after the caller was let in, so that garbage is a bad request and never a
fault. Whatever may block, which is everything behind the wire, runs in a bounded number of threads.
Every answer tells the coordinator's time.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from fedia3.coordinator.access import Access, Call, peer_address
from fedia3.coordinator.last_seen import LastSeen
from fedia3.coordinator.services.calls import Caller, Clock, Handlers, Streamed, Unary
from fedia3.errors import (
    BadInput,
    BadSetting,
    Conflict,
    Corrupt,
    Fedia3Error,
    NotAllowed,
    StorageFailed,
    TooManyCalls,
    Unreachable,
)
from fedia3.proto.contract import METHODS, Method
from fedia3.proto.signing import TIME_HEADER
from fedia3.proto.status import to_status

log = logging.getLogger(__name__)

STALL_S = 60.0  # a stream whose caller takes nothing for so long is given up
MAX_STREAMS, MAX_STREAMS_OF_ONE = 256, 8
CALL_THREADS, READ_THREADS = 8, 4

_Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
_Rpc: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"


class Rpcs:
    """Runs the services' code for calls that were let in.

    Args:
        handlers: each method's code, by path.
        access: lets calls in.
        last_seen: is told of every device that called.
        now_ms: this machine's clock.
        methods: what is offered; every one of them has a handler.
    """

    def __init__(
        self,
        handlers: Handlers,
        access: Access,
        last_seen: LastSeen,
        now_ms: Clock,
        methods: Mapping[str, Method] = METHODS,
    ) -> None:
        self._handlers, self._access, self._last_seen = handlers, access, last_seen
        self._now_ms, self._methods = now_ms, methods
        missing = methods.keys() - handlers.keys()
        assert not missing, f"there is no code for {sorted(missing)}"
        self._calls = ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="call")
        self._reads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._streams = Counter[str]()

    def close(self) -> None:
        """Start no more threads; those at work end by themselves."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._reads.shutdown(wait=False, cancel_futures=True)

    def by_service(self) -> dict[str, dict[str, _Rpc]]:
        """gRPC's handlers; it (de)serializes neither requests nor answers."""
        rpcs: dict[str, dict[str, _Rpc]] = {}
        for method in self._methods.values():
            rpc = self._stream(method) if method.streams else self._unary(method)
            rpcs.setdefault(method.service, {})[method.name] = rpc
        return rpcs

    def _unary(self, method: Method) -> _Rpc:
        async def answer(body: bytes, context: _Context) -> bytes:
            call = _call(method, body, context)
            try:
                data: bytes = await self._in_thread(self._calls, self.answer, call)
            except Exception as error:
                await self._refuse(call, context, error)
            context.set_trailing_metadata(self._our_time())
            return data

        return grpc.unary_unary_rpc_method_handler(cast(Any, answer))  # its types know no asyncio

    def _stream(self, method: Method) -> _Rpc:
        async def answer(body: bytes, context: _Context) -> None:
            call = _call(method, body, context)
            try:
                caller, request = await self._in_thread(self._calls, self._let_in, call)
                with self._counted(caller):
                    await self._send(call, request, caller, context)
            except Exception as error:
                await self._refuse(call, context, error)
            context.set_trailing_metadata(self._our_time())

        return grpc.unary_stream_rpc_method_handler(cast(Any, answer))  # as above

    def answer(self, call: Call) -> bytes:
        """The answer to a unary call, once it was let in; errors are the code's own."""
        caller, request = self._let_in(call)
        handler = cast(Unary, self._handlers[call.method.path])
        return handler(request, caller).SerializeToString()

    async def _send(self, call: Call, request: Message, caller: Caller, context: _Context) -> None:
        handler = cast(Streamed, self._handlers[call.method.path])
        answers = await self._in_thread(self._reads, handler, request, caller)
        async with contextlib.aclosing(self._ahead(answers)) as pieces:
            async for piece in pieces:
                try:
                    async with asyncio.timeout(STALL_S):
                        await context.write(piece)
                except TimeoutError as error:
                    raise Unreachable(f"the caller took nothing for {STALL_S:.0f} s") from error
                except grpc.aio.InternalError as error:  # so gRPC calls a write that failed
                    raise Unreachable("the caller hung up") from error

    async def _ahead(self, answers: Iterator[bytes]) -> AsyncGenerator[bytes]:
        """The answers; the next one is read while this one is sent."""
        ahead = self._in_thread(self._reads, next, answers, None)
        try:
            # Shielded: a thread cannot be stopped, and whoever closes has to know when it is done.
            while (piece := await asyncio.shield(ahead)) is not None:
                ahead = self._in_thread(self._reads, next, answers, None)
                yield piece
        finally:
            ahead.add_done_callback(lambda done: _close(done, answers))

    def _let_in(self, call: Call) -> tuple[Caller, Message]:
        """Who calls, and the request, once the call may run."""
        principal = self._access.admit(call)
        if principal is not None and principal.kind == "device":
            self._last_seen.note(principal.name)
        return Caller(peer_address(call.peer), principal), _parsed(call)

    @contextlib.contextmanager
    def _counted(self, caller: Caller) -> Iterator[None]:
        """Whoever reads slowly holds a file open, so there are only so many."""
        key = f"{caller.known.kind} {caller.known.name}"
        if self._streams[key] >= MAX_STREAMS_OF_ONE or self._streams.total() >= MAX_STREAMS:
            raise TooManyCalls("too many downloads at once; come again in 5 s", 5.0)
        self._streams[key] += 1
        try:
            yield
        finally:
            self._streams[key] -= 1
            if not self._streams[key]:
                del self._streams[key]

    async def _refuse(self, call: Call, context: _Context, error: Exception) -> NoReturn:
        _log(call, error)
        status = rpc_status.to_status(to_status(visible(error)))
        trailing = (*status.trailing_metadata, *self._our_time())
        await context.abort(status.code, status.details, trailing)
        raise AssertionError  # abort never returns

    def _our_time(self) -> tuple[tuple[str, str]]:
        return ((TIME_HEADER, str(self._now_ms())),)

    def _in_thread(
        self, pool: ThreadPoolExecutor, code: Callable[..., Any], *given: Any
    ) -> "asyncio.Future[Any]":
        return asyncio.get_running_loop().run_in_executor(pool, code, *given)


def visible(error: Exception) -> Exception:
    """The error as callers may see it: what this machine's disk said stays in the log."""
    if error.__cause__ is None or isinstance(error.__cause__, Fedia3Error):
        return error
    if isinstance(error, Corrupt):
        return Corrupt("what the coordinator stored is damaged; its log says more")
    if isinstance(error, Conflict):
        return Unreachable("the coordinator's database is busy; come again in 1 s", 1.0)
    if isinstance(error, (StorageFailed, BadSetting)):
        return StorageFailed("the coordinator's disk refused; nothing was changed")
    return error


def _call(method: Method, body: bytes, context: _Context) -> Call:
    metadata = tuple(context.invocation_metadata() or ())
    return Call(method, body, metadata, context.time_remaining(), context.peer())


def _parsed(call: Call) -> Message:
    try:
        return call.method.request.FromString(call.body)
    except DecodeError as error:
        raise BadInput(
            f"{call.method.name} takes a {call.method.request.DESCRIPTOR.full_name}, got "
            f"{len(call.body)} bytes that are none"
        ) from error


def _close(done: "asyncio.Future[bytes | None]", answers: Iterator[bytes]) -> None:
    if not done.cancelled():
        done.exception()  # seen, so that nobody warns of it
    if hasattr(answers, "close"):
        answers.close()


def _log(call: Call, error: Exception) -> None:
    where, who = call.method.name, peer_address(call.peer)
    if not isinstance(error, Fedia3Error):
        log.error("%s failed", where, exc_info=error)
    elif isinstance(error, (Corrupt, StorageFailed, BadSetting)):
        log.error("%s: %s", where, error)
    elif isinstance(error, (NotAllowed, Unreachable)):
        log.info("%s from %s: %s", where, who, error)
