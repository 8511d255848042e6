"""One step, as the scheduler hands it to the executor, and what comes back."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from protos.types import Logprobs, SamplingParams


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """Compute tokens [num_computed_tokens, num_computed_tokens + num_scheduled_tokens) of one request.

    token_ids and block_table are the request's own lists, lent for the step: the executor reads them and no more."""

    request_id: str
    token_ids: array[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    block_table: list[int]
    sampling_params: SamplingParams
    samples: bool  # the chunk reaches the end of token_ids: sample the next token from its last row


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    step: int
    scheduled: tuple[ScheduledRequest, ...]
    num_batched_tokens: int
    preempted_request_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled tokens by request id, for the requests with samples = True. Usually one each; the simulator's executor,
    which fast-forwards decodes, gives several. Log probabilities likewise, one for each token, where asked for."""

    sampled: dict[str, tuple[int, ...]] = field(default_factory=dict)
    logprobs: dict[str, tuple[Logprobs, ...]] = field(default_factory=dict)
