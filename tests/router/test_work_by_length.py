from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.work_by_length import WorkByLength

LENGTHS = st.lists(st.floats(0.0001, 500), max_size=30)  # far longer ones are not told apart


@given(LENGTHS, st.floats(0.002, 500))
def test_it_knows_what_is_shorter_to_a_fifth(lengths_s: list[float], length_s: float) -> None:
    work = WorkByLength()
    for one in lengths_s:
        work.add(one)
    surely = sum(one for one in lengths_s if one < length_s / 1.2)
    perhaps = sum(one for one in lengths_s if one < length_s * 1.2)
    assert surely - 1e-4 <= work.shorter_s(length_s) <= perhaps + 1e-4


@given(LENGTHS)
def test_what_has_left_leaves_nothing_behind(lengths_s: list[float]) -> None:
    work = WorkByLength()
    for one in lengths_s:
        work.add(one)
    assert abs(work.total_s - sum(lengths_s)) < 1e-4
    for one in reversed(lengths_s):
        work.remove(one)
    assert (work.total_us, work.shorter_s(1e6)) == (0, 0)
