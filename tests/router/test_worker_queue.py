from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.queue_order import Queued, QueueOrderName, make_order
from router.worker_queue import WorkerQueue


def make_queue(dispatch_tokens: int, changes: list[int] | None = None) -> WorkerQueue:
    changes = [] if changes is None else changes
    return WorkerQueue(make_order("first_come", 30.0), dispatch_tokens, lambda: changes.append(1))


def entry(request_id: str, num_tokens: int, prefill_s: float = 0.1) -> Queued:
    return Queued(request_id, 0.0, 5.0, num_tokens, prefill_s)


def test_credit_is_what_is_sent_and_not_yet_prefilled() -> None:
    queue = make_queue(100)
    queue.put(entry("a", 500))
    assert queue.head(0.0, 100, 0.0) is None
    head = queue.head(0.0, 99, 0.0)  # one may overdraw it
    assert head is not None
    assert head.request_id == "a"


def test_without_a_limit_there_is_always_credit() -> None:
    assert make_queue(0).has_credit(10**9)
    assert not make_queue(1).has_credit(1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 1000), st.floats(0, 5))))
def test_the_sums_are_those_of_the_entries(changes: list[tuple[int, int, float]]) -> None:
    """Those that come while they are there go instead."""
    told: list[int] = []
    queue, there = make_queue(1, told), dict[str, Queued]()
    for name, num_tokens, prefill_s in changes:
        before = len(told)
        if str(name) in there:
            assert queue.remove(str(name)) is there.pop(str(name))
        else:
            there[str(name)] = entry(str(name), num_tokens, prefill_s)
            queue.put(there[str(name)])
        assert len(told) == before + 1
        assert len(queue) == len(there)
        assert queue.num_tokens == sum(one.num_tokens for one in there.values())
        assert abs(queue.work_s - sum(one.prefill_s for one in there.values())) < 1e-5  # whole microseconds each
        assert there or queue.work_s == 0
    assert queue.remove("nobody") is None


def test_what_goes_before_a_request_is_by_the_order() -> None:
    expected: tuple[tuple[QueueOrderName, float], ...]
    expected = (("first_come", 3.3), ("cached_first", 3.3), ("shortest_remaining", 0.3))
    for order, before_s in expected:
        queue = WorkerQueue(make_order(order, 30.0), 1, lambda: None)
        for request_id, prefill_s in (("a", 0.1), ("b", 0.2), ("c", 3.0)):
            queue.put(entry(request_id, 1, prefill_s))
        assert abs(queue.work_before_s(1.0) - before_s) < 1e-6, order
    queue = WorkerQueue(make_order("moore_hodgson", 30.0), 1, lambda: None)
    queue.put(entry("long", 1, 3.0))
    assert queue.work_before_s(1.0) == 0
    assert queue.work_s == 3.0
