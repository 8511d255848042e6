from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.rebalance import Elsewhere, Movable, moves


def movable(name: str, work: float, slack: float, *elsewhere: tuple[str, float, float]) -> Movable:
    return Movable(name, slack, work, tuple(Elsewhere(*there) for there in elsewhere))


def ids(queue: list[Movable], start_s: float = 0.0) -> list[tuple[str, str]]:
    return [(move.request_id, move.worker_id) for move in moves(queue, start_s)]


def test_nothing_moves_while_the_slo_is_met() -> None:
    queue = [movable("a", 2, 5, ("j", 0, 2)), movable("b", 2, 5, ("j", 0, 2))]
    assert ids(queue, 1.0) == []
    assert ids(queue, 1.1) != []


def test_the_largest_benefit_moves_first_until_the_rest_meets_it() -> None:
    queue = [
        movable("a", 2, 5, ("j", 0, 2)),
        movable("b", 2, 5, ("j", 0, 2)),
        movable("c", 2, 5, ("j", 0, 3)),  # here 6 s, there 3 s
        movable("d", 2, 5, ("j", 0, 4.5)),  # here 8 s, there 4.5 s: the largest
    ]
    # After d, c is still late here, and j is full: c needs 4.5 + 3 s there. a and b gain nothing there any more.
    assert ids(queue) == [("d", "j")]
    assert ids([*queue[:3], movable("d", 2, 5, ("k", 0, 4.5))]) == [("d", "k"), ("c", "j")]


def test_a_candidate_that_would_miss_the_slo_takes_nothing() -> None:
    assert ids([movable("a", 9, 5, ("j", 5, 0.1)), movable("b", 2, 9, ("j", 8.9, 0.2))]) == []


def test_the_better_of_two_other_candidates_is_taken() -> None:
    assert ids([movable("a", 4, 5, ("j", 2, 2), ("k", 2, 1))], 3.0) == [("a", "k")]


def test_the_hopeless_set_nothing_in_motion() -> None:
    late = movable("late", 1, -3, ("j", 0, 1))
    fine = movable("fine", 1, 5, ("j", 0, 1))
    assert ids([late, fine], 2.0) == []


works = st.integers(1, 6).map(float)
there = st.tuples(st.sampled_from("jk"), st.integers(0, 8).map(float), works)


@given(st.lists(st.tuples(works, st.integers(-2, 12), st.lists(there, max_size=2)), max_size=8), st.integers(0, 4))
def test_every_move_is_a_gain_that_meets_the_slo(
    drawn: list[tuple[float, int, list[tuple[str, float, float]]]], start_s: int
) -> None:
    backlog = {"j": 1.0, "k": 3.0}
    queue = [
        movable(f"r{i}", work, slack, *((j, backlog[j], w) for j, (_, _, w) in {t[0]: t for t in others}.items()))
        for i, (work, slack, others) in enumerate(drawn)
    ]
    found = moves(queue, start_s)
    assert len({move.request_id for move in found}) == len(found), "one round"
    by_id = {one.request_id: one for one in queue}
    for move in found:
        one = by_id[move.request_id]
        (target,) = [other for other in one.elsewhere if other.worker_id == move.worker_id]
        assert move.there_s == backlog[move.worker_id] + target.prefill_s
        assert move.there_s < move.here_s
        assert move.there_s <= one.slack_s
        backlog[move.worker_id] += target.prefill_s
