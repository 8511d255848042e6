"""One generation over as many connections as it takes: puts its output together, and decides whether and when a lost
call is made again, behind the last token that came. Knows values and instants; the clients send and sleep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.client_types import Call, CallFailed, Chunk, Completion, RetryPolicy
from protos.types import Logprobs


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    is_complete: bool = False


class Generation:
    """Invariant: of every choice, what has been given out is its output's beginning, each index once."""

    def __init__(self, call: Call, policy: RetryPolicy, draw: Callable[[], float]) -> None:
        """`draw` gives random values in [0, 1): clients that failed together must not come back together. The call
        names its seed, so that what is resumed goes on in the same random stream."""
        assert call.sampling.seed is not None
        self._call = call
        self._policy = policy
        self._draw = draw
        self._choices = [_Choice() for _ in range(max(1, call.sampling.n))]
        self._num_failures = 0  # since the last token
        self._failing_since = 0.0
        self._is_resent = False
        self._num_resumes = 0

    @property
    def is_done(self) -> bool:
        return all(choice.is_complete for choice in self._choices)

    def call(self) -> Call:
        """What to send now."""
        return replace(self._call, output_token_ids=tuple(self._choices[0].token_ids) if self._is_resumable else ())

    def take(self, chunk: Chunk) -> Chunk:
        """The chunk as the user sees it: a last one with the whole completion."""
        choice = self._choices[chunk.choice_index]
        if chunk.first_index != len(choice.token_ids):
            message = f"tokens from index {chunk.first_index} on came where {len(choice.token_ids)} was due"
            raise CallFailed("INTERNAL", message)
        self._num_failures = 0
        choice.token_ids += chunk.token_ids
        choice.texts.append(chunk.text)
        choice.logprobs += chunk.logprobs
        if chunk.completion is None:
            return chunk
        choice.is_complete = True
        return replace(chunk, completion=self._whole(choice, chunk.completion))

    def retry_wait_s(self, failure: CallFailed, now: float, deadline_at: float) -> float:
        """How long to wait before call() is sent again; raises the failure where it is final."""
        self._num_failures += 1
        if self._num_failures == 1:
            self._failing_since = now
        wait_s = failure.pushback_s if failure.pushback_s is not None else self._backoff_s()
        back_at = now + wait_s
        is_late = back_at > self._failing_since + self._policy.give_up_after_s or back_at >= deadline_at
        if is_late or not self._may_retry(failure):
            raise failure
        self._is_resent = True
        self._num_resumes += self._has_output
        return wait_s

    @property
    def _has_output(self) -> bool:
        return any(choice.token_ids for choice in self._choices)

    @property
    def _is_resumable(self) -> bool:
        return len(self._choices) == 1

    def _may_retry(self, failure: CallFailed) -> bool:
        if self._has_output and not self._is_resumable:
            return False
        match failure.code:
            case "UNAVAILABLE":
                return failure.pushback_s is None or failure.pushback_s >= 0
            case "RESOURCE_EXHAUSTED":  # without a pushback it is the request itself that is too much
                return failure.pushback_s is not None and failure.pushback_s >= 0
            case "ALREADY_EXISTS":  # the server has not noticed yet that the lost call is lost
                return self._is_resent
        return False

    def _backoff_s(self) -> float:
        wait_s = min(self._policy.max_wait_s, self._policy.initial_wait_s * 2.0 ** min(self._num_failures - 1, 30))
        return wait_s * (0.5 + self._draw() / 2)

    def _whole(self, choice: _Choice, last: Completion) -> Completion:
        return replace(
            last,
            text="".join(choice.texts),
            token_ids=tuple(choice.token_ids),
            logprobs=tuple(choice.logprobs),
            num_resumes=self._num_resumes,
        )
