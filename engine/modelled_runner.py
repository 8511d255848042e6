"""Stands in for a model, for load tests of what is around it: a step computes nothing, lasts as long as the cost model
says, and repeats the prompt."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from engine.scheduler_output import ScheduledRequest, SchedulerOutput, StepResult
from engine.step_work import work_of
from protos.cost_model import CostModel
from protos.types import Logprobs

# KV of this shape moves like any other and takes next to no memory: 16 bytes a token in float32.
NUM_LAYERS = NUM_KV_HEADS = 1
HEAD_DIM = 2


class ModelledRunner:
    """Same calls as ModelRunner. The same request gets the same tokens on every worker, and never ends of itself."""

    def __init__(self, cost: CostModel, sleep: Callable[[float], None]) -> None:
        self._cost = cost
        self._sleep = sleep

    def execute(self, output: SchedulerOutput) -> StepResult:
        self._sleep(work_of(output.scheduled).step_s(self._cost))
        sampling = [each for each in output.scheduled if each.samples]
        sampled: dict[str, tuple[int, ...]] = {each.request_id: (next_token(each),) for each in sampling}
        asked = [each.request_id for each in sampling if each.sampling_params.num_logprobs is not None]
        return StepResult(sampled, {request_id: (Logprobs(0.0),) for request_id in asked})


def next_token(scheduled: ScheduledRequest) -> int:
    """Output token i is token i of the prompt, over and over; in the place of a stop token, one that is none."""
    index = len(scheduled.token_ids) - scheduled.num_prompt_tokens
    token_id, stops = scheduled.token_ids[index % scheduled.num_prompt_tokens], scheduled.sampling_params.stop_token_ids
    return token_id if token_id not in stops else next(other for other in count() if other not in stops)
