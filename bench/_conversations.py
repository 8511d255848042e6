"""Conversations that begin alike: a few documents that they are about, and many sessions, some of both much more often
than others. Decides who says what next; sends nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

VOCAB_SIZE = 256  # bytes; the demo model has special tokens above


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens."""

    num_documents: int
    document_len: int
    num_sessions: int  # going on at once; one that ends makes way for a new one
    question_len: int
    max_turns: int
    renew_after: int = 0  # turns, after which the first document is forgotten and a new one comes last; 0: never
    skew: float = 1.0  # of both choices: the n-th is taken as often as 1 / n ** skew says


@dataclass(eq=False)
class Session:
    tokens: list[int]  # said so far, the document included
    num_turns: int = 0
    is_waiting: bool = False  # for an answer


@dataclass
class Conversations:
    """Invariant: num_sessions sessions, none of which has had more than max_turns turns."""

    shape: Shape
    rng: random.Random
    sessions: list[Session] = field(default_factory=list)
    num_turns: int = 0

    def __post_init__(self) -> None:
        self._documents = [self._words(self.shape.document_len) for _ in range(self.shape.num_documents)]
        self.sessions = [self._new() for _ in range(self.shape.num_sessions)]

    def next_turn(self) -> Session:
        """The next session that asks, its question already among its tokens. A person who waits asks nothing: the next
        in line does, or a new session in place of the last."""
        self._renew()
        drawn = self._zipf(len(self.sessions))
        order = [*range(drawn, len(self.sessions)), *range(drawn)]
        place = next((place for place in order if not self.sessions[place].is_waiting), len(self.sessions) - 1)
        if self.sessions[place].is_waiting or self.sessions[place].num_turns == self.shape.max_turns:
            self.sessions[place] = self._new()
        session = self.sessions[place]
        session.tokens += self._words(self.shape.question_len)
        session.num_turns += 1
        session.is_waiting = True
        return session

    def answered(self, session: Session, token_ids: Sequence[int]) -> None:
        session.tokens += token_ids
        session.is_waiting = False

    def _renew(self) -> None:
        self.num_turns += 1
        if self.shape.renew_after and self.num_turns % self.shape.renew_after == 0:
            self._documents = [*self._documents[1:], self._words(self.shape.document_len)]

    def _new(self) -> Session:
        return Session(list(self._documents[self._zipf(len(self._documents))]))

    def _words(self, num_tokens: int) -> list[int]:
        return self.rng.choices(range(VOCAB_SIZE), k=num_tokens)

    def _zipf(self, num: int) -> int:
        return self.rng.choices(range(num), [1 / (place + 1) ** self.shape.skew for place in range(num)])[0]
