"""How many calls one address may have under way, and how long a request may take to come.

gRPC hands a call to a method when its request is here, and counts it from its first byte on. So
whoever opens calls and sends nothing, in an endless health watch for one, would take every place
that the server has. Here each call, of the libraries' services too, is counted for its address from
the start, and ended in time.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from grpc_status import rpc_status

from fedia3.coordinator.access import peer_address
from fedia3.errors import BadInput, Fedia3Error, TooManyCalls, Unreachable
from fedia3.proto.status import to_status

PLACES_OF_ONE = 128  # calls of one address; many devices may stand behind one
REQUEST_S = 60.0  # for a request of at most 4 MiB
LONGEST_S = 3700.0  # the longest deadline of a method, and some
NO_DEADLINE_S = 600.0  # for a call of a library's service that says none

Context = Any  # grpc.aio.ServicerContext; its types know no raw bytes
Handler = Any  # grpc.RpcMethodHandler


class Places(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Counts the calls of a server."""

    def __init__(self) -> None:
        self._taken = Counter[str]()

    @property
    def taken(self) -> int:
        """Calls under way."""
        return self._taken.total()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], handler_call_details: Any
    ) -> Handler:
        """The method's handler, called before its request is here."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if not handler.response_streaming:
            return self._with_answer(handler)
        return self._with_stream(handler) if handler.unary_stream else self._with_both(handler)

    def _with_answer(self, handler: Handler) -> Handler:
        async def answer(requests: AsyncIterator[bytes], context: Context) -> Any:
            async with self._place(context):
                request = await _request(handler, requests)
                return await handler.unary_unary(request, context)

        return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)

    def _with_stream(self, handler: Handler) -> Handler:
        async def answer(requests: AsyncIterator[bytes], context: Context) -> None:
            async with self._place(context):
                request = await _request(handler, requests)
                await handler.unary_stream(request, context)

        return grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)

    def _with_both(self, handler: Handler) -> Handler:
        async def answer(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            async with self._place(context):
                async for answered in handler.stream_stream(requests, context):
                    yield answered

        return grpc.stream_stream_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )

    @contextlib.asynccontextmanager
    async def _place(self, context: Context) -> AsyncIterator[None]:
        """A place for as long as the block lasts, which is not for ever."""
        address, left_s = peer_address(context.peer()), context.time_remaining()
        try:
            with self._counted(address):
                async with asyncio.timeout(min(left_s or NO_DEADLINE_S, LONGEST_S)):
                    yield
        except TimeoutError:
            await _abort(context, Unreachable("the call took too long"))
        except Fedia3Error as error:
            await _abort(context, error)

    @contextlib.contextmanager
    def _counted(self, address: str) -> Any:
        if self._taken[address] >= PLACES_OF_ONE:
            raise TooManyCalls("too many calls at once; come again in 1 s", 1.0)
        self._taken[address] += 1
        try:
            yield
        finally:
            self._taken[address] -= 1
            if not self._taken[address]:
                del self._taken[address]


async def _request(handler: Handler, requests: AsyncIterator[bytes]) -> Any:
    """The one request of a call.

    Raises:
        Unreachable: it did not come in time.
        BadInput: the call ended without one.
    """
    try:
        async with asyncio.timeout(REQUEST_S):
            async for body in requests:
                read = handler.request_deserializer
                return body if read is None else read(body)
    except TimeoutError as error:
        raise Unreachable(f"the request did not come within {REQUEST_S:g} s") from error
    raise BadInput("the call brought no request")


async def _abort(context: Context, error: Fedia3Error) -> NoReturn:
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError  # abort never returns
