"""Which requests of a hot worker's queue are better off at another of their candidates (DualMap, ICLR 2026, section 4).
Moves nothing: names the moves. Only requests that have not been sent are considered, once each.

The benefit of a move is TTFT here, at its place in the queue, less TTFT there, behind all that is there. The largest
goes first, while it is a gain and the request then meets its SLO, until the queue here is expected to meet it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_INTERVAL_S = 0.1  # between two looks at one queue: a look costs O(n log n) in its length


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another candidate of one request: the work in front of it there, and its own."""

    worker_id: str
    backlog_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Movable:
    """One queued request. `slack_s`: how much later than now its first token may come."""

    request_id: str
    slack_s: float
    prefill_s: float  # here
    elsewhere: tuple[Elsewhere, ...]


@dataclass(frozen=True, slots=True)
class Move:
    request_id: str
    worker_id: str
    here_s: float  # until its first token, where it is
    there_s: float


def moves(queue: Sequence[Movable], start_s: float) -> list[Move]:
    """`queue` in the order in which it would be sent, `start_s` what the worker does before. One round."""
    found: list[Move] = []
    staying = list(queue)
    moved_s: dict[str, float] = {}  # work that this round has moved, by worker
    while is_threatened(staying, start_s):
        move = _best_move(staying, start_s, moved_s)
        if move is None:
            break
        found.append(move)
        left = next(one for one in staying if one.request_id == move.request_id)
        staying.remove(left)
        there = next(one for one in left.elsewhere if one.worker_id == move.worker_id)
        moved_s[move.worker_id] = moved_s.get(move.worker_id, 0.0) + there.prefill_s
    return found


def is_threatened(queue: Sequence[Movable], start_s: float) -> bool:
    """Whether one that could be on time, if it went first, will not be at its place."""
    ends_s = start_s
    for one in queue:
        ends_s += one.prefill_s
        if ends_s > one.slack_s >= one.prefill_s:
            return True
    return False


def _best_move(queue: Sequence[Movable], start_s: float, moved_s: dict[str, float]) -> Move | None:
    best: Move | None = None
    ends_s = start_s
    for one in queue:
        ends_s += one.prefill_s
        for there in one.elsewhere:
            there_s = there.backlog_s + moved_s.get(there.worker_id, 0.0) + there.prefill_s
            if there_s > one.slack_s or there_s >= ends_s:
                continue
            if best is None or ends_s - there_s > best.here_s - best.there_s:
                best = Move(one.request_id, there.worker_id, ends_s, there_s)
    return best
