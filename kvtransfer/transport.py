"""What a link is: one direction between two workers, operations strictly by number, thrown away at the first fault.
Knows nothing of transfers; gloo_link.py, shared_memory_link.py and memory_link.py implement it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from kvtransfer.messages import LinkOffer


class LinkFailed(Exception):
    """The link is gone for good; a new one must be made."""


OnFailure = Callable[[str], None]  # called at most once, from any thread; never after close


class Link(Protocol):
    """One end. After a failure every call raises LinkFailed."""

    transport: str  # its name: gloo, shared_memory

    def connect(self) -> None:
        """Meet the other end and prove the link with a byte each way. Blocks: for the link's own thread."""

    def post(self, number: int, staged: torch.Tensor) -> None:
        """Start operation `number` (sending from, or receiving into, staged: [num_bytes], uint8). Does not block.
        Numbers start at 0 and have no gaps; staged belongs to the link until `wait` returned or raised."""

    def wait(self, number: int) -> torch.Tensor:
        """Block until operation `number` is done, each in its turn, at most the chunk's deadline. A missed deadline
        fails the link. Answers where the bytes are: in staged, or still where they were sent from."""

    def fail(self, reason: str) -> None:
        """The other end broke the rules: fail the link, and say so through on_failure."""

    def close(self) -> None:
        """Wake whoever waits, end the link's threads, give back its descriptors. Repeatable, from any thread."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Where what is posted should lie: [num_bytes], uint8. Once, before connect. From other memory a sender carries
        filler: so many bytes, any bytes."""


class SenderLink(Link, Protocol):
    """Posts what it sends."""


class ReceiverLink(Link, Protocol):
    @property
    def offer(self) -> LinkOffer:
        """What the sender needs to find this end."""

    def release(self, number: int) -> None:
        """The bytes that `wait` answered with are not read any more."""


class Transport(Protocol):
    @property
    def beacon(self) -> str:
        """For Hello."""

    def listen(self, beacon: str, on_failure: OnFailure) -> ReceiverLink:
        """A new receiving end, on a prefix that no link has used before, for the sender of that beacon."""

    def dial(self, offer: LinkOffer, on_failure: OnFailure) -> SenderLink: ...

    def close(self) -> None: ...
