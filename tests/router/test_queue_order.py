"""Every order is an order of what is there, puts priorities first and nobody off for ever."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.queue_order import Queued, QueueOrder, QueueOrderName, make_order, on_time

NAMES: tuple[QueueOrderName, ...] = get_args(QueueOrderName)
names = st.sampled_from(NAMES)
WAIT_S = 10.0


def entry(
    name: str, since: float = 0.0, work: float = 1.0, due: float = 99.0, cached: int = 0, prio: int = 0
) -> Queued:
    return Queued(name, since, due, 1, work, cached, prio)


@st.composite
def queues(draw: st.DrawFn, max_size: int = 12) -> list[Queued]:
    fields = st.tuples(
        st.integers(0, 15), st.integers(0, 5), st.integers(0, 25), st.integers(0, 3), st.sampled_from((0, 0, 0, 1))
    )
    return [
        entry(f"r{index}", float(since), float(work), float(due), cached, prio)
        for index, (since, work, due, cached, prio) in enumerate(draw(st.lists(fields, max_size=max_size)))
    ]


def filled(name: QueueOrderName, entries: list[Queued], max_wait_s: float = WAIT_S) -> QueueOrder:
    order = make_order(name, max_wait_s)
    for one in entries:
        order.add(one)
    return order


def drained(order: QueueOrder, now: float, start_s: float = 0.0) -> list[str]:
    ids = []
    while (head := order.head(now, start_s)) is not None:
        assert order.remove(head.request_id) is head
        ids.append(head.request_id)
    return ids


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("first_come", ["long", "short", "warm", "soon"]),
        ("cached_first", ["warm", "long", "short", "soon"]),
        ("shortest_remaining", ["short", "warm", "soon", "long"]),
        ("moore_hodgson", ["soon", "short", "warm", "long"]),
    ],
)
def test_each_order(name: QueueOrderName, expected: list[str]) -> None:
    entries = [
        entry("long", 0, 9.0, due=9.0),
        entry("short", 1, 1.0, due=5.0),
        entry("warm", 2, 2.0, due=6.0, cached=64),
        entry("soon", 3, 3.0, due=4.0),
    ]
    assert [one.request_id for one in filled(name, entries).in_order(0.0, 0.0)] == expected
    assert drained(filled(name, entries), 0.0) == expected


@given(names, queues(), st.integers(0, 30), st.integers(0, 5))
def test_all_come_out_once_and_as_listed(name: QueueOrderName, entries: list[Queued], now: int, start_s: int) -> None:
    order = filled(name, entries)
    assert len(order) == len(entries)
    listed = order.in_order(now, start_s)
    assert sorted(one.request_id for one in listed) == sorted(one.request_id for one in entries)
    assert order.head(now, start_s) is (listed[0] if listed else None)
    assert sorted(drained(order, now, start_s)) == sorted(one.request_id for one in entries)
    assert len(order) == 0
    assert order.head(now, start_s) is None


@given(names, queues(), st.integers(0, 30), st.data())
def test_the_overdue_go_first_oldest_first_then_priorities(
    name: QueueOrderName, entries: list[Queued], now: int, data: st.DataObject
) -> None:
    order = filled(name, entries)
    if entries:
        order.head(now - 1, 0.0)  # a plan that may be old
        gone = data.draw(st.sets(st.sampled_from(entries)))
        for one in gone:
            order.remove(one.request_id)
        entries = [one for one in entries if one not in gone]
    by_id = {one.request_id: one for one in entries}
    out = [by_id[request_id] for request_id in drained(order, now)]
    num_overdue = sum(now - one.since > WAIT_S for one in entries)
    assert [one.since for one in out[:num_overdue]] == sorted(one.since for one in out if now - one.since > WAIT_S)
    assert [one.priority for one in out[num_overdue:]] == sorted((o.priority for o in out[num_overdue:]), reverse=True)


@given(names, queues(), queues(), st.integers(1, 5))
def test_nobody_waits_longer_than_the_bound_and_what_was_over_it_before(
    name: QueueOrderName, entries: list[Queued], newer: list[Queued], step: int
) -> None:
    """One worker, one request at a time. Whatever comes meanwhile, whoever is over the bound has only older ones, and
    what runs when it passes the bound, in front of it."""
    comers = [*entries, *(replace(one, request_id=f"n{i}") for i, one in enumerate(newer))]
    comers.sort(key=lambda one: one.since)
    order, now, started, waiting = make_order(name, WAIT_S), 0.0, {}, list(comers)
    while waiting or len(order):
        while waiting and waiting[0].since <= now:
            order.add(waiting.pop(0))
        head = order.head(now, 0.0)
        if head is not None:
            order.remove(head.request_id)
            started[head.request_id] = now
        now += head.prefill_s if head is not None and head.prefill_s else float(step)
    assert len(started) == len(comers)
    longest = max([step, *(one.prefill_s for one in comers)], default=0.0)
    for one in comers:
        older = [o for o in comers if (o.since, o.request_id) < (one.since, one.request_id)]
        bound = WAIT_S + longest + sum(o.prefill_s or step for o in older)
        assert started[one.request_id] - one.since <= bound


def num_on_time(order: tuple[Queued, ...], start_at: float) -> int:
    num, ends_at = 0, start_at
    for one in order:
        ends_at += one.prefill_s
        num += ends_at <= one.due_at
    return num


@given(queues(max_size=6), st.integers(0, 5))
def test_moore_hodgson_is_the_best_of_all_orders(entries: list[Queued], start_at: int) -> None:
    chosen, late = on_time(entries, start_at)
    assert num_on_time(tuple(chosen), start_at) == len(chosen)
    assert sorted(map(str, chosen + late)) == sorted(map(str, entries))
    most = max(num_on_time(order, start_at) for order in permutations(entries))
    assert len(chosen) == most
    assert [one.due_at for one in chosen] == sorted(one.due_at for one in chosen)
    assert [one.prefill_s for one in late] == sorted(one.prefill_s for one in late)


@given(queues())
def test_moore_hodgson_sends_what_is_planned(entries: list[Queued]) -> None:
    """Sending one and going on when it ends: as many are on time as were planned."""
    entries = [Queued(e.request_id, 0.0, e.due_at, 1, e.prefill_s) for e in entries]
    order = filled("moore_hodgson", entries, max_wait_s=1e9)
    now, num = 0.0, 0
    while (head := order.head(now, 0.0)) is not None:
        order.remove(head.request_id)
        now += head.prefill_s
        num += now <= head.due_at
    assert num >= len(on_time(entries, 0.0)[0])


def test_the_shortest_of_the_hopeless_goes_before_longer_late_ones() -> None:
    entries = [entry("hopeless", 0, 4.0, due=1.0), entry("late", 0, 5.0, due=5.0), entry("good", 0, 2.0, due=5.0)]
    assert drained(filled("moore_hodgson", entries), 0.0) == ["good", "hopeless", "late"]


def test_heaps_do_not_grow_with_what_has_left() -> None:
    for name in NAMES:
        order = make_order(name, 1e9)
        order.add(entry("stays", 0, 1e6))
        for index in range(2000):
            order.add(entry(str(index), float(index), 1.0))
            order.remove(str(index))
        heaps = [order._by_age, getattr(order, "_by_key", None) or order._shortest]  # type: ignore[attr-defined]
        assert all(len(heap._heap) < 100 for heap in heaps)


def test_pairs_of_equal_entries_come_out_alike_in_every_queue() -> None:
    for name in NAMES:
        for one, two in combinations([entry("a"), entry("b"), entry("c")], 2):
            assert drained(filled(name, [one, two]), 0.0) == drained(filled(name, [two, one]), 0.0)
