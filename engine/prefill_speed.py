"""What prefill costs on this worker, measured from its own steps."""

from __future__ import annotations

from engine.scheduler_output import SchedulerOutput

# A step with fewer prefill tokens says more about decoding than about prefill.
MIN_PREFILL_TOKENS_TO_MEASURE = 16
# Weight of the newest step in the moving average: it follows a change of load within about ten steps.
NEWEST_STEP_WEIGHT = 0.2


class PrefillSpeed:
    """Invariant: s_per_token is 0 until the first step that says something about prefill, and positive ever after."""

    def __init__(self) -> None:
        self.s_per_token = 0.0

    def note_step(self, output: SchedulerOutput, duration_s: float) -> None:
        chunks = [each.num_scheduled_tokens for each in output.scheduled if each.num_scheduled_tokens > 1]
        if sum(chunks) < MIN_PREFILL_TOKENS_TO_MEASURE:
            return
        s_per_token = duration_s / output.num_batched_tokens
        old = self.s_per_token or s_per_token
        self.s_per_token = old + NEWEST_STEP_WEIGHT * (s_per_token - old)
