"""Conversations that begin alike: a few system prompts and many sessions, some of both much more often than others.
Decides who says what next; sends nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

VOCAB_SIZE = 256  # bytes; the demo model has special tokens above
NUM_SYSTEM_PROMPTS = 8
SYSTEM_LEN = 768
NUM_SESSIONS = 32  # going on at once; one that ends makes way for a new one
QUESTION_LEN = 40
MAX_TURNS = 12
SKEW = 1.0  # of both choices: the n-th is taken as often as 1 / n ** SKEW says


@dataclass(eq=False)
class Session:
    tokens: list[int]  # said so far, the system prompt included
    num_turns: int = 0
    is_waiting: bool = False  # for an answer


@dataclass
class Conversations:
    """Invariant: NUM_SESSIONS sessions, none of which has had more than MAX_TURNS turns."""

    rng: random.Random
    sessions: list[Session] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._systems = [self._words(SYSTEM_LEN) for _ in range(NUM_SYSTEM_PROMPTS)]
        self.sessions = [self._new() for _ in range(NUM_SESSIONS)]

    def next_turn(self) -> Session:
        """The next session that asks, its question already among its tokens. A person who waits asks nothing: the next
        in line does, or a new session in place of the last."""
        drawn = _zipf(self.rng, len(self.sessions))
        order = [*range(drawn, len(self.sessions)), *range(drawn)]
        place = next((place for place in order if not self.sessions[place].is_waiting), len(self.sessions) - 1)
        if self.sessions[place].is_waiting or self.sessions[place].num_turns == MAX_TURNS:
            self.sessions[place] = self._new()
        session = self.sessions[place]
        session.tokens += self._words(QUESTION_LEN)
        session.num_turns += 1
        session.is_waiting = True
        return session

    def answered(self, session: Session, token_ids: Sequence[int]) -> None:
        session.tokens += token_ids
        session.is_waiting = False

    def _new(self) -> Session:
        return Session(list(self._systems[_zipf(self.rng, NUM_SYSTEM_PROMPTS)]))

    def _words(self, num_tokens: int) -> list[int]:
        return self.rng.choices(range(VOCAB_SIZE), k=num_tokens)


def _zipf(rng: random.Random, num: int) -> int:
    return rng.choices(range(num), [1 / (place + 1) ** SKEW for place in range(num)])[0]
