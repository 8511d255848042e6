"""One client's stream, which the choices of its call share. Decides nothing but turns and deadlines."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import grpc

from protos import inference_pb2 as pb
from router.events import Fail

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class CallWriter:
    def __init__(self, context: Context, write_timeout_s: float) -> None:
        self._context = context
        self._timeout_s = write_timeout_s
        self._turn = asyncio.Lock()

    async def write(self, response: pb.GenerateResponse) -> None:
        """TimeoutError where the client does not read."""
        async with asyncio.timeout(self._timeout_s), self._turn:
            await self._context.write(response)

    async def cut_off(self, fail: Fail) -> NoReturn:
        """The status waits behind what the client does not read, too: after a while the call goes without one."""
        try:
            async with asyncio.timeout(self._timeout_s), self._turn:
                await abort_call(self._context, fail)
        except TimeoutError:
            raise asyncio.CancelledError from None


async def abort_call(context: Context, fail: Fail) -> NoReturn:
    """gRPC's own key tells clients when to come back."""
    pushback = () if fail.retry_after_s is None else (("grpc-retry-pushback-ms", str(int(1000 * fail.retry_after_s))),)
    await context.abort(grpc.StatusCode[fail.code], fail.message, trailing_metadata=pushback)
