"""Who says what next in the conversations of live benchmarks."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from bench._conversations import Conversations, Session, Shape

SHAPE = Shape(num_documents=3, document_len=20, num_sessions=4, question_len=2, max_turns=3)


def talk_of(shape: Shape, seed: int = 1) -> Conversations:
    return Conversations(shape, random.Random(seed))


@given(seed=st.integers(0, 1000), answered=st.lists(st.booleans(), max_size=60))
def test_whoever_waits_asks_nothing_and_no_session_goes_on_for_ever(seed: int, answered: list[bool]) -> None:
    talk, waiting = talk_of(SHAPE, seed), list[Session]()
    for is_answered in answered:
        session = talk.next_turn()
        assert session not in waiting
        assert session.num_turns <= SHAPE.max_turns and len(talk.sessions) == SHAPE.num_sessions
        waiting.append(session)
        if is_answered:
            talk.answered(waiting.pop(0), [7])


def test_a_turn_is_what_was_said_before_and_a_question() -> None:
    talk = talk_of(Shape(1, 20, 1, 2, 3))
    first = talk.next_turn()
    said = list(first.tokens)
    talk.answered(first, [7, 8])
    assert talk.next_turn().tokens[:-2] == [*said, 7, 8]
    assert len(said) == 22


def test_equal_seeds_ask_alike() -> None:
    first, second = talk_of(SHAPE), talk_of(SHAPE)
    assert [first.next_turn().tokens for _ in range(20)] == [second.next_turn().tokens for _ in range(20)]


def test_documents_go_as_time_goes_by() -> None:
    shape = Shape(num_documents=2, document_len=20, num_sessions=1, question_len=1, max_turns=1, renew_after=5)
    talk = talk_of(shape)
    asked = [tuple(talk.next_turn().tokens[:20]) for _ in range(40)]
    for document in set(asked):
        turns = [turn for turn, each in enumerate(asked) if each == document]
        assert turns[-1] - turns[0] <= 2 * shape.renew_after, "no longer than both places of a document last"
    assert len(set(asked)) > 4
