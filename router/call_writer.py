"""One client's stream, which the choices of its call share. Decides nothing but turns and deadlines; what goes over the
wire, and in which protocol, is the wire's affair."""

from __future__ import annotations

import asyncio
from typing import NoReturn, Protocol

from router.events import Fail
from router.parts import Part


class CutOff(Exception):
    """The call has had its last word: a failure."""

    def __init__(self, fail: Fail) -> None:
        super().__init__(f"{fail.code}: {fail.message}")
        self.fail = fail


class Wire(Protocol):
    async def send(self, part: Part) -> None:
        """Returns when the client's socket has taken it."""

    async def send_failure(self, fail: Fail) -> None: ...


class CallWriter:
    def __init__(self, wire: Wire, write_timeout_s: float) -> None:
        self._wire = wire
        self._timeout_s = write_timeout_s
        self._turn = asyncio.Lock()

    async def write(self, part: Part) -> None:
        """TimeoutError where the client does not read."""
        async with asyncio.timeout(self._timeout_s), self._turn:
            await self._wire.send(part)

    async def cut_off(self, fail: Fail) -> NoReturn:
        """The status waits behind what the client does not read, too: after a while the call goes without one."""
        try:
            async with asyncio.timeout(self._timeout_s), self._turn:
                await self._wire.send_failure(fail)
        except TimeoutError:
            raise asyncio.CancelledError from None
        raise CutOff(fail)
