"""What happens to workers in mid-run, as it is written: `60:prefill*4` joins four, `120:prefill-3,prefill-5` names two.
Decides which workers these are, and refuses what cannot happen to them; carries nothing out."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING

from protos.types import Role
from simulator.setup import Change, ChangeKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from simulator.setup import Setup

SEVERAL = re.compile(r"(prefill|decode)\*(\d+)")
NAME = re.compile(r"(prefill|decode)-\d+")


def changes_of(
    joins: Sequence[str], leaves: Sequence[str], drains: Sequence[str], fails: Sequence[str], setup: Setup
) -> tuple[Change, ...]:
    """By time. ValueError names the option, what was written, and why it cannot be."""
    written = [
        (_seconds(kind, text), kind, text)
        for kind, texts in (
            (ChangeKind.LEAVE, leaves),
            (ChangeKind.DRAIN, drains),
            (ChangeKind.FAIL, fails),
            (ChangeKind.JOIN, joins),
        )
        for text in texts
    ]
    workers = _Workers(setup)
    changes: list[Change] = []
    for at_s, kind, text in sorted(written, key=lambda each: each[0]):
        changes += workers.change(at_s, kind, text)
    return tuple(changes)


def check_in_time(changes: Sequence[Change], last_arrival_s: float, rate: float) -> None:
    """ValueError for what would happen after the last request came."""
    for change in changes:
        if change.at_s >= last_arrival_s:
            raise ValueError(
                f"{change.kind.value} at {change.at_s:g} s is too late: at {rate:g} requests/s the last one comes at "
                f"{last_arrival_s:.1f} s"
            )


class _Workers:
    """Invariant: `_up` are the workers that are there after the changes so far."""

    def __init__(self, setup: Setup) -> None:
        self._up: dict[str, Role] = {}
        self._counts = {Role.PREFILL: itertools.count(), Role.DECODE: itertools.count()}
        self._has_decode = setup.num_decode > 0
        for role, num_workers in ((Role.PREFILL, setup.num_prefill), (Role.DECODE, setup.num_decode)):
            self._up |= {self._new_name(role): role for _ in range(num_workers)}

    def change(self, at_s: float, kind: ChangeKind, text: str) -> list[Change]:
        try:
            return [self._one(at_s, kind, worker_id) for worker_id in self._named(kind, text.partition(":")[2])]
        except ValueError as error:
            raise ValueError(f"{kind.value} {text!r}: {error}") from None

    def _named(self, kind: ChangeKind, text: str) -> Iterator[str]:
        for word in text.split(","):
            several = SEVERAL.fullmatch(word)
            if several is not None and kind is ChangeKind.JOIN and int(several[2]):
                yield from (self._new_name(Role(several[1])) for _ in range(int(several[2])))
            elif NAME.fullmatch(word):
                yield word
            else:
                example = "prefill*4 or prefill-3" if kind is ChangeKind.JOIN else "prefill-3 or prefill-3,prefill-5"
                raise ValueError(f"workers must be like {example}, not {word!r}")

    def _one(self, at_s: float, kind: ChangeKind, worker_id: str) -> Change:
        role = Role(worker_id.partition("-")[0])
        if kind is ChangeKind.JOIN:
            if worker_id in self._up:
                raise ValueError(f"{worker_id} is up")
            if role is Role.DECODE and not self._has_decode:
                raise ValueError("a cluster without decode workers takes none")
            self._up[worker_id] = role
        else:
            if worker_id not in self._up:
                raise ValueError(f"{worker_id} is not up; there are {', '.join(self._up)}")
            del self._up[worker_id]
            if role not in self._up.values():
                raise ValueError(f"no {role.value} worker would be left")
        return Change(at_s, kind, worker_id, role)

    def _new_name(self, role: Role) -> str:
        """One that no worker has."""
        names = (f"{role.value}-{number}" for number in self._counts[role])
        return next(name for name in names if name not in self._up)


def _seconds(kind: ChangeKind, text: str) -> float:
    try:
        at_s = float(text.partition(":")[0])
    except ValueError:
        at_s = math.nan
    if not (math.isfinite(at_s) and at_s >= 0 and ":" in text):
        raise ValueError(f"{kind.value} must begin with seconds from 0 on, like 60:prefill-3, not {text!r}")
    return at_s
