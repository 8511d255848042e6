from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.queue_order import Queued, make_order
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
        assert abs(queue.work_s - sum(one.prefill_s for one in there.values())) < 1e-6
        assert there or queue.work_s == 0
    assert queue.remove("nobody") is None
