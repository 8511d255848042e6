from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protos.types import FinishReason, Logprobs
from router.commit_log import CommitLog

STOP = FinishReason.STOP


def test_takes_tokens_at_its_end() -> None:
    log = CommitLog(100)
    assert log.take(0, (5,)).token_ids == (5,)
    assert log.take(1, (6, 7)).token_ids == (6, 7)
    assert list(log.token_ids) == [5, 6, 7]
    assert not log.is_complete


def test_an_equal_duplicate_is_ignored_and_may_bring_more() -> None:
    log = CommitLog(100)
    log.take(0, (5, 6))
    assert log.take(0, (5, 6)) == log.take(1, (6,)) == type(log.take(0, ()))(())
    assert log.take(1, (6, 7)).token_ids == (7,)


def test_an_unequal_duplicate_is_a_conflict_and_changes_nothing() -> None:
    log = CommitLog(100)
    log.take(0, (5, 6))
    taken = log.take(1, (9, 8))
    assert taken.token_ids == ()
    assert taken.conflict == "token 9 at index 1, where 6 is committed"
    assert list(log.token_ids) == [5, 6]


def test_tokens_ahead_of_a_gap_wait() -> None:
    log = CommitLog(100)
    assert log.take(2, (7,), STOP).token_ids == ()
    assert log.take(1, (6,)).token_ids == ()
    assert not log.is_complete
    assert log.take(0, (5,)).token_ids == (5, 6, 7)
    assert log.is_complete
    assert log.finish_reason is STOP


def test_the_wait_is_bounded() -> None:
    log = CommitLog(3)
    assert not log.take(2, (1, 2, 3)).conflict
    assert "more than 3 tokens" in log.take(5, (1,)).conflict


def test_tokens_that_fit_before_a_conflict_behind_the_gap_are_kept() -> None:
    log = CommitLog(100)
    log.take(1, (6, 9))
    log.take(2, (7,))
    taken = log.take(0, (5,))
    assert taken.token_ids == (5, 6, 9)
    assert taken.conflict


def test_nothing_may_come_after_the_end() -> None:
    log = CommitLog(100)
    log.take(1, (6,), STOP)
    assert log.take(2, (7,)).conflict
    assert log.take(0, (5,)).token_ids == (5, 6)
    other = CommitLog(100)
    other.take(3, (7,))
    assert other.take(0, (5,), STOP).conflict


def test_a_new_attempt_forgets_what_only_the_old_one_said() -> None:
    log = CommitLog(100)
    log.take(0, (5,))
    log.take(2, (9,), STOP)
    log.start_over()
    assert log.take(1, (6, 7)).token_ids == (6, 7)
    assert not log.is_complete


@given(st.data(), st.lists(st.integers(0, 99), min_size=1, max_size=20))
def test_any_order_with_duplicates_gives_every_token_once_in_order(data: st.DataObject, tokens: list[int]) -> None:
    cuts = data.draw(st.lists(st.tuples(st.integers(0, len(tokens) - 1), st.integers(1, 5)), max_size=15))
    singles = [(index, 1) for index in range(len(tokens))]
    reports = data.draw(st.permutations([*cuts, *singles]))
    log, seen = CommitLog(1000), []
    for index, length in reports:
        piece = tuple(tokens[index : index + length])
        finish = STOP if index + len(piece) == len(tokens) else None
        taken = log.take(index, piece, finish)
        assert not taken.conflict
        seen += taken.token_ids
    assert seen == tokens
    assert log.is_complete


def test_logprobs_stay_with_their_tokens_whatever_comes_twice_or_early() -> None:
    one, two, three, other = (Logprobs(-float(each)) for each in (1, 2, 3, 9))
    log = CommitLog(100)
    assert log.take(0, (5,), logprobs=(one,)).logprobs == (one,)
    assert log.take(2, (7,), logprobs=(three,)).logprobs == ()
    assert log.take(0, (5, 6), logprobs=(other, two)).logprobs == (two, three)
    assert log.take(1, (6,), logprobs=(other,)).logprobs == ()


def test_what_the_caller_has_is_the_beginning_of_the_log() -> None:
    log = CommitLog(100, [5, 6])
    assert log.take(0, (5, 6, 7)).token_ids == (7,)
    assert log.num_given_tokens == 2
    assert CommitLog(100, [5, 6]).take(1, (9,)).conflict
