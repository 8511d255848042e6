from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decode_peak import OutputLengths, peak_tokens
from router.policies.peak_room import PeakRoom
from router.policy import Candidate

REQUESTS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), max_size=8)
LENGTHS = st.lists(st.integers(1, 30), max_size=20)


@given(REQUESTS)
def test_the_peak_is_what_stepping_shows(requests: list[tuple[int, int]]) -> None:
    held_by_step = [
        sum(held + step for held, remaining in requests if step <= remaining) for step in range(21)
    ]  # the last token's KV is still held when it comes
    assert peak_tokens(requests) == max(held_by_step)


def test_one_long_answer_beside_short_ones_peaks_when_the_short_ones_end() -> None:
    assert peak_tokens([(10, 100), (10, 5), (10, 5)]) == max(10 + 100, 3 * 15)
    assert peak_tokens([]) == 0


@given(LENGTHS, st.integers(0, 40), st.integers(1, 40), st.sampled_from([0.0, 0.5, 0.9]), st.integers(1, 10))
def test_the_remainder_is_a_quantile_of_the_longer_of_the_recent(
    lengths: list[int], num_generated: int, limit: int, quantile: float, window: int
) -> None:
    outputs = OutputLengths(window)
    for length in lengths:
        outputs.note(length)
    longer = sorted(length for length in lengths[-window:] if length > num_generated)
    remaining = outputs.remaining(num_generated, limit, quantile)
    assert 1 <= remaining <= limit
    if not longer:
        assert remaining == limit
    elif remaining < limit:
        assert num_generated + remaining in longer
        assert sum(length < num_generated + remaining for length in longer) <= quantile * len(longer)


def test_an_answer_that_has_gone_on_is_expected_to_go_on() -> None:
    outputs = OutputLengths(100)
    for length in (10, 10, 10, 1000):
        outputs.note(length)
    assert outputs.remaining(0, 4096) == 10
    assert outputs.remaining(10, 4096) == 990
    assert outputs.remaining(0, 4) == 4


def test_a_window_must_hold_something() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        OutputLengths(0)


def test_decode_goes_where_room_will_be_left() -> None:
    roomy_now = Candidate("d-0", num_blocks=100, num_free_blocks=60, num_peak_blocks=95)
    roomy_later = Candidate("d-1", num_blocks=100, num_free_blocks=30, num_peak_blocks=75)
    choice = PeakRoom().choose(5, [roomy_now, roomy_later])
    assert choice.worker_id == "d-1"
    assert choice.reason == "most room at its peak: 75 of 100 blocks, 0 requests there"
    tied = Candidate("d-2", num_blocks=100, num_free_blocks=40, num_peak_blocks=75)
    assert PeakRoom().choose(5, [roomy_now, roomy_later, tied]).worker_id == "d-2"
