"""The copies between the device and host memory, beside the steps: one thread each way, so that what a request waits
for does not stand behind what is saved. Decides nothing about blocks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from engine.events import Copied, CopyBlocks, CopyDirection, CopyLost
from engine.host_memory import HostMemory

logger = logging.getLogger("twinring.engine")


class HostCopies:
    """Invariant: copies of one direction are done one at a time, in the order of `copy`; each is answered by one event,
    once nothing reads or writes its blocks any more. Those that `stop` finds waiting are not, and nobody asks for them.
    """

    def __init__(self, memory: HostMemory, post: Callable[[Copied | CopyLost], None]) -> None:
        """`post` is called on the threads of the copies; it only passes on."""
        self._memory = memory
        self._post = post
        self._stopping = False
        self._waiting: dict[CopyDirection, SimpleQueue[CopyBlocks | None]] = {
            each: SimpleQueue() for each in CopyDirection
        }
        self._threads = [
            threading.Thread(target=self._run, args=(each,), name=f"twinring-copy-{each.name}", daemon=True)
            for each in CopyDirection
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def copy(self, copy: CopyBlocks) -> None:
        self._waiting[copy.direction].put(copy)

    def stop(self, timeout_s: float) -> bool:
        """False where a copy was still under way after timeout_s."""
        give_up_at = time.monotonic() + timeout_s
        self._stopping = True
        for waiting in self._waiting.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join(max(0.0, give_up_at - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, direction: CopyDirection) -> None:
        while (copy := self._waiting[direction].get()) is not None and not self._stopping:
            self._post(self._done(copy))

    def _done(self, copy: CopyBlocks) -> Copied | CopyLost:
        try:
            self._memory.copy(copy.direction, copy.from_block_ids, copy.to_block_ids)
        except RuntimeError as error:  # of PyTorch: the device failed
            fields = {"direction": copy.direction.value, "num_blocks": len(copy.to_block_ids), "error": str(error)}
            logger.warning("KV copy lost", extra={"fields": fields})
            return CopyLost(copy.copy_id, str(error))
        return Copied(copy.copy_id)
