"""The front doors of one cluster, one for each of its routers, and at which of them a client calls. Opens nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from cluster.client_types import CallFailed

D = TypeVar("D")


class Doors(Generic[D]):
    """Invariant: the calls go to one door, until that one fails. May be shared by threads."""

    def __init__(self, doors: Sequence[D]) -> None:
        self.all = tuple(doors)
        self.current = self.all[0]

    def leaves(self, door: D, failure: CallFailed) -> bool:
        """Whether this failure is the door's, and another may do better. Then it is the next one's turn, unless another
        call has said so already."""
        if failure.code != "UNAVAILABLE":
            return False
        if door is self.current:
            self.current = self.all[(self.all.index(door) + 1) % len(self.all)]
        return True


def addresses_of(address: str | Sequence[str]) -> tuple[str, ...]:
    """One, several, or several in one string with commas between. ValueError where there is none."""
    addresses = address.split(",") if isinstance(address, str) else list(address)
    found = tuple(one.strip() for one in addresses if one.strip())
    if not found:
        raise ValueError(f"no address in {address!r}")
    return found
