"""One thread that does a lane's slow work in order, and the tickets by which that work can be called off. Knows nothing
of what the work is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch

from kvtransfer.transport import LinkFailed


class Ticket:
    """Work that may be cancelled until it begins. Invariant: of begin and cancel, the first call wins, for good."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = False
        self._cancelled = False

    def begin(self) -> bool:
        """True: go ahead, nobody will call it off. On the lane's thread."""
        with self._lock:
            self._begun = not self._cancelled
            return self._begun

    def cancel(self) -> bool:
        """True: it has not begun and never will. On the event loop."""
        with self._lock:
            self._cancelled = not self._begun
            return self._cancelled


class LaneThread:
    """Runs jobs one after another. Invariant: jobs run in the order of `submit`, none after `close` returned; on a GPU
    they are on a stream of the thread's own, beside the engine's steps."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._device = device
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    async def run(self, job: Callable[[], None]) -> None:
        """Run job there, await its end; its LinkFailed is raised here. Jobs have deadlines of their own."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[str] = loop.create_future()

        def report() -> None:
            try:
                job()
                error = ""
            except LinkFailed as failure:
                error = str(failure) or "the link failed"
            loop.call_soon_threadsafe(settle, error)

        def settle(error: str) -> None:
            if not done.cancelled():
                done.set_result(error)

        self.submit(report)
        if error := await done:
            raise LinkFailed(error)

    def close(self, timeout_s: float) -> None:
        """Finish what was submitted, then end. A thread that is stuck is left behind: it is daemonic."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        if self._device.type == "cuda":
            stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # A step under way may still use memory that the allocator has given to the lane already.
            stream.wait_stream(torch.cuda.default_stream(self._device))
            torch.cuda.set_stream(stream)
        while (job := self._jobs.get()) is not None:
            job()
